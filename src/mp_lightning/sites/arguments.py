"""What is given to attach a perturbation, checked before anything is computed with it."""

from collections.abc import Collection
from numbers import Real
from typing import Any

from torch import nn

from mp_lightning.errors import ConfigurationError
from mp_lightning.perturbation import Perturbation


def whole_number(value: Any, name: str, least: int, what: str) -> int:
    """A whole number as one of Python, whatever kind of number it was given as.

    Args:
        value: that was given.
        name: of the argument.
        least: the smallest one.
        what: it counts, for the message, with what is special about ``least``.

    Raises:
        ConfigurationError: it is none, or too small; names the argument.
    """
    whole = isinstance(value, Real) and not isinstance(value, bool) and float(value).is_integer()
    if not whole or value < least:
        raise ConfigurationError(f"{name}={value!r}: give a whole number {what}")
    return int(value)


def check_one_of(value: Any, name: str, choices: Collection[str]) -> None:
    """Refuse what is none of the choices.

    Raises:
        ConfigurationError: names the argument, and lists them.
    """
    if value not in choices:
        raise ConfigurationError(f"{name}={value!r} is unknown; use one of {', '.join(choices)}")


def check_model(model: Any, what: str) -> None:
    """Refuse what is no module.

    Args:
        model: that was given.
        what: it was given to.

    Raises:
        ConfigurationError: says what it is.
    """
    if not isinstance(model, nn.Module):
        kind = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise ConfigurationError(f"{what} was given {kind}; give a torch.nn.Module that was made")


def check_arguments(
    *,
    perturbation: Any = None,
    clip: Any = None,
    seed: Any = None,
    input_size: Any = None,
    synchronize: Any = False,
    distributed: bool = True,
    total_steps: Any = None,
    ramp_steps: Any = None,
) -> None:
    """Refuse what the perturbation cannot be computed with; None is for what was not given.

    Raises:
        ConfigurationError: names the argument.
    """
    if isinstance(perturbation, type):
        raise ConfigurationError(f"perturbation={perturbation.__name__} is a class; give an object of it")
    if perturbation is not None and not isinstance(perturbation, Perturbation):
        raise ConfigurationError(
            f"perturbation={perturbation!r} has not the methods of mp_lightning.Perturbation; a phi goes by phi="
        )
    if clip is not None and not _above_0(clip):
        raise ConfigurationError(f"clip={clip!r}: give a bound above 0 for feature maps, or None for no bound")
    if seed is not None:
        whole_number(seed, "seed", 0, "from 0 on")
    if input_size is not None:
        whole_number(input_size, "input_size", 1, "of pixels, the height of the input, or None to take it from it")
    if not isinstance(synchronize, bool):
        raise ConfigurationError(
            f"sync_statistics (synchronize in attach) is {synchronize!r}; give True to take statistics over all "
            "processes, or False"
        )
    if synchronize and not distributed:
        raise ConfigurationError(
            "synchronize=True takes statistics over all processes, and distributed=False says that each trains a "
            "network of its own; leave one of them out"
        )
    if total_steps is not None:
        whole_number(total_steps, "total_steps", 0, "of training batches")
    if ramp_steps is not None:
        whole_number(ramp_steps, "ramp_steps", 0, "of batches, or 0 for no ramp")


def _above_0(value: Any) -> bool:
    try:
        return not isinstance(value, str | bool) and float(value) > 0
    except (TypeError, ValueError):
        return False
