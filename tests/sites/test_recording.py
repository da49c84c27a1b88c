"""Looking at a model leaves no trace: not on it, not beside it, and not in any generator of random numbers."""

import functools
import random

import numpy as np
import pytest
import torch
from torch import nn

from mp_lightning.backbones import build_backbone
from mp_lightning.sites import attach, find_sites
from mp_lightning.sites.recording import NoImageFits
from mp_lightning.sites.tracing import image_shape


@functools.lru_cache
def position(channels, height, width):
    return torch.zeros(1, channels, height, width)


class Remembers(nn.Module):
    """Keeps a position embedding of each size, in one way or another; torch.fx cannot follow it."""

    def __init__(self, how):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.how, self.by_size, self.last = how, {}, None
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        np.random.rand()
        random.random()
        height, width = (int(size) for size in x.shape[2:])
        x = self.act(self.bn(self.conv(x)))
        if self.how == "function":
            return x + position(8, height, width)
        if self.how == "dict":
            self.by_size.setdefault((height, width), torch.zeros(1, 8, height, width))
            return x + self.by_size[height, width]
        self.last = torch.zeros(1, 8, height, width) if self.last is None else self.last
        return x + self.last


@pytest.mark.parametrize("how", ["function", "dict", "attribute"])
def test_what_a_forward_remembers_is_never_without_content(how):
    model = Remembers(how)
    states = random.getstate(), np.random.get_state()[2], torch.get_rng_state()
    attach(model, sites=find_sites(model), ramp_steps=0)
    assert random.getstate() == states[0]
    assert np.random.get_state()[2] == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert (float(model.count), model.by_size, model.last, model.training) == (0, {}, None, True)
    output = model(torch.rand(2, 3, 224, 224))
    assert type(output) is torch.Tensor and output.isfinite().all()


@functools.cache
def shared_table():
    return torch.rand(3)


def test_what_was_remembered_before_stays():
    """As a table or an encoder that several models share, and that would be drawn anew."""
    table = shared_table()
    find_sites(Remembers("function"))
    assert shared_table() is table


def test_the_size_of_images_is_found_without_a_trace():
    model = Remembers("attribute")
    assert image_shape(model) == (3, 224, 224)
    assert model.last is None and int(model.bn.num_batches_tracked) == 0


def test_what_takes_no_image_says_why():
    with pytest.raises(NoImageFits, match="no convolution"):
        image_shape(nn.Linear(3, 3))
    with pytest.raises(NoImageFits, match=r"RuntimeError: .*1 channels"):
        image_shape(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(1, 4, 3)))


def test_a_module_that_cannot_be_copied_is_looked_at_itself_and_put_back():
    class WithGenerator(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = build_backbone("conv4", 3, width=4)
            self.lines = (line for line in "ab")  # cannot be copied
            self.kept = None

        def forward(self, x):
            self.kept = x
            return self.net(x)

    model = WithGenerator()
    assert len(find_sites(model)) == 4
    assert model.kept is None and next(model.lines) == "a"
    assert all(part.training for part in model.modules())


def test_plans_are_the_same_whatever_is_said_about_their_sites():
    import dataclasses

    from mp_lightning.sites import SitePlan

    plan = find_sites(build_backbone("conv4", 3, width=4))
    other = SitePlan([dataclasses.replace(site, reads="something", rule="by hand") for site in plan])
    assert plan == other and hash(plan) == hash(other)
    assert plan != SitePlan(list(plan)[1:])
