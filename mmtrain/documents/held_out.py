"""Which pictures are held out: by the hash of their content, so that one picture is never on both sides."""

import math
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


def held_out_limit(pictures: Iterable[tuple[str, bytes]], fraction: float, is_good: Callable[[bytes], bool]) -> str:
    """The hash (hexadecimal) below which pictures are held out: the sides of `held_out_pictures`, from a stream.

    pictures: hash and encoded bytes. They are read until both sides have a usable one (soon in a large corpus,
    unless the fraction is 0), and none is kept.
    """
    limit = f"{math.ceil(fraction * 2**32):08x}"
    lower = ""  # the greatest good hash below the limit
    upper: list[str] = []  # the lowest good hash from the limit on, and any other
    for sha256, data in pictures:
        if sha256 < limit:
            if sha256 > lower and is_good(data):
                lower = sha256
        elif sha256 not in upper and (len(upper) < 2 or sha256 < upper[0]) and is_good(data):
            upper = sorted([*upper, sha256])[:2]
        if lower and upper:
            return limit
    if len(upper) == 2:
        return upper[0] + "0"  # the next text after upper[0], which is held out itself
    return lower or limit
