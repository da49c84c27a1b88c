"""Tensors of any layout are perturbed as the maps that they hold."""

import pytest
import torch
from torch import nn

from capture import Unchanged
from mp_lightning.errors import SiteError
from mp_lightning.sites import SitePlan, SiteSpec, attach, find_sites
from mp_lightning.sites.layout import FIRST, LAST, SEQUENCE, as_maps, from_maps, stretch

SHAPES = [
    ((2, 3, 4, 5), FIRST, (2, 3, 4, 5), 1.0),
    ((2, 3, 7), FIRST, (2, 3, 7, 1), 1.0),
    ((2, 3, 6, 4, 5), FIRST, (2, 3, 24, 5), 6.0),
    ((2, 4, 5, 3), LAST, (2, 3, 4, 5), 1.0),
    ((2, 9, 3), LAST, (2, 3, 9, 1), 3.0),
    ((2, 6, 4, 5, 3), LAST, (2, 3, 24, 5), 6.0),
    ((9, 2, 3), SEQUENCE, (2, 3, 9, 1), 3.0),
]


@pytest.mark.parametrize(("shape", "layout", "maps", "times"), SHAPES)
def test_maps_and_back(shape, layout, maps, times):
    x = torch.arange(torch.Size(shape).numel()).view(shape).float()
    as_they_are = as_maps(x, layout)
    assert as_they_are.shape == maps and stretch(x, layout) == times
    back = from_maps(as_they_are.contiguous(), x, layout)
    assert torch.equal(back, x) and back.is_contiguous()
    image = x[:, 1] if layout == SEQUENCE else x[1]
    assert torch.equal(as_they_are[1, 2].flatten(), (image[2] if layout == FIRST else image[..., 2]).flatten())


class Mixed(nn.Module):
    """The same maps, with the channels first or last, before an activation."""

    def __init__(self, layout):
        super().__init__()
        self.layout = layout
        self.activation = nn.ReLU()

    def forward(self, image):
        if self.layout == FIRST:
            return self.activation(image)
        return self.activation(image.movedim(1, -1)).movedim(-1, 1)


def perturbed(layout, image, path):
    model = Mixed(layout).train()
    plan = SitePlan([SiteSpec("a", "", "activation", 0, image.shape[1], "by hand", "x", layout)])
    attach(model, sites=plan, seed=3, path=path, strength=1.0)
    image = image.requires_grad_()
    result = model(image)
    (result * torch.linspace(-1, 1, result.numel()).view(result.shape)).sum().backward()
    return result.detach(), image.grad


@pytest.mark.parametrize("path", ["auto", "reference"])
def test_channels_last_are_the_same_maps(path):
    image = torch.randn(4, 6, 8, 8)
    first, last = (perturbed(layout, image.clone(), path) for layout in (FIRST, LAST))
    assert not torch.equal(first[0], image.relu())
    for one, other in zip(first, last, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("layout", [FIRST, LAST])
def test_sequences_on_the_fast_path_as_on_the_readable_one(layout):
    signal = torch.randn(4, 16, 30)
    fast, reference = (perturbed(layout, signal.clone(), path) for path in ("auto", "reference"))
    for one, other in zip(fast, reference, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


class Recorder(Unchanged):
    def __init__(self):
        self.sizes = []

    def multiplier(self, x, eps, statistics, norms):
        self.sizes.append((x.shape[2], float(norms.size)))
        return super().multiplier(x, eps, statistics, norms)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.norm, self.up, self.act, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.down(self.act(self.up(self.norm(x))))
        x = x.mean(1)
        return self.head(x + x.relu())


def test_tokens_are_as_high_as_their_square():
    """The height that the scale sees is that of the 8 x 8 grid of an image of 32 pixels, not 64 tokens."""
    model, recorder = Tokens(), Recorder()
    (site,) = find_sites(model)
    assert (site.activation, site.channels, site.layout) == ("act", 16, LAST)
    attach(model, perturbation=recorder)
    model(torch.rand(2, 3, 32, 32))
    ((height, size),) = recorder.sizes
    assert height / size == pytest.approx(8 / 32)


@pytest.mark.parametrize(
    ("convolution", "norm", "shape"),
    [(nn.Conv1d, nn.BatchNorm1d, (2, 3, 40)), (nn.Conv3d, nn.BatchNorm3d, (2, 3, 4, 8, 8))],
)
def test_signals_and_clips(convolution, norm, shape):
    model = nn.Sequential(convolution(3, 8, 3, padding=1), norm(8), nn.ReLU(), convolution(8, 4, 3), nn.ReLU())
    plan = find_sites(model)
    assert [(site.name, site.channels, site.layout) for site in plan] == [("2", 8, FIRST)]
    plain = model(torch.ones(shape))
    attach(model, strength=1.0)
    model(torch.ones(shape)).sum().backward()
    assert not torch.equal(model(torch.ones(shape)), plain)


def test_a_tensor_without_space_is_named():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
    plan = SitePlan([SiteSpec("a", "", "1", 0, 6, "by hand", "x", LAST)])
    attach(model, sites=plan, input_size=32)
    with pytest.raises(SiteError, match=r"site 'a' got a tensor of shape \(2, 6\), expected \(B, N, 6\) or"):
        model(torch.rand(2, 4))


def test_features_of_whole_images_are_no_tokens():
    """A residual head on pooled features has a layer normalization, but nothing in space."""

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
            self.norm, self.up, self.act, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)

        def forward(self, x):
            x = self.bn(self.conv(x)).relu().mean((2, 3))
            return x + self.down(self.act(self.up(self.norm(x))))

    assert [site.channels for site in find_sites(Head())] == [8]


def test_a_net_that_makes_position_biases_is_no_part_of_the_branch():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.mix = nn.LayerNorm(8), nn.Linear(8, 8)
            self.bias_net = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 8))
            self.register_buffer("positions", torch.arange(64.0).view(64, 1))

        def forward(self, x):
            return self.mix(self.norm(x)) + self.bias_net(self.positions)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.attention, self.rest = nn.Conv2d(3, 8, 4, 4), Attention(), Tokens()

        def forward(self, x):
            x = self.patches(x).flatten(2).transpose(1, 2)
            x = x + self.attention(x)
            rest = self.rest
            return x + rest.down(rest.act(rest.up(rest.norm(x))))

    assert [site.activation for site in find_sites(Net())] == ["rest.act"]


