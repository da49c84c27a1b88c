"""The regularizing layers by themselves."""

import pytest
import torch
from torchvision.ops import drop_block2d

from mp_lightning.compare.layers import DropBlock, GaussianDropout, InformationDropout
from mp_lightning.errors import ConfigurationError


@pytest.mark.parametrize("layer", [DropBlock(0.5), GaussianDropout(1.0), InformationDropout(4)])
def test_every_layer_is_the_identity_in_evaluation(layer):
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(layer.eval()(x), x)
    assert not torch.equal(layer.train()(x), x)


@pytest.mark.parametrize(("side", "block"), [(8, 3), (3, 3), (2, 1), (1, 1)])
def test_dropblock_is_torchvisions_with_single_elements_on_small_maps(side, block):
    x = torch.randn(4, 8, side, side)
    torch.manual_seed(1)
    ours = DropBlock(0.3)(x)
    torch.manual_seed(1)
    assert torch.equal(ours, drop_block2d(x, 0.3, block))
    assert (ours == 0).any()


def test_gaussian_dropout_has_mean_one_and_its_std():
    torch.manual_seed(0)
    y = GaussianDropout(0.4)(torch.full((4, 8, 64, 64), 3.0)) / 3
    assert y.mean().item() == pytest.approx(1, abs=0.005)
    assert y.std().item() == pytest.approx(0.4, rel=0.01)


def fixed_alpha(alpha):
    """A layer whose alpha is the same for every x."""
    layer = InformationDropout(2)
    torch.nn.init.zeros_(layer.size.weight)
    share = torch.tensor((alpha - 0.001) / 0.7)
    torch.nn.init.constant_(layer.size.bias, torch.logit(share).item())
    return layer


def test_information_dropout_multiplies_by_log_normal_noise():
    torch.manual_seed(0)
    layer = fixed_alpha(0.3)
    x = -torch.ones(4, 2, 100, 100)
    y = layer(x)
    assert (y < 0).all()  # the noise is positive: it commutes with a ReLU
    logarithm = (y / x).log()
    assert logarithm.mean().item() == pytest.approx(0, abs=0.005)
    assert logarithm.std().item() == pytest.approx(0.3, rel=0.01)


@pytest.mark.parametrize("alpha", [0.05, 0.3, 0.6])
def test_information_dropout_costs_minus_log_alpha(alpha):
    layer = fixed_alpha(alpha)
    layer(torch.randn(2, 2, 4, 4))
    assert layer.kl.item() == pytest.approx(-torch.tensor(alpha / 0.701).log().item(), abs=1e-4)


def test_information_dropout_costs_nothing_at_the_largest_alpha():
    layer = InformationDropout(2)
    torch.nn.init.constant_(layer.size.bias, 50.0)
    layer(torch.zeros(1, 2, 3, 3))
    assert layer.kl.item() == pytest.approx(0, abs=1e-6)


def test_information_dropout_learns_alpha_from_x():
    layer = InformationDropout(3)
    layer(torch.randn(2, 3, 4, 4))
    layer.kl.backward()
    assert layer.size.weight.grad.abs().sum() > 0 and layer.size.bias.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("make", "culprit"),
    [
        (lambda: DropBlock(1.0), "p=1.0"),
        (lambda: DropBlock(0.1, block=4), "block=4"),
        (lambda: GaussianDropout(-1), "std=-1"),
        (lambda: InformationDropout(3, max_alpha=0), "max_alpha=0"),
    ],
)
def test_values_out_of_range_are_named(make, culprit):
    with pytest.raises(ConfigurationError, match=culprit):
        make()
