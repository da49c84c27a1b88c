"""Models that change while they are attached, make their layers late, or are attached in parts."""

import copy
import logging
import warnings

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map

from holder import ACTING, Holder, images, network, trained
from lightning_modules import Classifier, loader, module, trainer
from mp_lightning import Mean, MetaPerturbCallback, attach, attachment_of, detach, reestimate_batch_norm
from mp_lightning.checkpoints import CheckpointError
from mp_lightning.errors import ConfigurationError


@pytest.mark.parametrize("training", [True, False])
def test_a_network_that_replaced_the_attached_one_is_not_taken_for_it(training):
    model, _ = trained()
    model.train(training)
    model.net = network()
    with pytest.raises(ConfigurationError, match=r"self\.net was replaced .* call mp_lightning\.detach\(model\)"):
        model(images())
    with pytest.raises(ConfigurationError, match=r"self\.net was replaced"):
        attach(model)
    detach(model)
    attach(model, **ACTING)
    model.train()
    assert not torch.equal(model(images()), model(images()))


def test_an_activation_that_was_replaced_is_named():
    model, _ = trained()
    block = model.net.conv_layers[3]
    name = next(name for name, part in block.named_children() if isinstance(part, nn.ReLU))
    setattr(block, name, nn.ReLU())
    with pytest.raises(ConfigurationError, match=rf"self\.net\.conv_layers\.3\.{name} was replaced"):
        model(images())


def test_a_network_that_was_compiled_or_named_anew_is_still_there():
    model, _ = trained()
    expected = model(images())
    model.net = torch.compile(model.net, backend="eager")
    assert torch.allclose(model(images()), expected)
    model.net = model.net._orig_mod
    assert torch.equal(copy.deepcopy(model)(images()), expected)
    model.net = nn.Sequential(model.net)
    model.train()
    assert not torch.equal(model(images()), model(images()))


def test_the_network_of_the_next_fold_is_attached_anew(tmp_path, caplog):
    model = module()
    trainer(tmp_path, [MetaPerturbCallback(**ACTING)], max_epochs=1).fit(model, loader(2))
    first = attachment_of(model)
    model.net = network()
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, [MetaPerturbCallback(**ACTING)], max_epochs=1).fit(model, loader(3))
    assert "MetaPerturb: self.net was replaced since; it is attached anew" in caplog.messages
    second = attachment_of(model)
    assert second is not first and second.perturbed and int(second.steps) == 3


def test_what_was_attached_by_hand_is_not_attached_anew(tmp_path):
    model = module()
    attach(model, **ACTING)
    model.net = network()
    again = trainer(tmp_path, [MetaPerturbCallback(**ACTING)], max_epochs=1)
    with pytest.raises(ConfigurationError, match=r"self\.net was replaced"):
        again.fit(model, loader(2))


def test_batch_norm_that_is_gone_is_named_and_none_is_exchanged():
    model, attachment = trained()
    norms = [name for name, part in model.named_modules() if isinstance(part, nn.BatchNorm2d)]
    first = model.get_submodule(norms[0])
    before = first.running_mean.clone()
    parent, _, leaf = norms[-1].rpartition(".")
    gone = model.get_submodule(norms[-1])
    without = nn.BatchNorm2d(gone.num_features, track_running_stats=False)  # with other weights nothing would be used
    without.weight, without.bias = gone.weight, gone.bias
    setattr(model.get_submodule(parent), leaf, without.eval())
    for _ in range(2):
        with pytest.raises(ConfigurationError, match=rf"batch norm self\.{norms[-1]}, which was re-estimated"):
            model(images())
        assert torch.equal(first.running_mean, before) and attachment.depth == 0 and attachment.sampling


def test_a_forward_that_cannot_begin_leaves_the_model_as_it_was():
    """As in transforms of torch.func, which refuse what counts evaluations."""
    model, _ = trained()
    expected = model(images())
    with pytest.raises(RuntimeError):
        torch.func.jacrev(model)(images())
    assert torch.equal(model(images()), expected)


class MadeInSetup(Classifier):
    """Makes its network when it is set up, as what depends on the data does."""

    def __init__(self, before=None):
        super().__init__()
        self.net = before or nn.Identity()

    def setup(self, stage):
        self.net = network()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize("before", [None, network])
