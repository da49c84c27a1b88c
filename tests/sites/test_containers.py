"""Parts of containers that are called without them, and sites that no forward reaches."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from mp_lightning import Mean, attach, load_phi, reestimate_batch_norm
from mp_lightning.backbones import build_backbone
from mp_lightning.compare.controls import NoiseOnly
from mp_lightning.errors import SiteError


def layers(ch=8):
    def stage(before, after):
        return [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]

    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(ch, 4)]
    return nn.Sequential(*stage(3, ch), *stage(ch, ch), *stage(ch, ch), *pool)


def iterated(net, x):
    for layer in net:
        x = layer(x)
    return x


WAYS = {
    "iterated": iterated,
    "sliced": lambda net, x: net[5:](net[:5](x)),
    "checkpointed in part": lambda net, x: net[6:](checkpoint(net[:6], x, use_reentrant=False)),
    "checkpoint_sequential": lambda net, x: checkpoint_sequential(net, 2, x, use_reentrant=False),
    "its forward": lambda net, x: net.forward(x),
    "called": lambda net, x: net(x),
}


class Net(nn.Module):
    def __init__(self, way):
        super().__init__()
        torch.manual_seed(0)
        self.net = layers()
        self.way = way

    def forward(self, x):
        return self.way(self.net, x)


def trained(way, *, perturbed=True, steps=3):
    """The parameters after a few steps."""
    model = Net(way)
    attachment = attach(model, sites=1, ramp_steps=0, full_strength_at=1) if perturbed else None
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(8, 3, 16, 16, generator=generator)
        loss = F.cross_entropy(model(x), torch.arange(8) % 4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if attachment is not None:
            attachment.step(loss.detach())
    return torch.cat([parameter.detach().flatten() for parameter in model.net.parameters() if parameter.requires_grad])


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_container_may_be_taken_to_pieces(way):
    """As it runs as a whole, bit for bit, with the same noise."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = trained(way)
    assert torch.equal(found, trained(WAYS["called"]))
    assert not torch.equal(found, trained(way, perturbed=False))


class Shares(nn.Module):
    """One activation, which is in a container and is called beside it, too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        relu = nn.ReLU()
        self.first, self.relu = nn.Conv2d(3, 8, 3), relu
        self.net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), relu)

    def forward(self, x):
        return self.net(self.relu(self.first(x)))


def test_an_activation_that_others_call_as_well_is_perturbed_in_its_container_alone():
    model = Shares()
    attachment = attach(model, sites=lambda site: site.scope == "net", ramp_steps=0, full_strength_at=1)
    seen = []
    attachment.sites[0].register_forward_hook(lambda *_: seen.append(True))
    model(torch.randn(2, 3, 16, 16))
    assert len(seen) == 1


class Helper(nn.Module):
    """Trained by calling another method than forward."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def encode(self, x):
        return F.relu(self.norm(self.conv(x))).mean((2, 3))

    def forward(self, x):
        return self.head(self.encode(x))


def test_a_first_batch_in_which_nothing_was_perturbed_is_told_once():
    model = Helper()
    attachment = attach(model, ramp_steps=0, full_strength_at=1)
    model.head(model.encode(torch.randn(2, 3, 8, 8)))
    with pytest.warns(
        UserWarning, match="nothing was perturbed in the first training batch, as no forward of the module"
    ):
        attachment.step(1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attachment.step(1.0)
    reached = attach(Helper(), ramp_steps=0, full_strength_at=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reached.model(torch.randn(2, 3, 8, 8))
        reached.step(1.0)


class Halves(nn.Module):
    """A perturbation whose statistics are a constant."""

    name = "halves"

    def initial_statistics(self, channels):
        return {"factor": torch.tensor(0.5)}

    def measure(self, x, running, synchronize):
        return running, None

    def multiplier(self, x, eps, statistics, norms):
        return statistics["factor"].to(x.dtype)


def test_constant_statistics_do_not_mean_that_nothing_was_perturbed():
    for reached in (True, False):
        attachment = attach(Helper(), perturbation=Halves(), ramp_steps=0)
        if reached:
            attachment.model(torch.randn(2, 3, 8, 8))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            attachment.step(1.0)
        assert any("nothing was perturbed" in str(one.message) for one in told) == (not reached)


def test_noise_without_a_scale_has_no_statistics_and_perturbs():
    attachment = attach(Helper(), perturbation=NoiseOnly(load_phi().phi), ramp_steps=0)
    attachment.model(torch.randn(2, 3, 8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attachment.step(1.0)


def test_a_batch_of_one_which_no_statistic_is_taken_of_is_perturbed_in_silence():
    model = build_backbone("conv4", 3, width=4, image_size=16)
    attachment = attach(model, ramp_steps=10)
    model(torch.rand(1, 3, 16, 16)).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attachment.step(1.0)


def by_stages(net, x):
    return net.layer3(net.layer2(net.layer1(F.relu(net.bn1(net.conv1(x))))))


def staged(**options):
    torch.manual_seed(0)
    net = build_backbone("resnet20", 3, width=4)
    return net, attach(net, ramp_steps=0, full_strength_at=1, sites=1, **options)


def test_the_height_of_images_is_not_taken_from_the_feature_map_of_a_later_stage():
    net, attachment = staged()
    with pytest.raises(SiteError, match="height of the model's input is unknown"):
        by_stages(net, torch.rand(4, 3, 16, 16))
    net(torch.rand(4, 3, 16, 16))
    assert float(attachment.input_size) == 16


def test_a_network_that_is_called_by_its_stages_is_told_so():
    net, attachment = staged(input_size=16)
    by_stages(net, torch.rand(4, 3, 16, 16))
    with pytest.warns(UserWarning, match="parts of the network were called one by one"):
        attachment.step(1.0)


def test_stages_of_an_evaluated_network_take_the_expected_noise_and_batch_norm_of_training():
    net, attachment = staged()
    x = torch.rand(4, 3, 16, 16)
    net(x)
    attachment.step(1.0)
    net.eval()
    attachment.sampling = False
    expected = by_stages(net, x)
    attachment.sampling = True
    reestimate_batch_norm(attachment, [lambda: net(x)])
    attachment.inference = Mean()
    with pytest.warns(UserWarning, match="blocks of the model were called one by one, in evaluation mode"):
        assert torch.equal(by_stages(net, x), expected)
