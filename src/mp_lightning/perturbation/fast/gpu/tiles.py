"""What the Triton kernels share: tiles of pixels by channels, 3x3 filters on them, and the noise of one tile.

A program works on some pixels of one sample; channels are walked through in tiles of BC. ``at`` is the offset of an
element within its sample, ``stride_p`` the distance from one pixel to the next, so that any dense order of channels and
pixels is read as it lies. float32 throughout.
"""

import triton
import triton.language as tl


@triton.jit
def pixel_tile(tile, H, W, BP: tl.constexpr):
    """Pixels of a tile with their rows and columns, int32 (BP,), and which of them exist."""
    p = tile * BP + tl.arange(0, BP)
    return p, p // W, p % W, p < H * W


@triton.jit
def neighbour(base, at, stride_p, h, w, H, W, exists, J: tl.constexpr):
    """Neighbour J (0 to 8, row by row) of each element, zero outside of the map."""
    dy: tl.constexpr = J // 3 - 1
    dx: tl.constexpr = J % 3 - 1
    inside = exists & (h + dy >= 0) & (h + dy < H) & (w + dx >= 0) & (w + dx < W)
    return tl.load(base + at + (dy * W + dx) * stride_p, mask=inside, other=0).to(tl.float32)


@triton.jit
def filtered(base, at, stride_p, h, w, H, W, exists, kernel, TRANSPOSED: tl.constexpr):
    """A 3x3 filter, or its transpose, applied to a map in memory."""
    total = tl.zeros(at.shape, tl.float32)
    for j in tl.static_range(9):
        number = tl.load(kernel + (8 - j if TRANSPOSED else j))
        total += number * neighbour(base, at, stride_p, h, w, H, W, exists, j)
    return total


@triton.jit
def rectified(v):
    """ReLU; NaN stays NaN."""
    return tl.where(v < 0, 0.0, v)


@triton.jit
def normals(element, position, seed, stream, forward):
    """eps of noise.py for elements (index within the sample) of the sample at a position of the global batch."""
    lane = (element // 4).to(tl.uint32)
    zero = lane * 0
    words = (zero + position).to(tl.uint32), (zero + stream).to(tl.uint32), (zero + forward).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, lane, words[0], words[1], words[2], 7)
    first = element % 4 < 2
    a = tl.where(first, w0, w2).to(tl.float32)
    b = tl.where(first, w1, w3).to(tl.float32)
    radius = tl.sqrt(-2.0 * tl.log((a + 0.5) * 2.3283064365386963e-10))
    return radius * cosine_of_quarters(b * 9.313225746154785e-10 - (element % 2).to(tl.float32))


@triton.jit
def cosine_of_quarters(v):
    """cos(pi/2 * v) for -1 <= v <= 4, without the reduction of large arguments that a library's cosine carries along.

    The sine of the same angle is the cosine one quarter earlier.
    """
    quadrant = tl.floor(v + 0.5)
    a = (v - quadrant) * 1.5707963267948966
    q = a * a
    cosine = 1.0 + q * (-0.5 + q * (1 / 24 + q * (-1 / 720 + q * (1 / 40320))))
    sine = a * (1.0 + q * (-1 / 6 + q * (1 / 120 + q * (-1 / 5040 + q * (1 / 362880)))))
    number = quadrant.to(tl.int32)
    size = tl.where(number % 2 == 0, cosine, sine)
    return tl.where((number + 1) & 2 == 0, size, -size)


@triton.jit
def softplus_and_slope(t):
    e = tl.exp(-tl.abs(t))
    inverse = 1.0 / (1.0 + e)
    return rectified(t) + tl.log(1.0 + e), tl.where(t < 0, e * inverse, inverse)


@triton.jit
def expected_and_slope(alpha):
    """E[softplus(alpha + eps)] and its derivative, see mathematics.expected_noise."""
    t = tl.abs(alpha)
    t = tl.where(t > 20, 20.0, t)
    q = -0.904215028 + t * (0.00668506302 + t * (-0.00671529346 + t * (0.00095792785 - 4.1674365e-05 * t)))
    dq = 0.00668506302 + t * (2 * -0.00671529346 + t * (3 * 0.00095792785 - 4 * 4.1674365e-05 * t))
    even, slope = softplus_and_slope(0.214389405 + q * t)
    slope = slope * (q + dq * t)
    return rectified(alpha) + even, tl.where(alpha < 0, -slope, tl.where(alpha > 0, slope + 1.0, 0.0))


@triton.jit
def multiplier(
    alpha, eps, at, c, p, HW, exists, position, seed, stream, forward,
    SAMPLED: tl.constexpr, GIVEN: tl.constexpr, PER_CHANNEL: tl.constexpr,
):  # fmt: skip
    """z and its derivative with respect to alpha, for elements (c, p) of one sample."""
    if SAMPLED:
        if GIVEN:
            drawn = tl.load(eps + at, mask=exists, other=0).to(tl.float32)
        elif PER_CHANNEL:
            drawn = normals(c, position, seed, stream, forward)
        else:
            drawn = normals(c * HW + p, position, seed, stream, forward)
        z, slope = softplus_and_slope(alpha + drawn)
    else:
        z, slope = expected_and_slope(alpha)
    return z, slope
