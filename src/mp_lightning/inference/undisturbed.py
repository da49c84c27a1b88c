"""Running training steps for their forward alone, without a trace in metrics, logs and data loaders."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def undisturbed(module: nn.Module, loaders: list[Any]) -> Iterator[None]:
    """Nothing that ``module`` logs is kept, and its metrics and the generators of the loaders come back as they were.

    Args:
        module: a LightningModule.
        loaders: that the steps take their batches from.
    """
    holders = (holder for loader in loaders for holder in (loader, getattr(loader, "sampler", None)))
    generators = {g: g.get_state() for g in (getattr(h, "generator", None) for h in holders) if g is not None}
    metrics: list[Any] = [m for m in module.modules() if hasattr(m, "metric_state")]  # those of torchmetrics
    states = [copy.deepcopy({**m.metric_state, "_update_count": m._update_count}) for m in metrics]
    module.__dict__["log"] = _ignore
    try:
        yield
    finally:
        del module.__dict__["log"]
        for metric, state in zip(metrics, states, strict=True):
            for name, value in state.items():
                setattr(metric, name, value)
            metric._computed = None
        for generator, state_ in generators.items():
            generator.set_state(state_)


def _ignore(*args: Any, **kwargs: Any) -> None:
    pass
