"""What ``sites`` says that its sites cost is what attaching them costs."""

import pytest
import torch
from torch import nn

from mp_lightning.backbones import build_backbone
from mp_lightning.cli.site_costs import measure
from mp_lightning.compare.cost import KeptForBackward
from mp_lightning.perturbation import load_phi
from mp_lightning.sites import attach, find_sites


def megabytes(model: nn.Module, images: torch.Tensor) -> float:
    with KeptForBackward(model) as kept:
        model(images)
    return kept.bytes / 1e6


@pytest.mark.parametrize("name", ["resnet20", "vgg9", "torchvision:alexnet"])
def test_memory_is_what_a_step_keeps_more(name: str) -> None:
    model, shape = build_backbone(name, 10), (2, 3, 64, 64) if ":" in name else (2, 3, 32, 32)
    plan = find_sites(model)
    costs, _ = measure(model, plan, load_phi(), shape, torch.device("cpu"))
    images = torch.rand(shape)
    plain = megabytes(model, images)
    attach(model, sites=plan)
    more = megabytes(model, images) - plain
    assert sum(cost.megabytes for cost in costs.values()) == pytest.approx(more, rel=0.05)
