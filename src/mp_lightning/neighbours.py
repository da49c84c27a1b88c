"""What else there is in a training, of the trainer and the module, and what is done so that it works together."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from mp_lightning.errors import ConfigurationError
from mp_lightning.sites import attachment_of, detach
from mp_lightning.sites.attachment import NAME
from mp_lightning.sites.surgery import attachment_of_itself
from mp_lightning.sites.tracing import is_frozen

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


def check_alone(trainer: pl.Trainer, kind: type[Callback]) -> None:
    """Refuse a second callback of a kind, which would count every batch once more.

    Raises:
        ConfigurationError: there is one.
    """
    found = [callback for callback in trainer.callbacks if isinstance(callback, kind)]  # type: ignore[attr-defined]
    if len(found) > 1:
        raise ConfigurationError(
            f"the trainer has {len(found)} callbacks of the kind {kind.__name__}; leave one of them, with target= or "
            "sites= where several parts of the module are meant"
        )


def check_single(module: nn.Module) -> None:
    """Refuse a module of which several parts that are trained are attached one by one: one would be looked after.

    Raises:
        ConfigurationError: names them.
    """
    attached = [name for name, part in module.named_modules() if attachment_of_itself(part) and not is_frozen(part)]
    if len(attached) > 1 and "" not in attached:
        raise ConfigurationError(
            f"{' and '.join(f'self.{name}' for name in attached)} are attached one by one, and a training looks after "
            "one attachment; leave attaching to the callback, or call mp_lightning.detach on a copy that is not to be "
            "perturbed"
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

    Its counters and statistics would be averaged as if they were weights, and copied back. What a module that declares
    it has of them in its weights, the average passes over.
    """
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        average = getattr(other, "_average_model", None)
        if not isinstance(average, nn.Module) or average is trainer.lightning_module:
            continue
        if attachment_of(average) is not None:
            detach(average)
            average.register_load_state_dict_pre_hook(_without_perturbation)


def _without_perturbation(module: nn.Module, state_dict: dict[str, Any], *rest: Any) -> None:
    for name in [name for name in state_dict if NAME in name.split(".")]:
        del state_dict[name]


@contextmanager
def unfrozen(trainer: pl.Trainer, callback: Callback, module: nn.Module) -> Iterator[None]:
    """Where a finetuning callback before this one has frozen layers for a while, look at the module as before."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    earlier = [other for other in callbacks[: callbacks.index(callback)] if _is(other, "BaseFinetuning")]
    frozen = [parameter for parameter in module.parameters() if earlier and not parameter.requires_grad]
    names = [name for name, part in module.named_children() if is_frozen(part)] if earlier else []
    if len(names) > 1:
        rank_zero_warn(
            f"MetaPerturb: {', '.join(names)} are frozen, and taken to be trained later, as "
            f"{type(earlier[0]).__name__} comes before {type(callback).__name__}; put it after, or name the network "
            "that counts with target="
        )
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
