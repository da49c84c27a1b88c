"""Sites of networks that do not compute the same for images of any size."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mp_lightning.checkpoints import attach_state
from mp_lightning.errors import ConfigurationError, SiteError
from mp_lightning.sites import SitePlan, attach, find_sites


class LooksAtTheSize(nn.Module):
    """Calls an activation more where the image is large."""

    def __init__(self):
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(8 if i else 3, 8, 3, padding=1) for i in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))

    def forward(self, x):
        x = F.relu(self.norms[0](self.convolutions[0](x)))
        if x.shape[-1] > 64:
            x = F.relu(self.norms[1](self.convolutions[1](x)))
        return F.relu(self.norms[2](self.convolutions[2](x)))


def test_other_activations_than_when_the_sites_were_found_are_told_once():
    model = LooksAtTheSize()
    attach(model, ramp_steps=1)
    with pytest.warns(UserWarning, match=r"LooksAtTheSize calls .* than when its sites were found.*input_size="):
        model(torch.rand(2, 3, 16, 16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.rand(2, 3, 16, 16))


def test_sites_are_found_for_images_of_the_height_that_is_given():
    model = LooksAtTheSize()
    attachment = attach(model, ramp_steps=1, sites=1.0, input_size=16)
    assert len(attachment.plan) == 2
    read = []
    for site in attachment.all_sites():
        site.register_forward_pre_hook(lambda site, args: read.append(args[0].clone()))
    norms = []
    for norm in model.norms:
        norm.register_forward_hook(lambda norm, args, y: norms.append(y.clone()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            model(torch.rand(2, 3, 16, 16))
    assert len(read) == len(norms) == 4 and all(torch.equal(x, y) for x, y in zip(read, norms, strict=True))
    assert attach(model, input_size=16, sites=1.0) is attachment
    assert SitePlan.from_dict(attachment.plan.to_dict()) == attachment.plan


def test_a_plan_for_images_of_a_height_fits_there_and_is_brought_back():
    model = LooksAtTheSize()
    plan = find_sites(model, input_size=16)
    assert len(plan) == 2 and len(find_sites(model)) == 3
    attachment = attach(model, sites=plan, ramp_steps=1, input_size=16)
    assert attach(model, sites=1.0) is attachment
    model(torch.rand(2, 3, 16, 16))
    restored = attach_state(LooksAtTheSize(), attachment.state())
    assert restored.plan == plan


def test_a_plan_for_other_images_is_refused_with_the_reason():
    with pytest.raises(
        SiteError, match=r"for images of another size; make the plan again with .* the same input_size="
    ):
        attach(LooksAtTheSize(), sites=find_sites(LooksAtTheSize()), input_size=16)


def test_a_height_that_is_none_is_refused():
    with pytest.raises(ConfigurationError, match="input_size=0"):
        find_sites(LooksAtTheSize(), input_size=0)


def test_volumes_may_be_cubes():
    class Patches(nn.Module):
        """Takes volumes of 32 voxels on each side alone, which it does not say."""

        def __init__(self):
            super().__init__()
            self.patches, self.position = nn.Conv3d(1, 8, 8, 8), nn.Parameter(torch.zeros(64, 8))
            self.norm, self.up, self.act, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)

        def forward(self, x):
            batch, *_ = x.shape
            x = self.patches(x).reshape(batch, 8, -1).transpose(1, 2) + self.position
            return x + self.down(self.act(self.up(self.norm(x))))

    assert find_sites(Patches()).names == ["act"]
