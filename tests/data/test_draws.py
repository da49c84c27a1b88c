"""Which images the batch of a step holds."""

import pytest
import torch

from mp_lightning.data import batch_indices, draws
from mp_lightning.errors import ConfigurationError, DataError


@pytest.mark.parametrize(("length", "batch_size"), [(10, 3), (10, 5), (7, 7), (4, 11), (1, 2)])
def test_batches_are_full_and_every_epoch_takes_each_image_once(length: int, batch_size: int) -> None:
    batches = [batch_indices(length, batch_size, step, seed=3) for step in range(2 * length)]
    assert all(batch.shape == (batch_size,) and batch.dtype == torch.int64 for batch in batches)
    for epoch in torch.cat(batches).split(length):
        assert epoch.sort().values.tolist() == list(range(length))


def test_a_batch_does_not_depend_on_what_was_drawn_before() -> None:
    in_order = [batch_indices(50, 8, step, seed=1) for step in range(30)]
    draws._permutation.cache_clear()
    for step in (29, 3, 17):
        assert torch.equal(batch_indices(50, 8, step, seed=1), in_order[step])


def test_epochs_and_seeds_differ_in_order() -> None:
    first = batch_indices(100, 100, 0, seed=1)
    assert not torch.equal(first, batch_indices(100, 100, 1, seed=1))
    assert not torch.equal(first, batch_indices(100, 100, 0, seed=2))
    # Seed and epoch must not be added up: epoch 1 of seed 1 would be epoch 0 of seed 2.
    assert not torch.equal(batch_indices(100, 100, 1, seed=1), batch_indices(100, 100, 0, seed=2))


def test_changing_a_batch_does_not_change_later_draws() -> None:
    batch = batch_indices(6, 6, 0, seed=0)
    kept = batch.clone()
    batch.zero_()
    assert torch.equal(batch_indices(6, 6, 0, seed=0), kept)


def test_neither_set_nor_batch_may_be_empty() -> None:
    with pytest.raises(DataError, match="empty"):
        batch_indices(0, 4, 0, seed=0)
    with pytest.raises(ConfigurationError, match="batch_size=0"):
        batch_indices(4, 0, 0, seed=0)
    with pytest.raises(ConfigurationError, match="step=-1"):
        batch_indices(4, 4, -1, seed=0)
