"""Networks of torchvision and timm by name."""

import sys

import pytest
import torch
import torchvision

from mp_lightning.backbones import build_backbone
from mp_lightning.errors import ConfigurationError

IMAGES = torch.zeros(2, 3, 32, 32)


def test_a_network_of_torchvision_has_the_layers_it_has_there_and_our_head() -> None:
    net = build_backbone("torchvision:mobilenet_v3_small", 7)
    there = torchvision.models.mobilenet_v3_small(num_classes=7)
    assert {k: v.shape for k, v in net.state_dict().items()} == {k: v.shape for k, v in there.state_dict().items()}
    assert net(IMAGES).shape == (2, 7)


def test_weights_follow_the_global_generator() -> None:
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(build_backbone("torchvision:squeezenet1_1", 3).state_dict())
    same, other = ([torch.equal(states[0][key], state[key]) for key in state] for state in states[1:])
    assert all(same) and not all(other)


@pytest.mark.parametrize(("name", "size"), [("googlenet", 32), ("inception_v3", 96)])
@pytest.mark.filterwarnings("error")
def test_networks_with_auxiliary_heads_give_one_tensor_in_training(name: str, size: int) -> None:
    with torch.device("meta"):
        net = build_backbone(f"torchvision:{name}", 4).train()
        assert net(torch.empty(2, 3, size, size)).shape == (2, 4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision:resnet19", r"torchvision has no classification network 'resnet19': did you mean resnet18"),
        ("torchvision:resnet18-8", "did you mean resnet18 or"),
        ("torchvision:raft_large", "no classification network 'raft_large'"),
        ("torchvision:", "no classification network ''"),
        ("torchvision:Zz", r"'Zz': torchvision\.models\.list_models\(module=torchvision\.models\) lists all"),
        ("keras:resnet18", "unknown backbone 'keras:resnet18': choose one of .*torchvision:NAME or timm:NAME"),
    ],
)
def test_an_unknown_name_says_what_may_be_meant(name: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        build_backbone(name, 3)


def test_a_width_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="width=8 cannot be set for 'torchvision:resnet18'"):
        build_backbone("torchvision:resnet18", 3, width=8)


def test_torchvision_takes_three_channels_only() -> None:
    with pytest.raises(ConfigurationError, match=r"torchvision:resnet18 takes images of 3 channels, not in_channels=1"):
        build_backbone("torchvision:resnet18", 3, in_channels=1)


def test_without_timm_its_names_say_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigurationError, match=r"timm:resnet10t needs the package timm .*pip install timm"):
        build_backbone("timm:resnet10t", 3)


@pytest.mark.parametrize("in_channels", [1, 3])
def test_a_network_of_timm_takes_the_channels_and_classes_asked_for(in_channels: int) -> None:
    pytest.importorskip("timm")
    net = build_backbone("timm:test_resnet.r160_in1k", 5, in_channels=in_channels)
    assert net(torch.zeros(2, in_channels, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:resnet19", r"timm has no classification network 'resnet19': did you mean resnet18 .*timm\.list_models"),
        ("timm:resnet18.of_nobody", "no classification network 'resnet18.of_nobody'"),
        ("timm:hf-hub:timm/resnet18.a1_in1k", "no classification network 'hf-hub:timm/resnet18.a1_in1k'"),
    ],
)
def test_a_name_that_timm_does_not_list_is_refused_and_not_looked_for_elsewhere(name: str, message: str) -> None:
    pytest.importorskip("timm")
    with pytest.raises(ConfigurationError, match=message):
        build_backbone(name, 3)
