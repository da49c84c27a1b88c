"""The plain reference networks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mp_lightning.backbones import ConvNet, build_backbone, list_backbones
from mp_lightning.errors import ConfigurationError

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden" / "net_conv4.npz"


@pytest.mark.parametrize(
    ("name", "widths", "pool_after"),
    [
        ("conv4", [32] * 4, [1, 2, 3, 4]),
        ("conv6", [32] * 6, [1, 2, 4, 6]),
        ("vgg9", [64, 128, 256, 256, 512, 512, 512, 512], [1, 2, 4, 6, 8]),
    ],
)
def test_widths_and_poolings_are_the_published_ones(name: str, widths: list[int], pool_after: list[int]) -> None:
    layers = list(build_backbone(name, 10).conv_layers)
    assert [layer.conv.out_channels for layer in layers] == widths
    assert [i for i, layer in enumerate(layers, start=1) if isinstance(layer.pool, nn.MaxPool2d)] == pool_after


def test_a_layer_is_convolution_norm_relu_pool_in_this_order() -> None:
    layer = ConvNet([4], [1], 2, image_size=8).conv_layers[0]
    order: list[str] = []
    for name, module in layer.named_children():
        module.register_forward_hook(lambda *_, name=name: order.append(name))
    layer(torch.randn(2, 3, 8, 8))
    assert order == ["conv", "bn", "relu", "pool"]


@pytest.mark.parametrize("name", list_backbones())
def test_every_backbone_gives_logits_can_be_traced_and_learns_everywhere(name: str) -> None:
    net = build_backbone(name, 5, in_channels=1, width=4)
    images = torch.randn(2, 1, 32, 32)
    logits = net(images)
    assert logits.shape == (2, 5)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    net.eval()
    torch.testing.assert_close(torch.fx.symbolic_trace(net)(images), net(images))


@pytest.mark.parametrize(("name", "smallest"), [("conv4", 16), ("conv6", 16), ("vgg9", 32)])
def test_an_image_too_small_for_the_poolings_is_refused_with_the_size_it_needs(name: str, smallest: int) -> None:
    with pytest.raises(ConfigurationError, match=f"at least {smallest} pixels"):
        build_backbone(name, 10, image_size=smallest - 1, width=4)
    net = build_backbone(name, 10, image_size=smallest, width=4)
    assert net(torch.randn(2, 3, smallest, smallest)).shape == (2, 10)


def test_the_head_fits_an_image_that_does_not_halve_evenly() -> None:
    net = build_backbone("conv4", 10, image_size=84, width=4)
    assert net(torch.randn(2, 3, 84, 84)).shape == (2, 10)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match=r"'resnet18'.*conv4.*resnet56"):
        build_backbone("resnet18", 10)


@pytest.mark.parametrize("wrong", [{"num_classes": 0}, {"width": 0}, {"in_channels": 0}, {"image_size": 0}])
def test_a_number_below_one_is_refused_by_its_name(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError, match=f"{next(iter(wrong))}=0"):
        build_backbone("resnet20", **{"num_classes": 10, **wrong})


def test_convolutions_start_with_variance_two_over_fan_out() -> None:
    torch.manual_seed(0)
    weight = build_backbone("conv4", 10, width=64).conv_layers[0].conv.weight
    assert weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.1)


@pytest.mark.skipif(not GOLDEN.exists(), reason=f"golden vectors are not at {GOLDEN}")
def test_golden_state_of_conv4_loads_strictly() -> None:
    with np.load(GOLDEN) as golden:
        state = {key.removeprefix("state."): torch.tensor(golden[key]) for key in golden if key.startswith("state.")}
    build_backbone("conv4", 10).load_state_dict(state, strict=True)
