"""From a section of the configuration to a settings object, with every value checked."""

import dataclasses
import math
import types
from typing import Any, TypeVar, get_args, get_type_hints

from omegaconf import DictConfig, OmegaConf

from mp_lightning.errors import ConfigurationError

T = TypeVar("T")


def settings(cls: type[T], section: DictConfig, name: str) -> T:
    """An instance of the dataclass ``cls`` from the section called ``name``.

    Integers must be positive, other numbers finite and not negative; None only where the field allows it.

    Raises:
        ConfigurationError: a value is missing or of the wrong kind; the message names its key.
    """
    values = OmegaConf.to_container(section, resolve=True)
    assert isinstance(values, dict)
    hints = get_type_hints(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    return cls(**{f.name: check(values.get(f.name), hints[f.name], f"{name}.{f.name}") for f in fields})


def check(value: Any, kind: Any, key: str) -> Any:
    """``value`` as ``kind`` (int, float, str, bool or one of them or None), or a ConfigurationError that names ``key``."""
    optional = isinstance(kind, types.UnionType)
    if optional:
        if value is None:
            return None
        kind = next(part for part in get_args(kind) if part is not type(None))
    good = isinstance(value, kind) if kind in (str, bool) else not isinstance(value, bool)
    if kind is int:
        good = good and isinstance(value, int) and value > 0
    elif kind is float:
        good = good and isinstance(value, int | float) and math.isfinite(value) and value >= 0
    if not good:
        wanted = {int: "a positive whole number", float: "a number that is not negative", str: "a text", bool: "true or false"}
        raise ConfigurationError(f"{key}={value} is not {wanted[kind]}{' or null' if optional else ''}")
    return float(value) if kind is float else value
