"""Sums that are no residual ones: of convolutions, of what conditions a map, of branches side by side."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mp_lightning.perturbation import initial_phi
from mp_lightning.sites import attach, find_sites
from mp_lightning.sites.rules import END, PLAIN, PRE_ACTIVATION, RESIDUAL


def conv(a, b, size=3):
    return nn.Conv2d(a, b, size, padding=size // 2)


def layer(a, b):
    return nn.Sequential(conv(a, b), nn.BatchNorm2d(b), nn.ReLU())


def with_head(*layers):
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(5))


class TwoKernels(nn.Module):
    """One layer that is trained as two."""

    def __init__(self, c):
        super().__init__()
        self.large, self.small, self.norm = conv(c, c), conv(c, c, 1), nn.BatchNorm2d(c)

    def forward(self, x):
        return F.relu(self.norm(self.large(x) + self.small(x)))


class LoRA(nn.Module):
    """A convolution and its adapter, as peft has it."""

    def __init__(self, a, b):
        super().__init__()
        self.base = conv(a, b)
        self.adapter = nn.Sequential(nn.Dropout(0.1), nn.Conv2d(a, 2, 3, padding=1), nn.Conv2d(2, b, 1))

    def forward(self, x):
        return (self.base(x) + self.adapter(x) * 4.0).to(x.dtype)


class SelectiveKernels(nn.Module):
    """Two branches side by side, and how much of each."""

    def __init__(self, c):
        super().__init__()
        self.a, self.b = layer(c, c), layer(c, c)
        self.fuse, self.select = layer(c, 4), nn.Conv2d(4, 2 * c, 1)

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        weights = self.select(self.fuse((a + b).mean((2, 3), keepdim=True)))
        p, q = weights.view(x.size(0), 2, -1, 1, 1).softmax(1).split(1, dim=1)
        return a * p.squeeze(1) + b * q.squeeze(1)


class PositionsByConvolution(nn.Module):
    """A sum that no activation is inside of, or after."""

    def __init__(self, c):
        super().__init__()
        self.depthwise = nn.Conv2d(c, c, 3, padding=1, groups=c)

    def forward(self, x):
        return x + self.depthwise(x)


@pytest.mark.parametrize(
    ("inner", "names"),
    [
        (lambda: TwoKernels(8), ["0.2", "1:relu", "2.2"]),
        (lambda: nn.Sequential(LoRA(8, 8), nn.BatchNorm2d(8), nn.ReLU()), ["0.2", "1.2", "2.2"]),
        (lambda: SelectiveKernels(8), ["0.2", "1.a.2", "1.b.2", "2.2"]),
        (lambda: PositionsByConvolution(8), ["0.2", "2.2"]),
    ],
    ids=["kernels", "lora", "selective kernels", "positions"],
)
def test_a_plain_network_stays_one_whatever_one_layer_adds(inner, names):
    plan = find_sites(nn.Sequential(layer(3, 8), inner(), layer(8, 16)))
    assert (plan.names, {site.rule for site in plan}) == (names, {PLAIN})


class OwnFrozenNorm(nn.Module):
    """Batch norm whose statistics are kept, written with parameters."""

    def __init__(self, c):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(c)), nn.Parameter(torch.zeros(c))
        self.register_buffer("mean", torch.zeros(c))

    def forward(self, x):
        bias = self.bias - self.mean * self.weight
        return x * self.weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)


class Block(nn.Module):
    def __init__(self, c, norm):
        super().__init__()
        self.conv1, self.norm1, self.conv2, self.norm2 = conv(c, c), norm(c), conv(c, c), norm(c)

    def forward(self, x):
        return F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))) + x)


def test_an_affine_layer_by_hand_is_no_residual_sum():
    plan = find_sites(with_head(conv(3, 8), OwnFrozenNorm(8), nn.ReLU(), *(Block(8, OwnFrozenNorm) for _ in range(2))))
    assert [(site.name, site.rule) for site in plan] == [("3:relu", RESIDUAL), ("4:relu", RESIDUAL)]


class ConditionalNorm(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm, self.table = nn.BatchNorm2d(c, affine=False), nn.Embedding(10, 2 * c)

    def forward(self, x, y):
        scale, shift = self.table(y).chunk(2, 1)
        return self.norm(x) * scale[:, :, None, None] + shift[:, :, None, None]


class Upwards(nn.Module):
    """A block of a conditional generator."""

    def __init__(self, c):
        super().__init__()
        self.norm1, self.conv1, self.norm2, self.conv2 = ConditionalNorm(c), conv(c, c), ConditionalNorm(c), conv(c, c)

    def forward(self, x, y):
        x = F.interpolate(x, scale_factor=2)
        return x + self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x, y))), y)))


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 8 * 16)
        self.block1, self.block2, self.norm, self.last = Upwards(8), Upwards(8), nn.BatchNorm2d(8), conv(8, 3)

    def forward(self, z, y):
        x = self.linear(z).view(-1, 8, 4, 4)
        return torch.tanh(self.last(F.relu(self.norm(self.block2(self.block1(x, y), y)))))


def test_conditional_batch_norm_is_no_residual_sum():
    plan = find_sites(Generator())
    assert [(site.name, site.rule) for site in plan] == [
        *((name, PRE_ACTIVATION) for name in ("block1:relu", "block2:relu")),
        (":relu", END),
    ]
    assert [site.call for site in plan][:2] == [1, 1], "the second of a block"


class FiLM(nn.Module):
    """A normalized convolution that is scaled and shifted by a net of its own."""

    def __init__(self, a, c):
        super().__init__()
        self.conv, self.norm = conv(a, c), nn.BatchNorm2d(c)
        self.net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2 * c))

    def forward(self, x, t):
        scale, shift = self.net(t).chunk(2, 1)
        return F.relu(self.norm(self.conv(x)) * (1 + scale[:, :, None, None]) + shift[:, :, None, None])


class Conditioned(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer1, self.layer2, self.head = FiLM(3, 8), FiLM(8, 8), nn.Linear(8, 5)

    def forward(self, x, t):
        return self.head(self.layer2(self.layer1(x, t), t).mean((2, 3)))


def test_a_conditioned_plain_network_is_perturbed_after_its_conditions():
    plan = find_sites(Conditioned())
    assert [(site.name, site.rule) for site in plan] == [("layer1:relu", PLAIN), ("layer2:relu", PLAIN)]


class TimedBlock(nn.Module):
    """A block of a diffusion model."""

    def __init__(self, a, b):
        super().__init__()
        self.norm1, self.conv1, self.time = nn.GroupNorm(1, a), conv(a, b), nn.Linear(6, b)
        self.norm2, self.conv2 = nn.GroupNorm(1, b), conv(b, b)
        self.shortcut = conv(a, b, 1)

    def forward(self, x, t):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.spread(self.time(F.silu(t)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))

    def spread(self, t):
        return t[:, :, None, None]


class Unsqueezed(TimedBlock):
    def spread(self, t):
        return t.unsqueeze(-1).unsqueeze(-1)


class Viewed(TimedBlock):
    def spread(self, t):
        return t.view(t.shape[0], -1, 1, 1)


class Diffusion(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(6, 6), nn.SiLU(), nn.Linear(6, 6))
        self.first, self.block1, self.block2 = conv(3, 8), block(8, 16), block(16, 8)
        self.norm, self.last = nn.GroupNorm(1, 8), conv(8, 3)

    def forward(self, x, t):
        t = self.embed(torch.sin(t[:, None] * torch.arange(6.0)))
        return self.last(F.silu(self.norm(self.block2(self.block1(self.first(x), t), t))))


@pytest.mark.parametrize("block", [TimedBlock, Unsqueezed, Viewed])
def test_diffusion_models_are_trained_without_noise_on_their_time(block):
    model = Diffusion(block)
    attachment = attach(model, initial_phi(0), sites=1.0, ramp_steps=0)
    assert attachment.plan.names == ["block1:silu", "block2:silu", ":silu"]
    assert "time" not in str(attachment.plan)
    model(torch.rand(2, 3, 8, 8), torch.rand(2))


class Autoencoder(nn.Module):
    """Its decoder is made of what was pooled, by a layer, in the shape of maps."""

    def __init__(self):
        super().__init__()
        self.encoder, self.linear, self.decoder = layer(3, 8), nn.Linear(8, 8 * 16), Block(8, nn.BatchNorm2d)

    def forward(self, x):
        code = self.encoder(x).mean((2, 3))
        return self.decoder(self.linear(code).view(-1, 8, 4, 4))


def test_blocks_behind_a_pooled_code_are_residual():
    assert [(site.name, site.rule) for site in find_sites(Autoencoder())] == [("decoder:relu", RESIDUAL)]


class Tokens(nn.Module):
    """A block of a transformer, of linear layers alone."""

    def __init__(self, c):
        super().__init__()
        self.norm, self.first, self.activation, self.last = (
            *(nn.LayerNorm(c), nn.Linear(c, 2 * c), nn.GELU()),
            nn.Linear(2 * c, c),
        )

    def forward(self, x):
        return x + self.last(self.activation(self.first(self.norm(x))))


class Reader(nn.Module):
    """Convolutions, whose maps are read as a sequence of columns."""

    def __init__(self, pool):
        super().__init__()
        self.layers, self.pool = nn.Sequential(layer(3, 8), layer(8, 8)), pool
        self.blocks, self.head = nn.Sequential(Tokens(8), Tokens(8)), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.blocks(self.pool(self.layers(x)).transpose(1, 2)))


class OverHeight(nn.Module):
    def forward(self, x):
        return x.mean(2)


class AdaptiveOverHeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d((1, None))

    def forward(self, x):
        return self.pool(x).squeeze(2)


@pytest.mark.parametrize("pool", [OverHeight, AdaptiveOverHeight])
def test_a_mean_over_one_axis_leaves_a_sequence(pool):
    assert find_sites(Reader(pool())).names == ["blocks.0.activation", "blocks.1.activation"]
