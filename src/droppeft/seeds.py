"""Seeds and generators for all random draws of a run.

Each draw depends on (seed, round, client, purpose, step) alone. It depends neither on earlier
draws nor on the order of replies nor on the time. So a run draws the same numbers on any transport,
and after it was resumed.
"""

import hashlib
import operator
import random

import numpy as np

SERVER = -1
"""The ``client`` of draws made by the server."""


def seed_for(
    seed: int, *, purpose: str, round: int = 0, client: int = SERVER, step: int = 0
) -> int:
    """Return a 63-bit seed for one draw; distinct arguments give independent seeds.

    A hash (BLAKE2b) makes the seeds of neighbouring rounds, clients and steps unrelated. A sum of
    the arguments would give (round 1, client 2) and (round 2, client 1) the same seed.

    Raises:
        TypeError: a number is not whole by its type. As text, 1.0 would be another number than 1.
    """
    numbers = [int(operator.index(number)) for number in (seed, round, client, step)]
    label = "|".join([*map(str, numbers), purpose]).encode()
    digest = hashlib.blake2b(label, digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def numpy_generator(
    seed: int, *, purpose: str, round: int = 0, client: int = SERVER, step: int = 0
) -> np.random.Generator:
    """Return numpy's generator for one purpose; see :func:`seed_for`."""
    return np.random.default_rng(
        seed_for(seed, purpose=purpose, round=round, client=client, step=step)
    )


def python_generator(
    seed: int, *, purpose: str, round: int = 0, client: int = SERVER, step: int = 0
) -> random.Random:
    """Return the standard library's generator for one purpose; see :func:`seed_for`.

    It is faster to create than numpy's or torch's, for draws that create one in every step.
    """
    return random.Random(seed_for(seed, purpose=purpose, round=round, client=client, step=step))
