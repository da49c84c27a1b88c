"""Activations that give no feature map: a part of an activation by hand."""

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
    with pytest.raises(SiteError, match=r"no activation that can be seen; .*Mish nn\.Mish"):
        find_sites(nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), mish()))
