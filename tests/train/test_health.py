import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmtrain.config.schema import HealthConfig
from mmtrain.train import health as module
from mmtrain.train.health import Health, Skips, SpikeDetector, Verdict

CPU = torch.device("cpu")


def losses(count: int, seed: int = 0, mean: float = 2.5, deviation: float = 0.05) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    return (mean + deviation * torch.randn(count, generator=generator)).tolist()


def judge(detector: SpikeDetector, values: list[float]) -> list[bool]:
    """Which are spikes; the factor agrees."""
    found = []
    for value in values:
        factor = detector.judge(torch.tensor(value))
        found.append(bool(detector.is_spike))
        assert factor.dtype == torch.float32 and math.isnan(factor) == found[-1] and (found[-1] or factor == 1)
    return found


def test_a_spike_is_so_many_deviations_above_the_window() -> None:
    values = losses(300)
    last = torch.tensor(values[-128:], dtype=torch.float64)
    limit = float(last.mean() + 6 * last.std())
    for value, is_spike in ((limit - 1e-5, False), (limit + 1e-5, True), (0.1, False)):
        detector = SpikeDetector(128, 6.0, CPU)
        assert not any(judge(detector, values))
        assert judge(detector, [value]) == [is_spike]


def test_nothing_is_a_spike_before_half_of_the_window() -> None:
    for before, is_spike in ((63, False), (64, True)):
        assert judge(SpikeDetector(128, 6.0, CPU), [*losses(before), 9.0])[-1] is is_spike
    assert judge(SpikeDetector(8, 6.0, CPU), [*losses(8), 9.0])[-1]


def test_spikes_and_what_is_not_finite_do_not_enter_the_window() -> None:
    detector, plain = SpikeDetector(32, 6.0, CPU), SpikeDetector(32, 6.0, CPU)
    values = losses(40)
    judge(plain, values)
    bad = [9.0, math.nan, math.inf, -math.inf, 9.0]
    assert judge(detector, values) == [False] * 40
    assert judge(detector, bad) == [True, False, False, False, True]
    judge(detector, values[:1])
    judge(plain, values[:1])
    assert detector.state() == plain.state()


def test_a_flat_loss_does_not_make_its_noise_a_spike() -> None:
    detector = SpikeDetector(32, 6.0, CPU)
    assert judge(detector, [2.5] * 40 + [2.5 + 1e-6, 2.52, 2.5]) == [False] * 43
    assert judge(detector, [2.6]) == [True]


def test_a_level_that_stays_is_accepted_after_half_a_window() -> None:
    detector = SpikeDetector(64, 6.0, CPU)
    judge(detector, losses(100))
    found = judge(detector, losses(100, mean=5.0))
    assert found[:32] == [True] * 32 and not any(found[40:])
    assert judge(detector, [50.0]) == [True]


@pytest.mark.parametrize("first", [0, 5, 32, 77])
def test_a_detector_goes_on_bit_for_bit(first: int) -> None:
    values = [*losses(60), 9.0, *losses(60, seed=1)]
    straight, before, after = (SpikeDetector(32, 6.0, CPU) for _ in range(3))
    judge(straight, values)
    judge(before, values[:first])
    after.load(json.loads(json.dumps(before.state())))
    judge(after, values[first:])
    assert after.state() == straight.state() and torch.equal(after._ring, straight._ring)


@pytest.mark.parametrize("window", [16, 64])
def test_another_window_goes_on_from_the_last_losses(window: int) -> None:
    values = losses(50)
    old, new = SpikeDetector(32, 6.0, CPU), SpikeDetector(window, 6.0, CPU)
    judge(old, values)
    new.load(old.state())
    judge(new, values[:3])
    last = torch.tensor(([*values, *values[:3]])[-window if window == 16 else -35 :]).double()
    assert new.state()["losses"] == last.tolist()


