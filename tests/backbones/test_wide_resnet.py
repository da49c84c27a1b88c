"""WRN-28-2, and where it is perturbed."""

import pytest
import torch
from torch import nn

from mp_lightning.backbones import build_backbone
from mp_lightning.backbones.wide_resnet import PreActivationBlock
from mp_lightning.sites import find_sites


def test_the_name_counts_the_convolutions_as_the_paper_does() -> None:
    net = build_backbone("wrn28_2", 10, width=2)
    # 28: the 3x3 convolutions, and the 1x1 ones where a stage begins; the head does not count.
    assert sum(isinstance(module, nn.Conv2d) for module in net.modules()) == 28
    assert sum(isinstance(module, PreActivationBlock) for module in net.modules()) == 12


def test_it_has_the_published_number_of_parameters() -> None:
    # "WRN-28-2 [...] 1.5 million": Oliver et al. 2018, arXiv 1804.09170; the exact number follows from the layers.
    assert sum(parameter.numel() for parameter in build_backbone("wrn28_2", 10).parameters()) == 1_467_610


def test_width_is_that_of_the_stem_and_scales_all_stages() -> None:
    net = build_backbone("wrn28_2", 10, width=6)
    assert net.conv1.out_channels == 6
    assert [net.blocks[last].conv2.out_channels for last in (3, 7, 11)] == [12, 24, 48]


@pytest.mark.parametrize("width", [None, 4])
def test_each_block_has_one_site_before_its_last_activation_and_so_has_the_network(width: int | None) -> None:
    plan = find_sites(build_backbone("wrn28_2", 10, width=width))
    assert [site.activation for site in plan] == [*(f"blocks.{block}.relu2" for block in range(12)), "relu"]
    stem = width or 16
    assert [site.channels for site in plan] == [2 * stem] * 4 + [4 * stem] * 4 + [8 * stem] * 5


def test_a_block_that_keeps_the_shape_adds_its_branch_to_what_it_was_given() -> None:
    block = PreActivationBlock(4, 4, stride=1)
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(block(x), x)


def test_the_shortcut_of_another_shape_reads_the_activated_input() -> None:
    block = PreActivationBlock(2, 4, stride=2)
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 2, 8, 8)
    torch.testing.assert_close(block(x), block.shortcut(block.bn1(x).relu()))
    assert block(x).shape == (2, 4, 4, 4)


@pytest.mark.parametrize("size", [8, 15, 40])
def test_any_image_size_works(size: int) -> None:
    assert build_backbone("wrn28_2", 3, width=2)(torch.randn(2, 3, size, size)).shape == (2, 3)
