"""Layers at the sites of a module while a Trainer trains it."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from manual import ManualOptimization
from restored import trace
from seen import Seen

from lightning_modules import Classifier, loader, module, trainer
from mp_lightning import MetaPerturbCallback, attachment_of, find_sites
from mp_lightning.compare.at_sites import AtSites, InformationDropoutCallback
from mp_lightning.compare.layers import DropBlock, GaussianDropout, InformationDropout
from mp_lightning.errors import ConfigurationError


def dropout_at_sites(**options):
    made = []

    def make(channels):
        made.append(Seen())
        return made[-1]

    return AtSites(make, "dropout", **options), made


class Modes(pl.Callback):
    """Keeps the modes of the layers in each stage."""

    def __init__(self):
        self.seen = {}

    def _note(self, stage, pl_module):
        layers = [part for part in pl_module.modules() if isinstance(part, Seen)]
        self.seen.setdefault(stage, set()).update(layer.training for layer in layers)

    def on_train_batch_start(self, trainer, pl_module, *args):
        self._note("train", pl_module)

    def on_validation_batch_start(self, trainer, pl_module, *args):
        self._note("validate", pl_module)


def test_dropout_drops_its_fraction_at_every_site_in_training_and_none_in_evaluation(tmp_path):
    net = module()
    callback, made = dropout_at_sites()
    modes = Modes()
    trainer(tmp_path, [callback, modes]).fit(net, loader(6), loader(1))
    assert len(made) == len(find_sites(net)) == 4
    for layer in made:
        assert len(layer.dropped) == 12 and not layer.evaluated
        assert sum(layer.dropped) / 12 == pytest.approx(0.3, abs=0.02)
        assert layer.scales[0] == pytest.approx(1 / 0.7, rel=1e-4)
    assert modes.seen == {"train": {True}, "validate": {False}}


@pytest.mark.parametrize(
    "make",
    [
        lambda: [AtSites(lambda channels: DropBlock(), "dropblock")],
        lambda: [InformationDropoutCallback()],
        lambda: [AtSites(lambda channels: GaussianDropout(0.2), "gaussian"), dropout_at_sites()[0]],
    ],
    ids=["dropblock", "information_dropout", "two of them"],
)
def test_after_fit_the_module_is_as_it_was_twice(tmp_path, make):
    net = module()
    trainer(tmp_path, max_epochs=1).fit(net, loader(1), loader(1))  # Lightning leaves attributes of its own
    before = trace(net)
    callbacks = make()
    for _ in range(2):
        trainer(tmp_path, callbacks, max_epochs=1).fit(net, loader(2), loader(1))
        assert trace(net) == before
        assert attachment_of(net) is None
    trainer(tmp_path, callbacks, max_epochs=0).fit(net, loader(2))
    assert trace(net) == before


class Interrupted(Classifier):
    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        raise RuntimeError("a user's error")


def test_after_an_exception_the_module_is_as_it_was(tmp_path):
    net = module(Interrupted)
    with pytest.raises(RuntimeError, match="a user's error"):
        trainer(tmp_path).fit(net, loader(2))
    before = trace(net)
    with pytest.raises(RuntimeError, match="a user's error"):
        trainer(tmp_path, [InformationDropoutCallback(), dropout_at_sites()[0]]).fit(net, loader(2))
    assert trace(net) == before


@pytest.mark.parametrize("first", [True, False])
def test_beside_metaperturb_both_act_whatever_their_order(tmp_path, first):
    net = module()
    callback, made = dropout_at_sites()
    perturbation = MetaPerturbCallback(full_strength_at=1)
    pair = [callback, perturbation] if first else [perturbation, callback]
    trainer(tmp_path, pair, max_epochs=1).fit(net, loader(3), loader(1))
    attachment = attachment_of(net)
    assert int(attachment.forwards) > 0 and float(attachment.coeff) > 0.9
    assert not torch.equal(attachment.sites[0].mean, torch.zeros_like(attachment.sites[0].mean))
    assert len(made) == len(find_sites(module())) == 4 > len(attachment.sites), "phi takes a share of the sites"
    # The layers act in the three steps, and not while batch norm is re-estimated.
    assert all(len(layer.dropped) == 3 and not layer.evaluated for layer in made)
    assert not any("at_sites" in name for name, _ in net.named_modules())
    assert all(not site._forward_hooks for site in attachment.sites)


class Manual(ManualOptimization, Classifier):
    pass


def test_layers_act_under_manual_optimization_and_the_cost_is_refused(tmp_path):
    callback, made = dropout_at_sites()
    trainer(tmp_path, [callback], max_epochs=1).fit(module(Manual), loader(2))
    assert all(len(layer.dropped) == 2 for layer in made)
    with pytest.raises(ConfigurationError, match="Manual optimizes by itself"):
        trainer(tmp_path, [InformationDropoutCallback()]).fit(module(Manual), loader(2))


class Watch(pl.Callback):
    """What the optimizer holds and what the layers' parameters are, at the start and the end of training."""

    def __init__(self):
        self.parameters, self.costs = [], []

    def _layers(self, pl_module):
        return [part for part in pl_module.modules() if isinstance(part, InformationDropout)]

    def on_train_start(self, trainer, pl_module):
        held = {id(parameter) for group in trainer.optimizers[0].param_groups for parameter in group["params"]}
        self.held = [id(p) in held for layer in self._layers(pl_module) for p in layer.parameters()]
        self.number = len(held)
        self.start = [p.detach().clone() for layer in self._layers(pl_module) for p in layer.parameters()]

    def on_train_batch_end(self, trainer, pl_module, outputs, *args):
        self.costs.append([layer.kl.item() for layer in self._layers(pl_module)])
        self.end = [p.detach().clone() for layer in self._layers(pl_module) for p in layer.parameters()]
        self.optimizer = trainer.optimizers[0]


