"""What the loss and the gradient norm say about a run: skipped updates, loss spikes, and data to leave out.

Everything here is fed with numbers that are equal on all ranks (the global loss, the global norm), and decides by
them alone: all ranks come to the same verdict at the same step without a word between them.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmtrain.config.schema import HealthConfig

FLOOR = 0.002  # of the mean: a loss that hardly moves would otherwise call its own noise a spike
FEWEST = 20  # losses; the deviation of n is uncertain by a share of 1 / sqrt(2 n)
SCORE_STEPS = 1000
SPIKE = "loss is a spike"


class SpikeDetector:
    """Tells a loss far above the last ones, on the device, without the host ever waiting for it.

    A spike is a finite loss more than `sigma` standard deviations above the mean of the last `window` accepted ones.
    Spikes and losses that are not finite are not accepted, so that they do not hide those after them; but a row of
    spikes longer than half a window is a new level, and is accepted (otherwise a run whose data change would spike
    for good). No loss is a spike before half of the window is there, at least FEWEST: by then the deviation is known
    to a tenth, and the first steps, whose loss falls by itself, are over.
    Source: OLMo-core's SkipStepOptimizer, whose window holds the spikes too; for the skipping PaLM, sec. 5.1.
    """

    def __init__(self, window: int, sigma: float, device: torch.device):
        self.window, self.sigma = window, sigma
        self.needed = min(window, max(FEWEST, window // 2))
        self.is_spike = torch.zeros((), dtype=torch.bool, device=device)
        """Whether the loss judged last is one."""
        self._slots = torch.arange(window, device=device)
        self._ring = torch.zeros(window, dtype=torch.float64, device=device)
        self._accepted = torch.zeros((), dtype=torch.int64, device=device)
        self._in_a_row = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def judge(self, loss: Tensor) -> Tensor:
        """1.0, or NaN for a spike. loss: scalar, of this step over all ranks; its result: float32 scalar."""
        loss = loss.double()
        count = self._accepted.clamp(max=self.window)
        mean = self._ring.sum() / count
        square = torch.where(self._slots < count, self._ring - mean, 0.0).square().sum()
        deviation = torch.maximum((square / (count - 1)).sqrt(), FLOOR * mean.abs())
        finite = torch.isfinite(loss)
        self.is_spike = finite & (count >= self.needed) & (loss - mean > self.sigma * deviation)
        self._in_a_row = torch.where(finite, (self._in_a_row + 1) * self.is_spike, self._in_a_row)
        accepted = finite & (~self.is_spike | (self._in_a_row > self.window // 2))
        self._ring = torch.where(accepted & (self._slots == self._accepted % self.window), loss, self._ring)
        self._accepted = self._accepted + accepted
        return torch.where(self.is_spike, math.nan, 1.0).float()

    def state(self) -> dict[str, Any]:
        """For a checkpoint; waits for the device. losses: oldest first."""
        accepted = int(self._accepted)
        losses = self._ring.roll(-accepted).tolist()[self.window - min(accepted, self.window) :]
        return {"losses": losses, "accepted": accepted, "in_a_row": int(self._in_a_row)}

    def load(self, state: dict[str, Any]) -> None:
        """Go on exactly as the detector that gave `state`; from its last losses where the window is another one."""
        losses, accepted = state["losses"][-self.window :], state["accepted"]
        if len(losses) < min(accepted, self.window):
            accepted = len(losses)
        ring = torch.tensor([0.0] * (self.window - len(losses)) + losses, dtype=torch.float64)
        self._ring.copy_(ring.roll(accepted))
        self._accepted.fill_(accepted)
        self._in_a_row.fill_(state["in_a_row"])


@dataclass(frozen=True)
class Skips:
    """Batches that roll-backs left out: a stream's batches in their order, without those in `windows`.

    Steps are counted as in checkpoints and log rows: `step` updates are done, the next one makes it step + 1.
    windows: first and last batch of each, sorted, apart from one another.
    """

    windows: tuple[tuple[int, int], ...] = ()
    rollbacks: int = 0

    def batch_index(self, step: int) -> int:
        """The batch of the update from `step` to step + 1."""
        index = step
        for first, last in self.windows:
            if index < first:
                break
            index += last - first + 1
        return index

    def back(self, checkpoint: int, spike: int) -> "Skips":
        """After going back to the checkpoint of step `checkpoint`: its next batch follows that of step `spike`.

        spike: the step that the bad update led to (as `Verdict.rollback`); the checkpoint must be an earlier one.
        """
        if not 0 <= checkpoint < spike:
            raise ValueError(f"a checkpoint of step {checkpoint} is not before the spike at step {spike}")
        first, last = self.batch_index(checkpoint), self.batch_index(spike - 1)
        apart = [window for window in self.windows if window[1] < first or window[0] > last]
        return Skips(tuple(sorted([*apart, (first, last)])), self.rollbacks + 1)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"windows": [list(window) for window in self.windows], "rollbacks": self.rollbacks}

    @classmethod
    def of(cls, state: dict[str, Any]) -> "Skips":
        """What gave `state`."""
        return cls(tuple((first, last) for first, last in state["windows"]), state["rollbacks"])


@dataclass(frozen=True)
class Verdict:
    """What is known after a step."""

    skipped_total: int
    skipped_in_a_row: int
    spikes_total: int
    sentences: tuple[str, ...]
    """For the user, each told once."""
    rollback: int | None
    """The step of a spike that is to be gone back before: to a checkpoint of a smaller step, then `Skips.back`."""
    stop: str | None
    """Why training must end."""


@dataclass
class Tally:
    """What `Health` has counted; plain values, as they go into a checkpoint."""

    skipped: int = 0
    in_a_row: int = 0
    first_in_a_row: int = 0
    causes: dict[str, int] = field(default_factory=dict)
    """Why the updates in a row were skipped -> how many."""
    spikes: int = 0
    recent_spikes: list[int] = field(default_factory=list)
    """Steps of those among the last SCORE_STEPS."""
    last_loss: float | None = None
    """The newest that is finite and no spike."""
    step: int = 0


class Health:
    """Counts skipped updates and spikes step by step, and says what is to be done.

    An update is skipped when its loss or gradient norm is not finite (the engines see to it), or when it is a spike
    under the policy `skip`. On a CUDA device a step is read while the next one runs, so that the host does not wait:
    a verdict is then about the steps up to the one before.
    All ranks must call with the same numbers and at the same steps, and come to the same verdict.
    """

    def __init__(self, config: HealthConfig, device: torch.device):
        self.config = config
        self.skips = Skips()
        self._tally = Tally()
        self._sentences: list[str] = []
        self._rollback: int | None = None
        self._late = LateValues() if device.type == "cuda" else None

    def observe(self, step: int, loss: Tensor, norm: Tensor | float | None, is_spike: Tensor) -> None:
        """Take in the update that led to `step`. loss: global mean; norm: global, None when unknown; all scalars."""
        if self._late is None:
            self._read(step, float(loss), None if norm is None else float(norm), bool(is_spike))
        else:
            self.settle()
            self._late.send(step, loss, norm, is_spike)

    def settle(self) -> None:
        """Wait for what is observed and not yet read (CUDA), as at the end of a run."""
        if self._late and (values := self._late.receive()):
            self._read(*values)

    def verdict(self) -> Verdict:
        """What is known by now; its sentences and its roll-back are told once."""
        t, sentences, rollback = self._tally, tuple(self._sentences), self._rollback
        self._sentences, self._rollback = [], None
        stop = None
        if t.in_a_row >= self.config.max_skipped:
            stop = self._why_skipped()
        elif rollback and self.skips.rollbacks >= self.config.max_rollbacks:
            stop = self._why_no_rollback(rollback)
        if stop:
            rollback = None
        return Verdict(t.skipped, t.in_a_row, t.spikes, sentences, rollback, stop)

    def row(self) -> dict[str, float]:
        """Numbers for the log; spike_score: share of spikes in the last SCORE_STEPS steps."""
        t = self._tally
        return {
            "skipped_updates": t.skipped,
            "spikes": t.spikes,
            "spike_score": len(t.recent_spikes) / max(1, min(t.step, SCORE_STEPS)),
            "rollbacks": self.skips.rollbacks,
        }

    def state(self) -> dict[str, Any]:
        """For a checkpoint; waits for the device."""
        self.settle()
        return {"tally": asdict(self._tally), "skips": self.skips.state()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on as the one that gave `state`; after a roll-back, set `skips` again."""
        self._tally, self.skips = Tally(**state["tally"]), Skips.of(state["skips"])
        self._sentences, self._rollback = [], None
        if self._late:
            self._late.receive()

    def _read(self, step: int, loss: float, norm: float | None, is_spike: bool) -> None:
        t = self._tally
        t.step = step
        cause = self._cause_of_skip(loss, norm, is_spike)
        if is_spike:
            if step - 1 not in t.recent_spikes[-1:]:
                before = "" if t.last_loss is None else f" after {t.last_loss:.4g}"
                left_out = "; its update is left out" if cause else ""
                self._sentences.append(f"step {step}: the loss is {loss:.4g}{before}, a spike{left_out}")
            t.spikes += 1
            t.recent_spikes.append(step)
            if self.config.spike == "rollback":
                self._rollback = step
        elif math.isfinite(loss):
            t.last_loss = loss
        t.recent_spikes = [spike for spike in t.recent_spikes if spike > step - SCORE_STEPS]
        if cause is None:
            if t.in_a_row > 1:
                self._sentences.append(f"step {step}: the first update after {t.in_a_row} that were skipped")
            t.in_a_row, t.causes = 0, {}
            return
        if not t.in_a_row:
            t.first_in_a_row = step
            if not is_spike:
                self._sentences.append(f"step {step}: the update is skipped, its {cause}")
        t.skipped += 1
        t.in_a_row += 1
        t.causes[cause] = t.causes.get(cause, 0) + 1

    def _cause_of_skip(self, loss: float, norm: float | None, is_spike: bool) -> str | None:
        if not math.isfinite(loss):
            return "loss is not finite"
        if is_spike and self.config.spike == "skip":
            return SPIKE
        if norm is not None and not math.isfinite(norm):
            return "gradient is not finite"
        return None

    def _why_skipped(self) -> str:
        t = self._tally
        causes = ", ".join(f"{number} because the {cause}" for cause, number in t.causes.items())
        level = " A higher loss that stays, as with other data, needs health.spike=log." if SPIKE in t.causes else ""
        return (
            f"{t.in_a_row} updates in a row were skipped (health.max_skipped), steps {t.first_in_a_row} to {t.step}: "
            f"{causes}; the weights are still those of step {t.first_in_a_row - 1}. Either training has diverged: "
            "train again under another name= with a lower optim.lr, a longer optim.warmup_steps, a smaller optim.clip "
            f"or model.z_loss=1e-5; or the data of these steps are at fault.{level}"
        )

    def _why_no_rollback(self, spike: int) -> str:
        windows = ", ".join(f"{first}-{last}" for first, last in self.skips.windows)
        return (
            f"the loss spiked at step {spike} again, after {self.skips.rollbacks} roll-backs (health.max_rollbacks) "
            f"that left out the batches {windows}: the data are hardly the cause; go on with health.spike=skip, or "
            "train again under another name= with a lower optim.lr or a smaller optim.clip"
        )


