"""Something around the training step of one module, without a class of its own."""

import functools
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

Step = Callable[..., Any]
Around = Callable[..., Any]  # (step, batch, *rest of the arguments) -> what the step gives


class WrappedStep:
    """Stands in for ``module.training_step`` while something is around it; what came first is outermost.

    Nothing is around it in evaluation mode, as when batch norm is re-estimated by training steps. It is one object for
    all callbacks of a module, so that they can leave in any order.
    """

    def __init__(self, module: pl.LightningModule) -> None:
        self._module = module
        self._step: Step = module.training_step
        self._own = module.__dict__.get("training_step")  # a user may have set one on the instance
        self._around: list[Around] = []
        functools.update_wrapper(self, self._step)
        # Lightning looks one wrapper deep to learn which arguments a step takes.
        self.__wrapped__ = getattr(self._step, "__wrapped__", self._step)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        step = self._step
        if self._module.training:
            for around in reversed(self._around):
                step = functools.partial(around, step)
        return step(*args, **kwargs)

    @classmethod
    def put(cls, module: pl.LightningModule, around: Around) -> None:
        """Have ``around(step, *args, **kwargs)`` called in place of ``module.training_step(*args, **kwargs)``."""
        wrapped = module.__dict__.get("training_step")
        if not isinstance(wrapped, cls):
            wrapped = cls(module)
            module.training_step = wrapped  # type: ignore[method-assign]
        wrapped._around.append(around)

    @classmethod
    def take(cls, module: pl.LightningModule, around: Around) -> None:
        """Undo :meth:`put`; nothing happens where there is nothing to undo."""
        wrapped = module.__dict__.get("training_step")
        if not isinstance(wrapped, cls) or around not in wrapped._around:
            return
        wrapped._around.remove(around)
        if not wrapped._around:
            del module.training_step
            if wrapped._own is not None:
                module.training_step = wrapped._own  # type: ignore[method-assign]
