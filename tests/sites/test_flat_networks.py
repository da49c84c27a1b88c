"""Networks whose own forward holds the sites: the block is the model itself."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from mp_lightning import MonteCarlo, attach, reestimate_batch_norm
from mp_lightning.backbones import build_backbone
from mp_lightning.errors import SiteError


class Flat(nn.Module):
    """Two normalized convolutions, whose activations are functions or modules."""

    def __init__(self, functional):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.acts = [F.relu, F.gelu] if functional else nn.ModuleList([nn.ReLU(), nn.GELU()])
        self.head = nn.Linear(8, 4)

    def features(self, x):
        return self.acts[1](self.norm2(self.second(self.acts[0](self.norm(self.first(x)))))).mean((2, 3))

    def forward(self, x):
        return self.head(self.features(x))


class Gap(Flat):
    """A part of it is left out when it is compiled."""

    def features(self, x):
        torch._dynamo.graph_break()
        return self.rest(self.acts[0](self.norm(self.first(x)))).mean((2, 3))

    @torch.compiler.disable
    def rest(self, x):
        return self.acts[1](self.norm2(self.second(x)))


def attached(functional, cls=Flat):
    torch.manual_seed(0)
    model = cls(functional)
    return model, attach(model, sites=1, ramp_steps=0, full_strength_at=1)


def images(seed=0):
    return torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("functional", [False, True])
def test_samples_are_averaged_in_silence(functional):
    model, attachment = attached(functional)
    model(images())
    attachment.step(1.0)
    model.eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = torch.stack([model(images()).softmax(1) for _ in range(3)]).mean(0)
        attachment.evaluations.zero_()
        attachment.inference = MonteCarlo(3)
        assert torch.allclose(model(images()).softmax(1), expected, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("cls", [Flat, Gap])
def test_functions_are_perturbed_once_where_they_are_compiled(cls, backend, training):
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model, attachment = attached(True, cls)
        model.train(training)
        attachment.inference = MonteCarlo(2)
        forward = torch.compile(model, backend=backend) if compiled else model
        with torch.no_grad():
            found.append([forward(images(seed)) for seed in range(2)])
    for expected, actual in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_another_method_says_once_that_it_is_not_perturbed(training):
    model, _ = attached(functional=False)
    model.train(training)
    with pytest.warns(UserWarning, match=r"self.acts.0 was called outside of a forward of the Flat, as by features"):
        found = model.features(images())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model.eval().features(images()), model.features(images()))
        model(images())
    assert found.shape == (8, 8)


def test_what_torch_fx_traced_is_refused_when_it_runs():
    model, _ = attached(functional=False)
    extractor = fx.symbolic_trace(model)
    with pytest.raises(SiteError, match="leave its perturbation out; take features by forward hooks"):
        extractor(images())


class Holder(nn.Module):
    """A network beside others, and beside numbers of its own; which is called by itself."""

    def __init__(self, kind):
        super().__init__()
        if kind == "a scale":
            self.scale = nn.Parameter(torch.ones(()))
        if kind == "a frozen teacher":
            self.teacher = Flat(False).requires_grad_(False).eval()
        if kind == "a linear layer":
            self.adapter = nn.Linear(4, 4)
        self.student = build_backbone("resnet20", 5, width=4)

    def forward(self, x):
        return self.student(x)


@pytest.mark.parametrize("kind", ["a scale", "a frozen teacher", "a linear layer"])
def test_a_network_in_a_module_is_a_model_of_its_own_whatever_comes_before_it(kind):
    model = Holder(kind)
    attachment = attach(model, ramp_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            model.student(torch.rand(2, 3, 32, 32))
            attachment.step(1.0)
        reestimate_batch_norm(attachment, [lambda: model.student(torch.rand(2, 3, 32, 32))])
    assert (int(attachment.forwards), float(attachment.input_size)) == (3, 32)
