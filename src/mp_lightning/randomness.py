"""Randomness that follows from what it is for, so that a continued run, and one on other devices, draws the same."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derived_seed(*parts: object) -> int:
    """A seed that depends on all parts and on nothing else (Python's own hash changes from run to run)."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "little")


@contextmanager
def random_state(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, torch's generators start from ``seed``, for networks that draw (dropout); then they are put back."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
