"""What else there is in a training, of the trainer and the module, and what is done so that it works together."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from mp_lightning.errors import ConfigurationError
from mp_lightning.sites import detach
from mp_lightning.sites.surgery import attachment_of_itself
from mp_lightning.sites.tracing import is_frozen

# Parameters that are cut into pieces would have to be put together at every site.
_SHARDED = {
    "FSDPStrategy": "strategy='ddp'",
    "ModelParallelStrategy": "strategy='ddp', since phi and its statistics are not sharded",
    "DeepSpeedStrategy": "strategy='ddp'",
}
_LATE_HOOKS = ("configure_model", "setup")  # in which modules make layers, the last one that Lightning calls first


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


def check_alone(trainer: pl.Trainer, callback: Callback) -> None:
    """Refuse a second callback of the same kind, which would count every batch once more.

    Raises:
        ConfigurationError: there is one.
    """
    others = [type(other).__name__ for other in trainer.callbacks if isinstance(other, type(callback))]  # type: ignore[attr-defined]
    if len(others) > 1:
        raise ConfigurationError(
            f"the trainer has {len(others)} callbacks of the kind {type(callback).__name__}; leave one of them, with "
            "target= or sites= where several parts of the module are meant"
        )


def check_single(module: nn.Module) -> None:
    """Refuse a module of which several parts are attached one by one, of which only one would be looked after.

    Raises:
        ConfigurationError: names them.
    """
    attached = [name for name, part in module.named_modules() if attachment_of_itself(part) is not None]
    if len(attached) > 1:
        names = " and ".join(f"self.{name}" if name else "the module" for name in attached)
        raise ConfigurationError(
            f"{names} are attached one by one, and a training looks after one attachment; leave attaching to the "
            "callback, or call mp_lightning.detach on a copy that is not to be perturbed"
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


def late_hook(module: pl.LightningModule) -> str | None:
    """The last hook of a module's own in which it may make layers; None if it has none."""
    return next((name for name in _LATE_HOOKS if overrides(module, name)), None)


def overrides(module: pl.LightningModule, hook: str) -> bool:
    """Whether the module has a hook that is not Lightning's own (under either of its names)."""
    return getattr(type(module), hook).__module__.split(".")[0] not in ("lightning", "pytorch_lightning")


class AttachesLater:
    """Attaches to a module that may make layers in a hook of its own, as soon as it has.

    Args:
        attach: what attaches.
        module: to which.
        hook: as :func:`late_hook` names it.
    """

    def __init__(self, attach: Callable[[pl.LightningModule], Any], module: pl.LightningModule, hook: str) -> None:
        self._attach = attach
        self._module = module
        self._hook = hook

    def install(self) -> None:
        """Take the place of the hook, once."""
        setattr(self._module, self._hook, self.run)

    @classmethod
    def uninstall(cls, module: pl.LightningModule) -> None:
        """Where a training ended before there were any layers."""
        for hook in _LATE_HOOKS:
            if isinstance(getattr(module.__dict__.get(hook), "__self__", None), cls):
                delattr(module, hook)

    def run(self, *args: Any, **kwargs: Any) -> None:
        """The hook, and after it the attaching."""
        delattr(self._module, self._hook)
        getattr(self._module, self._hook)(*args, **kwargs)
        self._attach(self._module)


def _is(thing: object, name: str) -> bool:
    """Whether it is of a class of this name, in Lightning under either of its names."""
    return any(kind.__name__ == name for kind in type(thing).__mro__)
