"""From a section of the configuration to a settings object, with every value checked."""

import dataclasses
import difflib
import types
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf

from mp_lightning.errors import ConfigurationError

T = TypeVar("T")
_LARGEST = 3.4e38  # that float32 holds
_SMALLEST_IMAGES = 8


def settings(cls: type[T], section: dict[str, Any], name: str) -> T:
    """An instance of the dataclass ``cls`` from the section called ``name``, which holds its fields and nothing else.

    Integers must be positive, other numbers finite and not negative; None only where the field allows it.

    Raises:
        ConfigurationError: a value is missing or of the wrong kind, or a key unknown; the message names the key.
    """
    hints = get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    check_keys(section, names, f"{name}.")
    return cls(**{key: check(section.get(key), hints[key], f"{name}.{key}") for key in names})


def check_top_level(config: DictConfig, known: Sequence[str]) -> None:
    """Refuse a key at the top that nothing reads, but Hydra's.

    Raises:
        ConfigurationError: a key is unknown; the message names the nearest one.
    """
    check_keys([str(key) for key in config if key != "hydra"], known)


def plain(config: DictConfig) -> dict[str, Any]:
    """All of a configuration as dictionaries and lists; what is missing is '???'."""
    values: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
    return {str(key): value for key, value in values.items()}


def check_image_size(value: Any, key: str) -> int:
    """A side of images in pixels.

    Raises:
        ConfigurationError: it is none that networks take; the message names the key.
    """
    size: int = check(value, int, key)
    if size < _SMALLEST_IMAGES:
        raise ConfigurationError(f"{key}={size} is too small; give at least {_SMALLEST_IMAGES} pixels")
    return size


def plain_section(config: DictConfig, name: str) -> dict[str, Any]:
    """A section of the configuration as a dictionary.

    Raises:
        ConfigurationError: there is no such section.
    """
    section = config.get(name)
    if not OmegaConf.is_dict(section):
        raise ConfigurationError(
            f"{name}={section} is not a section of settings; leave '{name}' as it is, or set its keys"
        )
    values = OmegaConf.to_container(section, resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def check_keys(given: Iterable[str], known: Sequence[str], prefix: str = "") -> None:
    """Refuse a key that nothing reads.

    Raises:
        ConfigurationError: a key is unknown; the message names the nearest one.
    """
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean '{prefix}{near[0]}'?" if near else f"there are {', '.join(prefix + k for k in known)}"
            raise ConfigurationError(f"unknown key '{prefix}{key}'; {hint}")


def check_choice(value: str, choices: Sequence[str], key: str) -> str:
    """``value``, if it is one of ``choices``.

    Raises:
        ConfigurationError: it is not; the message lists them.
    """
    if value not in choices:
        raise ConfigurationError(f"{key}={value} is unknown; use one of {', '.join(choices)}")
    return value


def check(value: Any, kind: Any, key: str) -> Any:
    """``value`` as ``kind``: int, float, str, bool, one of them or None, or a Literal; else an error names ``key``."""
    if get_origin(kind) is Literal:
        return check_choice(value, get_args(kind), key)
    optional = isinstance(kind, types.UnionType)
    if optional:
        if value is None:
            return None
        kind = next(part for part in get_args(kind) if part is not type(None))
    good = isinstance(value, kind) if kind in (str, bool) else not isinstance(value, bool)
    if kind is int:
        good = good and isinstance(value, int) and value > 0
    elif kind is float:
        good = good and isinstance(value, int | float) and 0 <= value <= _LARGEST
    if not good:
        wanted = {
            int: "a positive whole number",
            float: "a finite number from 0",
            str: "a text",
            bool: "true or false",
        }
        raise ConfigurationError(f"{key}={value} cannot be used; give {wanted[kind]}{', or null' if optional else ''}")
    return float(value) if kind is float else value
