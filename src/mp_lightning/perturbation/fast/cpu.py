"""The fast path on a CPU: the compiled kernels, called by ctypes, and the statistics between them."""

import ctypes
import functools
import math
from typing import Any

import torch
from torch import Tensor

from mp_lightning.perturbation import mathematics
from mp_lightning.perturbation.fast import statistics
from mp_lightning.perturbation.fast.build import load_library
from mp_lightning.perturbation.fast.call import Call, Forward, Numbers
from mp_lightning.perturbation.mathematics import Moments
from mp_lightning.perturbation.phi import FEATURES, Phi

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_EXPECTED, _KEYED, _GIVEN = range(3)
_MASK = 0xFFFFFFFF

library = functools.cache(load_library)


class _Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "channels", "height", "width")]


class _Strength(ctypes.Structure):
    _fields_ = [("coeff", ctypes.c_float), ("clip", ctypes.c_float)]


class _Noise(ctypes.Structure):
    _fields_ = [
        ("mode", ctypes.c_int64),
        ("given", ctypes.c_void_p),
        ("key", ctypes.c_uint32 * 4),
        ("rank", ctypes.c_int64),
        ("world", ctypes.c_int64),
        ("per_channel", ctypes.c_int64),
    ]


def forward(x: Tensor, phi: Phi, running: Moments, numbers: Numbers, eps: Tensor | None, call: Call) -> Forward:
    """y and what the backward needs; see :class:`Forward`."""
    y = torch.empty_like(x)
    x, eps = x.contiguous(), _given(eps)
    responses = x.new_empty(0, dtype=torch.float32)
    used = Moments(running.mean.clone(), running.var.clone())
    if call.training:
        responses = x.new_empty(*x.shape[:2], FEATURES, dtype=torch.float32)
        _run("mp_pool", x, x, _shape(x), phi.scale_kernels.contiguous(), responses)
        used = statistics.moments(responses, running.var, call.synchronize)
    then = torch.tensor(
        [float(numbers.coeff), float(numbers.input_size), int(numbers.forward) & _MASK], dtype=torch.double
    )
    scale = mathematics.scale(used, phi, *_sizes(x, call, then)).flatten()
    hits = torch.empty(0 if call.training else len(x), dtype=torch.int64)
    out = y if y.is_contiguous() else torch.empty_like(x)
    settings = (_strength(call, then), _noise(call, then, eps))
    if then[0] == 0:  # x, whatever the multiplier
        out.copy_(x)
        hits.zero_()
    else:
        _run("mp_perturb", x, x, _shape(x), _filters(phi), scale, *settings, out, None if call.training else hits)
    if out is not y:
        y.copy_(out)
    return Forward(y, used.mean, used.var, scale, responses, then, hits)


def backward(
    gy: Tensor, x: Tensor, phi: Phi, saved: Forward, eps: Tensor | None, call: Call, needs_x: bool, needs_phi: bool
) -> tuple[Tensor | None, Phi | None]:
    """Gradients of x and of phi, each only where it is needed."""
    result = torch.empty_like(x) if needs_x else None
    x, gy, eps = x.contiguous(), gy.contiguous(), _given(eps)
    gx = result if result is None or result.is_contiguous() else torch.empty_like(x)
    gscale = x.new_empty(x.shape[:2], dtype=torch.float32)
    gfilters = x.new_empty(len(x), 4, 9, dtype=torch.float32) if needs_phi else None
    settings = (_strength(call, saved.numbers), _noise(call, saved.numbers, eps))
    _run(
        *("mp_perturb_backward", x, x, gy, _shape(x), _filters(phi), saved.scale, *settings),
        *(gx, gscale, gfilters),
    )
    used = Moments(saved.mean, saved.var)
    gmoments, gweight = statistics.scale_backward(
        gscale.sum(dim=0), used, saved.scale, phi.scale_weight, *_sizes(x, call, saved.numbers)
    )
    gkernels = None
    if call.training:
        gresponses = statistics.moments_backward(gmoments, saved.responses, used, call.synchronize).contiguous()
        gkernels = x.new_empty(len(x), FEATURES, 9, dtype=torch.float32) if needs_phi else None
        _run("mp_pool_backward", x, x, _shape(x), phi.scale_kernels.contiguous(), gresponses, gx, gkernels)
    if result is not None and gx is not None and gx is not result:
        result.copy_(gx)
    if gfilters is None:
        return result, None
    kernels = torch.zeros_like(phi.scale_kernels) if gkernels is None else gkernels.sum(dim=0).view(FEATURES, 3, 3)
    op1_identity, op1_all, op2_identity, op2_all = gfilters.sum(dim=0).view(4, 3, 3)
    return result, Phi(op1_identity, op1_all, op2_identity, op2_all, kernels, gweight)


def record(running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, momentum: float) -> None:
    """Running averages of the moments, in place; left as they are where anything that was measured is not finite."""
    if bool(mean.isfinite().all() & var.isfinite().all()):
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var, momentum)


def _given(eps: Tensor | None) -> Tensor | None:
    """The given noise as the kernels read it."""
    return None if eps is None else eps.float().contiguous()


def _run(name: str, x: Tensor, *arguments: Any) -> None:
    """Call the kernel for the dtype of x; tensors are passed as pointers, structures by reference.

    Raises:
        MemoryError: there is none for what the kernel keeps of a sample.
    """
    pointers = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in arguments]
    passed = [ctypes.byref(a) if isinstance(a, ctypes.Structure) else a for a in pointers]
    kernel, threads = getattr(library(), f"{name}_{DTYPES[x.dtype]}"), torch.get_num_threads()
    kernel.restype = ctypes.c_bool
    if not kernel(*passed, ctypes.c_int64(threads)):
        raise MemoryError(
            f"no memory is left to perturb maps of {'x'.join(map(str, x.shape[1:]))} on {threads} threads; allow fewer "
            "by torch.set_num_threads, or give smaller maps"
        )


def _shape(x: Tensor) -> _Shape:
    return _Shape(*x.shape)


def _sizes(x: Tensor, call: Call, numbers: Tensor) -> tuple[float, float]:
    return x.shape[1] / call.channel_norm, x.shape[2] / float(numbers[1])


def _strength(call: Call, numbers: Tensor) -> _Strength:
    coeff = float(numbers[0])
    return _Strength(coeff, call.clip if coeff > 0 else math.inf)


def _noise(call: Call, numbers: Tensor, eps: Tensor | None) -> _Noise:
    mode = _EXPECTED if not call.sampled else _KEYED if eps is None else _GIVEN
    seed, stream, rank, world = call.key
    key = (ctypes.c_uint32 * 4)(seed & _MASK, seed >> 32 & _MASK, stream, int(numbers[2]))
    return _Noise(mode, None if eps is None else eps.data_ptr(), key, rank, world, call.per_channel)


def _filters(phi: Phi) -> Tensor:
    return torch.cat([phi.op1_identity, phi.op1_all, phi.op2_identity, phi.op2_all])
