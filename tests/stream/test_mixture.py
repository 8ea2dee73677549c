import pytest

from mmtrain.stream.mixture import ONE, draw, neediest, quotas, share_at


def test_every_source_gets_its_share_of_the_tokens():
    quota, credit, drawn = quotas({"a": 3.0, "b": 1.0}), {"a": 0, "b": 0}, {"a": 0, "b": 0}
    for number in range(1000):
        name = neediest(quota, credit)
        length = 10 + number % 7 if name == "a" else 40
        draw(quota, credit, name, length)
        drawn[name] += length
        assert sum(credit.values()) == 0
    assert drawn["a"] == pytest.approx(3 * drawn["b"], abs=3 * 40)


def test_quotas_add_up_and_a_source_without_a_share_is_never_drawn():
    quota = quotas({"none": 0.0, "a": 1.0, "b": 1.0, "c": 1.0})
    assert sum(quota.values()) == ONE and quota["none"] == 0
    assert neediest(quota, {"none": 5, "a": -5, "b": -7, "c": -6}) == "a"


@pytest.mark.parametrize(("step", "share"), [(0, 3.0), (500, 2.0), (1000, 1.0), (9999, 1.0)])
def test_shares_are_linear_between_the_steps_of_a_schedule(step, share):
    assert share_at({1000: 1.0, 0: 3.0}, step) == share
