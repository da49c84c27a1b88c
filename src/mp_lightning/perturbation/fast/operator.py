"""The perturbation as one operator of torch, opaque to ``torch.compile``, with a fake and an autograd rule.

Only x and some numbers per channel are kept for the backward, which computes everything else again. The operators are
defined by ``torch.library.Library``, because ``torch.library.custom_op`` goes over the schema in Python at each call,
which costs as much as a small feature map.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mp_lightning.errors import ConfigurationError
from mp_lightning.perturbation.fast.backends import backend_for
from mp_lightning.perturbation.fast.call import Call, Forward, Numbers
from mp_lightning.perturbation.mathematics import Moments
from mp_lightning.perturbation.phi import FEATURES, SHAPES, Phi

_SIZES = [math.prod(shape) for shape in SHAPES.values()]
_CALL = "float channel_norm, float clip, int[] key, bool training, bool sampled, bool synchronize, bool per_channel"
_LIBRARY = torch.library.Library("mp_lightning", "DEF")
_LIBRARY.define(
    f"perturb(Tensor x, Tensor[] phi, Tensor[] running, Tensor[] numbers, Tensor? eps, {_CALL}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "perturb_backward(Tensor gy, Tensor x, Tensor[] phi, Tensor[] saved, Tensor? eps, "
    f"{_CALL}, bool needs_x, bool needs_phi) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "record(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, Tensor var, float momentum) -> ()"
)
_DEVICES = ("CPU", "CUDA")


def perturb(x: Tensor, phi: Phi, running: Moments, numbers: Numbers, eps: Tensor | None, call: Call) -> Forward:
    """y = min(x * (1 + coeff * (s * z - 1)), clip), or x where coeff is 0, differentiable once in x and in phi.

    Args:
        x: (B, C, H, W), of a dtype for which :func:`available` says that there is a fast path.
        phi: float32.
        running: running moments, float32 (C, 4).
        numbers: tensors without dimensions.
        eps: N(0, 1) noise like x, float32; None draws it by the key of ``call``.
        call: everything else.
    """
    return Forward(*torch.ops.mp_lightning.perturb(x, list(phi), list(running), list(numbers), eps, *call))


def record(running: Moments, measured: Moments, momentum: float) -> None:
    """Move the running moments towards the measured ones, in place and without asking the device for a number.

    Anything that is not finite in ``measured`` leaves them as they are.
    """
    torch.ops.mp_lightning.record(*running, *measured, momentum)


def _record(running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, momentum: float) -> None:
    with torch.cuda.device_of(mean):
        backend_for(mean.device).record(running_mean, running_var, mean, var, momentum)


def _forward(x: Tensor, phi: Sequence[Tensor], running: Any, numbers: Any, eps: Tensor | None, *call: Any) -> Forward:
    implementation = backend_for(x.device)
    with torch.cuda.device_of(x):
        given: Forward = implementation.forward(x, Phi(*phi), Moments(*running), Numbers(*numbers), eps, Call(*call))
    return given


def _fake(x: Tensor, phi: Any, running: Any, numbers: Any, eps: Any, *options: Any) -> Forward:
    batch, channels = x.shape[:2]
    training = Call(*options).training

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return x.new_empty(shape, dtype=dtype)

    return Forward(
        y=torch.empty_like(x),
        mean=empty(channels, FEATURES),
        var=empty(channels, FEATURES),
        scale=empty(channels),
        responses=empty(batch, channels, FEATURES) if training else empty(0),
        numbers=empty(3, dtype=torch.float64),
        hits=empty(0 if training else batch, dtype=torch.int64),
    )


def _backward(
    gy: Tensor, x: Tensor, phi: Sequence[Tensor], saved: Sequence[Tensor], eps: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of phi, all 82 numbers in one vector; each empty unless it is needed."""
    *call, needs_x, needs_phi = options
    mean, var, scale, responses, numbers = saved
    result = Forward(x, mean, var, scale, responses, numbers, x)
    with torch.cuda.device_of(x):
        gx, gphi = backend_for(x.device).backward(gy, x, Phi(*phi), result, eps, Call(*call), needs_x, needs_phi)
    return (
        x.new_empty(0) if gx is None else gx,
        scale.new_empty(0) if gphi is None else torch.cat([value.flatten() for value in gphi]),
    )


def _backward_fake(gy: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    needs_x, needs_phi = arguments[-2:]
    gphi = x.new_empty(sum(_SIZES) if needs_phi else 0, dtype=torch.float32)
    return torch.empty_like(x) if needs_x else x.new_empty(0), gphi


class _Perturb(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: Tensor | None, running: Any, numbers: Any, call: Any, *phi: Tensor) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            result = Forward(*torch.ops.mp_lightning.perturb(x, phi, running, numbers, eps, *call))
        ctx.mark_non_differentiable(*result[1:])
        ctx.set_materialize_grads(False)
        kept = (result.mean, result.var, result.scale, result.responses, result.numbers)
        ctx.save_for_backward(x, eps, *phi, *kept)
        ctx.call = call
        return tuple(result)

    @staticmethod
    def backward(ctx: Any, gy: Tensor | None, *_: Any) -> Any:
        x, eps, *rest = ctx.saved_tensors
        phi, saved = rest[: len(SHAPES)], rest[len(SHAPES) :]
        needs_x, needs_phi = ctx.needs_input_grad[0], any(ctx.needs_input_grad[5:])
        nothing = (None,) * len(ctx.needs_input_grad)
        if gy is None:
            return nothing
        gx, gphi = torch.ops.mp_lightning.perturb_backward(gy, x, phi, saved, eps, *ctx.call, needs_x, needs_phi)
        parts: Sequence[Tensor | None] = nothing[5:]
        if needs_phi:
            parts = [g.view(shape) for g, shape in zip(gphi.split(_SIZES), SHAPES.values(), strict=True)]
        return gx if needs_x else None, *nothing[1:5], *parts

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise ConfigurationError(
            "the fast path of the perturbation has no forward-mode derivative; attach with path='reference' to take one"
        )


class _PerturbBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rest: tuple[Any, ...], *tensors: Tensor) -> Any:
        gy, x, phi = tensors[0], tensors[1], tensors[2:]
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.mp_lightning.perturb_backward(gy, x, phi, *rest)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise ConfigurationError(
            "the fast path of the perturbation has no second derivative; attach with path='reference' to take one"
        )


def _differentiable(x: Tensor, phi: Any, running: Any, numbers: Any, eps: Tensor | None, *call: Any) -> Any:
    return _Perturb.apply(x, eps, running, numbers, call, *phi)


def _differentiable_backward(gy: Tensor, x: Tensor, phi: Any, *rest: Any) -> Any:
    return _PerturbBackward.apply(rest, gy, x, *phi)


for _device in _DEVICES:
    _LIBRARY.impl("perturb", _forward, _device)
    _LIBRARY.impl("perturb_backward", _backward, _device)
    _LIBRARY.impl("record", _record, _device)
_LIBRARY.impl("perturb", _differentiable, "Autograd")
_LIBRARY.impl("perturb_backward", _differentiable_backward, "Autograd")
torch.library.register_fake("mp_lightning::perturb", _fake, lib=_LIBRARY)
torch.library.register_fake("mp_lightning::perturb_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_fake("mp_lightning::record", lambda *arguments: None, lib=_LIBRARY)
