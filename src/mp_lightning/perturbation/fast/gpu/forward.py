"""Forward in three passes over x: means over channels and pooled responses, the first layer, and the output."""

import triton
import triton.language as tl

from mp_lightning.perturbation.fast.gpu.tiles import filtered, multiplier, neighbour, pixel_tile, rectified


@triton.jit
def pool_pass(
    x, kernels, mean, responses, gates,
    C, H, W, stride_b, stride_c, stride_p,
    POOL: tl.constexpr, GATES: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Mean over channels, (B, HW).

    With POOL, sums over the tile of the responses, (B, tiles, C, 4). With GATES, one byte for each element of x whose
    bit k says whether response k is positive. Grid (B, tiles).
    """
    b, tile, tiles = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    p, h, w, in_map = pixel_tile(tile, H, W, BP)
    h, w = h[:, None], w[:, None]
    total = tl.zeros((BP,), tl.float32)
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)
        exists = in_map[:, None] & (c < C)[None, :]
        at = p[:, None] * stride_p + c[None, :] * stride_c
        sample = x + b * stride_b
        total += tl.sum(tl.load(sample + at, mask=exists, other=0).to(tl.float32), axis=1)
        if POOL or GATES:
            r0 = tl.zeros((BP, BC), tl.float32)
            r1 = tl.zeros((BP, BC), tl.float32)
            r2 = tl.zeros((BP, BC), tl.float32)
            r3 = tl.zeros((BP, BC), tl.float32)
            for j in tl.static_range(9):
                v = neighbour(sample, at, stride_p, h, w, H, W, exists, j)
                r0 += tl.load(kernels + j) * v
                r1 += tl.load(kernels + 9 + j) * v
                r2 += tl.load(kernels + 18 + j) * v
                r3 += tl.load(kernels + 27 + j) * v
            if POOL:
                to = responses + ((b * tiles + tile) * C + c) * 4
                tl.store(to + 0, tl.sum(tl.where(exists, rectified(r0), 0.0), axis=0), mask=c < C)
                tl.store(to + 1, tl.sum(tl.where(exists, rectified(r1), 0.0), axis=0), mask=c < C)
                tl.store(to + 2, tl.sum(tl.where(exists, rectified(r2), 0.0), axis=0), mask=c < C)
                tl.store(to + 3, tl.sum(tl.where(exists, rectified(r3), 0.0), axis=0), mask=c < C)
            if GATES:
                bits = (r0 > 0).to(tl.uint8) + (r1 > 0).to(tl.uint8) * 2
                bits += (r2 > 0).to(tl.uint8) * 4 + (r3 > 0).to(tl.uint8) * 8
                tl.store(gates + b * stride_b + at, bits, mask=exists)
    tl.store(mean + b * H * W + p, total / C, mask=in_map)


@triton.jit
def hidden_pass(
    x, mean, op1_identity, op1_all, hidden, hidden_mean,
    C, H, W, stride_b, stride_c, stride_p,
    BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The first layer and its ReLU, like x, and its mean over channels, (B, HW). Grid (B, tiles)."""
    b = tl.program_id(0).to(tl.int64)
    p, h, w, in_map = pixel_tile(tl.program_id(1), H, W, BP)
    shared = filtered(mean + b * H * W, p, 1, h, w, H, W, in_map, op1_all, False)
    total = tl.zeros((BP,), tl.float32)
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)
        exists = in_map[:, None] & (c < C)[None, :]
        at = p[:, None] * stride_p + c[None, :] * stride_c
        own = filtered(x + b * stride_b, at, stride_p, h[:, None], w[:, None], H, W, exists, op1_identity, False)
        v = tl.where(exists, rectified(own + shared[:, None]), 0.0)
        tl.store(hidden + b * stride_b + at, v, mask=exists)
        total += tl.sum(v, axis=1)
    tl.store(hidden_mean + b * H * W + p, total / C, mask=in_map)


@triton.jit(do_not_specialize=["seed", "stream", "rank", "world"])
def output_pass(
    x, hidden, hidden_mean, op2_identity, op2_all, scale, numbers, eps, y, hits,
    C, H, W, stride_b, stride_c, stride_p, clip, seed, stream, rank, world,
    SAMPLED: tl.constexpr, GIVEN: tl.constexpr, PER_CHANNEL: tl.constexpr,
    COUNT: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y; with COUNT, the number of elements that reached the bound in hits (B,). Grid (B, tiles, channel tiles)."""
    b = tl.program_id(0).to(tl.int64)
    p, h, w, in_map = pixel_tile(tl.program_id(1), H, W, BP)
    c = tl.program_id(2) * BC + tl.arange(0, BC)
    exists = in_map[:, None] & (c < C)[None, :]
    at = p[:, None] * stride_p + c[None, :] * stride_c
    coeff = tl.load(numbers).to(tl.float32)
    forward = tl.load(numbers + 2).to(tl.int64)
    shared = filtered(hidden_mean + b * H * W, p, 1, h, w, H, W, in_map, op2_all, False)
    own = filtered(hidden + b * stride_b, at, stride_p, h[:, None], w[:, None], H, W, exists, op2_identity, False)
    z, _ = multiplier(
        own + shared[:, None], eps + b * stride_b, at, c[None, :], p[:, None], H * W, exists,
        b * world + rank, seed, stream, forward, SAMPLED, GIVEN, PER_CHANNEL,
    )  # fmt: skip
    s = tl.load(scale + c, mask=c < C, other=0)[None, :]
    v = tl.load(x + b * stride_b + at, mask=exists, other=0).to(tl.float32)
    out = v * tl.where(coeff == 0, 1.0, 1.0 + coeff * (s * z - 1.0))
    bound = tl.where(coeff > 0, clip, float("inf"))
    out = tl.where(out > bound, bound, out)
    tl.store(y + b * stride_b + at, out, mask=exists)
    if COUNT:
        reached = tl.sum((exists & (out >= bound)).to(tl.int64))
        tl.atomic_add(hits + b, tl.where(coeff > 0, reached, 0))
