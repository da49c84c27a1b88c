"""What each site adds to a training step: the time of its forward and backward, and what it keeps in between."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mp_lightning.compare.cost import KeptForBackward, wait
from mp_lightning.errors import ConfigurationError, UserError, one_line
from mp_lightning.perturbation import NamedPhi
from mp_lightning.sites import Attachment, SitePlan, attach
from mp_lightning.sites.layout import FIRST, LAST, SEQUENCE, height_of
from mp_lightning.sites.site import Site

_REPEATS = 5  # of which the median counts, after one that is not counted


@dataclass(frozen=True)
class SiteCost:
    """Of one site.

    Attributes:
        size: of its map in space.
        milliseconds: of its calls in one training step, forward and backward.
        megabytes: that its calls keep for the backward, the map among it: nothing else of the network needs that.
    """

    size: tuple[int, ...]
    milliseconds: float
    megabytes: float


def measure(
    model: nn.Module, plan: SitePlan, phi: NamedPhi, images: tuple[int, ...], device: torch.device
) -> tuple[dict[str, SiteCost], float]:
    """Costs by site, of those that were reached, and the median time of a training step without perturbation in ms.

    Args:
        model: on the device; it comes back detached.
        images: the shape of a batch.

    Raises:
        ConfigurationError: the model does not take such images.
    """
    like = next(model.parameters(), torch.empty(0))
    try:
        batch = torch.rand(images, device=device, dtype=like.dtype)
        plain = _median(lambda: _sum_of_all(model(batch)).backward(), device)
    except UserError:
        raise
    except Exception as error:  # user code that gets the wrong image raises anything
        size = "x".join(map(str, images[1:]))
        raise ConfigurationError(
            f"{type(model).__name__} does not take images of {size} ({type(error).__name__}: "
            f"{one_line(error, 120)}); give their size with input="
        ) from error
    model.zero_grad(set_to_none=True)
    attachment = attach(model, phi, sites=plan, input_size=height_of(batch))
    try:
        reached = _shapes_at_sites(attachment, model, batch)
        sites = [site for site in attachment.all_sites() if site.spec.name in reached]
        return {site.spec.name: _cost(site, reached[site.spec.name], device) for site in sites}, plain
    finally:
        attachment.detach()


def _shapes_at_sites(attachment: Attachment, model: nn.Module, batch: Tensor) -> dict[str, list[torch.Size]]:
    shapes: dict[str, list[torch.Size]] = {}

    def note(site: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(site, Site)
        shapes.setdefault(site.spec.name, []).append(args[0].shape)

    handles = [site.register_forward_pre_hook(note) for site in attachment.sites]
    with torch.no_grad():
        model(batch)
    for handle in handles:
        handle.remove()
    return shapes


def _cost(site: Site, shapes: list[torch.Size], device: torch.device) -> SiteCost:
    milliseconds = kept = 0.0
    for shape in shapes:
        x = torch.rand(shape, device=device, requires_grad=True)

        def step(x: Tensor = x) -> None:
            site(x, 0, True).sum().backward()

        milliseconds += _median(step, device)
        with KeptForBackward(site) as counted:
            site(x, 0, True)
        kept += counted.bytes / 1e6
    space = {FIRST: shapes[0][2:], LAST: shapes[0][1:-1], SEQUENCE: shapes[0][:1]}[site.spec.layout]
    return SiteCost(tuple(space), milliseconds, kept)


def _median(step: Callable[[], None], device: torch.device) -> float:
    times = []
    for _ in range(1 + _REPEATS):
        wait(device)
        start = time.perf_counter()
        step()
        wait(device)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def _sum_of_all(output: object) -> Tensor:
    """A loss of whatever a model gives."""
    if isinstance(output, Tensor):
        return output.float().sum()
    parts = list(output.values()) if isinstance(output, dict) else output
    if not isinstance(parts, list | tuple):
        raise ConfigurationError(
            f"the model gives a {type(output).__name__}, of which no cost can be measured; let it give a tensor, or a "
            "list, tuple or dict of tensors"
        )
    found = [_sum_of_all(part) for part in parts if isinstance(part, Tensor | list | tuple | dict)]
    return torch.stack(found).sum()
