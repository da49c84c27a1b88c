"""Running training steps for their forward alone, without a trace in metrics, logs and data loaders."""

import copy
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mp_lightning.sites.attachment import NAME

_CONTAINERS = (list, dict, set, deque)
_OF_TORCH = frozenset(vars(nn.Module()))  # what a module holds before it has anything of its own


@contextmanager
def undisturbed(module: nn.Module, loaders: list[Any]) -> Iterator[None]:
    """Nothing that ``module`` logs is kept, and it and the generators of the loaders come back as they were.

    That is its parameters and buffers, such as those of a momentum teacher that a step moves along, its metrics, and
    those of its attributes that are tensors, plain numbers or text, or lists, dictionaries and sets, of which what they
    hold comes back but is not copied.
    Steps that optimize by hand (``manual_backward``, ``self.optimizers()``) go through all of it without any effect.

    Args:
        module: a LightningModule.
        loaders: that the steps take their batches from.
    """
    holders = (holder for loader in loaders for holder in (loader, getattr(loader, "sampler", None)))
    found = (getattr(holder, "generator", None) for holder in holders)
    generators = {g: g.get_state() for g in found if isinstance(g, torch.Generator)}
    # Those of torchmetrics; its collections hold metrics and count nothing themselves.
    metrics: list[Any] = [m for m in module.modules() if hasattr(m, "metric_state") and hasattr(m, "_update_count")]
    states = [copy.deepcopy({**m.metric_state, "_update_count": m._update_count}) for m in metrics]
    kept = [_Kept(part) for name, part in module.named_modules() if NAME not in name.split(".")]
    instead = {"log": _ignore}
    if not getattr(module, "automatic_optimization", True):
        instead |= {"manual_backward": _ignore, "clip_gradients": _ignore}
        instead |= {name: _idle(getattr(module, name)) for name in ("optimizers", "lr_schedulers")}
    before = {name: module.__dict__[name] for name in instead if name in module.__dict__}
    module.__dict__.update(instead)
    try:
        yield
    finally:
        for name in instead:
            del module.__dict__[name]
        module.__dict__.update(before)
        for part in kept:
            part.restore()
        for metric, state in zip(metrics, states, strict=True):
            for name, value in state.items():
                setattr(metric, name, value)
            metric._computed = None
        for generator, state_ in generators.items():
            generator.set_state(state_)


class _Kept:
    """What one module holds itself: parameters, buffers, and attributes that are plain or hold others."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        tensors: dict[str, Any] = {kind: getattr(module, kind) for kind in ("_parameters", "_buffers", "__dict__")}
        self._tensors = {
            kind: {name: (value, value.detach().clone()) for name, value in of.items() if isinstance(value, Tensor)}
            for kind, of in tensors.items()
        }
        own = {name: value for name, value in vars(module).items() if name not in _OF_TORCH}
        self._plain = {name: value for name, value in own.items() if isinstance(value, int | float | str)}
        held = {name: value for name, value in own.items() if type(value) in _CONTAINERS}
        self._containers = {name: (value, copy.copy(value)) for name, value in held.items()}

    @torch.no_grad()
    def restore(self) -> None:
        for kind, held in self._tensors.items():
            for name, (value, before) in held.items():
                getattr(self._module, kind)[name] = value
                if not torch.equal(value, before):
                    value.copy_(before)
        self._module.__dict__.update(self._plain)
        for name, (container, content) in self._containers.items():
            self._module.__dict__[name] = container
            container.clear()
            if isinstance(container, list | deque):
                container.extend(content)
            else:
                container.update(content)


def _ignore(*args: Any, **kwargs: Any) -> Any:
    return nullcontext()  # some of what is replaced is used as a context


def _idle(get: Callable[..., Any]) -> Callable[..., Any]:
    """A function that gives what another one does, optimizers or schedulers, with steps of no effect."""

    def idle(*args: Any, **kwargs: Any) -> Any:
        found = get(*args, **kwargs)
        return [_Idle(each) for each in found] if isinstance(found, list) else found and _Idle(found)

    return idle


class _Idle:
    """An optimizer or scheduler that can be read, and does nothing."""

    _actions = ("zero_grad", "toggle_model", "untoggle_model", "load_state_dict")

    def __init__(self, real: Any) -> None:
        self._real = real

    def step(self, closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        """Where a closure runs the model it must be called."""
        return closure() if callable(closure) else None

    def __getattr__(self, name: str) -> Any:
        return _ignore if name in self._actions else getattr(self._real, name)
