"""Which images make up the batch of a step: a function of the step, so a continued run draws what it would have."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from mp_lightning.errors import ConfigurationError, DataError


def batch_indices(length: int, batch_size: int, step: int, seed: int) -> Tensor:
    """The images of one batch.

    Each epoch is a new random permutation of all images, fixed by (seed, epoch). Batches are cut from the endless row
    of permutations, across their borders, so every batch is full, even one larger than the set.

    Args:
        length: images in the set.
        batch_size: images in the batch.
        step: number of the batch, from 0; no earlier batch needs to have been drawn.
        seed: any integer.

    Returns:
        int64 (batch_size,), values 0 to length - 1.

    Raises:
        DataError: the set is empty.
        ConfigurationError: the batch size is below 1 or the step negative.
    """
    if length < 1:
        raise DataError("no batch can be drawn from an empty set of images: give at least one image")
    if batch_size < 1 or step < 0:
        raise ConfigurationError(f"batch_size={batch_size}, step={step} is out of range: give at least 1 and 0")
    start, stop = step * batch_size, (step + 1) * batch_size
    parts = []
    for epoch in range(start // length, (stop - 1) // length + 1):
        offset = epoch * length
        parts.append(_permutation(length, seed, epoch)[max(start - offset, 0) : stop - offset])
    return torch.cat(parts)


# Several tasks, each with a set to train and one to validate, take turns.
@lru_cache(maxsize=64)
def _permutation(length: int, seed: int, epoch: int) -> Tensor:
    order = np.random.default_rng([seed % 2**64, epoch]).permutation(length)
    return torch.from_numpy(order.astype(np.int64))
