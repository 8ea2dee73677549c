"""Counter-based randomness: every draw is a pure function of a key, never of what was drawn before."""

import hashlib

import numpy as np


def random_stream(*key: int | str) -> np.random.Generator:
    """A generator that depends on `key` alone (Philox keyed by SHA-256), the same in every process."""
    digest = hashlib.sha256("/".join(str(part) for part in key).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
