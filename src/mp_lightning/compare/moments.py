"""What the multiplier is at each site of a model, measured."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
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

    def add(site: str, x: Tensor, multiplier: Tensor, expected: Callable[[], Tensor]) -> None:
        # Broadcast evenly, so that the means of what is there are those over all elements.
        values = multiplier.double()
        moments = x.numel() * torch.stack([values.new_ones(()), values.mean(), values.square().mean()])
        sums[site] = sums.get(site, 0) + moments

    with watching(attachment, add):
        for forward in forwards:
            forward()
    return [_moments(name, sums[name]) for name in attachment.plan.names if name in sums]


@contextmanager
def watching(
    attachment: Attachment, look: Callable[[str, Tensor, Tensor, Callable[[], Tensor]], None]
) -> Iterator[None]:
    """While it lasts, ``look`` is told of each multiplier that is computed, by the readable path.

    Args:
        attachment: of an uncompiled model.
        look: gets the name of the site, its feature maps (B, C, H, W), their multiplier, broadcastable to them and
            detached, and a function that gives the expected one.
    """
    perturbation, path = attachment.perturbation, attachment.path
    current: list[str] = []
    own = vars(perturbation).get("multiplier")
    computed = perturbation.multiplier

    def note(site: nn.Module, args: Any) -> None:
        assert isinstance(site, Site)
        current[:] = [site.spec.name]

    def measured(x: Tensor, eps: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        multiplier = computed(x, eps, *args, **kwargs)
        look(current[0], x.detach(), multiplier.detach(), lambda: computed(x, None, *args, **kwargs).detach())
        return multiplier

    handles = [site.register_forward_pre_hook(note) for site in attachment.sites]
    attachment.path = "reference"
    vars(perturbation)["multiplier"] = measured
    try:
        yield
    finally:
        attachment.path = path
        for handle in handles:
            handle.remove()
        if own is None:
            del vars(perturbation)["multiplier"]
        else:
            vars(perturbation)["multiplier"] = own


def _moments(site: str, sums: Tensor) -> SiteMoments:
    count, total, squares = sums.tolist()
    mean = total / count
    return SiteMoments(site, mean, max(squares / count - mean**2, 0.0))
