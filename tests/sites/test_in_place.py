"""Activations that change their input in place, whose results are not what is used."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mp_lightning import attach, find_sites
from mp_lightning.errors import SiteError
from mp_lightning.perturbation import initial_phi


class Statement(nn.Module):
    """A second activation that is a statement, or whose input is used again; the first is as usual."""

    def __init__(self, second):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.convolution, self.norm = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.second = second

    def forward(self, x):
        x = self.norm(self.convolution(self.first(x)))
        return self.second(self, x)


def module_statement(self, x):
    self.relu(x)
    return x


def function_statement(self, x):
    F.relu_(x)
    return x


def used_again(self, x):
    return F.relu(x, inplace=True) + x


def as_usual(self, x):
    return self.relu(x)


@pytest.mark.parametrize("second", [module_statement, function_statement, used_again])
def test_are_no_sites_and_act_as_before(second):
    torch.manual_seed(0)
    model = Statement(second).eval()
    x = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        assert model(x).min() == 0
        assert find_sites(model).names == ["first.2"]
        attach(model, initial_phi(0))
        assert model(x).min() == 0, "still rectified"


def test_are_sites_where_their_result_is_used():
    assert find_sites(Statement(as_usual)).names == ["first.2", "relu"]


def test_a_network_of_statements_alone_has_no_site():
    model = Statement(module_statement)
    model.first = nn.Identity()
    model.convolution = nn.Conv2d(3, 8, 3)
    with pytest.raises(SiteError, match="no site"):
        find_sites(model)
