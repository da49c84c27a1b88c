"""From pooled responses to the scale of each channel, and the way back: small tensors, in torch's own operations."""

import torch
import torch.distributed
from torch import Tensor

from mp_lightning.perturbation import mathematics
from mp_lightning.perturbation.mathematics import Moments
from mp_lightning.perturbation.phi import FEATURES


def moments(responses: Tensor, running_var: Tensor, synchronize: bool) -> Moments:
    """Moments of the batch (C, 4); a batch of one has no variance and takes the running one."""
    found = mathematics.batch_moments(responses, synchronize)
    return Moments(responses.mean(dim=0), running_var.clone()) if found is None else found


def scale_backward(
    gscale: Tensor,
    used: Moments,
    scale: Tensor,
    weight: Tensor,
    relative_channels: float,
    relative_size: float | Tensor,
) -> tuple[Moments, Tensor]:
    """Gradients of the moments and of the ten weights.

    Args:
        gscale: gradient of the scale, (C,).
        used: the moments that gave it.
        scale: s, (C,).
        weight: the ten weights.
        relative_channels, relative_size: as for :func:`mathematics.scale`.
    """
    glogit = gscale * scale * (1 - scale)
    total = glogit.sum()
    gweight = torch.cat(
        [
            (glogit.unsqueeze(1) * used.mean).sum(dim=0),
            (glogit.unsqueeze(1) * used.var).sum(dim=0),
            torch.stack([total * relative_channels, total * relative_size]),
        ]
    )
    column = glogit.unsqueeze(1)
    return Moments(column * weight[:FEATURES], column * weight[FEATURES : 2 * FEATURES]), gweight


def moments_backward(gradients: Moments, responses: Tensor, used: Moments, synchronize: bool) -> Tensor:
    """Gradient of the pooled responses, (B, C, 4).

    The variance depends on the mean as well, but the sum of the deviations is zero, and with it that part.
    """
    count: float | Tensor = float(len(responses))
    several = len(responses) > 1
    gmean, gvar = gradients
    if synchronize and torch.distributed.is_initialized():
        count = responses.new_full((), float(len(responses)))
        for value in (count, gmean, gvar):
            torch.distributed.all_reduce(value)
        several = several or torch.distributed.get_world_size() > 1  # known without asking a GPU for count
    if not several:
        return gmean.expand_as(responses)
    return gmean / count + gvar * (responses - used.mean) * (2 / (count - 1))
