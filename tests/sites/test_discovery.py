"""Sites are found where the paper's rule says, in modules and functions alike, and nowhere else."""

import copy

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from mp_lightning.backbones import build_backbone
from mp_lightning.errors import SiteError
from mp_lightning.sites import attach, find_sites
from mp_lightning.sites.rules import END, PLAIN, PRE_ACTIVATION, RESIDUAL
from research_nets import PreActivationBlock, ResearchResNet

TORCHVISION = [
    ("resnet18", 8, 512, RESIDUAL),
    ("resnet50", 16, 2048, RESIDUAL),
    ("vgg11_bn", 8, 512, PLAIN),
    ("regnet_y_400mf", 16, 440, RESIDUAL),
    ("convnext_tiny", 18, 3072, PRE_ACTIVATION),
]


@pytest.mark.parametrize(("name", "count", "channels", "rule"), TORCHVISION)
def test_torchvision(name, count, channels, rule):
    plan = find_sites(torchvision.models.get_model(name, weights=None))
    assert (len(plan), plan.channel_norm, {site.rule for site in plan}) == (count, channels, {rule})


@pytest.mark.parametrize(
    ("name", "count", "channels"),
    [("conv4", 4, 32), ("conv6", 6, 32), ("vgg9", 8, 512), ("resnet20", 9, 64), ("resnet44", 21, 64)],
)
def test_own_backbones(name, count, channels):
    plan = find_sites(build_backbone(name, 10))
    assert (len(plan), plan.channel_norm) == (count, channels)


def test_shared_relu_of_a_basic_block_is_taken_at_its_last_call():
    site = next(iter(find_sites(torchvision.models.resnet18(weights=None))))
    assert (site.scope, site.activation, site.call) == ("layer1.0", "layer1.0.relu", 1)


def test_functional_activations_of_a_research_resnet():
    plan = find_sites(ResearchResNet())
    assert [(site.scope, site.activation, site.call) for site in plan] == [
        ("layers.0", None, 1),
        ("layers.1", None, 1),
        ("layers.2", None, 1),
    ]


def test_residual_stream_without_activation_is_not_multiplied_before_it_ends():
    blocks = [PreActivationBlock(8), PreActivationBlock(8)]
    inside = [("1", 1, PRE_ACTIVATION), ("2", 1, PRE_ACTIVATION)]

    def found(*rest):
        return [(site.scope, site.call, site.rule) for site in find_sites(nn.Sequential(nn.Conv2d(3, 8, 3), *rest))]

    assert found(*blocks, nn.BatchNorm2d(8), nn.ReLU()) == [*inside, ("", 0, END)]
    assert found(*blocks) == inside
    multiplied = [inside[0], ("", 0, RESIDUAL)]
    assert found(*blocks, nn.ReLU()) == multiplied  # an activation ends the last block
    assert found(*blocks, nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()) == multiplied
    assert found(*blocks, nn.Conv2d(8, 8, 3), nn.ReLU()) == inside  # maps that are not normalized
    between = found(blocks[0], nn.BatchNorm2d(8), nn.ReLU(), blocks[1])
    assert between == [inside[0], ("4", 1, PRE_ACTIVATION)]  # the stream goes on


def test_the_head_of_a_mobile_network_is_its_end():
    plan = find_sites(torchvision.models.mobilenet_v2(weights=None))
    assert [site.rule for site in plan] == [PRE_ACTIVATION] * 10 + [END]
    assert (list(plan)[-1].activation, plan.channel_norm) == ("features.18.2", 1280)


def test_gates_of_squeeze_and_excitation_are_no_sites():
    names = find_sites(torchvision.models.mobilenet_v3_small(weights=None)).names
    assert names
    assert not any("fc" in name or name.endswith(".2.activation") for name in names)


class ResidualWithDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.dropout = nn.Dropout(0.1)
        self.activation = nn.GELU()

    def forward(self, x):
        return self.activation(self.dropout(x + self.norm(self.conv(x))))


def test_dropout_between_sum_and_activation_and_group_norm():
    plan = find_sites(nn.Sequential(nn.Conv2d(3, 4, 3), ResidualWithDropout()))
    assert [(site.name, site.channels, site.rule) for site in plan] == [("1.activation", 4, RESIDUAL)]


def test_plain_sequential_with_group_norm():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 6, 3), nn.ReLU())
    assert find_sites(model).names == ["2"]  # the second convolution has no norm


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.block = ResidualWithDropout()

    def forward(self, x):
        x = self.stem(x)
        return self.block(x) if x.sum() > 0 else x


def test_parts_of_a_model_that_cannot_be_traced():
    """And the stem of a residual network stays no site though it is traced alone."""
    assert find_sites(Untraceable()).names == ["block.activation"]


class CalledTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = ResidualWithDropout()

    def forward(self, x):
        return self.block(self.block(x))


def test_a_block_called_twice_is_one_site():
    assert find_sites(CalledTwice()).names == ["block.activation"]


class LightningModule(nn.Module):
    """Stands for Lightning's class, which is known by its name; its own forward must not be traced."""

    def __init__(self):
        super().__init__()
        self.net = build_backbone("conv4", 10, width=4, image_size=16)
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def forward(self, x):
        raise AssertionError("the forward of a LightningModule was traced")


def test_frozen_teacher_in_a_lightning_module_is_left_alone():
    plan = find_sites(LightningModule())
    assert len(plan) == 4
    assert all(site.scope.startswith("net.") for site in plan)


