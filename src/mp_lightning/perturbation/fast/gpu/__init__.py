"""The fast path on a GPU, in Triton kernels: forward and backward as a sequence of launches."""

from typing import Any

import torch
import triton
from torch import Tensor

from mp_lightning.perturbation import mathematics
from mp_lightning.perturbation.fast import statistics as in_torch
from mp_lightning.perturbation.fast.call import Call, Forward, Numbers
from mp_lightning.perturbation.fast.gpu import backward as back
from mp_lightning.perturbation.fast.gpu import forward as ahead
from mp_lightning.perturbation.fast.gpu import statistics
from mp_lightning.perturbation.mathematics import Moments
from mp_lightning.perturbation.phi import FEATURES, Phi

_ELEMENTS = 1024  # of a tile
_TILES = 65_535  # that the second axis of a grid can have
_STATISTICS = {"BB": 128, "BC": 4}  # samples and channels that a program of the statistics sees at a time


class _Maps:
    """Feature maps as the kernels see them: dense, in whichever order of channels and pixels they came."""

    def __init__(self, x: Tensor) -> None:
        batch, channels, height, width = x.shape
        channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.x = self.dense(x)
        self.batch, self.pixels = batch, height * width
        strides = (1, channels) if channels_last else (self.pixels, 1)
        self.geometry = (channels, height, width, channels * self.pixels, *strides)
        limit_c, limit_p = triton.next_power_of_2(channels), triton.next_power_of_2(self.pixels)
        if channels_last:
            bc = min(limit_c, 64)
            bp = min(limit_p, _ELEMENTS // bc)
        else:
            bp = min(limit_p, 256)
            bc = min(limit_c, _ELEMENTS // bp)
        bp = max(bp, triton.next_power_of_2(triton.cdiv(self.pixels, _TILES)))
        bc = min(bc, max(1, _ELEMENTS // bp))
        self.blocks = {"BP": bp, "BC": bc}
        self.tiles, self.channel_tiles = triton.cdiv(self.pixels, bp), triton.cdiv(channels, bc)
        self.over_pixels = (batch, self.tiles)
        self.over_all = (batch, self.tiles, self.channel_tiles)
        # float16 has too small a range for the products in between.
        self.between = torch.float32 if x.dtype == torch.float16 else x.dtype

    def dense(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=self.format)

    def like(self, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty_like(self.x, dtype=dtype)

    def plane(self) -> Tensor:
        """One number a pixel, over all channels."""
        return self.x.new_empty((self.batch, self.pixels), dtype=torch.float32)

    def numbers(self, *shape: int) -> Tensor:
        return self.x.new_empty(shape, dtype=torch.float32)


def forward(x: Tensor, phi: Phi, running: Moments, numbers: Numbers, eps: Tensor | None, call: Call) -> Forward:
    """y and what the backward needs; see :class:`Forward`."""
    y = torch.empty_like(x)
    maps, phi = _Maps(x), Phi(*(value.contiguous() for value in phi))
    channels = x.shape[1]
    partial = maps.numbers(maps.batch, maps.tiles, channels, FEATURES) if call.training else maps.x
    mean = maps.plane()
    _pool(maps, phi, mean, partial, maps.x, pool=call.training)
    used, scale, responses, then = _scale(maps, phi, running, numbers, partial, call)
    hidden, hidden_mean = _hidden(maps, phi, mean)
    hits = torch.zeros(0 if call.training else maps.batch, dtype=torch.int64, device=x.device)
    out = y if _same_strides(y, maps.x) else maps.like()
    ahead.output_pass[maps.over_all](
        *(maps.x, hidden, hidden_mean, phi.op2_identity, phi.op2_all, scale, then, _given(maps, eps), out, hits),
        *(*maps.geometry, call.clip, *call.key),
        **_draw(call, eps),
        COUNT=not call.training,
        **maps.blocks,
    )
    if out is not y:
        y.copy_(out)
    return Forward(y, used.mean, used.var, scale, responses, then, hits)


def backward(
    gy: Tensor, x: Tensor, phi: Phi, saved: Forward, eps: Tensor | None, call: Call, needs_x: bool, needs_phi: bool
) -> tuple[Tensor | None, Phi | None]:
    """Gradients of x and of phi, each only where it is needed."""
    result = torch.empty_like(x) if needs_x else None
    maps, phi = _Maps(x), Phi(*(value.contiguous() for value in phi))
    channels = maps.geometry[0]
    options = {"NEEDS_PHI": needs_phi, **maps.blocks}
    mean, gates = maps.plane(), maps.like(torch.uint8) if call.training else maps.x
    _pool(maps, phi, mean, maps.x, gates, pool=False, gates_wanted=call.training)
    hidden, hidden_mean = _hidden(maps, phi, mean)
    gx = result if result is not None and _same_strides(result, maps.x) else maps.like()
    galpha, galpha_sum, hidden_sum = maps.like(maps.between), maps.plane(), maps.plane()
    gscale = maps.numbers(maps.batch, maps.tiles, channels)
    gfilters = maps.numbers(maps.batch, maps.tiles, 36) if needs_phi else gscale
    back.output_backward[maps.over_pixels](
        *(maps.x, maps.dense(gy), hidden, hidden_mean, phi.op2_identity, phi.op2_all, saved.scale, saved.numbers),
        *(_given(maps, eps), gx, galpha, galpha_sum, gscale, gfilters, *maps.geometry, call.clip, *call.key),
        **_draw(call, eps),
        NEEDS_X=needs_x,
        **options,
    )
    gresponses, gweight = _scale_backward(maps, phi, saved, gscale, call)
    back.hidden_backward[maps.over_pixels](
        *(maps.x, mean, galpha, galpha_sum, phi.op2_identity, phi.op2_all, hidden, hidden_sum, gfilters),
        *maps.geometry,
        **options,
    )
    pooled = call.training
    gkernels = maps.numbers(*maps.over_all, 36) if needs_phi and pooled else gscale
    if needs_x or (needs_phi and pooled):
        back.input_backward[maps.over_all](
            *(maps.x, gates, gresponses, hidden, hidden_sum, phi.op1_identity, phi.op1_all, phi.scale_kernels),
            *(gx, gkernels, *maps.geometry),
            POOL=pooled,
            NEEDS_X=needs_x,
            **options,
        )
    if result is not None and gx is not result:
        result.copy_(gx)
    if not needs_phi:
        return result, None
    kernels = gkernels.sum(dim=(0, 1, 2)) if pooled else maps.numbers(36).zero_()
    op1_identity, op1_all, op2_identity, op2_all = gfilters.sum(dim=(0, 1)).view(4, 3, 3)
    weight = gweight.view(-1, 10).sum(dim=0)
    return result, Phi(op1_identity, op1_all, op2_identity, op2_all, kernels.view(FEATURES, 3, 3), weight)


def record(running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, momentum: float) -> None:
    """Running averages of the moments, in place."""
    statistics.record_pass[(1,)](running_mean, running_var, mean, var, mean.numel(), momentum, BLOCK=1024)


def _pool(
    maps: _Maps, phi: Phi, mean: Tensor, partial: Tensor, gates: Tensor, *, pool: bool, gates_wanted: bool = False
) -> None:
    ahead.pool_pass[maps.over_pixels](
        *(maps.x, phi.scale_kernels, mean, partial, gates, *maps.geometry),
        POOL=pool,
        GATES=gates_wanted,
        **maps.blocks,
    )


def _hidden(maps: _Maps, phi: Phi, mean: Tensor) -> tuple[Tensor, Tensor]:
    hidden, hidden_mean = maps.like(maps.between), maps.plane()
    ahead.hidden_pass[maps.over_pixels](
        *(maps.x, mean, phi.op1_identity, phi.op1_all, hidden, hidden_mean, *maps.geometry), **maps.blocks
    )
    return hidden, hidden_mean


def _scale(
    maps: _Maps, phi: Phi, running: Moments, numbers: Numbers, partial: Tensor, call: Call
) -> tuple[Moments, Tensor, Tensor, Tensor]:
    channels, height, width = maps.geometry[:3]
    then = maps.x.new_empty(3, dtype=torch.float64)
    scale, used = maps.numbers(channels), Moments(maps.numbers(channels, FEATURES), maps.numbers(channels, FEATURES))
    responses = maps.numbers(*((maps.batch, channels, FEATURES) if call.training else (0,)))
    statistics.scale_pass[(triton.cdiv(channels, _STATISTICS["BC"]),)](
        *(partial, running.mean, running.var, phi.scale_weight, *numbers, *used, scale, responses, then),
        *(maps.batch, channels, height, width, maps.tiles, call.channel_norm),
        TRAINING=call.training,
        **_STATISTICS,
    )
    if call.training and call.synchronize:
        used = in_torch.moments(responses, running.var, True)
        relative_size = (height / then[1]).float()
        scale = mathematics.scale(used, phi, channels / call.channel_norm, relative_size).flatten()
    return used, scale, responses, then


def _scale_backward(maps: _Maps, phi: Phi, saved: Forward, gscale: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    channels, height = maps.geometry[:2]
    if call.training and call.synchronize:
        used = Moments(saved.mean, saved.var)
        sizes = (channels / call.channel_norm, (height / saved.numbers[1]).float())
        total = gscale.sum(dim=(0, 1))
        gmoments, gweight = in_torch.scale_backward(total, used, saved.scale, phi.scale_weight, *sizes)
        return in_torch.moments_backward(gmoments, saved.responses, used, True).contiguous(), gweight
    programs = triton.cdiv(channels, _STATISTICS["BC"])
    gresponses, gweight = torch.empty_like(saved.responses), maps.numbers(programs, 10)
    statistics.scale_backward[(programs,)](
        *(gscale, saved.mean, saved.var, saved.scale, phi.scale_weight, saved.responses, saved.numbers),
        *(gresponses, gweight, maps.batch, channels, height, maps.tiles, call.channel_norm),
        TRAINING=call.training,
        **_STATISTICS,
    )
    return gresponses, gweight


def _given(maps: _Maps, eps: Tensor | None) -> Tensor:
    return maps.x if eps is None else maps.dense(eps)


def _draw(call: Call, eps: Tensor | None) -> dict[str, Any]:
    return {"SAMPLED": call.sampled, "GIVEN": eps is not None, "PER_CHANNEL": call.per_channel}


def _same_strides(a: Tensor, b: Tensor) -> bool:
    return a.stride() == b.stride()
