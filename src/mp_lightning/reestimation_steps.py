"""Batch norm re-estimated by a trainer's own training steps, on the data that it trains or has trained with."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from mp_lightning.errors import ConfigurationError
from mp_lightning.inference import reestimate_batch_norm
from mp_lightning.inference.undisturbed import undisturbed
from mp_lightning.late_layers import overrides
from mp_lightning.sites import Attachment


@dataclass(frozen=True)
class _TrainingData:
    """Batches, and whose hooks make of them what the training step gets: the datamodule's of ``fit``, if it had one."""

    loader: CombinedLoader
    hooks: Any


# An attribute of the trainer, which forgets its training data when it goes on to test, when re-estimation may need it.
_TRAINING_DATA = "_metaperturb_training_data"


def reestimate(
    trainer: pl.Trainer, module: pl.LightningModule, attachment: Attachment, inference: str, loaders: Any = None
) -> None:
    """Estimate batch norm, and for 'fold' the constants, for a mode of inference; says so where there is no data.

    Args:
        trainer, module, attachment: that belong together.
        inference: 'mean' or 'fold'.
        loaders: of training batches, as ``train_dataloader`` gives them; None: those that the trainer trains with.
    """
    data = training_data(trainer) if loaders is None else _data_of(trainer, loaders)
    if data is None:
        rank_zero_warn(
            f"MetaPerturb: batch norm was not re-estimated for inference='{inference}', as this trainer has no "
            "training data; evaluate with the trainer that trained, give a datamodule with a train_dataloader that "
            "needs no setup('fit'), or use inference='mc'"
        )
        return
    with (
        isolate_rng(),
        undisturbed(module, data.loader.flattened),
        _as_in_training(trainer, data.hooks),
        torch.no_grad(),
        trainer.precision_plugin.train_step_context(),
    ):
        forwards = _TrainingForwards(trainer, module, data.loader)
        reestimate_batch_norm(attachment, forwards, fold=inference == "fold")


def try_to_reestimate(trainer: pl.Trainer, module: pl.LightningModule, attachment: Attachment, inference: str) -> None:
    """As :func:`reestimate`, but warn of what goes wrong: a training that is done, or a test, must not be lost."""
    try:
        reestimate(trainer, module, attachment, inference)
    except ConfigurationError as error:
        rank_zero_warn(f"MetaPerturb: {error}")
    except Exception as error:  # a training step that cannot be run without gradients, once more, or without a fit
        rank_zero_warn(
            f"MetaPerturb: batch norm was not re-estimated for inference='{inference}', as a training step ended with "
            f"{type(error).__name__}: {error}; use inference='mc'"
        )


def training_data(trainer: pl.Trainer) -> _TrainingData | None:
    """The data that this trainer trains or has trained with, or else would train with."""
    current = trainer.fit_loop._combined_loader
    if current is not None:
        # A fresh one, for iterators of its own; the mode says how the batches of several loaders are put together.
        loader = CombinedLoader(current.iterables, current._mode)
        setattr(trainer, _TRAINING_DATA, _TrainingData(loader, trainer._data_connector._datahook_selector))
    data: _TrainingData | None = getattr(trainer, _TRAINING_DATA, None)
    return data or _own_training_data(trainer)


def _own_training_data(trainer: pl.Trainer) -> _TrainingData | None:
    """That of the datamodule or the module, where it can be had without ``fit``."""
    for owner in (trainer.datamodule, trainer.lightning_module):  # type: ignore[attr-defined]
        # from_datasets gives a datamodule of Lightning's own class such a hook.
        if owner is not None and ("train_dataloader" in vars(owner) or overrides(owner, "train_dataloader")):
            try:
                return _data_of(trainer, owner.train_dataloader())
            except Exception:  # it was set up for a test alone
                continue
    return None


def _data_of(trainer: pl.Trainer, loaders: Any) -> _TrainingData:
    if not isinstance(loaders, CombinedLoader):
        loaders = CombinedLoader(loaders, "max_size_cycle")  # as Lightning does in fit
    return _TrainingData(loaders, trainer._data_connector._datahook_selector)


@contextmanager
def _as_in_training(trainer: pl.Trainer, hooks: Any) -> Iterator[None]:
    """``trainer.training`` holds, and batches go through the hooks of ``fit``, whatever the trainer is doing."""
    connector, state = trainer._data_connector, trainer.state
    before = connector._datahook_selector, state.stage
    connector._datahook_selector, state.stage = hooks, RunningStage.TRAINING
    try:
        yield
    finally:
        connector._datahook_selector, state.stage = before


def moved(trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> Any:
    """A batch as Lightning's loops hand it to a step: through the hooks of transfer, and on the trainer's device."""
    converted = module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch), 0)
    return trainer.strategy.batch_to_device(converted, dataloader_idx=0)


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
            ready = moved(trainer, module, batch)

            def forward(batch: Any = ready, index: int = index) -> Any:
                return module.training_step(*((batch, index) if takes_index else (batch,)))

            yield forward