def test_layers_that_are_a_lightning_modules_own():
    class LightningModule(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.act = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()

        def forward(self, x):
            return self.act(self.norm(self.conv(x)))

    assert find_sites(LightningModule()).names == ["act"]


class KeepsFeatures(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = ResidualWithDropout()
        self.features = None

    def forward(self, x, mask=None):
        self.features = self.block(x)
        return self.features if mask is None else self.features * mask


def test_model_is_left_as_it_was():
    model = KeepsFeatures()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.random.get_rng_state()
    find_sites(model)
    assert model.features is None
    assert model.training
    assert not model._forward_hooks
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class SplitChannels(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return x + F.gelu(self.conv(x).unflatten(1, (2, 4))).flatten(1, 2)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.ReLU()), "it has no convolution"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 4), nn.ReLU()),
            "of its activations \\(3\\) none ends a residual block, is inside of one, or follows a convolution",
        ),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid()), "its networks call no activation that counts; .*: CELU, .*"),
        (build_backbone("conv4", 10).requires_grad_(False), "all its parameters are frozen"),
        (SplitChannels(), "what reaches these has no known number of channels: :gelu"),
    ],
)
def test_no_site_is_one_line_with_what_was_found_and_the_remedy(model, reason):
    with pytest.raises(SiteError, match=reason) as caught:
        find_sites(model)
    assert type(model).__name__ in str(caught.value)
    assert "sites=" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_lazy_network_must_have_run_once():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU())
    with pytest.raises(SiteError, match="it has lazy layers, which have no weights yet; run one forward first"):
        find_sites(model)
    model(torch.rand(2, 3, 8, 8))
    assert len(find_sites(model)) == 1


class Recorder:
    """A perturbation that changes nothing and keeps what it is given."""

    name = "recorder"

    def __init__(self):
        self.seen = []

    def initial_statistics(self, channels):
        return {}

    def measure(self, x, running, synchronize):
        return {}, None

    def multiplier(self, x, eps, statistics, norms):
        self.seen.append(x.detach().clone())
        return torch.ones(())


def relu_inputs(run):
    """The input of every relu, function or module, in order, caught below all hooks."""
    caught = []
    original = torch.relu, torch.relu_
    catch = lambda f: lambda x: (caught.append(x.detach().clone()), f(x))[1]  # noqa: E731
    torch.relu, torch.relu_ = catch(original[0]), catch(original[1])
    try:
        run()
    finally:
        torch.relu, torch.relu_ = original
    return caught


@pytest.mark.parametrize(
    ("factory", "expected"),
    [
        # stem first, then two activations a block, of which the second is the site
        (lambda: torchvision.models.resnet18(weights=None, num_classes=3), [2 + 2 * i for i in range(8)]),
        (ResearchResNet, [2, 4, 6]),
        (lambda: build_backbone("resnet20", 3), [2 + 2 * i for i in range(9)]),
        (lambda: build_backbone("conv4", 3), [0, 1, 2, 3]),
    ],
)
def test_tensors_at_the_sites_are_the_inputs_of_those_activations(factory, expected):
    model = factory()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    recorder = Recorder()
    attach(model, perturbation=recorder)
    inputs = relu_inputs(lambda: model(x))
    assert len(recorder.seen) == len(expected)
    for seen, index in zip(recorder.seen, expected, strict=True):
        assert torch.equal(seen, inputs[index])


def test_function_relu_is_the_one_that_modules_call():
    """The counting of functional calls relies on it: one module call is one call of one listed function."""
    assert len(relu_inputs(lambda: nn.ReLU()(torch.zeros(1)))) == len(relu_inputs(lambda: F.relu(torch.zeros(1)))) == 1


class HeadAlone(nn.Module):
    """A trained network of which the last layer alone goes on being trained."""

    def __init__(self):
        super().__init__()
        self.net = torchvision.models.resnet18(num_classes=3)
        self.net.requires_grad_(False)
        self.net.fc.requires_grad_(True)


def test_frozen_layers_of_a_network_whose_head_is_trained_have_its_sites_however_it_is_given():
    class Held(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = HeadAlone().net

    class Called(Held):
        def forward(self, x):
            return self.net(x)

    names = find_sites(HeadAlone().net).names
    assert len(names) == 8
    for kind in (Held, Called):
        assert find_sites(kind()).names == [f"net.{name}" for name in names]


def test_the_remedy_for_a_frozen_backbone_is_one_that_works():
    class Model(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.backbone = torchvision.models.resnet18(num_classes=3)
            self.head = nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.backbone(x))

    model = Model()
    model.backbone.requires_grad_(False)
    with pytest.raises(SiteError, match=r"frozen and left alone: backbone; freeze them after attach\(module\)"):
        find_sites(model)
    model = Model()
    assert len(attach(model, sites=1).plan) == 8
    model.backbone.requires_grad_(False)
    assert model(torch.zeros(2, 3, 32, 32)).isfinite().all()


def plain_layers():
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class WithHead(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.backbone = plain_layers()
        self.model = nn.Sequential(self.backbone, nn.Linear(4, 2))


class WithoutHead(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = torchvision.models.resnet18(num_classes=2)
        self.backbone = nn.Sequential(*list(self.model.children())[:-1])


@pytest.mark.parametrize("make", [WithHead, WithoutHead])
@pytest.mark.parametrize("called", ["model", "backbone"])
def test_a_network_under_two_names_is_perturbed_once_whichever_is_called(make, called):
    model = make()
    attachment = attach(model, sites=1, ramp_steps=0)
    activations = [model.get_submodule(spec.activation) for spec in attachment.plan]
    assert len({*activations}) == len(activations) == (2 if make is WithHead else 8)
    seen = []
    for site in attachment.sites:
        site.register_forward_hook(lambda site, args, output: seen.append(site.spec.name))
    getattr(model, called)(torch.rand(2, 3, 32, 32))
    assert sorted(seen) == sorted(attachment.plan.names)
    assert int(attachment.forwards) == 1 and not attachment.trained_by_parts
