"""Whatever else a training does, the sites act, what is counted is right, and the order of callbacks is no matter."""

import copy
import csv
import os
import subprocess
import sys
import warnings

import lightning as L
import pytest
import torch
import torchvision
from hydra.utils import instantiate
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.tuner import Tuner
from omegaconf import OmegaConf
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.feature_extraction import create_feature_extractor

from lightning_modules import digits
from mp_lightning import (
    ConfigurationError,
    MetaPerturbCallback,
    MetaPerturbMixin,
    attach,
    attachment_of,
    reestimate_batch_norm,
)
from mp_lightning.backbones import build_backbone
from mp_lightning.errors import SiteError
from mp_lightning.perturbation import NoiseKey

BATCHES = 4


class Module(L.LightningModule):
    def __init__(self, lr: float = 1e-3, batch_size: int = 8):
        super().__init__()
        self.lr, self.batch_size = lr, batch_size
        torch.manual_seed(0)
        self.net = build_backbone("resnet20", 10, width=4)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx=0):
        return cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx=0):
        self.log("loss", cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)

    def train_dataloader(self):
        x, y = digits()
        count = BATCHES * 8
        return DataLoader(TensorDataset(x[:count], y[:count]), batch_size=self.batch_size)

    def val_dataloader(self):
        x, y = digits()
        return DataLoader(TensorDataset(x[100:116], y[100:116]), batch_size=8)


