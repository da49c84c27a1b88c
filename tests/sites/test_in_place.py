"""Activations that change their input in place, whose results are not what is used."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mp_lightning import attach, find_sites
from mp_lightning.errors import SiteError
from mp_lightning.perturbation import initial_phi
from mp_lightning.sites.rules import RESIDUAL


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


class InPlace(nn.Module):
    """An activation in place, and another name for its input."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.convolution, self.last = nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()
        self.relu, self.identity, self.dropout = nn.ReLU(inplace=True), nn.Identity(), nn.Dropout(0.1)

    def forward(self, x):
        h = self.first(x)
        return self.rest(h)


class ByIdentity(InPlace):
    def rest(self, h):
        shortcut = self.identity(h)
        return self.convolution(self.relu(h)) + shortcut


class ByDropout(InPlace):
    def rest(self, h):
        return self.convolution(self.relu(self.dropout(h))) + h


class ByView(InPlace):
    def rest(self, h):
        rows = h.view(h.shape[0], 8, -1)
        return (self.convolution(F.relu(h, inplace=True)).flatten(2) * rows).mean(2)


class ByPart(InPlace):
    def rest(self, h):
        a, b = h.chunk(2, 1)
        return self.convolution(torch.cat([F.relu_(a), b], 1)) + h


@pytest.mark.parametrize("model", [ByIdentity, ByDropout, ByView, ByPart])
def test_an_input_that_is_used_again_by_another_name_is_seen(model):
    with pytest.raises(SiteError, match="no site"):
        find_sites(model())


class BesidePart(InPlace):
    def rest(self, h):
        a, b = self.convolution(h).chunk(2, 1)
        return self.convolution(torch.cat([F.relu_(a), b], 1)) + h


class OfClone(InPlace):
    def rest(self, h):
        shortcut = h.clone()
        return self.convolution(self.relu(h)) * shortcut


class ReadsSize(InPlace):
    def rest(self, h):
        y = self.convolution(self.relu(h))
        return y.view(h.size(0), h.shape[1], -1)


@pytest.mark.parametrize("model", [BesidePart, OfClone, ReadsSize])
def test_what_lies_beside_it_copies_and_sizes_are_no_use_of_an_input(model):
    assert len(find_sites(model())) == 1


class SizeOfSum(InPlace):
    def rest(self, h):
        y = self.convolution(F.gelu(h)) + h
        return F.relu(y).view(y.size(0), -1)


def test_the_size_of_a_sum_is_no_use_of_it():
    assert [site.rule for site in find_sites(SizeOfSum())] == [RESIDUAL]
