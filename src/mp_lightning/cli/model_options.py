"""Keys that the verbs about one model have in common."""

import re

from omegaconf import DictConfig, OmegaConf

from mp_lightning.cli.options import check
from mp_lightning.errors import ConfigurationError


def required(config: DictConfig, key: str, example: str) -> str:
    """A text that must be given."""
    if OmegaConf.is_missing(config, key):
        raise ConfigurationError(f"{key} is missing; give one, for example {key}={example}")
    value: str = check(config[key], str, key)
    return value


def read_image(value: object) -> tuple[int, ...] | None:
    """(C, H, W) from CxHxW; (C, L) and (C, D, H, W) are read alike."""
    if value is None:
        return None
    if not isinstance(value, str) or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,3}", value):
        raise ConfigurationError(f"input={value} cannot be used; give the size of one image, such as 3x224x224")
    return tuple(map(int, value.split("x")))
