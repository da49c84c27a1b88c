"""Batch norm re-estimated by a trainer's own training steps, on the data that it trains or has trained with."""

from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from mp_lightning.inference import reestimate_batch_norm
from mp_lightning.inference.undisturbed import undisturbed
from mp_lightning.sites import Attachment

# A trainer forgets its training data when it goes on to test, which is when re-estimation may need it.
_TRAINING_DATA: "WeakKeyDictionary[pl.Trainer, CombinedLoader]" = WeakKeyDictionary()


def reestimate(trainer: pl.Trainer, module: pl.LightningModule, attachment: Attachment, inference: str) -> None:
    """Estimate batch norm, and for 'fold' the constants, for a mode of inference; says so where there is no data."""
    data = training_data(trainer)
    if data is None:
        rank_zero_warn(
            f"MetaPerturb: batch norm was not re-estimated for inference='{inference}', as this trainer has no "
            "training data; evaluate with the trainer that trained, or use inference='mc'"
        )
        return
    with (
        isolate_rng(),
        undisturbed(module, data.flattened),
        torch.no_grad(),
        trainer.precision_plugin.train_step_context(),
    ):
        forwards = _TrainingForwards(trainer, module, data)
        reestimate_batch_norm(attachment, forwards, fold=inference == "fold")


def training_data(trainer: pl.Trainer) -> CombinedLoader | None:
    """The data that this trainer trains or has trained with."""
    current = trainer.fit_loop._combined_loader
    if current is not None:
        # A fresh one, for iterators of its own; the mode says how the batches of several loaders are put together.
        _TRAINING_DATA[trainer] = CombinedLoader(current.iterables, current._mode)
    return _TRAINING_DATA.get(trainer)


class _TrainingForwards:
    """The training step on one batch after another, from the start each time it is gone through."""

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, combined: CombinedLoader) -> None:
        self._trainer = trainer
        self._module = module
        self._combined = combined

    def __iter__(self) -> Iterator[Callable[[], Any]]:
        trainer, module = self._trainer, self._module
        takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
        limit = trainer.num_training_batches
        for batch, index, _ in iter(self._combined):
            if index >= limit:
                return
            moved = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))

            def forward(batch: Any = moved, index: int = index) -> Any:
                return module.training_step(*((batch, index) if takes_index else (batch,)))

            yield forward
