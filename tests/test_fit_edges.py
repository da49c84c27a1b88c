"""Batches that hooks prepare, fits without any training, modules that come back, and blocks that run by themselves."""

import copy
import warnings

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_modules import Classifier, digits, loader, module, trainer
from mp_lightning import MetaPerturbCallback, MonteCarlo, attach, attachment_of, reestimate_batch_norm
from mp_lightning.backbones import build_backbone
from mp_lightning.errors import ConfigurationError
from mp_lightning.inference import Mean

FULL = {"strength": 1, "full_strength_at": 1}


def raw_loader(batches=4):
    """Images before they are normalized by a hook."""
    x, y = digits()
    return DataLoader(TensorDataset(100 + 50 * x[: batches * 16], y[: batches * 16]), batch_size=16)


def normalized(batch):
    return [(batch[0] - 100) / 50, batch[1]]


class Before(Classifier):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        return normalized(batch)


class After(Classifier):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return normalized(batch)


class Late(Classifier):
    def __init__(self):
        pl.LightningModule.__init__(self)
        self.net, self.dropout = None, 0

    def configure_model(self):
        if self.net is None:
            self.net = build_backbone("conv4", 10, width=8, image_size=16)


def close(first, second):
    assert first.keys() == second.keys()
    return all(torch.allclose(value, second[name], rtol=1e-3, atol=1e-4) for name, value in first.items())


def test_batch_norm_is_estimated_on_what_the_hooks_of_the_module_make_of_batches(tmp_path):
    found = []
    for cls, data in ((Classifier, loader(4)), (Before, raw_loader()), (After, raw_loader())):
        model = module(cls)
        trainer(tmp_path, [MetaPerturbCallback(**FULL)]).fit(model, data)
        found.append(attachment_of(model).estimates.buffers)
    assert found[0] and all(close(found[0], other) for other in found[1:])


class Normalizing(pl.LightningDataModule):
    def train_dataloader(self):
        return raw_loader()

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return normalized(batch)


def test_when_it_tests_a_checkpoint_it_estimates_on_batches_as_fit_had_them(tmp_path):
    """By the hooks of its datamodule, and with trainer.training, though the test comes with a loader of its own."""
    stages = []

    class Noting(Classifier):
        def training_step(self, batch, batch_idx):
            stages.append((self.trainer.training, self.trainer.testing))
            return super().training_step(batch, batch_idx)

    model = module(Noting)
    saved = ModelCheckpoint(tmp_path, save_weights_only=False, every_n_train_steps=4)
    run = trainer(tmp_path, [MetaPerturbCallback(**FULL), saved], max_epochs=1, enable_checkpointing=True)
    run.fit(model, datamodule=Normalizing())
    first = attachment_of(model).estimates.buffers
    stages.clear()
    run.test(model, loader(1), ckpt_path=saved.best_model_path, verbose=False)
    assert close(first, attachment_of(model).estimates.buffers)
    assert set(stages) == {(True, False)} and len(stages) == 4
    assert run.state.stage is None or not run.training


def test_a_finished_run_that_is_resumed_is_evaluated_as_before(tmp_path):
    model, again = module(), module(seed=1)
    run = trainer(tmp_path, [MetaPerturbCallback(**FULL)])
    run.fit(model, loader(2))
    run.save_checkpoint(tmp_path / "done.ckpt")
    trainer(tmp_path, [MetaPerturbCallback(**FULL)]).fit(again, loader(2), ckpt_path=tmp_path / "done.ckpt")
    x = digits()[0][:8]
    assert isinstance(attachment_of(again).inference, Mean)
    assert torch.equal(model.eval()(x), again.eval()(x))


def test_a_fit_without_training_leaves_layers_of_configure_model_as_they_were(tmp_path):
    model = Late()
    trainer(tmp_path, [MetaPerturbCallback(**FULL)], max_epochs=0).fit(model, loader(2))
    assert model.net is not None and attachment_of(model) is None


