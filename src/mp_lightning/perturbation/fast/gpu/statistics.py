"""From pooled responses to the scale of each channel and back, each in one launch (see fast/statistics.py)."""

import triton
import triton.language as tl


@triton.jit
def scale_pass(
    partial, running_mean, running_var, weight, coeff, input_size, forward,
    mean, var, scale, responses, numbers,
    B, C, H, W, tiles, channel_norm,
    TRAINING: tl.constexpr, BB: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The moments, (C, 4), the scale, (C,), and the responses, (B, C, 4), out of their sums, (B, tiles, C, 4).

    The scalars are kept as they are in ``numbers``. Grid (C / BC).
    """
    c, k = tl.program_id(0) * BC + tl.arange(0, BC), tl.arange(0, 4)
    at = c[:, None] * 4 + k[None, :]
    inside = (c < C)[:, None] & (k < 4)[None, :]
    size = tl.load(input_size)
    used_mean = tl.load(running_mean + at, mask=inside, other=0)
    used_var = tl.load(running_var + at, mask=inside, other=0)
    if TRAINING:
        total = tl.zeros((BC, 4), tl.float32)
        for start in range(0, B, BB):
            response, place, exists = some_responses(partial, start, c, k, B, C, H * W, tiles, BB, BC)
            tl.store(responses + place, response, mask=exists)
            total += tl.sum(response, axis=0)
        used_mean = total / B
        squares = tl.zeros((BC, 4), tl.float32)
        for start in range(0, B, BB):
            response, place, exists = some_responses(partial, start, c, k, B, C, H * W, tiles, BB, BC)
            deviation = tl.where(exists, response - used_mean[None, :, :], 0.0)
            squares += tl.sum(deviation * deviation, axis=0)
        used_var = tl.where(B > 1, squares / tl.maximum(B - 1, 1), used_var)
    tl.store(mean + at, used_mean, mask=inside)
    tl.store(var + at, used_var, mask=inside)
    logit = tl.sum(used_mean * tl.load(weight + k)[None, :] + used_var * tl.load(weight + 4 + k)[None, :], axis=1)
    logit += C / channel_norm * tl.load(weight + 8) + H / size * tl.load(weight + 9)
    tl.store(scale + c, 1.0 / (1.0 + tl.exp(-logit)), mask=c < C)
    if tl.program_id(0) == 0:
        tl.store(numbers + 0, tl.load(coeff).to(tl.float64))
        tl.store(numbers + 1, size.to(tl.float64))
        tl.store(numbers + 2, (tl.load(forward) & 0xFFFFFFFF).to(tl.float64))


@triton.jit
def some_responses(partial, start, c, k, B, C, HW, tiles, BB: tl.constexpr, BC: tl.constexpr):
    """Responses of BB samples, (BB, BC, 4), their places in (B, C, 4), and which of them exist."""
    b = (start + tl.arange(0, BB)).to(tl.int64)[:, None, None]  # times all the others it passes 32 bits
    column = c[None, :, None] * 4 + k[None, None, :]
    exists = (b < B) & (c[None, :, None] < C) & (k[None, None, :] < 4)
    total = tl.zeros((BB, BC, 4), tl.float32)
    for tile in range(0, tiles):
        total += tl.load(partial + (b * tiles + tile) * C * 4 + column, mask=exists, other=0)
    return total / HW, b * C * 4 + column, exists


@triton.jit
def scale_backward(
    gscale, mean, var, scale, weight, responses, numbers, gresponses, gweight,
    B, C, H, tiles, channel_norm,
    TRAINING: tl.constexpr, BB: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Gradients of the responses, (B, C, 4), and of the ten weights, (programs, 10). Grid (C / BC)."""
    c, k = tl.program_id(0) * BC + tl.arange(0, BC), tl.arange(0, 4)
    at = c[:, None] * 4 + k[None, :]
    inside = (c < C)[:, None] & (k < 4)[None, :]
    total = tl.zeros((BC,), tl.float32)
    for start in range(0, B * tiles, BB):
        row = (start + tl.arange(0, BB)).to(tl.int64)[:, None]
        exists = (row < B * tiles) & (c < C)[None, :]
        total += tl.sum(tl.load(gscale + row * C + c[None, :], mask=exists, other=0), axis=0)
    s = tl.load(scale + c, mask=c < C, other=0)
    glogit = total * s * (1.0 - s)
    used_mean = tl.load(mean + at, mask=inside, other=0)
    used_var = tl.load(var + at, mask=inside, other=0)
    to = gweight + tl.program_id(0) * 10
    tl.store(to + k, tl.sum(glogit[:, None] * used_mean, axis=0))
    tl.store(to + 4 + k, tl.sum(glogit[:, None] * used_var, axis=0))
    whole = tl.sum(glogit)
    tl.store(to + 8, whole * C / channel_norm)
    tl.store(to + 9, whole * H / tl.load(numbers + 1).to(tl.float32))
    if TRAINING:
        gmean = glogit[:, None] * tl.load(weight + k)[None, :] / B
        gvar = glogit[:, None] * tl.load(weight + 4 + k)[None, :] * tl.where(B > 1, 2.0 / tl.maximum(B - 1, 1), 0.0)
        for start in range(0, B, BB):
            b = (start + tl.arange(0, BB)).to(tl.int64)[:, None, None]
            place = b * C * 4 + at[None, :, :]
            exists = (b < B) & inside[None, :, :]
            response = tl.load(responses + place, mask=exists, other=0)
            g = gmean[None, :, :] + gvar[None, :, :] * (response - used_mean[None, :, :])
            tl.store(gresponses + place, g, mask=exists)


@triton.jit
def record_pass(running_mean, running_var, mean, var, count, momentum, BLOCK: tl.constexpr):
    """Running averages, both left as they are where anything that was measured is not finite. Grid (1)."""
    finite = tl.full((), 1, tl.int32)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        m = tl.load(mean + i, mask=i < count, other=0)
        v = tl.load(var + i, mask=i < count, other=0)
        finite = tl.minimum(finite, tl.min(((m - m == 0) & (v - v == 0)).to(tl.int32)))
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = (i < count) & (finite > 0)
        old_mean = tl.load(running_mean + i, mask=inside, other=0)
        old_var = tl.load(running_var + i, mask=inside, other=0)
        new_mean = tl.load(mean + i, mask=inside, other=0)
        new_var = tl.load(var + i, mask=inside, other=0)
        tl.store(running_mean + i, old_mean + momentum * (new_mean - old_mean), mask=inside)
        tl.store(running_var + i, old_var + momentum * (new_var - old_var), mask=inside)
