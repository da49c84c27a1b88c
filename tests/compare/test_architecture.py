"""Architectures by name: what is refused before anything is trained, and what a forward costs."""

import pytest
import torch

from mp_lightning.compare import architecture as architecture_module
from mp_lightning.compare.architecture import Architecture
from mp_lightning.data import ImageSet, image_set
from mp_lightning.errors import ConfigurationError
from mp_lightning.meta.step import phi_gradient, theta_step
from mp_lightning.perturbation import MetaPerturb, initial_phi
from mp_lightning.sites import attach
from mp_lightning.sites.attachment import NAME

NAMES = ["conv4", "resnet20-8", "wrn28_2-4", "torchvision:resnet18", "timm:test_resnet.r160_in1k"]


def images(size: int = 32) -> ImageSet:
    return image_set("set", torch.zeros(6, 3, size, size, dtype=torch.uint8), torch.arange(6) % 3)


def parse(text: str) -> Architecture:
    if text.startswith("timm:"):
        pytest.importorskip("timm")
    return Architecture.parse(text)


@pytest.mark.parametrize("text", [*NAMES, "timm:vit-of.some-day"])
def test_architectures_print_as_they_are_written(text: str) -> None:
    assert str(Architecture.parse(text)) == text


def test_only_reference_networks_have_a_width_in_their_name() -> None:
    assert Architecture.parse("wrn28_2-8") == Architecture("wrn28_2", 8)
    assert Architecture.parse("torchvision:resnet18-8") == Architecture("torchvision:resnet18-8")


@pytest.mark.parametrize("text", ["conv4-0", "conv4-x", "conv4--4", "conv4-1.5", "conv4-", "wrn-28-2"])
def test_a_width_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match=f"architecture '{text}'"):
        Architecture.parse(text)


@pytest.mark.parametrize("text", NAMES)
def test_what_the_check_accepts_can_be_meta_trained(text: str) -> None:
    architecture = parse(text)
    architecture.check(32)
    model = architecture.build(images(), seed=0).train()
    perturbation = MetaPerturb(initial_phi(0), trainable=True)
    attach(model, perturbation=perturbation, seed=0)
    theta = [parameter for name, parameter in model.named_parameters() if not name.startswith(NAME)]
    x, y = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    train_loss = theta_step(model, torch.optim.SGD(theta, lr=1e-3), x, y)
    valid_loss, gradients = phi_gradient(model, list(perturbation.parameters()), x, y)
    assert train_loss.isfinite() and valid_loss.isfinite()
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)


@pytest.mark.parametrize(
    ("text", "size", "message"),
    [
        ("alexnet", 32, "choose one of .*conv4"),
        ("conv4", 8, "at least 16 pixels"),
        ("torchvision:resnet19", 32, "did you mean resnet18"),
        ("torchvision:vit_b_16", 32, r"takes no images of 32 pixels \(.+\); give image_size=224, or choose another"),
        ("timm:repvgg_d2se", 64, "no site for a perturbation in ByobNet: .*; choose another network"),
        ("torchvision:inception_v3", 32, r"takes no images of 32 pixels \(.+\); give image_size=96, or choose another"),
        ("torchvision:maxvit_t", 256, r"takes no images of 256 pixels \(.+\); give image_size=224, or choose another"),
        ("timm:test_resnet", 0, "image_size=0"),
    ],
)
def test_what_cannot_be_trained_is_refused_with_the_reason(text: str, size: int, message: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^architecture '{text}': .*{message}") as caught:
        parse(text).check(size)
    assert "sites=" not in str(caught.value), "a remedy that does not exist where networks are only named"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("output", "shown"),
    [(lambda x: (x, x), "tuple"), (lambda x: x, r"\(2, 2, 16, 16\)"), (lambda x: {"logits": x}, "dict")],
)
def test_a_network_that_gives_no_logits_is_refused(monkeypatch, output, shown) -> None:
    class Headless(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.relu = torch.nn.Conv2d(3, 2, 3, 2, 1), torch.nn.BatchNorm2d(2), torch.nn.ReLU()

        def forward(self, x):
            return output(self.relu(self.bn(self.conv(x))))

    monkeypatch.setattr(architecture_module, "build_backbone", lambda *args, **options: Headless())
    with pytest.raises(
        ConfigurationError, match=f"architecture 'any': its output in training .{shown}. is not one row"
    ):
        Architecture("any").check(32)


def test_a_constructor_that_fails_is_no_traceback(monkeypatch) -> None:
    def fail(*args, **options):
        raise TypeError("unexpected keyword argument 'in_chans'\nmore")

    monkeypatch.setattr(architecture_module, "build_backbone", fail)
    with pytest.raises(ConfigurationError, match=r"'any': it cannot be built \(unexpected .* 'in_chans'\); choose"):
        Architecture("any").check(32)


@pytest.mark.parametrize("text", ["resnet20-4", "torchvision:regnet_y_400mf"])
def test_checking_and_building_leave_the_global_generator_alone(text: str) -> None:
    state = torch.get_rng_state()
    architecture = Architecture.parse(text)
    architecture.check(32)
    architecture.forward_flops(3, 32)
    architecture.build(images(), 1)
    assert torch.equal(state, torch.get_rng_state())


def test_same_seed_builds_the_same_network() -> None:
    first, again, other = (Architecture("conv4", 4).build(images(16), seed) for seed in (0, 0, 1))
    assert torch.equal(first.fc.weight, again.fc.weight)
    assert not torch.equal(first.fc.weight, other.fc.weight)


def test_flops_are_those_counted_by_hand() -> None:
    # Conv4 of width 2 at 16 pixels: (side, input channels) of each convolution, then the head.
    convolutions = sum(side**2 * 9 * channels * 2 for side, channels in ((16, 3), (8, 2), (4, 2), (2, 2)))
    assert Architecture("conv4", 2).forward_flops(10, 16) == 2 * (convolutions + 2 * 10)


def test_flops_of_resnet20_are_the_known_ones() -> None:
    # 41 million multiply-adds at 32 pixels.
    assert Architecture("resnet20").forward_flops(10, 32) == pytest.approx(2 * 40.55e6, rel=1e-3)


def test_flops_grow_with_the_area_of_the_image() -> None:
    small, large = (Architecture("torchvision:resnet18").forward_flops(5, size) for size in (32, 64))
    assert 3.5 * small < large < 4.1 * small
