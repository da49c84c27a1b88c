"""Backward through the output, the layers and the pooling, after two passes of the forward were computed again."""

import triton
import triton.language as tl

from mp_lightning.perturbation.fast.gpu.tiles import filtered, multiplier, neighbour, pixel_tile


@triton.jit(do_not_specialize=["seed", "stream", "rank", "world"])
def output_backward(
    x, gy, hidden, hidden_mean, op2_identity, op2_all, scale, numbers, eps, gx, galpha, galpha_sum, gscale, gphi,
    C, H, W, stride_b, stride_c, stride_p, clip, seed, stream, rank, world,
    SAMPLED: tl.constexpr, GIVEN: tl.constexpr, PER_CHANNEL: tl.constexpr,
    NEEDS_X: tl.constexpr, NEEDS_PHI: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Gradients of alpha, like x, with its sum over channels, (B, HW), and of the scale, (B, tiles, C).

    gx receives the first of its three parts, through x as a factor of y.

    With NEEDS_PHI those of the second layer's filters, the last 18 of (B, tiles, 36). Grid (B, tiles).
    """
    b, tile, tiles = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    p, h, w, in_map = pixel_tile(tile, H, W, BP)
    coeff = tl.load(numbers).to(tl.float32)
    bound = tl.where(coeff > 0, clip, float("inf"))
    forward = tl.load(numbers + 2).to(tl.int64)
    shared = filtered(hidden_mean + b * H * W, p, 1, h, w, H, W, in_map, op2_all, False)
    total = tl.zeros((BP,), tl.float32)
    to_phi = gphi + (b * tiles + tile) * 36
    slot = tl.arange(0, 16)  # of which 9 are used
    of_filter = tl.zeros((16,), tl.float32)
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)
        exists = in_map[:, None] & (c < C)[None, :]
        at = p[:, None] * stride_p + c[None, :] * stride_c
        source = hidden + b * stride_b
        own = filtered(source, at, stride_p, h[:, None], w[:, None], H, W, exists, op2_identity, False)
        z, slope = multiplier(
            own + shared[:, None], eps + b * stride_b, at, c[None, :], p[:, None], H * W, exists,
            b * world + rank, seed, stream, forward, SAMPLED, GIVEN, PER_CHANNEL,
        )  # fmt: skip
        s = tl.load(scale + c, mask=c < C, other=0)[None, :]
        v = tl.load(x + b * stride_b + at, mask=exists, other=0).to(tl.float32)
        g = tl.load(gy + b * stride_b + at, mask=exists, other=0).to(tl.float32)
        factor = 1.0 + coeff * (s * z - 1.0)
        g = tl.where(v * factor > bound, 0.0, g)
        gm = g * v * coeff
        ga = tl.where(exists, gm * s * slope, 0.0)
        tl.store(galpha + b * stride_b + at, ga, mask=exists)
        tl.store(gscale + (b * tiles + tile) * C + c, tl.sum(tl.where(exists, gm * z, 0.0), axis=0), mask=c < C)
        total += tl.sum(ga, axis=1)
        if NEEDS_X:
            tl.store(gx + b * stride_b + at, g * factor, mask=exists)
        if NEEDS_PHI:
            for j in tl.static_range(9):
                near = neighbour(source, at, stride_p, h[:, None], w[:, None], H, W, exists, j)
                of_filter += tl.where(slot == j, tl.sum(ga * near), 0.0)
    tl.store(galpha_sum + b * H * W + p, total, mask=in_map)
    if NEEDS_PHI:
        tl.store(to_phi + 18 + slot, of_filter, mask=slot < 9)
        for j in tl.static_range(9):
            near = neighbour(hidden_mean + b * H * W, p, 1, h, w, H, W, in_map, j)
            tl.store(to_phi + 27 + j, tl.sum(total * near))


@triton.jit
def hidden_backward(
    x, mean, galpha, galpha_sum, op2_identity, op2_all, hidden, hidden_sum, gphi,
    C, H, W, stride_b, stride_c, stride_p,
    NEEDS_PHI: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Gradient of the first layer's output before its ReLU, in place of ``hidden``, and its sum over channels, (B, HW).

    With NEEDS_PHI those of the first layer's filters, the first 18 of (B, tiles, 36). Grid (B, tiles).
    """
    b, tile, tiles = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    p, h, w, in_map = pixel_tile(tile, H, W, BP)
    shared = filtered(galpha_sum + b * H * W, p, 1, h, w, H, W, in_map, op2_all, True) / C
    total = tl.zeros((BP,), tl.float32)
    to_phi = gphi + (b * tiles + tile) * 36
    slot = tl.arange(0, 16)  # of which 9 are used
    of_filter = tl.zeros((16,), tl.float32)
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)
        exists = in_map[:, None] & (c < C)[None, :]
        at = p[:, None] * stride_p + c[None, :] * stride_c
        own = filtered(galpha + b * stride_b, at, stride_p, h[:, None], w[:, None], H, W, exists, op2_identity, True)
        gate = tl.load(hidden + b * stride_b + at, mask=exists, other=0) > 0
        g = tl.where(gate, own + shared[:, None], 0.0)
        tl.store(hidden + b * stride_b + at, g, mask=exists)
        total += tl.sum(g, axis=1)
        if NEEDS_PHI:
            for j in tl.static_range(9):
                near = neighbour(x + b * stride_b, at, stride_p, h[:, None], w[:, None], H, W, exists, j)
                of_filter += tl.where(slot == j, tl.sum(g * near), 0.0)
    tl.store(hidden_sum + b * H * W + p, total, mask=in_map)
    if NEEDS_PHI:
        tl.store(to_phi + slot, of_filter, mask=slot < 9)
        for j in tl.static_range(9):
            near = neighbour(mean + b * H * W, p, 1, h, w, H, W, in_map, j)
            tl.store(to_phi + 9 + j, tl.sum(total * near))


