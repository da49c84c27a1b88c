"""When the perturbation reaches its full strength: the horizon that the ramp is measured by, as a trainer knows it."""

import math
from typing import Any

from mp_lightning.errors import ConfigurationError


def total_training_batches(trainer: Any) -> int:
    """Number of training batches of the whole run, as a Lightning trainer knows it when training starts.

    Raises:
        ConfigurationError: it is not known (iterable data without a length, or a run that only ``max_time`` ends).
    """
    horizons: list[float] = []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        horizons.append(trainer.max_epochs * trainer.num_training_batches)
    # global_step counts optimizer steps; only automatic optimization fixes how many batches make one.
    if trainer.max_steps >= 0 and trainer.lightning_module.automatic_optimization:
        horizons.append(trainer.max_steps * trainer.accumulate_grad_batches)
    total = min(horizons, default=math.inf)
    if math.isinf(total):
        raise ConfigurationError(
            "the number of training batches is not known (data without a length, or a run that only max_time ends), so "
            "the ramp of the perturbation has no end; pass ramp_steps= to MetaPerturbCallback"
        )
    return int(total)