@pytest.mark.parametrize("options", [{"max_epochs": 0}, {"limit_train_batches": 0}])
def test_a_fit_without_training_leaves_a_module_as_it_was(tmp_path, options):
    model = module()
    x = digits()[0][:8]
    before = model.eval()(x)
    model.train()
    run = trainer(tmp_path, [MetaPerturbCallback(**FULL)], **options)
    run.fit(model, loader(2))
    assert attachment_of(model) is None and torch.equal(model.eval()(x), before)


def test_without_training_what_the_user_attached_stays(tmp_path):
    model = module()
    attachment = attach(model, ramp_steps=0)
    trainer(tmp_path, [MetaPerturbCallback()], max_epochs=0).fit(model, loader(2))
    assert attachment_of(model) is attachment


def test_a_restored_module_goes_on_in_training_mode(tmp_path, recwarn):
    """But for what was not in it before: a frozen layer stays so."""
    run = trainer(tmp_path, [MetaPerturbCallback(**FULL)])
    run.fit(module(), loader(2))
    run.save_checkpoint(tmp_path / "done.ckpt")

    class Frozen(Classifier):
        def __init__(self):
            super().__init__()
            next(part for part in self.modules() if isinstance(part, nn.BatchNorm2d)).eval()

    restored = MetaPerturbCallback.restore(Frozen(), tmp_path / "done.ckpt")
    assert not restored.training
    norms = [part for part in restored.modules() if isinstance(part, nn.BatchNorm2d)]
    before, forwards = [norm.running_mean.clone() for norm in norms], int(attachment_of(restored).forwards)
    trainer(tmp_path, [MetaPerturbCallback()], max_epochs=1).fit(restored, loader(2))
    assert [torch.equal(norm.running_mean, b) for norm, b in zip(norms, before, strict=True)] == [True, *[False] * 3]
    assert int(attachment_of(restored).forwards) == forwards + 2
    assert not any("evaluation mode, in which nothing" in str(one.message) for one in recwarn)


def test_a_module_that_the_user_left_in_evaluation_mode_is_told(tmp_path):
    with pytest.warns(UserWarning, match=r"Classifier is in evaluation mode.*call train\(\) before fit"):
        trainer(tmp_path, [MetaPerturbCallback()], max_epochs=1).fit(module().eval(), loader(2))


def test_restore_makes_the_layers_of_configure_model(tmp_path):
    model = Late()
    run = trainer(tmp_path, [MetaPerturbCallback(**FULL)])
    run.fit(model, loader(2))
    run.save_checkpoint(tmp_path / "late.ckpt")
    x = digits()[0][:8]
    assert torch.equal(MetaPerturbCallback.restore(Late(), tmp_path / "late.ckpt")(x), model.eval()(x))


def test_a_finished_training_is_not_lost_when_a_step_cannot_be_run_again(tmp_path):
    class Gradients(Classifier):
        def training_step(self, batch, batch_idx):
            x = batch[0].clone().requires_grad_()
            torch.autograd.grad((x**2).sum(), x)
            return super().training_step(batch, batch_idx)

    model = module(Gradients)
    with pytest.warns(UserWarning, match=r"not re-estimated.*a training step ended with RuntimeError"):
        trainer(tmp_path, [MetaPerturbCallback()]).fit(model, loader(2))
    assert isinstance(attachment_of(model).inference, Mean)


def trained(steps=8):
    """A network that trained with full strength, in a plain loop, with batch norm estimated."""
    torch.manual_seed(0)
    model = build_backbone("conv4", 10, width=8, image_size=16)
    attachment = attach(model, sites=1, ramp_steps=0, **FULL)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    x, y = digits()
    batches = [(x[i : i + 16], y[i : i + 16]) for i in range(0, 16 * steps, 16)]
    for images, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        attachment.step(1.0)
    reestimate_batch_norm(attachment, [lambda images=images: model(images) for images, _ in batches])
    attachment.inference = Mean()
    return model.eval(), attachment, x[:16]


def test_blocks_that_run_by_themselves_take_the_expected_noise_and_say_so_once():
    model, attachment, x = trained()
    features = nn.Sequential(*model.conv_layers)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert torch.equal(features(x), features(x))
    said = [str(one.message) for one in caught]
    assert len(said) == 1 and said[0].startswith("MetaPerturb: blocks of the model were called one by one")
    attachment.inference = MonteCarlo(2, "logits")
    assert not torch.equal(features(x), features(x)), "samples are drawn there"


