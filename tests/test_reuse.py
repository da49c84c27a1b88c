"""What is changed between two uses of a module: modes, weights, settings, and fits that failed before they began."""

import copy
import gc
import weakref

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_modules import Classifier, loader, module, trainer
from mp_lightning import MetaPerturbCallback, attach, attachment_of, detach
from mp_lightning.checkpoints import KEY, CheckpointHooks
from mp_lightning.errors import ConfigurationError
from mp_lightning.perturbation import initial_phi
from test_fit_edges import Late


def checkpoint_of(folder, model, *callbacks, **options):
    """The file of a fit that went to its end."""
    run = trainer(folder, [*callbacks, MetaPerturbCallback(sites=1)], **options)
    run.fit(model, loader(4), loader(2))
    run.save_checkpoint(folder / "end.ckpt")
    return folder / "end.ckpt"


def test_after_restore_the_perturbation_may_be_taken_out_and_put_elsewhere(tmp_path):
    path = checkpoint_of(tmp_path, module())
    model = MetaPerturbCallback.restore(module(), path)
    detach(model)
    (name, head) = next(one for one in model.named_modules() if isinstance(one[1], nn.Linear))
    model.set_submodule(name, nn.Sequential(head))
    trainer(tmp_path, [MetaPerturbCallback(sites=0.5)]).fit(model, loader(2), loader(1))
    assert model.training and model.net.training


def test_modes_that_the_user_sets_after_restore_stay(tmp_path):
    path = checkpoint_of(tmp_path, module())
    model = MetaPerturbCallback.restore(module(), path).train()
    frozen = next(part for part in model.modules() if isinstance(part, nn.BatchNorm2d)).eval()
    trainer(tmp_path, [MetaPerturbCallback()]).fit(model, loader(2), loader(1))
    assert not frozen.training and model.training


def test_weights_that_are_loaded_after_restore_are_not_evaluated_with_the_batch_norm_of_those_before(tmp_path):
    path = checkpoint_of(tmp_path, module())
    model = MetaPerturbCallback.restore(module(), path)
    assert attachment_of(model).estimates is not None
    model.load_state_dict(module(seed=5).state_dict(), strict=False)
    assert attachment_of(model).estimates is None


def test_trainer_and_module_are_let_go(tmp_path):
    model = module()
    run = trainer(tmp_path, [MetaPerturbCallback()])
    run.fit(model, loader(2), loader(1))
    left = weakref.ref(run), weakref.ref(model)
    del run, model
    gc.collect()
    assert [one() for one in left] == [None, None]


class Fails(Classifier):
    failed = False

    def validation_step(self, batch, batch_idx):
        if not self.failed:
            self.failed = True
            raise ValueError("a typo")
        super().validation_step(batch, batch_idx)


def test_a_fit_that_fails_before_its_first_batch_changes_nothing(tmp_path):
    model = Fails()
    with pytest.raises(ValueError, match="a typo"):
        trainer(tmp_path, [MetaPerturbCallback()], num_sanity_val_steps=1).fit(model, loader(2), loader(1))
    assert attachment_of(model) is None and "on_save_checkpoint" not in vars(model)
    other = MetaPerturbCallback(initial_phi(0))
    trainer(tmp_path, [other], num_sanity_val_steps=1).fit(model, loader(2), loader(1))
    assert attachment_of(model).phi_name == other.phi.name


class LateAndFails(Late):
    failed = False

    def setup(self, stage):
        if not self.failed:
            self.failed = True
            raise ValueError("a typo")


def test_a_fit_that_fails_before_there_are_layers_leaves_the_next_one_alone(tmp_path):
    model = LateAndFails()
    with pytest.raises(ValueError, match="a typo"):
        trainer(tmp_path, [MetaPerturbCallback()]).fit(model, loader(2), loader(1))
    trainer(tmp_path, []).fit(model, loader(2), loader(1))
    assert attachment_of(model) is None


def test_a_test_that_fails_leaves_noise_for_later(tmp_path):
    model = module()
    run = trainer(tmp_path, [MetaPerturbCallback()])
    run.fit(model, loader(2), loader(1))
    model.test_step = Fails.validation_step.__get__(Fails())
    with pytest.raises(ValueError, match="a typo"):
        run.test(model, loader(1), verbose=False)
    assert attachment_of(model).sampling


def test_a_second_fit_takes_what_belongs_to_a_run_and_says_what_it_does_not(tmp_path, recwarn):
    model = module()
    trainer(tmp_path, [MetaPerturbCallback()]).fit(model, loader(2), loader(1))
    again = MetaPerturbCallback(sync_statistics=True, input_size=64, path="reference")
    trainer(tmp_path, [again]).fit(model, loader(2), loader(1))
    attachment = attachment_of(model)
    assert (attachment.synchronize, attachment.path, int(attachment.input_size)) == (True, "reference", 16)
    said = "trained with input_size=16, which stays in force instead of 64"
    assert any(said in str(one.message) for one in recwarn)
    trainer(tmp_path, [MetaPerturbCallback()]).fit(model, loader(2), loader(1))
    assert (attachment.synchronize, attachment.path) == (True, "reference")  # as it was left


class Collects(Classifier):
    """With metrics in a collection, which torchmetrics has for several at once."""

    def __init__(self):
        super().__init__()
        accuracy = torchmetrics.Accuracy("multiclass", num_classes=10)
        self.metrics = torchmetrics.MetricCollection({"accuracy": accuracy})

    def training_step(self, batch, batch_idx):
        logits = self(batch[0])
        self.metrics.update(logits, batch[1])
        return nn.functional.cross_entropy(logits, batch[1])


