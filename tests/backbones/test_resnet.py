"""The residual reference networks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mp_lightning.backbones import build_backbone
from mp_lightning.backbones.resnet import BasicBlock, Shortcut

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden" / "net_resnet20.npz"


@pytest.mark.parametrize("depth", [20, 32, 44, 56])
def test_the_name_counts_convolutions_and_head(depth: int) -> None:
    net = build_backbone(f"resnet{depth}", 10, width=2)
    assert sum(isinstance(module, nn.Conv2d | nn.Linear) for module in net.modules()) == depth
    assert sum(isinstance(module, BasicBlock) for module in net.modules()) == (depth - 2) // 2


def test_resnet20_has_the_published_number_of_parameters() -> None:
    # 0.27 million in table 6 of He et al.; the exact number follows from the layers.
    assert sum(parameter.numel() for parameter in build_backbone("resnet20", 10).parameters()) == 269_722


def test_width_scales_all_stages() -> None:
    net = build_backbone("resnet20", 10, width=6)
    stages = (net.layer1, net.layer2, net.layer3)
    assert [stage[-1].conv2.out_channels for stage in stages] == [6, 12, 24]


def test_the_shortcut_subsamples_and_puts_half_of_the_zero_channels_on_each_side() -> None:
    x = torch.arange(2 * 16.0).view(1, 2, 4, 4) + 1
    out = Shortcut(2, 4, stride=2)(x)
    assert torch.equal(out[:, 1:3], x[:, :, ::2, ::2])
    assert not out[:, [0, 3]].any()


@pytest.mark.parametrize(("in_channels", "stride"), [(4, 1), (2, 2)])
def test_the_input_of_relu2_is_the_sum_of_branch_and_shortcut(in_channels: int, stride: int) -> None:
    block = BasicBlock(in_channels, 4, stride).eval()
    seen: list[torch.Tensor] = []
    block.relu2.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = torch.randn(2, in_channels, 8, 8)
    out = block(x)
    branch = block.bn2(block.conv2(block.relu1(block.bn1(block.conv1(x)))))
    torch.testing.assert_close(seen, [branch + block.shortcut(x)])
    torch.testing.assert_close(out, seen[0].relu())


@pytest.mark.parametrize("size", [8, 15, 40])
def test_any_image_size_works(size: int) -> None:
    assert build_backbone("resnet20", 3, width=2)(torch.randn(2, 3, size, size)).shape == (2, 3)


@pytest.mark.skipif(not GOLDEN.exists(), reason=f"golden vectors are not at {GOLDEN}")
def test_golden_state_of_resnet20_loads_strictly() -> None:
    with np.load(GOLDEN) as golden:
        state = {key.removeprefix("state."): torch.tensor(golden[key]) for key in golden if key.startswith("state.")}
    build_backbone("resnet20", 10).load_state_dict(state, strict=True)
