"""What of the training state a rank owns: contiguous pieces of parameters, with their moments.

The same form for every engine, stage and world size: a checkpoint is the union of all ranks' fragments.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

PARAMETER = "parameter"  # beside the names of the optimizer's moments


@dataclass(frozen=True)
class Fragment:
    """Elements start .. start + length - 1 of the flattened parameter `name`.

    tensors: "parameter" and each moment -> (length,) float32, views of what the optimizer works on: reading them is
    saving, writing into them is restoring.
    """

    name: str
    start: int
    tensors: dict[str, Tensor]

    @property
    def length(self) -> int:
        """Elements of the parameter."""
        return self.tensors[PARAMETER].numel()


def whole(states: Mapping[str, Mapping[str, Tensor]]) -> list[Fragment]:
    """Whole parameters as one fragment each. states: parameter name -> "parameter" and moments, contiguous float32."""
    return [Fragment(name, 0, {kind: t.detach().view(-1) for kind, t in ts.items()}) for name, ts in states.items()]


def shared_out(fragments: Iterable[Fragment], rank: int, size: int) -> list[Fragment]:
    """This rank's share of fragments that all `size` ranks hold alike: equal numbers of elements, in order."""
    fragments = list(fragments)
    total = sum(fragment.length for fragment in fragments)
    first, last = total * rank // size, total * (rank + 1) // size
    own, position = [], 0
    for f in fragments:
        low, high = max(first - position, 0), min(last - position, f.length)
        if low < high:
            own.append(Fragment(f.name, f.start + low, {kind: t[low:high] for kind, t in f.tensors.items()}))
        position += f.length
    return own
