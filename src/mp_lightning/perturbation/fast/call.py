"""What the fast path is told beside tensors, and what its forward leaves for its backward."""

from typing import NamedTuple

from torch import Tensor


class Call(NamedTuple):
    """The plain values of one call.

    Attributes:
        channel_norm: the largest number of channels of any site of the network.
        clip: upper bound of y where coeff is not 0, or infinity.
        key: seed and stream of the noise, then the rank and the number of processes: sample b of x is number
            ``b * world + rank`` of the global batch (see :mod:`mp_lightning.perturbation.noise`).
        training: use the statistics of the batch; otherwise the running ones.
        sampled: draw the noise; otherwise use its expectation.
        synchronize: take the statistics over the batches of all processes.
        per_channel: draw one number for each channel of a sample, instead of one for each element.
    """

    channel_norm: float
    clip: float
    key: tuple[int, int, int, int]
    training: bool
    sampled: bool
    synchronize: bool
    per_channel: bool = False


class Numbers(NamedTuple):
    """The scalars that live in tensors on the device of x: strength, height of the input, count of forwards."""

    coeff: Tensor
    input_size: Tensor
    forward: Tensor


class Forward(NamedTuple):
    """What the forward gives.

    Attributes:
        y: like x.
        mean, var: the moments that were used, float32 (C, 4).
        scale: s, float32 (C,).
        responses: pooled responses, float32 (B, C, 4); in evaluation (0,).
        numbers: :class:`Numbers` as they were, float64 (3,), since buffers change before a backward needs them.
        hits: in evaluation, how many elements of each sample reached the bound, int64 (B,); in training (0,).
    """

    y: Tensor
    mean: Tensor
    var: Tensor
    scale: Tensor
    responses: Tensor
    numbers: Tensor
    hits: Tensor
