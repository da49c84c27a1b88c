"""Which devices have a fast path here, and why one has none."""

import functools
import importlib
import importlib.util
import math
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import get_args

import torch

from mp_lightning.perturbation import mathematics
from mp_lightning.perturbation.fast import cpu
from mp_lightning.perturbation.fast.build import BuildError
from mp_lightning.perturbation.fast.call import Call, Numbers
from mp_lightning.perturbation.mathematics import Moments
from mp_lightning.perturbation.noise import NoiseKey, NoisePer
from mp_lightning.perturbation.phi import Phi, initial_phi

_TOLERANCE = 1e-4
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
        return _refuse(str(error))
    return _computes_rightly(torch.device("cpu"))


@functools.cache
def _gpu_is_usable() -> bool:
    if importlib.util.find_spec("triton") is None:
        return _refuse("Triton is not installed; install the package 'triton' (on Linux torch brings it)")
    major, minor = torch.cuda.get_device_capability()
    if torch.version.hip is None and (major, minor) < _CAPABILITY:
        needed = ".".join(map(str, _CAPABILITY))
        return _refuse(f"this GPU is of compute capability {major}.{minor}, and Triton needs {needed}")
    return _computes_rightly(torch.device("cuda", torch.cuda.current_device()))


def _computes_rightly(device: torch.device) -> bool:
    """Whether the kernels that a compiler has just made here give the numbers of the reference, on a small map."""
    try:
        # The first use may be inside autocast, or traced with tensors that hold no numbers, as by torch.export. Both
        # are modes of a thread, so that one of its own is in neither.
        with ThreadPoolExecutor(1) as thread:
            error = thread.submit(_error_on_a_small_map, backend_for(device), device).result()
    except Exception as failure:  # of the many kinds that compilers and drivers raise
        first = (str(failure).strip().splitlines() or [""])[0][:200]
        return _refuse(f"its kernels fail on this {device.type.upper()} ({type(failure).__name__}: {first})")
    return error < _TOLERANCE or _refuse(f"its kernels are off by {error:.1e} on this {device.type.upper()}")


@torch.no_grad()
def _error_on_a_small_map(backend: ModuleType, device: torch.device) -> float:
    """The largest difference to the reference, relative to its largest value; the backward has only to run."""
    x = torch.linspace(-2, 2, 2 * 3 * 4 * 5, dtype=torch.float32, device=device).view(2, 3, 4, 5)
    phi = Phi(*(10 * value.to(device) for value in initial_phi(0)))
    running = Moments(x.new_zeros(3, 4), x.new_ones(3, 4))
    numbers = Numbers(x.new_tensor(1.0), x.new_tensor(4.0), torch.tensor(7, device=device))
    moments = mathematics.batch_moments(mathematics.pooled_responses(x, phi.scale_kernels))
    assert moments is not None
    errors = []
    for per in get_args(NoisePer):
        call = Call(3.0, math.inf, (5, 6, 0, 1), True, sampled=True, synchronize=False, per_channel=per == "channel")
        with torch.cuda.device_of(x):
            out = backend.forward(x, phi, running, numbers, None, call)
            backend.backward(x, x, phi, out, None, call, True, True)
        z = mathematics.noise(mathematics.noise_location(x, phi), NoiseKey(5, 6, numbers.forward).draw(x, per))
        expected = x * mathematics.scale(moments, phi, 1.0, 1.0) * z
        errors.append(float((out.y - expected).abs().max() / expected.abs().max()))
    return max(errors)


def _refuse(reason: str) -> bool:
    """False, having said why."""
    warnings.warn(
        f"MetaPerturb: the slower reference path computes the perturbation, since {reason}; path='reference' chooses "
        "it without this warning",
        stacklevel=2,
    )
    return False
