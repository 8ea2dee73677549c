import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from mmtrain.train import sections as module
from mmtrain.train.sections import Sections, Straggler, stragglers

CPU = torch.device("cpu")


def test_seconds_add_up_by_section_and_start_anew_when_taken() -> None:
    entered: list[str] = []
    sections = Sections(CPU, entered.append)
    for _ in range(2):
        with sections("data"):
            time.sleep(0.02)
        with sections("forward"):
            pass
    taken = sections.take()
    assert 0.04 <= taken["data"] < 0.2 and 0 <= taken["forward"] < 0.02
    assert entered == ["data", "forward"] * 2
    assert sections.take() == {}


def test_a_section_that_raises_is_measured_and_over() -> None:
    sections = Sections(CPU)
    with pytest.raises(ValueError), sections("data"):
        raise ValueError
    with sections("forward"), pytest.raises(RuntimeError, match="step begins inside section forward"):
        sections("step")
    assert sections.take().keys() == {"data", "forward"}


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands for a CUDA stream on which every event takes one second, up to the event number `passed`."""
    stream = SimpleNamespace(events=0, recorded=0, passed=0)

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing
            stream.events += 1

        def record(self) -> None:
            stream.recorded += 1
            self.number = stream.recorded

        def query(self) -> bool:
            return self.number <= stream.passed

        def elapsed_time(self, end: "Event") -> float:
            assert end.query()
            return 1000.0 * (end.number - self.number)

    monkeypatch.setattr(module.torch.cuda, "Event", Event)
    return stream


def test_on_cuda_only_what_the_device_has_finished_is_taken(device: SimpleNamespace) -> None:
    sections = Sections(torch.device("cuda"))
    for name in ("data", "forward", "backward", "backward"):
        with sections(name):
            pass
    device.passed = 5  # the end of the second backward pass is event 6
    first = sections.take()
    assert first.pop("data") < 0.5 and first == {"forward": 1.0, "backward": 1.0}
    assert sections.take() == {}
    device.passed = 6
    assert sections.take() == {"backward": 1.0}


def test_events_are_used_again_and_their_number_is_bounded(device: SimpleNamespace) -> None:
    sections = Sections(torch.device("cuda"))
    for _ in range(5 * module.MOST_PENDING):
        with sections("step"):
            pass
        device.passed = device.recorded
    assert device.events <= 2 * module.MOST_PENDING + 2
    assert sections.take() == {"step": 5.0 * module.MOST_PENDING}


@pytest.mark.parametrize(
    ("data", "found"),
    [
        ([1.0, 1.0, 1.1, 3.0], [Straggler(3, "data", 3.0)]),
        ([1.0, 2.0], [Straggler(1, "data", 2.0)]),
        ([2.0, 2.9], []),
        ([0.01, 0.01, 0.05], []),  # five times as long, and nothing to speak of
        ([0.0, 0.0, 5.0], [Straggler(2, "data", float("inf"))]),
        ([7.0], []),
    ],
)
def test_a_straggler_is_far_above_the_median_and_above_the_noise(data: list[float], found: list[Straggler]) -> None:
    assert stragglers([{"data": seconds, "backward": 9.0} for seconds in data], 1.5) == found


def test_waiting_for_others_is_nobodys_fault() -> None:
    by_rank = [{"data": 1.0, "forward": 1.0, "backward": 8.0}, {"data": 4.0, "forward": 2.0, "backward": 1.0}]
    assert [(s.rank, s.section) for s in stragglers(by_rank, 1.5)] == [(1, "data"), (1, "forward")]
    assert [str(s) for s in stragglers(by_rank, 1.5, ("data",))] == [
        "rank 1 takes 4.0 times the median of all ranks for data"
    ]


@pytest.mark.gpu
def test_on_a_device_seconds_are_those_of_its_kernels() -> None:
    sections = Sections(torch.device("cuda"))
    x = torch.randn(4096, 4096, device="cuda")

    def seconds(work: Callable[[], object]) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - started

    def products() -> None:
        with sections("forward"):
            for _ in range(50):
                x @ x

    products()
    torch.cuda.synchronize()
    sections.take()
    host = seconds(products)
    assert sections.take()["forward"] == pytest.approx(host, rel=0.2)
