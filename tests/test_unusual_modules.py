"""Modules of several networks, and steps that change modes: what is perturbed, and what is evaluated."""

import collections
import warnings

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_modules import SIZE, Classifier, digits, loader, module, trainer
from mp_lightning import MetaPerturbCallback, MetaPerturbMixin, MonteCarlo, attach, attachment_of, export
from mp_lightning import reestimate_batch_norm as reestimate
from mp_lightning.backbones import build_backbone
from mp_lightning.errors import ConfigurationError
from mp_lightning.perturbation import initial_phi


def everywhere(**options):
    """At all sites, at full strength soon."""
    return MetaPerturbCallback(initial_phi(0), **{"ramp_steps": 2, **options})


class Distills(Classifier):
    """A student that learns the outputs of a teacher."""

    def __init__(self, teacher):
        super().__init__()
        self.teacher = teacher.requires_grad_(False)

    def training_step(self, batch, batch_idx):
        self.teacher.eval()
        with torch.no_grad():
            target = self.teacher(batch[0]).softmax(dim=1)
        return F.cross_entropy(self(batch[0]), target)


@pytest.mark.parametrize("target", [None, "net"])
def test_a_frozen_teacher_that_was_trained_with_it_is_left_alone_and_its_student_perturbed(tmp_path, target):
    teacher = module()
    trainer(tmp_path, [everywhere()]).fit(teacher, loader(4))
    images = digits()[0][:8]
    expected, steps = teacher.eval()(images), int(attachment_of(teacher).steps)
    student = module(lambda: Distills(teacher))
    run = trainer(tmp_path, [everywhere(target=target), ModelCheckpoint(tmp_path)], enable_checkpointing=True)
    run.fit(student, loader(4))
    attachment = attachment_of(student)
    assert attachment.model is student and int(attachment.steps) == 8
    assert all(name.startswith("net") for name in attachment.plan.names)
    assert torch.equal(teacher.eval()(images), expected) and int(attachment_of(teacher).steps) == steps
    run.fit(student, loader(4), ckpt_path=run.checkpoint_callback.best_model_path)
    assert attachment_of(student) is attachment and torch.equal(teacher.eval()(images), expected)


def test_a_frozen_network_that_is_attached_stays_so_where_only_a_head_is_trained(tmp_path):
    class Head(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.body = build_backbone("conv4", 10, width=8, image_size=SIZE)
            attach(self.body, initial_phi(0))
            self.body.requires_grad_(False)
            self.head = nn.Linear(10, 10)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.head(self.body(batch[0])), batch[1])

        configure_optimizers = Classifier.configure_optimizers

    model = module(Head)
    trainer(tmp_path, [MetaPerturbCallback()]).fit(model, loader(2))
    assert attachment_of(model).model is model.body and int(attachment_of(model).steps) == 4


class Labels(Classifier):
    """Looks at a batch in evaluation mode first, as for labels of its own or an attack."""

    def training_step(self, batch, batch_idx):
        self.net.eval()
        with torch.no_grad():
            self(batch[0])
        self.net.train()
        return super().training_step(batch, batch_idx)


class FreezesLate(Classifier):
    def training_step(self, batch, batch_idx):
        if self.current_epoch == 1:
            self.net.conv_layers[1].bn.eval()
        return super().training_step(batch, batch_idx)


class TrainsAll(Classifier):
    def training_step(self, batch, batch_idx):
        self.train()
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("cls", [Labels, FreezesLate, TrainsAll])
def test_steps_that_change_modes_are_reestimated_as_a_loop_by_hand(tmp_path, cls):
    model = module(cls)
    trainer(tmp_path, [everywhere()]).fit(model, loader(4))
    attachment = attachment_of(model)
    found = dict(attachment.estimates.buffers)
    reestimate(attachment, [lambda x=x: model(x) for x, _ in loader(4)])
    assert found.keys() == attachment.estimates.buffers.keys() and len(found) == 8
    assert all(torch.allclose(value, attachment.estimates.buffers[name]) for name, value in found.items())