def observe(health: Health, rows: list[tuple[float, float | None, bool]], first: int = 1) -> list[Verdict]:
    """Verdicts of steps `first`, ...; rows: loss, norm, is_spike."""
    verdicts = []
    for step, (loss, norm, is_spike) in enumerate(rows, first):
        tensor = None if norm is None else torch.tensor(norm)
        health.observe(step, torch.tensor(loss), tensor, torch.tensor(is_spike))
        verdicts.append(health.verdict())
    return verdicts


def new_health(**settings: Any) -> Health:
    return Health(HealthConfig(**settings), CPU)


GOOD = (2.5, 1.0, False)


@pytest.mark.parametrize("bad", [(math.nan, 1.0, False), (2.5, math.inf, False), (math.nan, None, False)])
def test_an_update_that_is_not_finite_is_counted_and_told_once(bad: tuple[float, float | None, bool]) -> None:
    verdicts = observe(new_health(), [GOOD, bad, bad, GOOD, (2.5, None, False)])
    assert [(v.skipped_total, v.skipped_in_a_row) for v in verdicts] == [(0, 0), (1, 1), (2, 2), (2, 0), (2, 0)]
    what = "loss" if math.isnan(bad[0]) else "gradient"
    assert [v.sentences for v in verdicts] == [
        (),
        (f"step 2: the update is skipped, its {what} is not finite",),
        (),
        ("step 4: the first update after 2 that were skipped",),
        (),
    ]
    assert not any(v.stop or v.rollback for v in verdicts)


def test_too_many_in_a_row_stop_the_run() -> None:
    bad = [(math.nan, math.nan, False), (2.5, math.nan, False), (2.5, math.inf, False)]
    verdicts = observe(new_health(max_skipped=3), [*bad[:2], GOOD, *bad], first=11)
    assert [v.stop is None for v in verdicts] == [True] * 5 + [False]
    assert verdicts[-1].stop is not None
    for words in ("3 updates in a row", "steps 14 to 16", "1 because the loss", "2 because the gradient",
                  "still those of step 13", "optim.lr", "health.max_skipped"):  # fmt: skip
        assert words in verdicts[-1].stop


@pytest.mark.parametrize(("policy", "skipped", "rollback"), [("log", 0, None), ("skip", 2, None), ("rollback", 0, 3)])
def test_a_spike_does_what_its_policy_says(policy: str, skipped: int, rollback: int | None) -> None:
    health = new_health(spike=policy)
    norm = None if policy == "skip" else 1.0  # a skipped update has no norm that all engines tell
    *_, first, second, last = observe(health, [GOOD, GOOD, (9.0, norm, True), (8.0, norm, True), GOOD])
    left_out = "; its update is left out" if policy == "skip" else ""
    assert first.sentences == (f"step 3: the loss is 9 after 2.5, a spike{left_out}",)
    assert second.sentences == () and first.rollback == rollback
    assert (last.spikes_total, last.skipped_total, last.rollback) == (2, skipped, None)
    assert health.row() == {"skipped_updates": skipped, "spikes": 2, "spike_score": 2 / 5, "rollbacks": 0}


def test_the_spike_score_is_of_the_last_thousand_steps() -> None:
    health = new_health()
    observe(health, [(9.0, 1.0, True)] * 3 + [GOOD] * 998)
    assert health.row()["spike_score"] == 2 / 1000  # the first has left
    observe(health, [GOOD] * 10, first=1002)
    assert health.row()["spike_score"] == 0 and health.row()["spikes"] == 3


def test_a_spike_after_the_last_roll_back_stops_the_run() -> None:
    health = new_health(spike="rollback", max_rollbacks=2)
    for _ in range(2):
        (verdict,) = observe(health, [(9.0, 1.0, True)], first=20)
        assert verdict.rollback == 20 and verdict.stop is None
        health.skips = health.skips.back(10, 20)
    (verdict,) = observe(health, [(9.0, 1.0, True)], first=20)
    assert verdict.rollback is None and verdict.stop and "batches 10-19, 20-29" in verdict.stop


