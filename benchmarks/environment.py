"""What a measurement was made with."""

import platform
from importlib.metadata import version
from pathlib import Path

import torch


def describe(device: str = "cpu") -> str:
    """Versions, processor or GPU, and threads, in one line."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning"))
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{_processor()}, {torch.get_num_threads()} threads"
    return f"Python {platform.python_version()}, {packages}, {machine}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{platform.machine()} CPU ({name})" if name else f"{platform.machine()} CPU"
