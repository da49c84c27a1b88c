"""Modules that may make their layers in a hook of their own, to which is attached when they have."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from torch import nn

_HOOKS = ("configure_model", "setup")  # the last one that Lightning calls first


def late_hook(module: pl.LightningModule) -> str | None:
    """The last hook of a module's own in which it may make layers; None if it has none."""
    return next((name for name in _HOOKS if overrides(module, name)), None)


def overrides(owner: pl.LightningModule | pl.LightningDataModule, hook: str) -> bool:
    """Whether the class of a module or datamodule has a hook that is not Lightning's (under either of its names)."""
    return getattr(type(owner), hook).__module__.split(".")[0] not in ("lightning", "pytorch_lightning")


class AttachesLater:
    """Attaches to a module when a hook of its own has run.

    What callbacks have frozen between :meth:`install` and the hook is trained later: it is looked at as it was.

    Args:
        attach: what attaches.
        module: to which.
        hook: as :func:`late_hook` names it.
    """

    def __init__(self, attach: Callable[[pl.LightningModule], Any], module: pl.LightningModule, hook: str) -> None:
        self._attach = attach
        self._module = module
        self._hook = hook
        self._frozen = _frozen(module)

    def install(self) -> None:
        """Take the place of the hook, once."""
        setattr(self._module, self._hook, self.run)

    @classmethod
    def uninstall(cls, module: pl.LightningModule) -> None:
        """Where a training ended before there were any layers."""
        for hook in _HOOKS:
            if isinstance(getattr(module.__dict__.get(hook), "__self__", None), cls):
                delattr(module, hook)

    def run(self, *args: Any, **kwargs: Any) -> None:
        """The hook, and after it the attaching."""
        later = _frozen(self._module) - self._frozen
        delattr(self._module, self._hook)
        getattr(self._module, self._hook)(*args, **kwargs)
        for parameter in later:
            parameter.requires_grad_(True)
        try:
            self._attach(self._module)
        finally:
            for parameter in later:
                parameter.requires_grad_(False)


def _frozen(module: nn.Module) -> set[nn.Parameter]:
    return {parameter for parameter in module.parameters() if not parameter.requires_grad}
