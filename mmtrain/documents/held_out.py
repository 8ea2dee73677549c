"""Which pictures are held out: by the hash of their content, so that one picture is never on both sides."""

from collections.abc import Callable, Iterable


def held_out_pictures(hashes: Iterable[str], fraction: float, is_good: Callable[[str], bool]) -> set[str]:
    """The SHA-256 hashes (hexadecimal) of the validation pictures: those in the lowest `fraction` of all values.

    The side of a picture does not depend on the others, with one exception for small corpora: when one side
    would have no usable picture and there are two, the picture next to the limit moves over. So there is
    always something to train on and, from two good pictures on, something to validate on. `is_good` decodes a
    picture by its hash; it is asked only as often as this needs.
    """
    ordered = sorted(set(hashes))
    limit = sum(int(value[:8], 16) / 2**32 < fraction for value in ordered)
    lower = next((index for index in range(limit - 1, -1, -1) if is_good(ordered[index])), None)
    upper = next((index for index in range(limit, len(ordered)) if is_good(ordered[index])), None)
    if lower is None and upper is not None:
        another = any(is_good(value) for value in ordered[upper + 1 :])
        limit = upper + 1 if another else limit
    elif upper is None and lower is not None:
        limit = lower  # alone it trains, too
    return set(ordered[:limit])