class Split(Classifier):
    """Two networks that a step calls one after the other."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.rest = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.BatchNorm1d(128), nn.Linear(128, 10))

    def forward(self, x):
        return self.rest(self.net(x))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.rest(self.net(batch[0])), batch[1])


def test_batch_norm_beyond_the_network_with_the_sites_is_named(tmp_path):
    with pytest.warns(UserWarning, match=r"norm self\.rest\.2 keeps .* within self\.net; .* give Split a forward"):
        trainer(tmp_path, [everywhere()]).fit(module(Split), loader(4))


def test_a_forward_that_goes_through_all_needs_no_such_warning(tmp_path):
    class Whole(Split):
        training_step = Classifier.training_step

    model = module(Whole)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "MetaPerturb: batch norm")
        trainer(tmp_path, [everywhere()]).fit(model, loader(4))
    assert "rest.2.running_mean" in attachment_of(model).estimates.buffers


@pytest.mark.parametrize("features", [True, False])
def test_features_that_other_layers_go_on_from_are_no_class_scores(tmp_path, features):
    """Of a network that is followed by a head of its own, and of one that is all there is."""

    class Features(Classifier):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(10, 10) if features else nn.Identity()

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.head(self.net(batch[0])), batch[1])

        def test_step(self, batch, batch_idx):
            self.head(self.net(batch[0]))

    model = module(Features)
    run = trainer(tmp_path, [everywhere(inference="mc", samples=2)])
    run.fit(model, loader(2))
    assert isinstance(attachment_of(model).inference, MonteCarlo)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run.test(model, loader(2), verbose=False)
    told = [str(w.message) for w in said if "averaged as class scores" in str(w.message)]
    assert len(told) == features and all("self.net" in text and "self.head" in text for text in told)


def test_a_network_that_is_not_all_there_is_is_exported_by_its_own_name_alone(tmp_path):
    class Without(Split):
        forward = pl.LightningModule.forward

    model = module(Without)
    with pytest.warns(UserWarning, match="batch norm"):
        trainer(tmp_path, [everywhere()]).fit(model, loader(2))
    images = digits()[0][:2]
    with pytest.raises(ConfigurationError, match=r"has no forward, and layers beside self\.net, as self\.rest"):
        export(model, tmp_path / "m.pt2", images)
    assert export(model.net, tmp_path / "m.pt2", images) < 1e-5


class AsksItsFit(Classifier):
    """A step that needs what only fit provides."""

    def on_fit_start(self):
        self.weights = torch.ones(10)

    def training_step(self, batch, batch_idx):
        weights = self.weights
        return F.cross_entropy(self(batch[0]), batch[1], weights)


def test_a_fresh_trainer_tests_a_file_of_within_fit_whatever_the_step_needs(tmp_path):
    saver = ModelCheckpoint(tmp_path)
    trainer(tmp_path, [everywhere(), saver], enable_checkpointing=True).fit(module(AsksItsFit), loader(4))

    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return loader(4)

        def test_dataloader(self):
            return loader(2)

    fresh = trainer(tmp_path, [everywhere()])
    with pytest.warns(UserWarning, match="not re-estimated .* AttributeError.*no attribute 'weights'"):
        found = fresh.test(module(AsksItsFit), Data(), saver.best_model_path, verbose=False, weights_only=True)
    assert found[0]["test_loss"] > 0


class Remembers(Classifier):
    """Keeps what it saw in lists, a dictionary and a plain tensor."""

    def __init__(self):
        super().__init__()
        self.seen, self.latest = [], collections.deque(maxlen=2)
        self.counts, self.labels = {"steps": 0}, set()
        self.usage = torch.zeros(10)

    def training_step(self, batch, batch_idx):
        self.seen.append(batch_idx)
        self.latest.append(batch_idx)
        self.counts["steps"] += 1
        self.labels |= {*batch[1].tolist()}
        self.usage += torch.bincount(batch[1], minlength=10)
        return super().training_step(batch, batch_idx)


def test_reestimation_leaves_no_trace_in_what_a_step_collects(tmp_path):
    plain, perturbed = module(Remembers), module(Remembers)
    trainer(tmp_path).fit(plain, loader(3))
    trainer(tmp_path, [everywhere()]).fit(perturbed, loader(3))
    assert attachment_of(perturbed).estimates.buffers
    for name in ("seen", "latest", "counts", "labels"):
        assert getattr(plain, name) == getattr(perturbed, name), name
    assert torch.equal(plain.usage, perturbed.usage) and plain.usage.sum() == 96


def test_a_declared_module_is_evaluated_plain_until_it_is_trained(tmp_path):
    class Declared(MetaPerturbMixin, Classifier):
        def __init__(self):
            super().__init__()
            self.perturb(initial_phi(0))

    pretrained, model = module(), module(Declared, seed=1)
    trainer(tmp_path).fit(pretrained, loader(4))
    model.load_state_dict(pretrained.state_dict(), strict=False)
    run = trainer(tmp_path)
    with pytest.warns(
        UserWarning, match="Declared was never trained with MetaPerturb in this process; it is evaluated without"
    ):
        found = run.test(model, loader(2), verbose=False)
    assert found == trainer(tmp_path).test(pretrained, loader(2), verbose=False)
    images = digits()[0][:8]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "MetaPerturb")
        assert torch.allclose(model.eval()(images), pretrained.eval()(images), atol=1e-6)
    run.fit(model.train(), loader(4))
    assert float(attachment_of(model).coeff) > 0


class Auxiliary(nn.Module):
    """Calls a second activation in training alone, before its last one."""

    def __init__(self, in_training: bool):
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(8 if i else 3, 8, 3, padding=1) for i in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.in_training = in_training

    def forward(self, x):
        x = F.relu(self.norms[0](self.convolutions[0](x)))
        if self.training or not self.in_training:
            F.relu(self.norms[1](self.convolutions[1](x))).mean()
        return F.relu(self.norms[2](self.convolutions[2](x)))


@pytest.mark.parametrize("in_training", [True, False])
def test_activations_of_training_alone_are_told_once(in_training):
    model = Auxiliary(in_training)
    attach(model, initial_phi(0))
    x = torch.rand(2, 3, 8, 8)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            model.train()(x)
            model.eval()(x)
    told = [str(w.message) for w in said if "another number of activations in training" in str(w.message)]
    assert len(told) == in_training and all("Auxiliary" in text and "relu" in text for text in told)
