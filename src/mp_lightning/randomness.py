"""Randomness that follows from what it is for, so that a continued run, and one on other devices, draws the same."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derived_seed(*parts: object) -> int:
    """A seed that depends on all parts and on nothing else (Python's own hash changes from run to run)."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "little")


def seed_all(seed: int) -> None:
    """Start the global generators of Python, NumPy and torch, all devices, from ``seed``."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def random_state(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, all global generators start from ``seed``, for networks that draw (dropout); then they are put back.

    They are those of torch, and for networks of the user's own those of Python and numpy.
    """
    of_python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        seed_all(seed)
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)
