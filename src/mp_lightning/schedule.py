"""What the strength depends on, as a trainer knows it: the horizon that the ramp is measured by, and the loss."""

import math
from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any

from torch import Tensor

from mp_lightning.errors import ConfigurationError


def total_training_batches(trainer: Any) -> int:
    """Number of training batches of the whole run, as a Lightning trainer knows it when training starts.

    Raises:
        ConfigurationError: it is not known (iterable data without a length, a run that only ``max_time`` ends, or one
            that ``max_steps`` ends and whose module optimizes by hand).
    """
    horizons: list[float] = []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        horizons.append(trainer.max_epochs * trainer.num_training_batches)
    if trainer.max_steps >= 0:
        if not trainer.lightning_module.automatic_optimization:
            raise ConfigurationError(
                f"max_steps={trainer.max_steps} counts steps of optimizers, and a module that optimizes by hand may "
                "make any number of them in a batch, so the ramp of the perturbation has no end; pass ramp_steps= to "
                "MetaPerturbCallback"
            )
        horizons.append(_batches_until(trainer, trainer.max_steps))
    total = min(horizons, default=math.inf)
    if math.isinf(total):
        raise ConfigurationError(
            "the number of training batches is not known (data without a length, or a run that only max_time ends), so "
            "the ramp of the perturbation has no end; pass ramp_steps= to MetaPerturbCallback"
        )
    return int(total)


def batches_per_step(trainer: Any, total: int) -> float:
    """Number of batches whose gradients make one step of the optimizer, on average over so many training batches."""
    done = steps = 0.0
    for batches, accumulated in _epochs(trainer):
        taken = min(batches, total - done)
        if taken <= 0:
            break
        done += taken
        steps += math.ceil(taken / accumulated)
    return done / steps if steps else 1.0


def _batches_until(trainer: Any, steps: int) -> float:
    """Number of training batches in which the optimizer makes so many steps."""
    done = 0.0
    for batches, accumulated in _epochs(trainer):
        # The last batches of an epoch make a step of their own; data without an end are one epoch.
        if batches == 0 or math.isinf(batches) or steps <= math.ceil(batches / accumulated):
            break
        done, steps = done + batches, steps - math.ceil(batches / accumulated)
    return done + min(steps * accumulated, batches)


def _epochs(trainer: Any) -> Iterator[tuple[float, int]]:
    """Of one epoch after another: its training batches, and how many of them make one step of the optimizer."""
    schedulers = [c for c in trainer.callbacks if hasattr(c, "get_accumulate_grad_batches")]
    for epoch in count():
        accumulated = trainer.accumulate_grad_batches
        for scheduler in schedulers:
            accumulated = scheduler.get_accumulate_grad_batches(epoch)
        yield trainer.num_training_batches, accumulated


def training_loss(trainer: Any, outputs: Any) -> Tensor | None:
    """The loss of a training batch, of what Lightning hands to ``on_train_batch_end``; None where there is none."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    return loss.detach() * trainer.accumulate_grad_batches if isinstance(loss, Tensor) else None  # which divided it
