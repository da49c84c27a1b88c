"""The perturbation as functions without state, in the order of Section 3 of the paper (arXiv 2006.07540).

Symbols: ``x`` is a feature map (B, C, H, W) before the activation; ``s`` the scale of a channel, ``z`` the positive
noise of an element, ``s * z`` the multiplier. Everything is differentiable in ``x`` and in phi.
"""

import math
from typing import NamedTuple

import torch
import torch.distributed
import torch.distributed.nn.functional as distributed
import torch.nn.functional as F
from torch import Tensor

from mp_lightning.perturbation.phi import FEATURES, Phi


class Moments(NamedTuple):
    """Mean and variance over a batch of the pooled responses of each channel, both (C, 4)."""

    mean: Tensor
    var: Tensor


def equivariant(x: Tensor, k_identity: Tensor, k_all: Tensor) -> Tensor:
    """Channel-permutation-equivariant layer: ``k_identity * x_c + k_all * mean_over_channels(x)``, padding 1."""
    return _filter(x, k_identity) + _filter(x.mean(dim=1, keepdim=True), k_all)


def noise_location(x: Tensor, phi: Phi) -> Tensor:
    """alpha, (B, C, H, W): where the noise of each element is centred, two equivariant layers around a ReLU."""
    hidden = equivariant(x, phi.op1_identity, phi.op1_all).relu()
    return equivariant(hidden, phi.op2_identity, phi.op2_all)


def noise(alpha: Tensor, eps: Tensor) -> Tensor:
    """z = softplus(alpha + eps), eps ~ N(0, 1) for every element."""
    return F.softplus(alpha + eps)


def expected_noise(alpha: Tensor) -> Tensor:
    """E[softplus(alpha + eps)] for eps ~ N(0, 1), to an absolute error below 2e-5.

    Since softplus(a) = a + softplus(-a), the expectation is relu(alpha) plus an even function, and the inverse softplus
    of that function is so nearly a straight line that a polynomial of degree 5 (least squares on [0, 20] against
    64-point Gauss-Hermite quadrature) leaves an error of 1.7e-5. Above 20 the even function is 0 to that error, and the
    polynomial is not followed to where its slope overflows.
    """
    t = alpha.abs().clamp(max=20)
    p = 0.214389405
    q = -0.904215028 + t * (0.00668506302 + t * (-0.00671529346 + t * (0.00095792785 - 4.1674365e-05 * t)))
    return alpha.relu() + F.softplus(p + q * t)


def pooled_responses(x: Tensor, kernels: Tensor) -> Tensor:
    """Spatial means of the rectified responses of each channel to the shared filters, (B, C, 4)."""
    return torch.stack([_filter(x, kernel).relu().mean(dim=(2, 3)) for kernel in kernels], dim=2)


def batch_moments(responses: Tensor, synchronize: bool = False) -> Moments | None:
    """Mean and unbiased variance over the batch; None when the (global) batch holds one sample only.

    Args:
        responses: (B, C, 4).
        synchronize: take the moments over the batches of all processes of the default process group.
    """
    if synchronize and torch.distributed.is_initialized():
        count = responses.new_full((), float(len(responses)))
        torch.distributed.all_reduce(count)
        mean = distributed.all_reduce(responses.sum(dim=0)) / count
        squares = distributed.all_reduce((responses - mean).square().sum(dim=0))
        several = len(responses) > 1 or torch.distributed.get_world_size() > 1  # known without asking a GPU for count
        return Moments(mean, squares / (count - 1)) if several else None
    if len(responses) < 2:
        return None
    var, mean = torch.var_mean(responses, dim=0)
    return Moments(mean, var)


def scale(moments: Moments, phi: Phi, relative_channels: float, relative_size: float | Tensor) -> Tensor:
    """s, (1, C, 1, 1): sigmoid of one linear map, without bias, of the moments and the relative size of the map.

    Args:
        moments: batch moments in training, running ones in evaluation.
        phi: the learned numbers.
        relative_channels: C / channel_norm.
        relative_size: H / spatial_norm.
    """
    w = phi.scale_weight
    logit = moments.mean @ w[:FEATURES] + moments.var @ w[FEATURES : 2 * FEATURES]
    logit = logit + relative_channels * w[-2] + relative_size * w[-1]
    return logit.sigmoid().view(1, -1, 1, 1)


def apply_multiplier(x: Tensor, multiplier: Tensor, coeff: float | Tensor, clip: float | Tensor | None) -> Tensor:
    """y = min(x * (1 + coeff * (multiplier - 1)), clip), or x where coeff is 0, whatever the multiplier."""
    y = x * torch.where(torch.as_tensor(coeff, device=x.device) == 0, 1, 1 + coeff * (multiplier - 1))
    return y if clip is None else y.clamp(max=clip)


def bound(clip: float, coeff: Tensor) -> Tensor:
    """The upper bound at a strength: none at 0, as what does not act bounds nothing."""
    return torch.where(coeff > 0, clip, math.inf)


def _filter(x: Tensor, kernel: Tensor) -> Tensor:
    """One 3x3 filter shared by all channels (a cross-correlation, as torch's convolutions), padding 1."""
    channels = x.shape[1]
    return F.conv2d(x, kernel.expand(channels, 1, 3, 3), padding=1, groups=channels)
