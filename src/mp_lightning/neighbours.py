"""What else a trainer may hold, callbacks and strategies, and what must be done so that all of it works together."""

from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import nn

from mp_lightning.errors import ConfigurationError
from mp_lightning.sites import detach

# Parameters that are cut into pieces would have to be put together at every site.
_SHARDED = {
    "FSDPStrategy": "strategy='ddp'",
    "ModelParallelStrategy": "strategy='ddp', since phi and its statistics are not sharded",
    "DeepSpeedStrategy": "strategy='ddp'",
}


def check_strategy(trainer: pl.Trainer) -> None:
    """Refuse strategies that keep a module in pieces.

    Raises:
        ConfigurationError: names the strategy, and what to use in its place.
    """
    for name, remedy in _SHARDED.items():
        if _is(trainer.strategy, name):
            raise ConfigurationError(
                f"MetaPerturb does not work with {type(trainer.strategy).__name__}, which keeps the module in pieces; "
                f"use {remedy}"
            )


def act_last(trainer: pl.Trainer, callback: Callback) -> None:
    """Let a callback come after all others but those that write checkpoints.

    Averaged weights (WeightAveraging, StochasticWeightAveraging) take their place when training ends; batch norm must
    be re-estimated for those.
    """
    others = [other for other in trainer.callbacks if other is not callback]  # type: ignore[attr-defined]
    first = next((index for index, other in enumerate(others) if _is(other, "Checkpoint")), len(others))
    trainer.callbacks = [*others[:first], callback, *others[first:]]  # type: ignore[attr-defined]


def leave_averages_plain(trainer: pl.Trainer) -> None:
    """Take the perturbation out of copies of the module that only hold averaged weights.

    Its counters and statistics would be averaged as if they were weights, and copied back.
    """
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        average = getattr(other, "_average_model", None)
        if isinstance(average, nn.Module) and average is not trainer.lightning_module:
            detach(average)


@contextmanager
def all_parameters_trained(trainer: pl.Trainer, module: nn.Module) -> Iterator[None]:
    """Where a finetuning callback has frozen layers for a while, look at the module as if it had not."""
    found = any(_is(other, "BaseFinetuning") for other in trainer.callbacks)  # type: ignore[attr-defined]
    frozen = [parameter for parameter in module.parameters() if found and not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _is(thing: object, name: str) -> bool:
    """Whether it is of a class of this name, in Lightning under either of its names."""
    return any(kind.__name__ == name for kind in type(thing).__mro__)