class Attends(nn.Module):
    """A transformer block, whose attention takes the batch first or, as torch's own does by default, the sequence."""

    def __init__(self, batch_first):
        super().__init__()
        self.before, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.norm, self.up, self.act, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)

    def forward(self, x):
        y = self.before(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.down(self.act(self.up(self.norm(x))))


class AsInClip(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.batch_first = batch_first
        self.patches, self.token = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.ones(1, 1, 8))
        self.blocks, self.head = nn.Sequential(Attends(batch_first), Attends(batch_first)), nn.Linear(8, 5)

    def tokens(self, image):
        return self.patches(image).flatten(2)

    def forward(self, image):
        x = self.tokens(image).permute(0, 2, 1)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.blocks(x if self.batch_first else x.transpose(0, 1))
        return self.head(x.mean(1 if self.batch_first else 0))


class Unpacks(AsInClip):
    """Cannot be traced by symbols, and is recorded."""

    def tokens(self, image):
        batch, channels, *_ = (x := self.patches(image)).shape
        return x.reshape(batch, channels, -1)


@pytest.mark.parametrize("kind", [AsInClip, Unpacks])
@pytest.mark.parametrize("path", ["auto", "reference"])
def test_a_sequence_before_its_batch_is_perturbed_as_one_after_it(kind, path):
    first, last = kind(True), kind(False)
    last.load_state_dict(first.state_dict())
    results = []
    for model, layout in ((first, LAST), (last, SEQUENCE)):
        attach(model, sites=1.0, strength=1.0, seed=3, path=path)
        assert [site.layout for site in model._metaperturb.plan] == [layout, layout]
        image = torch.linspace(-1, 1, 4 * 3 * 16 * 16).view(4, 3, 16, 16).sin().requires_grad_()
        result = model(image)
        result.square().sum().backward()
        results.append((result.detach(), image.grad))
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_queries_keys_and_values_in_front_of_the_batch_leave_it_first():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.mix = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x):
            batch, length, _ = x.shape
            q, k, v = self.qkv(x).reshape(batch, length, 3, 2, 4).permute(2, 0, 3, 1, 4)
            x = (q @ k.transpose(-2, -1)).softmax(-1) @ v
            return self.mix(x.transpose(1, 2).reshape(batch, length, 8))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.attention, self.norm = nn.Conv2d(3, 8, 4, 4), Attention(), nn.LayerNorm(8)
            self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

        def forward(self, x):
            x = self.attention(self.patches(x).flatten(2).transpose(1, 2))
            return x + self.mlp(self.norm(x))

    assert [site.layout for site in find_sites(Net())] == [LAST]


def test_what_replaces_a_normalization_of_tokens_counts_as_one():
    """As in ResMLP, which scales and shifts tokens."""

    class Affine(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.shift = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))

        def forward(self, x):
            return self.scale * x + self.shift

    model = Tokens()
    model.norm = Affine()
    assert [(site.activation, site.layout) for site in find_sites(model)] == [("act", LAST)]