def test_layers_that_are_made_in_setup_are_found(tmp_path, before):
    model = MadeInSetup(before and before())
    run = trainer(tmp_path, [MetaPerturbCallback(**ACTING)], max_epochs=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="MetaPerturb")
        run.fit(model, loader(2), loader(1))
    assert attachment_of(model).perturbed and attachment_of(model).estimates.buffers
    assert "setup" not in vars(model)
    run.save_checkpoint(tmp_path / "end.ckpt")
    with pytest.raises(CheckpointError, match=r"after its setup\(\) where that makes its layers"):
        MetaPerturbCallback.restore(MadeInSetup(), tmp_path / "end.ckpt")
    other = MadeInSetup()
    other.setup("test")
    restored = MetaPerturbCallback.restore(other, tmp_path / "end.ckpt")
    with torch.no_grad():
        assert torch.equal(restored(images()), model.eval()(images()))


def test_layers_that_each_setup_makes_anew_are_attached_anew(tmp_path):
    """As where a finder of the learning rate comes before, and a test of the best checkpoint after."""
    model = MadeInSetup()
    run = trainer(tmp_path, [MetaPerturbCallback(**ACTING)], max_epochs=1)
    pl.tuner.Tuner(run).lr_find(model, loader(4), num_training=3, attr_name="lr", update_attr=False)
    for count in (2, 3):
        run = trainer(tmp_path, [MetaPerturbCallback(**ACTING)], max_epochs=1)
        run.fit(model, loader(count), loader(1))
        assert attachment_of(model).perturbed and int(attachment_of(model).steps) == count
    run.save_checkpoint(tmp_path / "end.ckpt")
    expected = torch.cat(run.predict(model, loader(2), ckpt_path=tmp_path / "end.ckpt"))
    assert attachment_of(model).estimates.buffers
    again = trainer(tmp_path, [MetaPerturbCallback()])
    found = torch.cat(again.predict(MadeInSetup(), loader(2), ckpt_path=tmp_path / "end.ckpt"))
    assert torch.equal(found, expected)


class Finetuning(pl.callbacks.BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net, train_bn=False)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net, optimizer, train_bn=False)


@pytest.mark.parametrize("first", [True, False])
def test_layers_that_a_finetuning_callback_froze_meanwhile_are_attached(tmp_path, first):
    class WithSetup(Pair):
        def setup(self, stage):
            self.prepared = True

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.01)

    model = WithSetup()
    callbacks = [MetaPerturbCallback(**ACTING), Finetuning()]
    trainer(tmp_path, callbacks if first else callbacks[::-1]).fit(model, loader(1))
    assert {spec.name.split(".")[0] for spec in attachment_of(model).plan} == {"net", "other"}
    assert model.prepared


def test_layers_that_setup_itself_freezes_are_left_alone(tmp_path):
    class Frozen(Pair):
        def setup(self, stage):
            self.net.requires_grad_(False)

    model = Frozen()
    trainer(tmp_path, [MetaPerturbCallback(**ACTING)], max_epochs=1).fit(model, loader(1))
    assert {spec.name.split(".")[0] for spec in attachment_of(model).plan} == {"other"}
    assert not any(parameter.requires_grad for parameter in model.net.parameters())


def test_a_setup_that_fails_leaves_the_module_its_own(tmp_path):
    class Failing(MadeInSetup):
        def setup(self, stage):
            raise RuntimeError("no data")

    model = Failing()
    with pytest.raises(RuntimeError, match="no data"):
        trainer(tmp_path, [MetaPerturbCallback()], max_epochs=1).fit(model, loader(2))
    assert "setup" not in vars(model) and attachment_of(model) is None


class Pair(Classifier):
    """Two networks, whose outputs are added."""

    def __init__(self):
        super().__init__()
        self.other = network()

    def forward(self, x):
        return self.net(x) + self.other(x)


