"""The versions of Python and of the libraries that decide results, for reports and cards."""

import platform
from importlib.metadata import version

_LIBRARIES = ("mp_lightning", "torch", "lightning", "torchvision")


def versions() -> dict[str, str]:
    """By name."""
    return {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}}