def test_batch_norm_is_estimated_beside_a_collection_of_metrics(tmp_path):
    model = Collects()
    trainer(tmp_path, [MetaPerturbCallback()], max_epochs=1).fit(model, loader(4), loader(1))
    assert attachment_of(model).estimates is not None
    assert model.metrics["accuracy"]._update_count == 4  # a count of training alone


def test_batch_norm_is_estimated_on_a_loader_with_a_generator_of_another_library(tmp_path):
    class Loader:
        generator = np.random.default_rng(0)

        def __iter__(self):
            return iter(loader(2))

        def __len__(self):
            return 2

    model = module()
    trainer(tmp_path, [MetaPerturbCallback()]).fit(model, Loader())
    assert attachment_of(model).estimates is not None


class Nothing(IterableDataset):
    def __iter__(self):
        return iter(())


def test_an_epoch_of_validation_without_a_batch_ends_well(tmp_path):
    run = trainer(tmp_path, [MetaPerturbCallback(inference="mc")])
    run.fit(module(), loader(2), DataLoader(Nothing()))
    assert run.state.finished


class Plain(pl.LightningModule):
    """Without batch norm, of which a checkpoint from within fit lacks nothing."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_network_without_batch_norm_comes_back_without_a_warning(tmp_path, recwarn):
    class Saves(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "within.ckpt")

    trainer(tmp_path, [Saves(), MetaPerturbCallback(full_strength_at=1)]).fit(Plain(), loader(2))
    recwarn.clear()
    restored = MetaPerturbCallback.restore(Plain(), tmp_path / "within.ckpt")
    with torch.no_grad():
        first, second = (restored.net(loader(1).dataset[0][0][None]) for _ in range(2))
    assert torch.equal(first, second)
    assert not [one for one in recwarn if "checkpoint" in str(one.message)]


class OwnTraining(Classifier):
    """What a training step does beside its loss, and what hangs on it."""

    def __init__(self):
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.register_buffer("center", torch.zeros(10))
        self.seen = 0

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            for own, taught in zip(self.net.parameters(), self.teacher.parameters(), strict=True):
                taught.lerp_(own, 0.1)
            self.center = 0.9 * self.center + 0.1 * self.teacher(batch[0]).mean(0)
        self.seen += len(batch[0])
        return super().training_step(batch, batch_idx)


def test_estimating_batch_norm_leaves_what_training_steps_change_as_training_left_it(tmp_path):
    found = []
    for inference in ("mean", "mc"):  # which estimates nothing
        torch.manual_seed(0)
        model = OwnTraining()
        trainer(tmp_path, [MetaPerturbCallback(inference=inference)]).fit(model, loader(4), loader(1))
        found.append({**model.state_dict(), "seen": torch.tensor(model.seen)})
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


class Other(pl.LightningModule):
    def __init__(self, net):
        super().__init__()
        self.backbone = net

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.backbone(batch[0]), batch[1])

    configure_optimizers = Plain.configure_optimizers


def test_a_network_that_is_attached_in_another_module_is_refused(tmp_path):
    model = module()
    trainer(tmp_path, [MetaPerturbCallback()]).fit(model, loader(2), loader(1))
    other = Other(model.net)
    with pytest.raises(ConfigurationError, match="Other is attached already, as a part of Classifier; call"):
        trainer(tmp_path, [MetaPerturbCallback()]).fit(other, loader(2))
    detach(model.net)
    trainer(tmp_path, [MetaPerturbCallback()]).fit(other, loader(2))
    assert attachment_of(other).model is other


def test_what_was_attached_to_a_part_by_hand_comes_back(tmp_path):
    model = module()
    attach(model.net, sites=1, full_strength_at=1)
    run = trainer(tmp_path, [MetaPerturbCallback()])
    run.fit(model, loader(2), loader(1))
    assert float(attachment_of(model).coeff) > 0.9
    run.save_checkpoint(tmp_path / "end.ckpt")
    assert torch.load(tmp_path / "end.ckpt", weights_only=True)[KEY]["part"] == "net"
    restored = MetaPerturbCallback.restore(module(), tmp_path / "end.ckpt")
    assert attachment_of(restored).model is restored.net
    images = loader(1).dataset.tensors[0][:4]
    with torch.no_grad():
        assert torch.equal(restored(images), model.eval()(images))


def test_the_part_of_a_compiled_network_is_called_as_before(tmp_path):
    model = module()
    attach(model.net, sites=1)
    model.net = torch.compile(model.net, backend="eager")
    checkpoint = {"state_dict": {}}
    CheckpointHooks.install(model, {}, marker=False).on_save_checkpoint(checkpoint)
    assert checkpoint[KEY]["part"] == "net"


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return loader(4)

    def val_dataloader(self):
        return loader(2, start=400)

    test_dataloader = val_dataloader


@pytest.mark.parametrize("ready", [True, False])
def test_a_new_trainer_estimates_on_the_training_data_that_it_can_have(tmp_path, recwarn, ready):
    saver = ModelCheckpoint(tmp_path, filename="within", save_top_k=1)
    model = module()
    run = trainer(tmp_path, [MetaPerturbCallback(full_strength_at=1), saver], enable_checkpointing=True)
    run.fit(model, datamodule=Data())
    expected = run.test(model, datamodule=Data(), verbose=False)
    data = Data()
    if not ready:
        data.train_dataloader = lambda: [][0]  # before setup("fit")
    new = trainer(tmp_path, [MetaPerturbCallback(full_strength_at=1)])
    found = new.test(module(seed=3), datamodule=data, ckpt_path=saver.best_model_path, verbose=False, weights_only=True)
    assert (found == expected) == ready
    assert any("needs no setup('fit')" in str(one.message) for one in recwarn) == (not ready)
