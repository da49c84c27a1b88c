"""What a measurement was made with."""

import platform
from importlib.metadata import version

import torch


def describe() -> str:
    """Versions, processor and threads, in one line."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning"))
    return (
        f"Python {platform.python_version()}, {packages}, {platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