def test_parts_that_are_attached_one_by_one_are_refused(tmp_path):
    model = Pair()
    attach(model.net, **ACTING)
    attach(model.other, **ACTING)
    run = trainer(tmp_path, [MetaPerturbCallback(**ACTING)], max_epochs=1)
    with pytest.raises(ConfigurationError, match=r"self\.net and self\.other are attached one by one"):
        run.fit(model, loader(1))
    detach(model.net)
    detach(model.other)
    trainer(tmp_path, [MetaPerturbCallback(**ACTING)], max_epochs=1).fit(model, loader(1))
    assert {spec.name.split(".")[0] for spec in attachment_of(model).plan} == {"net", "other"}


def test_copies_that_are_not_trained_are_no_second_attachment(tmp_path):
    model = Pair()
    attach(model.net, **ACTING)
    model.other = copy.deepcopy(model.net).requires_grad_(False)
    trainer(tmp_path, [MetaPerturbCallback(**ACTING)], max_epochs=1).fit(model, loader(1))
    assert attachment_of(model).perturbed
    whole = module()
    trainer(tmp_path, [MetaPerturbCallback(**ACTING)], max_epochs=1).fit(whole, loader(1))
    whole.snapshot = copy.deepcopy(whole)
    trainer(tmp_path, [MetaPerturbCallback(**ACTING)], max_epochs=1).fit(whole, loader(2))
    assert int(whole._metaperturb.steps) == 3


class Kind(MetaPerturbCallback):
    pass


class OtherKind(MetaPerturbCallback):
    pass


@pytest.mark.parametrize("kinds", [(MetaPerturbCallback, MetaPerturbCallback), (Kind, OtherKind)])
def test_a_second_callback_is_refused(tmp_path, kinds):
    run = trainer(tmp_path, [kind() for kind in kinds], max_epochs=1)
    with pytest.raises(ConfigurationError, match="the trainer has 2 callbacks of the kind MetaPerturbCallback"):
        run.fit(module(), loader(1))


class FrozenStatistics(Classifier):
    """Calls a network in evaluation mode in its training steps, and once after each epoch."""

    def __init__(self):
        super().__init__()
        self.forwards, self.between = [], []
        self.net.register_forward_hook(lambda *_: self.forwards.append(torch.is_grad_enabled()))

    def on_train_epoch_start(self):
        self.net.eval()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def on_train_epoch_end(self):
        before = len(self.forwards)
        with torch.no_grad():
            self.net(images())
        self.between.append(len(self.forwards) - before)


def test_a_network_in_evaluation_mode_is_run_once_in_a_training_step_before_and_after_validation(tmp_path):
    model = FrozenStatistics()
    run = trainer(tmp_path, [MetaPerturbCallback(fit_samples=3)], max_epochs=3)
    with pytest.warns(UserWarning, match=r"computed with self\.net\.conv_layers\.[23].* in evaluation mode"):
        run.fit(model, loader(2), loader(1))
    assert sum(model.forwards) == 6, "with gradients, of six batches"
    assert model.between == [3] * 3, "averaged between the batches, from the first epoch on"


def test_a_network_that_comes_in_evaluation_mode_is_told(tmp_path):
    model = module()
    model.net.eval()
    with pytest.warns(UserWarning, match=r"in evaluation mode, in which no statistics are taken for the noise"):
        trainer(tmp_path, [MetaPerturbCallback(**ACTING)], max_epochs=1).fit(model, loader(1))


def test_a_class_is_not_taken_for_a_module(tmp_path):
    for wrong, words in ((Classifier, "the class Classifier"), (nn.Sequential(), "a Sequential")):
        with pytest.raises(CheckpointError, match=f"cannot be restored into {words}; give a LightningModule"):
            MetaPerturbCallback.restore(wrong, tmp_path / "any.ckpt")


@pytest.mark.parametrize("lost", ["plan", "phi_name", "sites", "counters", "evaluation_buffers", "strength", "weights"])
def test_a_state_that_lacks_something_is_refused_whole(lost):
    _, attachment = trained()
    state = copy.deepcopy(attachment.state())
    del state[lost]
    other = attach(Holder(), **ACTING)
    before = _text(other.state())
    with pytest.raises(ConfigurationError, match=f"lacks {lost}; give what"):
        other.load_state(state)
    assert _text(other.state()) == before
    other.load_state(attachment.state())
    assert _text(other.state()) != before


