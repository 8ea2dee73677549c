"""Which waiting documents share the next row."""

from collections.abc import Sequence


def fullest_subset(lengths: Sequence[int], capacity: int) -> list[int]:
    """Indices of the documents that together fill a row best, the first one always among them.

    The exact answer to subset sum: bit t of `reachable[i]` says that some of the documents 0..i add up to t.
    Among equally full subsets, later documents are left out first. Taking the oldest always means that no
    document waits forever. lengths: at least one; the first is at most `capacity`.
    """
    inside = (1 << (capacity + 1)) - 1
    reachable = [1 << lengths[0]]
    for length in lengths[1:]:
        reachable.append(reachable[-1] | (reachable[-1] << length) & inside)
    total = reachable[-1].bit_length() - 1
    chosen = []
    for i in range(len(lengths) - 1, 0, -1):
        if not reachable[i - 1] >> total & 1:
            chosen.append(i)
            total -= lengths[i]
    return [0, *reversed(chosen)]
