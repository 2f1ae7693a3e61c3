"""Every random draw of a run, derived from (seed, round, client, purpose, step) alone.

A draw never depends on what was drawn before it, on arrival order or on the wall clock: the same
run on another transport, or resumed after a crash, draws the same numbers.
"""

import hashlib
import random

import numpy as np

SERVER = -1
"""The ``client`` of draws made by the server."""


def seed_for(
    seed: int, *, purpose: str, round: int = 0, client: int = SERVER, step: int = 0
) -> int:
    """Return a 63-bit seed for one draw; distinct arguments give independent seeds.

    The hash (BLAKE2b) makes neighbouring rounds, clients and steps unrelated, where adding them
    up would let (round 1, client 2) meet (round 2, client 1).
    """
    label = f"{seed}|{round}|{client}|{step}|{purpose}".encode()
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

    Cheaper to make than numpy's or torch's, so it serves draws that are made anew every step.
    """
    return random.Random(seed_for(seed, purpose=purpose, round=round, client=client, step=step))
