"""The networks of the benchmarks and what stands at their sites."""

from collections.abc import Callable

import torch
import torchvision
from torch import Tensor, nn

from mp_lightning import attach
from mp_lightning.backbones import build_backbone
from mp_lightning.compare.layers import DropBlock
from mp_lightning.compare.site_layers import SiteLayers

PHI = "tiny-imagenet-1"  # with noise of each element, whatever the default has
SMALL = ("conv4", "vgg9", "resnet20")
LARGE = ("resnet18", "resnet50")


def build(name: str) -> tuple[nn.Module, int]:
    """A network and the side of its images: the reference networks at 32 pixels, torchvision's at 224."""
    if name in LARGE:
        return getattr(torchvision.models, name)(num_classes=1000), 224
    return build_backbone(name, 10), 32


DROPS: dict[str, Callable[[], nn.Module]] = {
    "dropout2d": lambda: nn.Dropout2d(0.1),
    "dropout": lambda: nn.Dropout(0.1),
    "dropblock": DropBlock,
}
ARMS = ("plain", *DROPS, "reference", "fast", "default")


def perturbed(model: nn.Module, arm: str) -> nn.Module:
    """``model`` with an arm of ARMS at its sites, those of phi at all of them, but for the default as it comes."""
    if arm in DROPS:
        SiteLayers(model, lambda channels: DROPS[arm](), arm)
    elif arm == "default":
        attach(model)
    elif arm != "plain":
        attach(model, PHI, sites=1, path="auto" if arm == "fast" else "reference")
    return model


def site_elements(model: nn.Module, x: Tensor) -> int:
    """How many numbers the sites see in one forward of ``x``."""
    seen: list[int] = []
    attachment = attach(model, PHI, sites=1)
    for site in attachment.sites:
        site.register_forward_hook(lambda module, args, output: seen.append(output.numel()))
    with torch.no_grad():
        model(x)
    return sum(seen)
