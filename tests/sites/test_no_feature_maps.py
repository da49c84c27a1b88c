"""Activations that give no feature map: a part of an activation by hand, or the prediction itself."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mp_lightning.errors import SiteError
from mp_lightning.sites import find_sites
from mp_lightning.sites.rules import RESIDUAL


def conv(a, b):
    return nn.Conv2d(a, b, 3, padding=1)


class Mish(nn.Module):
    def forward(self, x):
        return x * torch.tanh(F.softplus(x))


class MishOfModules(nn.Module):
    def __init__(self):
        super().__init__()
        self.softplus, self.tanh = nn.Softplus(), nn.Tanh()

    def forward(self, x):
        return self.tanh(self.softplus(x)).mul(x)


class Block(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.conv1, self.norm1, self.conv2, self.norm2 = conv(8, 8), nn.BatchNorm2d(8), conv(8, 8), nn.BatchNorm2d(8)
        self.activation = activation

    def forward(self, x):
        return F.relu(x + self.norm2(self.conv2(self.activation(self.norm1(self.conv1(x))))))


@pytest.mark.parametrize("mish", [Mish, MishOfModules])
def test_a_part_of_an_activation_by_hand_is_no_site(mish):
    plain = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), mish(), conv(8, 8), nn.BatchNorm2d(8), nn.ReLU())
    assert find_sites(plain).names == ["5"]
    plan = find_sites(nn.Sequential(conv(3, 8), Block(mish())))
    assert [(site.name, site.rule) for site in plan] == [("1:relu", RESIDUAL)]
    with pytest.raises(SiteError, match=r"no activation that counts; .*Mish"):
        find_sites(nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), mish()))


class Heads(nn.Module):
    """A mean, and a variance that is positive."""

    def __init__(self):
        super().__init__()
        self.body, self.mean, self.variance = nn.Sequential(conv(3, 8), nn.ReLU()), conv(8, 1), conv(8, 1)

    def forward(self, x):
        x = self.body(x)
        return self.mean(x), F.softplus(self.variance(x))


def depth():
    return nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, 1), nn.ReLU())


def test_the_prediction_itself_is_not_perturbed():
    assert find_sites(depth()).names == ["1", "3"]
    assert find_sites(Heads()).names == ["body.1"]


class Trained(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = depth()
        self.judge = depth().requires_grad_(False)

    forward = None


def test_the_prediction_is_told_beside_what_does_not_learn():
    assert find_sites(Trained()).names == ["net.1", "net.3"]


class InParts(nn.Module):
    """What its encoder gives is no prediction, though its forward cannot be followed that says so."""

    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8), nn.ReLU()), nn.Linear(8, 5)

    forward = None


def test_what_a_part_gives_may_be_read_by_another_one():
    assert find_sites(InParts()).names == ["encoder.1", "encoder.3"]


class Recurrent(nn.Module):
    """The layer that follows the convolutions is one of time."""

    def __init__(self):
        super().__init__()
        self.body, self.time = nn.Sequential(conv(3, 8), nn.ReLU()), nn.GRU(8, 5, batch_first=True)

    def forward(self, x):
        return self.time(self.body(x).mean(2).transpose(1, 2))[0]


def test_layers_of_time_are_layers():
    assert find_sites(Recurrent()).names == ["body.1"]