def test_information_dropout_is_trained_by_the_optimizer(tmp_path):
    net = module()
    own = sum(1 for _ in net.parameters())
    watch = Watch()
    trainer(tmp_path, [InformationDropoutCallback(), watch]).fit(net, loader(4))
    assert watch.held == [True] * 8 and watch.number == own + 8
    assert all(not torch.equal(start, end) for start, end in zip(watch.start, watch.end, strict=True))
    left = [parameter for group in watch.optimizer.param_groups for parameter in group["params"]]
    assert len(left) == own and len(watch.optimizer.state) == own


class Loss(Classifier):
    """Keeps its own loss, and gives it as asked."""

    gives = "tensor"

    def __init__(self, **options):
        super().__init__(**options)
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        return {"tensor": loss, "dict": {"loss": loss, "other": 1}, "none": None}[self.gives]


class Losses(pl.Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, *args):
        self.seen.append(outputs)


@pytest.mark.parametrize("gives", ["tensor", "dict", "none"])
def test_information_dropout_adds_its_cost_to_the_loss(tmp_path, gives):
    net = module(Loss)
    net.gives = gives
    watch, losses = Watch(), Losses()
    trainer(tmp_path, [InformationDropoutCallback(beta=3.0), watch, losses], max_epochs=1).fit(net, loader(2))
    for loss, outputs, costs in zip(net.losses, losses.seen, watch.costs, strict=True):
        assert len(costs) == 4 and min(costs) > 0
        if gives == "none":
            assert not outputs
        else:
            assert outputs["loss"].item() == pytest.approx(loss + 3 * sum(costs) / 4, rel=1e-5)
            assert ("other" in outputs) == (gives == "dict")


class PassesBy(Loss):
    """Its second step leaves the sites out."""

    def training_step(self, batch, batch_idx):
        if batch_idx == 0:
            return super().training_step(batch, batch_idx)
        loss = self.net.fc.weight.square().mean()
        self.losses.append(loss.item())
        return loss


def test_a_step_that_reaches_no_site_has_no_cost(tmp_path):
    net, losses = module(PassesBy), Losses()
    trainer(tmp_path, [InformationDropoutCallback(), losses], max_epochs=1).fit(net, loader(2))
    (first, second), (with_cost, without) = net.losses, [outputs["loss"].item() for outputs in losses.seen]
    assert with_cost > first and without == second


def test_a_checkpoint_loads_without_the_layers_and_resumes_with_them(tmp_path):
    net = module()
    first = trainer(
        tmp_path,
        [InformationDropoutCallback(), pl.callbacks.ModelCheckpoint(tmp_path, "half")],
        max_epochs=1,
        enable_checkpointing=True,
    )
    first.fit(net, loader(3))
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert list(saved["state_dict"]) == list(module().state_dict())
    module().load_state_dict(saved["state_dict"])
    (state,) = [value for key, value in saved["callbacks"].items() if "information_dropout" in key]
    watch = Watch()
    again = module(seed=1)
    trainer(tmp_path, [InformationDropoutCallback(), watch]).fit(again, loader(3), ckpt_path=tmp_path / "half.ckpt")
    for ours, theirs in zip(watch.start, state["layers"].values(), strict=True):
        assert torch.equal(ours, theirs)
    assert trace(again)["keys"] == list(module().state_dict())


def test_only_the_given_sites_have_layers(tmp_path):
    callback, made = dropout_at_sites(sites=find_sites(module()).only("net.*1*"))
    trainer(tmp_path, [callback], max_epochs=1).fit(module(), loader(1))
    assert len(made) == len(callback.sites) < 4