def test_health_goes_on_as_it_was() -> None:
    rows = [GOOD, (9.0, 1.0, True), (math.nan, None, False), (2.5, math.inf, False), (9.0, math.nan, True), GOOD, GOOD]
    straight, before, after = (new_health(max_skipped=2) for _ in range(3))
    before.skips = straight.skips = Skips().back(3, 5)
    expected = observe(straight, rows)
    found = observe(before, rows[:3])
    after.load(json.loads(json.dumps(before.state(), allow_nan=False)))
    assert [*found, *observe(after, rows[3:], first=4)] == expected
    assert after.state() == straight.state() and after.row() == straight.row()


def test_on_cuda_a_step_is_read_while_the_next_one_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[int] = []
    event = SimpleNamespace(record=lambda: None, synchronize=lambda: waits.append(1))
    monkeypatch.setattr(module.torch.cuda, "Event", lambda blocking: event)
    rows = [GOOD, (math.nan, math.inf, False), (2.5, None, False), (9.0, 1.0, True), GOOD]
    late = Health(HealthConfig(), torch.device("cuda"))
    expected, verdicts = observe(new_health(), rows), observe(late, rows)
    assert [v.skipped_total for v in verdicts] == [0, *(v.skipped_total for v in expected[:-1])]
    assert [v.sentences for v in verdicts[1:]] == [v.sentences for v in expected[:-1]]
    assert len(waits) == len(rows) - 1
    late.settle()
    assert late.verdict() == expected[-1]
    late.observe(6, torch.tensor(math.nan), 1.0, torch.tensor(False))  # a norm that the engine tells on the host
    assert late.state()["tally"]["skipped"] == 2


@pytest.mark.gpu
def test_on_a_device_verdicts_are_those_of_the_cpu() -> None:
    values = [*losses(70), 9.0, math.nan, *losses(10)]

    def verdicts(device: torch.device) -> list[tuple[int, int]]:
        detector, health = SpikeDetector(64, 6.0, device), Health(HealthConfig(spike="skip"), device)
        found = []
        for step, value in enumerate(values, 1):
            loss = torch.tensor(value, device=device)
            health.observe(step, loss, loss * detector.judge(loss), detector.is_spike)
            health.settle()
            verdict = health.verdict()
            found.append((verdict.skipped_total, verdict.spikes_total))
        return found

    assert verdicts(torch.device("cuda")) == verdicts(CPU)


def test_batches_of_a_roll_back_are_left_out() -> None:
    skips = Skips().back(checkpoint=100, spike=130)  # the updates to 101 ... 130 saw the batches 100 ... 129
    assert [skips.batch_index(step) for step in (0, 99, 100, 101)] == [0, 99, 130, 131]
    again = skips.back(checkpoint=120, spike=121)
    assert again.windows == ((100, 129), (150, 150)) and again.batch_index(120) == 151
    before = again.back(checkpoint=50, spike=125)  # lands before both
    assert before.windows == ((50, again.batch_index(124)),) and before.rollbacks == 3
    with pytest.raises(ValueError, match="step 7 is not before the spike at step 7"):
        skips.back(7, 7)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 30)), max_size=6))
def test_roll_backs_in_any_order_leave_out_what_was_seen_since_the_checkpoint(rolls: list[tuple[int, int]]) -> None:
    skips = Skips()
    for checkpoint, length in rolls:
        spike = checkpoint + length
        after = Skips.of(json.loads(json.dumps(skips.back(checkpoint, spike).state())))
        assert all(after.batch_index(step) == skips.batch_index(step) for step in range(checkpoint))
        assert all(after.batch_index(checkpoint + i) == skips.batch_index(spike + i) for i in range(200))
        skips = after
    assert skips.rollbacks == len(rolls)
