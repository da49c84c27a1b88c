"""The networks of the benchmarks and what stands at their sites."""

from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.ops import drop_block2d

from mp_lightning import attach
from mp_lightning.backbones import build_backbone
from mp_lightning.perturbation import NoiseKey, Norms, Perturbed, Statistics

SMALL = ("conv4", "vgg9", "resnet20")
LARGE = ("resnet18", "resnet50")


def build(name: str) -> tuple[nn.Module, int]:
    """A network and the side of its images: the reference networks at 32 pixels, torchvision's at 224."""
    if name in LARGE:
        return getattr(torchvision.models, name)(num_classes=1000), 224
    return build_backbone(name, 10), 32


class Drop:
    """A layer of a library at our sites, called by the same hooks as the perturbation."""

    def __init__(self, name: str, layer: Callable[[Tensor], Tensor]) -> None:
        self.name = name
        self.layer = layer

    def initial_statistics(self, channels: int) -> Statistics:
        return {}

    def measure(self, x: Tensor, running: Statistics, synchronize: bool) -> tuple[Statistics, None]:
        raise NotImplementedError

    def multiplier(self, x: Tensor, eps: Tensor | None, statistics: Statistics, norms: Norms) -> Tensor:
        raise NotImplementedError

    def fuses(self, x: Tensor) -> bool:
        return True

    def fused(self, x: Tensor, key: NoiseKey | None, running: Statistics, norms: Norms, **_: Any) -> Perturbed:
        return Perturbed(self.layer(x), None, None)

    def record(self, running: Statistics, measured: Statistics, momentum: float) -> None:
        raise NotImplementedError


class DropBlock(nn.Module):
    """torchvision's DropBlock with blocks of 3 by 3; on smaller maps, for which it refuses them, single elements."""

    def forward(self, x: Tensor) -> Tensor:
        dropped: Tensor = drop_block2d(x, 0.1, 3 if min(x.shape[2:]) >= 3 else 1, training=self.training)
        return dropped


DROPS: dict[str, Callable[[], nn.Module]] = {
    "dropout2d": lambda: nn.Dropout2d(0.1),
    "dropout": lambda: nn.Dropout(0.1),
    "dropblock": DropBlock,
}
ARMS = ("plain", *DROPS, "reference", "fast")


def perturbed(model: nn.Module, arm: str) -> nn.Module:
    """``model`` with an arm of ARMS at its sites."""
    if arm in DROPS:
        attach(model, perturbation=Drop(arm, DROPS[arm]()))
    elif arm != "plain":
        attach(model, path="auto" if arm == "fast" else "reference")
    return model


def site_elements(model: nn.Module, x: Tensor) -> int:
    """How many numbers the sites see in one forward of ``x``."""
    seen: list[int] = []
    attachment = attach(model)
    for site in attachment.sites:
        site.register_forward_hook(lambda module, args, output: seen.append(output.numel()))
    with torch.no_grad():
        model(x)
    return sum(seen)