def test_other_weights_are_not_evaluated_with_the_batch_norm_of_those_before():
    model, attachment, _ = trained()
    state, weights = attachment.state(), copy.deepcopy(model.state_dict())
    others = {name: value + 0.01 if value.is_floating_point() else value for name, value in weights.items()}
    model.load_state_dict(others)
    assert attachment.estimates is None
    attachment.load_state(state)  # in either order
    model.load_state_dict(weights)
    assert attachment.estimates is not None
    attachment.load_state(state)
    model.half().load_state_dict(weights)
    assert attachment.estimates is not None, "the same weights, rounded"
    model.float().load_state_dict(others)
    assert attachment.estimates is None


def test_an_interrupted_forward_leaves_nothing_once_the_mode_is_set_again():
    model, attachment, x = trained()
    norm = next(part for part in model.modules() if isinstance(part, nn.BatchNorm2d))
    mean, expected = norm.running_mean.clone(), model(x)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = norm.register_forward_hook(interrupt)
    attachment.settle()
    with pytest.raises(KeyboardInterrupt):
        model(x)
    handle.remove()
    # Lightning's trainer settles by itself; here the mode does.
    assert torch.equal(model.eval()(x), expected)
    assert attachment.depth == 0 and torch.equal(norm.running_mean, mean)


@pytest.mark.parametrize("classes", [2, 3])
def test_the_first_logits_of_few_classes_may_lie_between_0_and_1(classes):
    for seed in range(20):
        torch.manual_seed(seed)
        model = build_backbone("conv4", classes, width=8, image_size=16)
        attachment = attach(model, ramp_steps=0)
        attachment.inference = MonteCarlo(2)
        output = model.eval()(torch.rand(32, 3, 16, 16))
        assert torch.allclose(output.exp().sum(1), torch.ones(32), atol=1e-4)
        assert attachment.inference.output is None, "decided when it was trained"


@pytest.mark.parametrize(
    ("options", "schedule", "batches", "steps"),
    [
        ({"max_steps": 5, "max_epochs": -1}, {0: 4}, 20, 5),
        ({"max_steps": 5, "max_epochs": -1}, {0: 1, 1: 4}, 8, 5),
        ({"max_epochs": 3}, {0: 4}, 12, 3),
        ({"max_steps": 5, "max_epochs": -1, "accumulate_grad_batches": 100}, None, 20, 5),
        ({"max_steps": 5, "max_epochs": -1, "accumulate_grad_batches": 3}, None, 11, 5),
    ],
)
def test_the_horizon_is_that_of_the_steps_that_are_made(tmp_path, options, schedule, batches, steps):
    model = module()
    callbacks = [] if schedule is None else [GradientAccumulationScheduler(schedule)]
    run = trainer(tmp_path, [MetaPerturbCallback(), *callbacks], **options)
    run.fit(model, loader(4))
    attachment = attachment_of(model)
    assert (int(attachment.steps), run.global_step) == (batches, steps)
    assert attachment.ramp_steps == round(0.4 * batches)
    assert attachment.reached == pytest.approx(steps / 1200)


def test_max_steps_of_a_module_that_optimizes_by_hand_is_no_horizon(tmp_path):
    class ByHand(Classifier):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(ConfigurationError, match=r"max_steps=40 counts steps of optimizers.*pass ramp_steps="):
        trainer(tmp_path, [MetaPerturbCallback()], max_epochs=1000, max_steps=40).fit(module(ByHand), loader(2))


def test_a_ramp_that_has_ended_does_not_begin_anew_in_a_second_fit(tmp_path):
    model = module()
    trainer(tmp_path, [MetaPerturbCallback(**FULL)]).fit(model, loader(2))
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(float(attachment_of(pl_module).coeff))

    trainer(tmp_path, [MetaPerturbCallback(), Watch()], max_epochs=20).fit(model, loader(2))
    assert seen == [1.0] * 40
