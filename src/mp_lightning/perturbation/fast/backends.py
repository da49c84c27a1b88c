"""Which devices have a fast path here, and why one has none."""

import functools
import importlib
import importlib.util
import warnings
from types import ModuleType

import torch

from mp_lightning.perturbation.fast import cpu
from mp_lightning.perturbation.fast.build import BuildError

_CAPABILITY = (7, 0)  # of the oldest GPUs that Triton compiles for


def backend_for(device: torch.device) -> ModuleType:
    """The module with ``forward``, ``backward`` and ``record`` for tensors on ``device``."""
    if device.type == "cpu":
        return cpu
    return importlib.import_module("mp_lightning.perturbation.fast.gpu")  # which needs Triton


@torch.compiler.assume_constant_result
def available(device_type: str, dtype: torch.dtype) -> bool:
    """Whether tensors of this kind have a fast path here. If something is missing for it, says so, once."""
    if device_type == "cpu" and dtype in cpu.DTYPES:
        return _cpu_is_usable()
    if device_type == "cuda" and dtype in (torch.float32, torch.float16, torch.bfloat16):
        return _gpu_is_usable()
    return False


@functools.cache
def _cpu_is_usable() -> bool:
    try:
        cpu.library()
    except BuildError as error:
        _warn(str(error))
        return False
    return True


@functools.cache
def _gpu_is_usable() -> bool:
    if importlib.util.find_spec("triton") is None:
        _warn("Triton is not installed; install the package 'triton' (on Linux torch brings it)")
        return False
    major, minor = torch.cuda.get_device_capability()
    if torch.version.hip is None and (major, minor) < _CAPABILITY:
        _warn(f"this GPU is of compute capability {major}.{minor}, and Triton needs {_CAPABILITY[0]}.{_CAPABILITY[1]}")
        return False
    return True


def _warn(reason: str) -> None:
    warnings.warn(
        f"MetaPerturb: the slower reference path computes the perturbation, since {reason}; path='reference' chooses "
        "it without this warning",
        stacklevel=2,
    )