def _text(state):
    """All numbers of a state."""
    return repr(tree_map(lambda value: value.tolist() if isinstance(value, torch.Tensor) else value, state))


@pytest.mark.parametrize("head", [nn.Identity, lambda: nn.Linear(8, 3)])
def test_another_head_leaves_what_was_estimated_for_the_layers_before_it(head):
    model, attachment = trained()
    features = []
    last = [part for part in model.net.modules() if isinstance(part, nn.Linear)][-1]
    last.register_forward_pre_hook(lambda module, args: features.append(args[0]))
    model(images())
    (name,) = [name for name, part in model.named_modules() if part is last]
    new = head()
    replaced = nn.Linear(last.in_features, 3) if isinstance(new, nn.Linear) else new
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, replaced)
    replaced.register_forward_pre_hook(lambda module, args: features.append(args[0]))
    model.eval()(images())
    assert attachment.estimates is not None and torch.equal(*features)


def test_a_changed_layer_before_the_last_batch_norm_is_another_weight():
    model, attachment = trained()
    first = next(part for part in model.modules() if isinstance(part, nn.Conv2d))
    first.weight.data.mul_(2)
    with pytest.warns(UserWarning, match="batch norm was not re-estimated since"):
        model.eval()(images())
    assert attachment.estimates is None


class NormsFirst(nn.Module):
    """Registers its batch norm before the convolution that it follows."""

    def __init__(self):
        super().__init__()
        self.norm, self.conv, self.relu, self.head = nn.BatchNorm2d(4), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.relu(self.norm(self.conv(x))).mean((2, 3)))


@pytest.mark.parametrize(("part", "kept"), [("conv", False), ("head", True)])
def test_a_convolution_counts_wherever_it_is_registered(part, kept):
    model = NormsFirst()
    attachment = attach(model, **ACTING)
    model(images())
    attachment.step(1.0)
    reestimate_batch_norm(attachment, [lambda: model(images())])
    attachment.forget_other_weights()
    assert attachment.estimates is not None
    model.get_submodule(part).weight.data.mul_(2)
    model.eval()
    assert (attachment.estimates is not None) == kept


def test_batch_norm_that_was_merged_into_a_convolution_is_named():
    model, _ = trained()
    name = next(name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d))
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Identity())
    with torch.no_grad():
        next(model.parameters()).mul_(1.1)
    with pytest.raises(ConfigurationError, match=f"batch norm self.{name}, which was re-estimated, was replaced"):
        model.eval()(images())


def test_weights_that_are_not_finite_are_no_other_weights():
    model, attachment = trained()
    first = next(part for part in model.modules() if isinstance(part, nn.Conv2d))
    first.weight.data.fill_(float("nan"))
    reestimate_batch_norm(attachment, [lambda: model(images())])
    attachment.inference = Mean()
    model.eval()(images())
    assert attachment.estimates is not None


class Online(pl.Callback):
    """Evaluates when a batch ends, before the callback of the perturbation, which comes last."""

    def __init__(self):
        self.forwards = []

    def on_train_batch_end(self, trainer, pl_module, *rest):
        pl_module.eval()
        before = len(pl_module.forwards)
        with torch.no_grad():
            pl_module.net(images())
        self.forwards.append(len(pl_module.forwards) - before)
        pl_module.train()


@pytest.mark.parametrize("inference", ["mean", "mc"])
def test_what_other_callbacks_evaluate_when_a_batch_ends_is_averaged(tmp_path, inference):
    online, model = Online(), FrozenStatistics()
    run = trainer(tmp_path, [online, MetaPerturbCallback(inference=inference, fit_samples=3)], max_epochs=1)
    run.fit(model, loader(3))
    assert online.forwards == [3] * 3 and sum(model.forwards) == 3


def test_a_part_under_another_name_that_is_in_evaluation_mode_is_told():
    model, attachment = trained()
    model.net = nn.Sequential(model.net)
    attachment.perturbed = attachment._looked = False
    with pytest.warns(UserWarning, match=r"computed with self\.net\.conv_layers"):
        attachment.step(1.0)