class LateValues:
    """Brings the numbers of a step from a CUDA device to the host behind the work that follows."""

    def __init__(self) -> None:
        # Pinned, or the copy would wait for the device.
        self._buffer = torch.empty(3, dtype=torch.float64, pin_memory=torch.cuda.is_available())
        self._copied = torch.cuda.Event(blocking=True)
        self._sent: tuple[int, Tensor, float | None] | None = None

    def send(self, step: int, loss: Tensor, norm: Tensor | float | None, is_spike: Tensor) -> None:
        """Start the copy; the one before must have been received."""
        values = [loss, is_spike]
        if isinstance(norm, Tensor) and norm.device == loss.device:
            values.append(norm)
        buffer = self._buffer[: len(values)]
        buffer.copy_(torch.stack([x.detach().double().reshape(()) for x in values]), non_blocking=True)
        self._copied.record()
        self._sent = step, buffer, None if norm is None or len(values) == 3 else float(norm)

    def receive(self) -> tuple[int, float, float | None, bool] | None:
        """Step, loss, norm and whether it is a spike, waiting for the copy; None when nothing was sent since."""
        if self._sent is None:
            return None
        self._copied.synchronize()
        (step, buffer, host_norm), self._sent = self._sent, None
        loss, is_spike, *device_norm = buffer.tolist()
        return step, loss, device_norm[0] if device_norm else host_norm, bool(is_spike)
