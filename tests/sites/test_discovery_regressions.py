"""Ways of writing a network that once gave wrong sites, sites never reached, or traces left on the model."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from mp_lightning.errors import SiteError
from mp_lightning.sites import attach, find_sites
from mp_lightning.sites.activations import ACTIVATION_FUNCTIONS, ACTIVATION_MODULES


class Reached:
    """A perturbation that changes nothing and counts."""

    name = "reached"

    def __init__(self):
        self.shapes = []

    def initial_statistics(self, channels):
        return {}

    def measure(self, x, running, synchronize):
        return {}, None

    def multiplier(self, x, eps, statistics, norms):
        self.shapes.append(tuple(x.shape))
        return torch.ones(())


def sites_of(model):
    """(scope, call, channels) of the plan, once it is seen that a forward reaches every site with those channels."""
    reached = Reached()
    plan = attach(model, perturbation=reached).plan
    model(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert [shape[1] for shape in reached.shapes] == [site.channels for site in plan]
    return [(site.scope, site.call, site.channels) for site in plan]


class Block(nn.Module):
    def __init__(self, conv=nn.Conv2d, activation=None, last=None):
        super().__init__()
        self.conv1, self.norm1 = conv(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = conv(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.activation = activation or nn.ReLU()
        self.last = last or self.activation

    def forward(self, x):
        return self.last(self.norm2(self.conv2(self.activation(self.norm1(self.conv1(x))))) + x)


class StandardizedConv(nn.Conv2d):
    """A convolution of the user's own class, which torch.fx sees through."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


@pytest.mark.parametrize("module", ACTIVATION_MODULES, ids=lambda module: module.__name__)
def test_a_module_makes_one_listed_call(module):
    class Count(TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.calls += func in ACTIVATION_FUNCTIONS
            return func(*args, **(kwargs or {}))

    x = torch.ones(1, 2, 2, 2)
    with Count() as count:
        module()(x)
    assert count.calls == 1


@pytest.mark.parametrize("function", [F.relu6, F.leaky_relu_, F.elu_, torch.relu_, F.relu])
def test_function_after_a_relu6_module_is_reached(function):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Block(activation=nn.ReLU6(), last=function))
    assert sites_of(model) == [("1", 1, 8)]


def test_convolutions_of_the_users_own_class():
    assert sites_of(nn.Sequential(StandardizedConv(3, 8, 3), Block(StandardizedConv))) == [("1", 1, 8)]
    assert sites_of(nn.Sequential(StandardizedConv(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())) == [("", 0, 8)]


def test_one_activation_module_shared_by_all_blocks():
    shared = nn.ReLU()
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Block(activation=shared), Block(activation=shared))
    assert sites_of(model) == [("1", 1, 8), ("2", 1, 8)]


class GatedPreActivation(nn.Module):
    """The gate's pooling is an average over a window as large as the map."""

    def __init__(self):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.norm2, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.squeeze, self.excite = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)

    def forward(self, x):
        out = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        gate = F.relu(self.squeeze(F.avg_pool2d(out, out.size(2))))
        return x + out * torch.sigmoid(self.excite(gate))


class ActivationAfterGate(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.gate = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        out = self.conv1(x)
        out = out.mul(torch.sigmoid(self.gate(F.adaptive_avg_pool2d(out, 1))))
        return x + self.conv2(F.relu(self.norm(out)))


def test_gates_are_told_by_what_they_lead_to():
    assert sites_of(nn.Sequential(nn.Conv2d(3, 8, 3), GatedPreActivation())) == [("1", 1, 8)]
    assert sites_of(nn.Sequential(nn.Conv2d(3, 8, 3), ActivationAfterGate())) == [("1", 0, 8)]


class ZeroPaddedShortcut(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16))

    def forward(self, x):
        return F.relu(F.pad(F.avg_pool2d(x, 2), (0, 0, 0, 0, 4, 4)) + self.branch(x))


def test_padding_of_channels_is_not_taken_for_that_of_pixels():
    assert sites_of(nn.Sequential(nn.Conv2d(3, 8, 3), ZeroPaddedShortcut())) == [("1", 0, 16)]


class TwoTowers(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(2))
        self.head_a, self.head_b = nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x):
        return self.head_a(self.a(x).mean((2, 3))) + self.head_b(self.b(x).mean((2, 3)))


def test_sum_of_logits_is_no_residual_sum():
    assert sites_of(TwoTowers()) == [("a", 0, 8), ("b", 0, 8)]


class Sometimes(Block):
    """Stochastic depth as research code writes it, and a list of features."""

    def __init__(self):
        super().__init__()
        self.features = []

    def forward(self, x):
        draw = torch.rand(1).item() + random.random()
        if self.training and draw < 1.0:
            return x
        self.features.append(x)
        return super().forward(x)


def test_chance_does_not_decide_and_no_trace_is_left():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), *(Sometimes() for _ in range(4)))
    seen = []
    model[1].register_forward_hook(lambda module, args, output: seen.append(output))
    numbers, python_numbers = torch.random.get_rng_state(), random.getstate()
    assert [len(find_sites(model)) for _ in range(5)] == [4] * 5
    assert torch.equal(torch.random.get_rng_state(), numbers)
    assert random.getstate() == python_numbers
    assert seen == []
    assert [block.features for block in model[1:]] == [[]] * 4
    assert model[1].training
    assert len(model[1]._forward_hooks) == 1


def test_frozen_network_is_named_in_the_error():
    model = nn.Module()
    model.add_module("backbone", nn.Sequential(nn.Conv2d(3, 8, 3), Block()).requires_grad_(False))
    model.add_module("head", nn.Linear(8, 2))
    with pytest.raises(SiteError, match="frozen and left alone: backbone"):
        find_sites(model)
