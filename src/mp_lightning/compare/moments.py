"""What the multiplier is at each site of a model, measured."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mp_lightning.sites import Attachment
from mp_lightning.sites.site import Site


class SiteMoments(NamedTuple):
    """Mean and (population) variance of the multiplier over all elements of all feature maps that a site saw."""

    site: str
    mean: float
    var: float


def site_moments(attachment: Attachment, forwards: Iterable[Callable[[], Any]]) -> list[SiteMoments]:
    """Mean and variance of the multiplier at each site over some forwards of the model.

    The multiplier is what the perturbation gives at strength 1, whatever its strength and the ramp are. Forwards in
    training mode move running statistics, as always; those in evaluation mode sample only where the attachment's
    ``inference`` does (None: it does).

    Args:
        attachment: of the model.
        forwards: functions each of which runs the model on a batch, uncompiled.

    Returns:
        In the order of the plan; sites that were not reached are left out.
    """
    sums: dict[str, Tensor] = {}  # count, sum, sum of squares; float64
    perturbation, path = attachment.perturbation, attachment.path
    current: list[str] = []
    own = vars(perturbation).get("multiplier")
    computed = perturbation.multiplier

    def note(site: nn.Module, args: Any) -> None:
        assert isinstance(site, Site)
        current[:] = [site.spec.name]

    def measured(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        multiplier = computed(x, *args, **kwargs)
        # Broadcast evenly, so that the means of what is there are those over all elements.
        values = multiplier.detach().double()
        moments = x.numel() * torch.stack([values.new_ones(()), values.mean(), values.square().mean()])
        sums[current[0]] = sums.get(current[0], 0) + moments
        return multiplier

    handles = [site.register_forward_pre_hook(note) for site in attachment.sites]
    attachment.path = "reference"
    vars(perturbation)["multiplier"] = measured
    try:
        for forward in forwards:
            forward()
    finally:
        attachment.path = path
        for handle in handles:
            handle.remove()
        if own is None:
            del vars(perturbation)["multiplier"]
        else:
            vars(perturbation)["multiplier"] = own
    return [_moments(name, sums[name]) for name in attachment.plan.names if name in sums]


def _moments(site: str, sums: Tensor) -> SiteMoments:
    count, total, squares = sums.tolist()
    mean = total / count
    return SiteMoments(site, mean, max(squares / count - mean**2, 0.0))