def trainer_with(tmp_path, callbacks, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return L.Trainer(
        **{"default_root_dir": tmp_path, "accelerator": "cpu", "max_epochs": 2, "logger": False, **quiet, **options},
        callbacks=callbacks,
    )


def fit(tmp_path, module=None, others=(), ours_first=True, **options):
    module = Module() if module is None else module
    callback = MetaPerturbCallback(sites=1, full_strength_at=1)
    callbacks = [callback, *others] if ours_first else [*others, callback]
    trainer = trainer_with(tmp_path, callbacks, **options)
    trainer.fit(module)
    return module, trainer


def check_acted(module, batches, sites=9, forwards=None):
    """Every batch was counted, and every site has seen it."""
    attachment = attachment_of(module)
    assert len(attachment.plan) == sites
    assert int(attachment.steps) == batches
    assert int(attachment.forwards) == (batches if forwards is None else forwards)
    fresh = attachment.perturbation.initial_statistics
    for site in attachment.sites:
        initial = fresh(site.spec.channels)
        assert not any(torch.equal(value, initial[name]) for name, value in site.statistics.items()), site.spec.name
    return attachment


@pytest.mark.parametrize(
    ("options", "batches"),
    [
        ({"precision": "bf16-mixed"}, 2 * BATCHES),
        ({"accumulate_grad_batches": 3}, 2 * BATCHES),
        ({"gradient_clip_val": 0.1}, 2 * BATCHES),
        ({"overfit_batches": 2}, 2 * 2),
        ({"limit_train_batches": 3}, 2 * 3),
        ({"limit_train_batches": 0.5, "limit_val_batches": 0}, BATCHES),
        ({"num_sanity_val_steps": 2, "max_steps": 3}, 3),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_options_of_the_trainer(tmp_path, options, batches):
    module, trainer = fit(tmp_path, **options)
    attachment = check_acted(module, batches)
    assert attachment.estimates.buffers
    trainer.validate(module, verbose=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="16-mixed needs a GPU; on a CPU Lightning takes bf16 instead")
def test_sixteen_bits_on_a_gpu(tmp_path):
    module, _ = fit(tmp_path, precision="16-mixed", accelerator="gpu", devices=1)
    check_acted(module, 2 * BATCHES)


class Adversarial(Module):
    """Two networks and two optimizers, stepped by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.other = build_backbone("resnet20", 10, width=4)

    def training_step(self, batch, batch_idx=0):
        for net, optimizer in zip((self.net, self.other), self.optimizers(), strict=True):
            optimizer.zero_grad()
            self.manual_backward(cross_entropy(net(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), lr=0.01) for net in (self.net, self.other)]


def test_manual_optimization_of_two_networks(tmp_path):
    module, trainer = fit(tmp_path, Adversarial())
    check_acted(module, 2 * BATCHES, sites=9 + 9, forwards=2 * 2 * BATCHES)
    trainer.validate(module, verbose=False)


class Checkpointed(Module):
    def forward(self, x):
        return checkpoint(self.net, x, use_reentrant=False)


class WithClosure(Module):
    """The model runs inside of the optimizer's step."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx=0):
        optimizer = self.optimizers()

        def closure():
            optimizer.zero_grad()
            loss = cross_entropy(self(batch[0]), batch[1])
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)


def test_a_model_that_runs_in_a_closure_is_reestimated(tmp_path):
    module, _ = fit(tmp_path, WithClosure())
    assert check_acted(module, 2 * BATCHES).estimates.buffers


def test_activation_checkpointing_trains_as_without(tmp_path):
    plain, _ = fit(tmp_path)
    recomputed, _ = fit(tmp_path, Checkpointed())
    check_acted(recomputed, 2 * BATCHES)
    for a, b in zip(plain.net.parameters(), recomputed.net.parameters(), strict=True):
        assert torch.equal(a, b)


def test_channels_last_trains_as_channels_first(tmp_path):
    plain, _ = fit(tmp_path)
    other, _ = fit(tmp_path, Module().to(memory_format=torch.channels_last))
    check_acted(other, 2 * BATCHES)
    for a, b in zip(plain.net.parameters(), other.net.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def compiled_inside():
    module = Module()
    module.net = torch.compile(module.net, backend="aot_eager", fullgraph=True)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("how", ["inside", "whole"])
def test_compiled_models_train_as_others_and_their_sites_act(tmp_path, how):
    """The canary: a graph that left the sites out would leave their statistics as they were."""
    torch._dynamo.reset()
    plain, _ = fit(tmp_path)
    module = compiled_inside() if how == "inside" else Module()
    callback = MetaPerturbCallback(sites=1, full_strength_at=1)
    trainer = trainer_with(tmp_path, [callback])
    trainer.fit(torch.compile(module, backend="aot_eager") if how == "whole" else module)
    check_acted(module, 2 * BATCHES)
    for a, b in zip(plain.net.parameters(), module.net.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.slow
def test_a_model_that_was_compiled_and_run_before_is_compiled_again(tmp_path):
    torch._dynamo.reset()
    module = compiled_inside()
    module.train()(torch.rand(8, 3, 16, 16))
    trainer = trainer_with(tmp_path, [MetaPerturbCallback(sites=1, full_strength_at=1)])
    trainer.fit(module)
    check_acted(module, 2 * BATCHES)


AVERAGES = {
    "WeightAveraging": WeightAveraging,
    "EMAWeightAveraging": EMAWeightAveraging,
    "StochasticWeightAveraging": lambda: StochasticWeightAveraging(1e-2, swa_epoch_start=1),
}


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("name", AVERAGES)
def test_batch_norm_is_estimated_for_the_averaged_weights(tmp_path, name, ours_first):
    module, trainer = fit(tmp_path, others=[AVERAGES[name]()], ours_first=ours_first)
    epochs = 2 + name.startswith("Stochastic")  # which updates batch norm in an epoch of its own
    attachment = check_acted(module, epochs * BATCHES)
    found = copy.deepcopy(attachment.estimates.buffers)
    batches = [batch for batch in module.train_dataloader()]
    reestimate_batch_norm(attachment, [lambda batch=batch: module.training_step(batch) for batch in batches])
    assert found.keys() == attachment.estimates.buffers.keys()
    for key, value in attachment.estimates.buffers.items():
        assert torch.allclose(value, found[key], atol=1e-6), key
    trainer.validate(module, verbose=False)


class Declares(MetaPerturbMixin, Module):
    def __init__(self):
        super().__init__()
        self.perturb(sites=1, full_strength_at=1)


@pytest.mark.parametrize("name", AVERAGES)
def test_a_module_that_declares_it_goes_on_with_averaged_weights(tmp_path, name):
    """They are saved without what the module has of the perturbation in its own weights, and loaded strictly."""

    def trainer(epochs, *others):
        return trainer_with(tmp_path, [AVERAGES[name](), *others], max_epochs=epochs, enable_checkpointing=True)

    every = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    module, whole = Declares(), trainer(4, every)
    whole.fit(module)
    expected, steps = whole.validate(module, verbose=False), int(attachment_of(module).steps)
    whole.validate(module, ckpt_path=tmp_path / "epoch=3.ckpt", verbose=False, weights_only=True)
    other, again = Declares(), trainer(4)
    again.fit(other, ckpt_path=tmp_path / "epoch=2.ckpt", weights_only=True)
    assert int(attachment_of(other).steps) == steps
    assert again.validate(other, verbose=False) == expected


class CopiesAt(L.Callback):
    """A moving average by hand, which follows at once, so that the copy is to be as the module."""

    def __init__(self, hook):
        self.copied = None
        setattr(self, hook, self.copy)

    def copy(self, trainer, module, *rest):
        self.copied = self.copied or copy.deepcopy(module).eval()

    def on_validation_epoch_end(self, trainer, module):
        if self.copied is not None and not trainer.sanity_checking:
            self.copied.load_state_dict(module.state_dict())
            x = torch.rand(4, 3, 16, 16)
            self.outputs = self.copied(x), self.copied(x)


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start", "on_train_batch_end"])
def test_a_copy_that_is_made_while_training_draws_no_noise_and_says_that_it_is_not_as_strong(tmp_path, hook):
    copies = CopiesAt(hook)
    with pytest.warns(
        UserWarning, match=r"strength 0(\.\d+)? acts in this copy of Module, and 0.95 in the Module that"
    ):
        module, _ = fit(tmp_path, others=[copies])
    a, b = copies.outputs
    assert torch.allclose(a, b) or hook == "on_train_batch_end"  # which is noisy already, as samples are averaged
    attachment_of(copies.copied).load_state(attachment_of(module).state())
    assert float(attachment_of(copies.copied).coeff) == float(attachment_of(module).coeff)


class ByParts(Module):
    def training_step(self, batch, batch_idx=0):
        net, (x, y) = self.net, batch
        x = net.layer3(net.layer2(net.layer1(net.relu(net.bn1(net.conv1(x))))))
        return cross_entropy(net.fc(x.mean(dim=(2, 3))), y)


def test_a_network_that_is_called_by_its_parts_is_told_at_the_first_batch(tmp_path):
    module = ByParts()
    attachment = attach(module, sites=1, ramp_steps=0, full_strength_at=1)
    batch = next(iter(module.train_dataloader()))
    with pytest.raises(SiteError, match=r"unknown.*call the model as a whole, or pass input_size="):
        module.training_step(batch)
    attachment.detach()
    attachment = attach(module, sites=1, ramp_steps=0, full_strength_at=1, input_size=16)
    module.training_step(batch)
    with pytest.warns(UserWarning, match="parts of the network were called one by one.*Call the network, or put"):
        attachment.step(1.0)


class Detector(nn.Module):
    """Takes a list of images of many sizes."""

    def __init__(self):
        super().__init__()
        self.net = build_backbone("resnet20", 10, width=4)

    def forward(self, images, targets=None):
        return self.net(torch.stack([image[:, :16, :16] for image in images]))


def test_the_height_of_images_in_a_list_is_known():
    model = Detector()
    attachment = attach(model, sites=1, ramp_steps=0)
    model([torch.rand(3, 24, 16), torch.rand(3, 32, 16)])
    assert float(attachment.input_size) == 24


class Finetuning(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net, train_bn=False)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net, optimizer)


class WithHead(Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(10, 10)

    def forward(self, x):
        return self.head(self.net(x))


@pytest.mark.parametrize("ours_first", [True, False])
def test_a_backbone_that_is_frozen_for_a_while_has_its_sites(tmp_path, ours_first):
    module, _ = fit(tmp_path, WithHead(), [Finetuning()], ours_first)
    check_acted(module, 2 * BATCHES)
    assert all(parameter.requires_grad for parameter in module.net.parameters())


@pytest.mark.parametrize("ours_first", [True, False])
def test_a_frozen_teacher_beside_a_finetuned_backbone(tmp_path, ours_first, recwarn):
    class Taught(WithHead):
        def __init__(self):
            super().__init__()
            self.teacher = build_backbone("resnet20", 10, width=4).requires_grad_(False)

    module, _ = fit(tmp_path, Taught(), [Finetuning()], ours_first)
    found = {name.split(".")[0] for name in attachment_of(module).plan.names}
    said = [str(warning.message) for warning in recwarn if "target=" in str(warning.message)]
    assert (found == {"net"}, bool(said)) == (ours_first, not ours_first)  # alone, or with a warning


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize(
    "finder",
    [
        lambda: LearningRateFinder(num_training_steps=5),
        lambda: BatchSizeFinder(init_val=4, max_trials=2, steps_per_trial=2),
    ],
    ids=["LearningRateFinder", "BatchSizeFinder"],
)
def test_finders_leave_no_trace_in_what_is_counted(tmp_path, finder, ours_first):
    module, trainer = fit(tmp_path, others=[finder()], ours_first=ours_first)
    check_acted(module, trainer.num_training_batches * 2)


def test_the_tuner_leaves_the_statistics_as_they_were(tmp_path):
    module = Module()
    trainer = trainer_with(tmp_path, [MetaPerturbCallback(sites=1, full_strength_at=1)])
    Tuner(trainer).lr_find(module, num_training=5)
    attachment = attachment_of(module)
    assert (int(attachment.steps), int(attachment.forwards)) == (0, 0)
    for site in attachment.sites:
        initial = attachment.perturbation.initial_statistics(site.spec.channels)
        assert all(torch.equal(value, initial[name]) for name, value in site.statistics.items())
    trainer.fit(module)
    check_acted(module, 2 * BATCHES)


def test_lightning_cli(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quiet = ["enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger"]
    cli = LightningCLI(
        Module,
        args=[
            "fit",
            "--trainer.callbacks+=mp_lightning.MetaPerturbCallback",
            "--trainer.callbacks.sites=[net.layer1.*,net.layer2.*]",
            "--trainer.max_epochs=2",
            "--trainer.accelerator=cpu",
            *(f"--trainer.{key}=false" for key in quiet),
        ],
        save_config_callback=None,
    )
    attachment = check_acted(cli.model, 2 * BATCHES, sites=6)
    assert all(name.startswith("net.layer") for name in attachment.plan.names)


def test_hydra_makes_the_callback(tmp_path):
    config = {"_target_": "mp_lightning.MetaPerturbCallback", "sites": ["net.*.0.*"], "inference": "fold"}
    module = Module()
    trainer_with(tmp_path, [instantiate(OmegaConf.create(config))]).fit(module)
    assert len(attachment_of(module).plan) == 3
    assert attachment_of(module).estimates.constants is not None


@pytest.mark.parametrize("name", ["FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"])
def test_strategies_that_cut_a_module_into_pieces_are_refused(tmp_path, name):
    module = Module()
    trainer = trainer_with(tmp_path, [MetaPerturbCallback(sites=1, full_strength_at=1)])
    trainer.strategy.__class__ = type(name, (type(trainer.strategy),), {})
    with pytest.raises(ConfigurationError, match=f"does not work with {name}.* use strategy='ddp'"):
        trainer.fit(module)
    assert attachment_of(module) is None


class Distillation(Module):
    """A student, a teacher that is frozen, and a copy of the student that follows it."""

    def __init__(self):
        super().__init__()
        self.teacher = torchvision.models.resnet18(num_classes=10).requires_grad_(False)
        self.follower = copy.deepcopy(self.net)

    def training_step(self, batch, batch_idx=0):
        with torch.no_grad():
            target = self.teacher(batch[0]).softmax(dim=1) + self.follower(batch[0]).softmax(dim=1)
        return cross_entropy(self(batch[0]), target / 2)


def test_target_leaves_an_ema_teacher_alone(tmp_path):
    module = Distillation()
    trainer_with(tmp_path, [MetaPerturbCallback(sites=1, target="net", full_strength_at=1)]).fit(module)
    attachment = check_acted(module, 2 * BATCHES)
    assert {name.split(".")[0] for name in attachment.plan.names} == {"net"}


def logged(path):
    with next(path.rglob("metrics.csv")).open(newline="") as file:
        return list(csv.DictReader(file))


def test_what_the_sites_do_goes_to_the_logger_and_the_training_is_the_same(tmp_path):
    quiet, module = Module(), Module()
    trainer_with(tmp_path, [MetaPerturbCallback(sites=1, full_strength_at=0.4)]).fit(quiet)
    callback, factors = MetaPerturbCallback(sites=1, full_strength_at=0.4, log_every=3), []

    class Noting(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, *args):
            factors.append(float(attachment_of(pl_module).fitting.factor()))

    trainer_with(tmp_path, [callback, Noting()], logger=CSVLogger(tmp_path, "logs"), log_every_n_steps=1).fit(module)
    for a, b in zip(quiet.state_dict().values(), module.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    attachment = attachment_of(module)
    rows = [row for row in logged(tmp_path) if row.get(f"metaperturb/{attachment.plan.names[0]}/scale")]
    assert [int(row["step"]) for row in rows] == [2, 5]  # as Lightning counts batches
    ramp = attachment.ramp_steps
    reached = 0.95 * attachment.reached
    share = [float(row["metaperturb/strength"]) / (reached * min(1, int(row["step"]) / ramp)) for row in rows]
    assert share == pytest.approx(factors[2:6:3]) and max(share) > 0
    for name in attachment.plan.names:
        for row in rows:
            mean, std, scale = (
                float(row[f"metaperturb/{name}/{what}"]) for what in ("multiplier_mean", "multiplier_std", "scale")
            )
            assert 0 < mean < 3 and 0 <= std < 2 and 0 < scale < 1
    assert not any(site._forward_pre_hooks for site in attachment.sites)


def test_the_logged_numbers_are_those_of_the_multiplier():
    from mp_lightning.site_metrics import SiteLog

    torch.manual_seed(0)
    model = build_backbone("conv4", 3, width=4, image_size=16)
    attachment = attach(model, sites=1, ramp_steps=0)
    images = torch.rand(4, 3, 16, 16)
    log = SiteLog(attachment, every=2)
    log.begin_batch()
    assert log.end_batch() == {}
    log.begin_batch()
    seen = {}
    for site in attachment.sites:
        site.register_forward_pre_hook(lambda site, args: seen.__setitem__(site, args[0].clone()))
    model(images)
    found = log.end_batch()
    assert found.pop("metaperturb/strength") == float(attachment.coeff)
    for site, x in seen.items():
        maps, norms = site.maps_and_norms(x)
        key = NoiseKey(attachment.seed, site.index * 4096, attachment.forwards)
        noise = key.draw(maps, attachment.perturbation.noise_per)
        multiplier = attachment.perturbation.multiplier(maps, noise, site.statistics, norms).expand_as(maps)
        assert found[f"metaperturb/{site.spec.name}/multiplier_mean"] == pytest.approx(float(multiplier.mean()))
        assert found[f"metaperturb/{site.spec.name}/multiplier_std"] == pytest.approx(float(multiplier.std()))
    assert len(found) == 3 * len(seen) == 12


SCRIPT = """
import sys
import lightning as L
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from mp_lightning import MetaPerturbCallback, attachment_of
from mp_lightning.backbones import build_backbone


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = build_backbone("resnet20", 3, width=4)
        self.first, self.losses = None, []

    def training_step(self, batch):
        logits = self.net(batch[0])
        self.first = logits.detach().clone() if self.first is None else self.first
        loss = cross_entropy(logits, batch[1])
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


if __name__ == "__main__":
    torch.manual_seed(0)
    images = torch.rand(1, 3, 16, 16).expand(32, -1, -1, -1)  # the same for both, so that only the noise differs
    data = DataLoader(TensorDataset(images, torch.arange(32) % 3), batch_size=4)
    module = Module()
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", devices=2, strategy="ddp",
        callbacks=[MetaPerturbCallback(sites=1, ramp_steps=0, full_strength_at=0.4)],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )
    trainer.fit(module, data)
    attachment = attachment_of(module)
    torch.save(
        {
            "steps": int(attachment.steps),
            "first": module.first,
            "losses": torch.stack(module.losses),
            "fitting": attachment.fitting.state(),
            "coeff": float(attachment.coeff),
            "weights": {name: value for name, value in module.net.named_parameters()},
            "buffers": attachment.estimates.buffers,
            "statistics": [dict(site.statistics) for site in attachment.sites],
        },
        f"{sys.argv[1]}/rank{trainer.global_rank}.pt",
    )
"""


def looked_back(losses):
    """Over ten batches."""
    recent = losses[0]
    for loss in losses[1:]:
        recent = recent + (loss - recent) / 10
    return float(recent)


@pytest.mark.slow
def test_ddp_on_two_processes(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, script, tmp_path], capture_output=True, text=True, timeout=240, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    zero, one = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert zero["steps"] == one["steps"] == 4
    assert not torch.equal(zero["first"], one["first"])  # noise of their own
    losses = (zero["losses"] + one["losses"]) / 2
    assert not torch.allclose(zero["losses"], losses)
    assert zero["fitting"]["recent"] == pytest.approx(looked_back(losses))
    assert str(zero["fitting"]) == str(one["fitting"]) and zero["coeff"] == one["coeff"]
    for part in ("weights", "buffers"):
        assert zero[part] and all(torch.equal(value, one[part][name]) for name, value in zero[part].items())
    assert all(value.isfinite().all() for site in zero["statistics"] for value in site.values())


def test_an_error_in_a_watched_batch_leaves_no_hook(tmp_path):
    class Fails(Module):
        def training_step(self, batch, batch_idx=0):
            loss = super().training_step(batch, batch_idx)
            if batch_idx == 1:
                raise ValueError("no")
            return loss

    module = Fails()
    trainer = trainer_with(
        tmp_path, [MetaPerturbCallback(sites=1, log_every=1, full_strength_at=1)], logger=CSVLogger(tmp_path)
    )
    with pytest.raises(ValueError, match="no"):
        trainer.fit(module)
    assert not any(site._forward_pre_hooks for site in attachment_of(module).sites)


def test_a_logger_draws_the_graph_of_the_network(tmp_path):
    class Drawn(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = build_backbone("conv4", 10, width=8, image_size=16)
            self.example_input_array = torch.zeros(2, 3, 16, 16)

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            return cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    x, y = digits()
    model = Drawn()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=TensorBoardLogger(tmp_path, log_graph=True),
        callbacks=[MetaPerturbCallback()],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of tracing
        trainer.fit(model, DataLoader(TensorDataset(x[:64], y[:64]), 16))
    assert int(attachment_of(model).steps) == int(attachment_of(model).forwards) == 4


def test_a_feature_extractor_is_refused_as_it_would_leave_the_perturbation_out():
    model = torchvision.models.resnet18(num_classes=10)
    attach(model, ramp_steps=0)
    with pytest.raises(SiteError, match=r"torch\.fx traces this network.*forward hooks"):
        create_feature_extractor(model.eval(), ["layer4"])
    assert model(torch.zeros(2, 3, 32, 32)).isfinite().all()


class Named(nn.Module):
    """Gives its activations what they take by keyword."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.relu, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Linear(8, 2)

    def forward(self, x):
        return self.fc(self.relu(input=self.norm(self.conv(x))).mean((2, 3)))


def test_an_activation_may_be_called_by_keyword():
    torch.manual_seed(0)
    model, x = Named(), torch.randn(4, 3, 8, 8)
    plain = model(x)
    attachment = attach(model, ramp_steps=0, full_strength_at=1.0)
    assert attachment.plan.names and not torch.allclose(model(x), plain)


@pytest.mark.parametrize("options", [{}, {"ramp_steps": 0, "full_strength_at": 1.0}])
def test_a_strength_that_does_not_move_needs_no_counting(options, recwarn):
    model = Named()
    attach(model, **options)
    for _ in range(201):
        model(torch.zeros(2, 3, 8, 8))
    assert not [warning for warning in recwarn if "no batch was counted" in str(warning.message)]


def test_a_module_with_the_mixin_whose_callback_is_hidden_is_told():
    class Hides(MetaPerturbMixin, L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Named()
            self.perturb()

        def configure_callbacks(self):
            return []

    model = Hides()
    with pytest.warns(UserWarning, match=r"no batch was counted.*super\(\)\.configure_callbacks"):
        for _ in range(200):
            model.net(torch.zeros(2, 3, 8, 8))


def test_training_that_nobody_counts_is_told(recwarn):
    model = Named()
    attachment = attach(model, total_steps=1000)
    for _ in range(150):
        model(torch.zeros(2, 3, 8, 8))
    attachment.step(1.0)
    for _ in range(199):
        model(torch.zeros(2, 3, 8, 8))
    assert not [warning for warning in recwarn if "no batch was counted" in str(warning.message)]
    with pytest.warns(UserWarning, match=r"no batch was counted.*strength stays at 0.*attachment\.step\(loss\)"):
        model(torch.zeros(2, 3, 8, 8))