@triton.jit
def input_backward(
    x, gates, gresponses, ghidden, ghidden_sum, op1_identity, op1_all, kernels, gx, gkernels,
    C, H, W, stride_b, stride_c, stride_p,
    POOL: tl.constexpr, NEEDS_X: tl.constexpr, NEEDS_PHI: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Adds to gx what comes through the first layer and, with POOL, through the pooled responses.

    With POOL and NEEDS_PHI the gradients of the pooled filters, (B, tiles, channel tiles, 36).
    Grid (B, tiles, channel tiles).
    """
    b = tl.program_id(0).to(tl.int64)
    p, h, w, in_map = pixel_tile(tl.program_id(1), H, W, BP)
    h2, w2 = h[:, None], w[:, None]
    c = tl.program_id(2) * BC + tl.arange(0, BC)
    exists = in_map[:, None] & (c < C)[None, :]
    at = p[:, None] * stride_p + c[None, :] * stride_c
    if POOL:
        of_response = gresponses + (b * C + c) * 4
        g0 = tl.load(of_response + 0, mask=c < C, other=0)[None, :] / (H * W)
        g1 = tl.load(of_response + 1, mask=c < C, other=0)[None, :] / (H * W)
        g2 = tl.load(of_response + 2, mask=c < C, other=0)[None, :] / (H * W)
        g3 = tl.load(of_response + 3, mask=c < C, other=0)[None, :] / (H * W)
    if NEEDS_X:
        shared = filtered(ghidden_sum + b * H * W, p, 1, h, w, H, W, in_map, op1_all, True) / C
        total = filtered(ghidden + b * stride_b, at, stride_p, h2, w2, H, W, exists, op1_identity, True)
        total += shared[:, None] + tl.load(gx + b * stride_b + at, mask=exists, other=0).to(tl.float32)
        if POOL:
            for j in tl.static_range(9):
                bits = neighbour(gates + b * stride_b, at, stride_p, h2, w2, H, W, exists, j).to(tl.int32)
                total += tl.where(bits & 1 != 0, g0 * tl.load(kernels + 8 - j), 0.0)
                total += tl.where(bits & 2 != 0, g1 * tl.load(kernels + 17 - j), 0.0)
                total += tl.where(bits & 4 != 0, g2 * tl.load(kernels + 26 - j), 0.0)
                total += tl.where(bits & 8 != 0, g3 * tl.load(kernels + 35 - j), 0.0)
        tl.store(gx + b * stride_b + at, total, mask=exists)
    if POOL and NEEDS_PHI:
        program = (b * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2)
        to = gkernels + program * 36
        bits = tl.load(gates + b * stride_b + at, mask=exists, other=0).to(tl.int32)
        for j in tl.static_range(9):
            near = neighbour(x + b * stride_b, at, stride_p, h2, w2, H, W, exists, j)
            tl.store(to + j, tl.sum(tl.where(bits & 1 != 0, g0 * near, 0.0)))
            tl.store(to + 9 + j, tl.sum(tl.where(bits & 2 != 0, g1 * near, 0.0)))
            tl.store(to + 18 + j, tl.sum(tl.where(bits & 4 != 0, g2 * near, 0.0)))
            tl.store(to + 27 + j, tl.sum(tl.where(bits & 8 != 0, g3 * near, 0.0)))
