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


class ChannelsFirst(nn.LayerNorm):
    """Over the channels of maps, as in ConvNeXt code of several libraries."""

    def forward(self, x):
        moved = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return moved.permute(0, 3, 1, 2)


def test_a_layer_norm_of_maps_leaves_their_channels_first():
    def block():
        return nn.Conv2d(8, 8, 3, padding=1), ChannelsFirst(8), nn.ReLU()

    plain = nn.Sequential(nn.Conv2d(3, 8, 1), *block(), *block())
    assert sites_of(plain) == [("", 0, 8), ("", 0, 8)]
    residual = Block()
    residual.norm1, residual.norm2 = ChannelsFirst(8), ChannelsFirst(8)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), residual)
    assert sites_of(net) == [("1", 1, 8)]
    assert {site.layout for model in (plain, net) for site in find_sites(model)} == {"channels first"}


class Wrapper(nn.Module):
    """An activation of the user's own, without parameters."""

    def __init__(self, module=None):
        super().__init__()
        self.inside = module

    def forward(self, x):
        return F.relu(x) if self.inside is None else self.inside(x)


class Gate(nn.Module):
    """Squeeze-and-excitation; with a given shape, of the gates of Attention U-Net."""

    def __init__(self, channels, pool=True):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1) if pool else nn.Identity()
        self.one, self.norm, self.two = nn.Conv2d(channels, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, channels, 1)
        self.relu = nn.ReLU()

    def forward(self, x):
        return x * torch.sigmoid(self.two(self.relu(self.norm(self.one(self.pool(x))))))


class AttentionGate(nn.Module):
    def __init__(self):
        super().__init__()
        self.of_g = nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4))
        self.of_x = nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4))
        self.psi, self.relu = nn.Sequential(nn.Conv2d(4, 1, 1), nn.BatchNorm2d(1), nn.Sigmoid()), nn.ReLU(inplace=True)

    def forward(self, g, x):
        return x * self.psi(self.relu(self.of_g(g) + self.of_x(x)))


class AttentionUnet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.up, self.gate = nn.ConvTranspose2d(8, 8, 2, 2), AttentionGate()
        self.out = nn.Sequential(nn.Conv2d(16, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))

    def forward(self, x):
        shallow = self.down(x)
        up = self.up(self.deep(shallow))
        return self.out(torch.cat([self.gate(up, shallow), up], 1)).sigmoid()  # a mask, which multiplies nothing


def test_gates_of_attention_are_no_residual_blocks():
    assert [scope for scope, _, _ in sites_of(AttentionUnet())] == ["down", "deep", "out"]


@pytest.mark.parametrize("normalized", [True, False])
def test_gates_are_no_sites_of_plain_networks(normalized):
    def layers():
        return nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8) if normalized else nn.Identity(), nn.ReLU(), Gate(8)

    net = nn.Sequential(nn.Conv2d(3, 8, 1), *layers(), *layers())
    if not normalized:
        net[4].norm = net[8].norm = nn.Identity()
    assert [channels for _, _, channels in sites_of(net)] == [8, 8]


class HandWritten(nn.Module):
    """Hard-swish in the words of many a MobileNetV3."""

    def __init__(self, divided_first):
        super().__init__()
        self.relu, self.divided_first = nn.ReLU6(inplace=True), divided_first

    def forward(self, x):
        return x * (self.relu(x + 3) / 6) if self.divided_first else x * self.relu(x + 3) / 6


@pytest.mark.parametrize("divided_first", [True, False])
def test_a_hard_sigmoid_by_hand_is_a_gate(divided_first):
    class Inverted(nn.Module):
        def __init__(self, activation):
            super().__init__()
            first = nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16), activation()
            second = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16), activation()
            self.body = nn.Sequential(*first, *second, nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8))

        def forward(self, x):
            return x + self.body(x)

    blocks = Inverted(nn.ReLU), Inverted(lambda: HandWritten(divided_first)), Inverted(nn.Hardswish)
    assert [scope for scope, _, _ in sites_of(nn.Sequential(nn.Conv2d(3, 8, 1), *blocks))] == ["1.body", "3.body"]


@pytest.mark.parametrize("inside", [None, nn.ReLU])
def test_each_call_of_a_wrapped_activation_is_a_place_of_its_own(inside):
    """In one block, whose last call alone is a site; and in several, of which each has its own statistics."""
    wrapper = Wrapper(inside and inside())
    one = nn.Sequential(nn.Conv2d(3, 8, 1), Block(activation=wrapper))
    assert sites_of(one) == [("1", 1, 8)]
    several = nn.Sequential(nn.Conv2d(3, 8, 1), *(Block(nn.Conv2d, nn.ReLU(), wrapper) for _ in range(2)))
    assert [scope for scope, _, _ in sites_of(several)] == ["1", "2"]


def test_an_activation_of_a_sum_with_a_number_that_a_mask_multiplies_is_no_gate():
    blocks = nn.Sequential(nn.Conv2d(3, 8, 1), Shifted())
    assert [scope for scope, _, _ in sites_of(blocks)] == ["1"]


class Shifted(nn.Module):
    """A residual block whose branch ends in such an activation."""

    def __init__(self):
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return x + self.two(F.relu(self.norm(self.one(x)) + 1) * x)
