"""Loops in plain PyTorch: copies with averaged weights, states, perturbations that learn, a second attach."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from mp_lightning import ConfigurationError, Fold, Mean, MonteCarlo, attach, attachment_of, reestimate_batch_norm
from mp_lightning.backbones import build_backbone
from mp_lightning.errors import SiteError
from mp_lightning.inference import exportable
from mp_lightning.perturbation import initial_phi

PHI = initial_phi(0)


class Body(nn.Module):
    """Two normalized convolutions, the second of which may be checkpointed."""

    def __init__(self, width, checkpointed):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.checkpointed = checkpointed

    def forward(self, x):
        x = self.first(x)
        if self.checkpointed is None:
            return self.second(x)
        return checkpoint(self.second, x, use_reentrant=self.checkpointed)


class Net(nn.Module):
    def __init__(self, checkpointed=None, width=8):
        super().__init__()
        self.body, self.head = Body(width, checkpointed), nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.body(x["image"] if isinstance(x, dict) else x).mean(dim=(2, 3)))


def network(checkpointed=None):
    torch.manual_seed(0)
    return Net(checkpointed)


def batches(count=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(8, 3, 8, 8, generator=generator) for _ in range(count)]


def train(model, attachment, after=lambda: None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    for x in batches():
        loss = F.cross_entropy(model(x), torch.arange(8) % 3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after()
        attachment.step(loss)


def estimated(model, attachment, inference=None, **options):
    reestimate_batch_norm(attachment, [lambda x=x: model(x) for x in batches()], **options)
    attachment.inference = inference or Mean()
    return model.eval()


def test_a_copy_with_averaged_weights_says_that_nothing_acts_and_takes_the_state():
    model = network()
    attachment = attach(model, PHI, ramp_steps=2)
    average = copy.deepcopy(model).requires_grad_(False)

    def update():
        for own, value in zip(average.parameters(), model.parameters(), strict=True):
            own.lerp_(value.detach(), 0.5)

    train(model, attachment, update)
    of_average = attachment_of(average)
    of_average.inference = Mean()
    with pytest.warns(UserWarning, match=r"strength 0 acts in this copy of Net, and 1 in the Net .*load_state\("):
        average.eval()(batches()[0])
    of_average.load_state(attachment.state())
    assert float(of_average.coeff) == float(attachment.coeff) > 0
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "MetaPerturb: (nothing|strength)")
        estimated(average, of_average)(batches()[0])


@pytest.mark.parametrize("change", ["copied in", "scaled"])
def test_weights_that_are_changed_between_two_evaluations_are_noticed(change):
    model = network()
    attachment = attach(model, PHI, ramp_steps=0)
    train(model, attachment)
    estimated(model, attachment)(batches()[0])
    assert attachment.estimates.buffers
    with torch.no_grad():
        weight = model.body.first[0].weight
        weight.mul_(1.3) if change == "scaled" else weight.copy_(torch.randn_like(weight))
    with pytest.warns(UserWarning, match="not re-estimated"):
        model(batches()[0])
    assert attachment.estimates is None


def test_a_compiled_model_is_looked_at_when_it_is_set_to_evaluation():
    model = network()
    attachment = attach(model, PHI, ramp_steps=0)
    train(model, attachment)
    compiled = torch.compile(estimated(model, attachment), backend="eager")
    x = batches()[0]
    with torch.no_grad():
        compiled(x)
        model.body.first[0].weight.mul_(1.3)
        compiled.eval()
    assert attachment.estimates is None


def test_validation_before_a_batch_is_counted_leaves_batch_norm_to_be_reestimated():
    model = network()
    attachment = attach(model, PHI, ramp_steps=0)
    train(model, attachment, lambda: (model.eval(), model(batches()[0]), None)[-1])
    estimated(model.train(), attachment)
    assert len(attachment.estimates.buffers) == 4


def test_one_inference_serves_models_with_and_without_batch_norm():
    without = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU())
    inference = Mean()
    attach(without, PHI, ramp_steps=0).inference = inference
    with_norm = network()
    attach(with_norm, PHI, ramp_steps=0).inference = inference
    without.eval()(batches()[0])
    with pytest.warns(UserWarning, match="not re-estimated"):
        with_norm.eval()(batches()[0])


class Learns(nn.Module):
    """A perturbation with a number of its own, that counts its batches and measures nothing else."""

    name = "learns"

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def initial_statistics(self, channels):
        return {"batches": torch.zeros((), dtype=torch.int64)}

    def measure(self, x, running, synchronize):
        return running, {"batches": running["batches"] + 1}

    def multiplier(self, x, eps, statistics, norms):
        return torch.sigmoid(self.weight).expand_as(x)


def test_what_a_perturbation_learns_and_counts_is_in_the_state():
    model = network()
    attachment = attach(model, perturbation=Learns(), ramp_steps=0)
    train(model, attachment)
    learned = float(attachment.perturbation.weight)
    assert learned != 0 and all(int(site.batches) == 3 for site in attachment.all_sites())
    other = attach(network(), perturbation=Learns())
    other.load_state(attachment.state())
    assert float(other.perturbation.weight) == learned and int(other.all_sites()[0].batches) == 3

    class More(Learns):
        def __init__(self):
            super().__init__()
            self.more = nn.Parameter(torch.zeros(()))

    with pytest.raises(ConfigurationError, match=r"made with another More .*more.*; attach the same one"):
        attach(network(), perturbation=More()).load_state(attachment.state())


def test_the_state_keeps_what_was_estimated_whatever_becomes_of_the_model():
    model = network()
    attachment = attach(model, PHI, ramp_steps=0)
    train(model, attachment)
    estimated(model, attachment)
    state = attachment.state()
    model.half()
    attachment.estimates.buffers["body.first.1.running_mean"] = torch.zeros(8, dtype=torch.half)
    assert {value.dtype for value in state["evaluation_buffers"].values()} == {torch.float32}


def test_a_model_is_exported_in_the_precision_that_it_has():
    model = network()
    attachment = attach(model, PHI, ramp_steps=0)
    train(model, attachment)
    estimated(model, attachment)
    x = batches()[0]
    with torch.no_grad():
        expected = model(x)
        assert torch.allclose(exportable(model.double(), "mean")(x.double()).float(), expected, atol=1e-5)


def test_a_second_attach_sets_the_ramp_that_it_is_given():
    model = network()
    attachment = attach(model, PHI, full_strength_at=1)
    assert attach(model, total_steps=100) is attachment and attachment.ramp_steps == 40
    attachment.step()
    assert attach(model, ramp_steps=7).ramp_steps == 7
    assert attach(model).ramp_steps == 7


def test_an_image_inside_of_a_dictionary_gives_the_height():
    model = network()
    attachment = attach(model, PHI)
    model({"image": torch.rand(2, 3, 12, 8)})
    assert float(attachment.input_size) == 12


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["mean", "fold", "samples"])
def test_gradients_of_a_checkpointed_evaluation_are_refused_where_they_would_be_wrong(kind, reentrant):
    model = network(checkpointed=reentrant)
    attachment = attach(model, PHI, ramp_steps=0)
    train(model, attachment)
    inference = {"mean": Mean(), "fold": Fold(), "samples": MonteCarlo(2)}[kind]
    estimated(model, attachment, inference, fold=kind == "fold")
    x = batches()[0].requires_grad_(True)
    with pytest.raises(SiteError, match=f"forward by {type(inference).__name__} again.*turn checkpointing off"):
        model(x).sum().backward()


def test_gradients_of_an_evaluation_that_replaces_nothing_are_those_without_checkpointing():
    found = []
    for checkpointed in (None, False):
        torch.manual_seed(0)
        model = network(checkpointed=checkpointed)
        for part in (model.body.first, model.body.second):
            part[1] = nn.GroupNorm(2, 8)
        attachment = attach(model, PHI, ramp_steps=0)
        train(model, attachment)
        attachment.inference = Mean()
        x = batches()[0].requires_grad_(True)
        model.eval()(x).sum().backward()
        found.append(x.grad)
    assert torch.allclose(found[0], found[1], atol=1e-7)


class SetsItsOwnMode(nn.Module):
    """Labels its images by itself before it learns from them."""

    def __init__(self):
        super().__init__()
        self.net = build_backbone("conv4", 5, width=4)

    def forward(self, x):
        was = self.training
        self.eval()
        with torch.no_grad():
            labels = self.net(x).softmax(1)
        self.train(was)
        return self.net(x) * labels


def test_a_model_may_set_its_mode_within_its_forward():
    model = SetsItsOwnMode()
    attachment = attach(model, "paper", sites=1.0, ramp_steps=0)
    x = torch.randn(4, 3, 32, 32)
    for count in (1, 2):
        model(x).sum().backward()
        assert (int(attachment.forwards), int(attachment.evaluations), attachment.depth) == (count, 0, 0)
    attachment.inference = average = MonteCarlo(3, output="logits")
    model.eval()(x)
    assert average.calls == 1 and attachment.depth == 0


def test_without_running_statistics_there_is_nothing_to_re_estimate(recwarn):
    model = build_backbone("conv4", 5, width=4)
    for layer in model.conv_layers:
        layer.bn = nn.BatchNorm2d(4, track_running_stats=False)
    attachment = attach(model, "paper", sites=1.0, ramp_steps=0)
    x = torch.randn(4, 3, 32, 32)
    model(x)
    attachment.inference = Mean()
    assert torch.equal(model.eval()(x), model(x)) and int(attachment.evaluations) == 2
    assert not recwarn.list


def test_batch_norm_that_was_merged_into_convolutions_is_missed():
    """With the weights that it changes; what was re-estimated would be lost in silence."""
    model = build_backbone("conv4", 5, width=4)
    attachment = attach(model, "paper", sites=1.0, ramp_steps=0)
    x = torch.randn(8, 3, 32, 32)
    model(x)
    reestimate_batch_norm(attachment, [lambda: model(x)])
    attachment.inference = Mean()
    layer = copy.deepcopy(model.eval()).conv_layers[0]
    merged = copy.deepcopy(model)
    merged.conv_layers[0].conv = torch.nn.utils.fuse_conv_bn_eval(layer.conv, layer.bn)
    merged.conv_layers[0].bn = nn.Identity()
    with pytest.raises(
        ConfigurationError, match=r"self\.conv_layers\.0\.bn, which was re-estimated, was replaced or removed"
    ):
        merged(x)
