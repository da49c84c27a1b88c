"""The callback in a user's training."""

import copy
import logging

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, IterableDataset

from lightning_modules import Classifier, digits, loader, module, trainer
from mp_lightning import MetaPerturbCallback, attach, attachment_of, detach
from mp_lightning.backbones import build_backbone
from mp_lightning.compare.controls import FixedNoise
from mp_lightning.errors import ConfigurationError, PhiError, SiteError
from mp_lightning.inference import Fold, Mean, MonteCarlo, OutputAverage
from mp_lightning.perturbation import initial_phi, load_phi


class Watch(pl.Callback):
    """Notes the strength at each training batch, and the inference of each validation."""

    def __init__(self):
        self.coeff, self.inference = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.coeff.append(float(attachment_of(pl_module).coeff))

    def on_validation_batch_end(self, trainer, pl_module, *args):
        self.inference.append(attachment_of(pl_module).inference)


def messages(caplog):
    return [record.getMessage() for record in caplog.records if "MetaPerturb" in record.getMessage()]


def test_prints_one_line(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, [MetaPerturbCallback(sites=1)], max_epochs=5).fit(module(), loader(2), loader(1))
    (line,) = messages(caplog)
    assert "\n" not in line
    assert "4 sites" in line and str(load_phi()) in line
    assert (
        "grows to 0.00792 (less than 1% of 0.95, as the run is short) over the first 4 of 10 training batches" in line
    )


def test_fit_fit_validate_test_attach_once(tmp_path):
    model = module()
    callback = MetaPerturbCallback()
    trainer(tmp_path, [callback], max_epochs=1).fit(model, loader(2), loader(1))
    attachment = attachment_of(model)
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    again = trainer(tmp_path, [callback], max_epochs=1)
    again.fit(model, loader(2), loader(1))
    again.validate(model, loader(1), verbose=False)
    again.test(model, loader(1), verbose=False)
    again.predict(model, loader(1))
    assert sum(isinstance(m, type(attachment)) for m in model.modules()) == 1
    assert attachment_of(model) is attachment  # and it stays
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert int(attachment.forwards) == 4 == int(attachment.steps)


def test_detach_after_fit_leaves_a_plain_module(tmp_path):
    model = module()
    names = sorted(vars(module()))
    run = trainer(tmp_path, [MetaPerturbCallback(full_strength_at=1)], max_epochs=1)
    run.fit(model, loader(2), loader(1))
    assert "on_save_checkpoint" in vars(model) and float(attachment_of(model).coeff) > 0.9
    detach(model)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert not {"on_save_checkpoint", "on_load_checkpoint", "log", "_metaperturb"} & (set(vars(model)) - set(names))
    assert list(model.state_dict()) == list(module().state_dict())
    plain = module()
    plain.load_state_dict(model.state_dict())
    x = digits()[0][:8]
    assert torch.equal(model.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("inference", ["mean", "mc"])
def test_evaluation_is_repeatable(tmp_path, inference):
    model = module()
    run = trainer(tmp_path, [MetaPerturbCallback(inference=inference, samples=3, full_strength_at=1)])
    run.fit(model, loader(4, shuffle=True), loader(2))
    first = run.test(model, loader(2, start=400), verbose=False)
    assert first == run.test(model, loader(2, start=400), verbose=False)
    predictions = run.predict(model, loader(2, start=400))
    loss = F.cross_entropy(torch.cat(predictions), digits()[1][400:432])
    assert float(loss) == pytest.approx(first[0]["test_loss"], rel=1e-5)
    expected = Mean if inference == "mean" else MonteCarlo
    assert type(attachment_of(model).inference) is expected


def test_validation_in_fit_and_sanity_check(tmp_path):
    watch = Watch()
    model = module()
    run = trainer(tmp_path, [MetaPerturbCallback(fit_samples=3, full_strength_at=1), watch], num_sanity_val_steps=1)
    run.fit(model, loader(4), loader(2))
    assert len(watch.inference) == 1 + 2 * 2
    assert {type(i) for i in watch.inference} == {OutputAverage}
    assert watch.inference[0].samples == 3 and watch.inference[0].calls == 1
    # The sanity check counts no training forward and records nothing.
    assert int(attachment_of(model).forwards) == 8


def test_sanity_check_changes_nothing(tmp_path):
    results = []
    for steps in (0, 2):
        model = module()
        callback = MetaPerturbCallback(full_strength_at=1)
        trainer(tmp_path, [callback], num_sanity_val_steps=steps).fit(model, loader(4), loader(2))
        results.append({**model.state_dict(), **dict(attachment_of(model).sites.named_buffers())})
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def test_fast_dev_run(tmp_path):
    model = module()
    run = trainer(tmp_path, [MetaPerturbCallback()], fast_dev_run=True)
    run.fit(model, loader(4), loader(2))
    assert int(attachment_of(model).steps) == 1
    run.test(model, loader(2), verbose=False)


@pytest.mark.parametrize(
    ("options", "batches", "ramp"),
    [
        ({"max_epochs": 5}, 10, 4),
        ({"max_epochs": -1, "max_steps": 5}, 5, 2),
        ({"max_epochs": 50, "max_steps": 5}, 5, 2),
        ({"max_epochs": 5, "max_steps": 100}, 10, 4),
        ({"max_epochs": -1, "max_steps": 5, "accumulate_grad_batches": 2}, 10, 4),
        ({"max_epochs": 5, "accumulate_grad_batches": 2}, 10, 4),
        ({"max_epochs": 10, "limit_train_batches": 1}, 10, 4),
    ],
)
def test_ramp_over_40_percent_of_the_batches(tmp_path, options, batches, ramp):
    watch = Watch()
    trainer(tmp_path, [MetaPerturbCallback(strength=1, full_strength_at=1), watch], **options).fit(module(), loader(2))
    assert watch.coeff == pytest.approx([min(1, batch / ramp) for batch in range(batches)])


class Endless(IterableDataset):
    """Data without a length."""

    def __init__(self, batches=3):
        self.batches = batches

    def __iter__(self):
        x, y = digits()
        return iter([(x[i : i + 8], y[i : i + 8]) for i in range(self.batches)])


@pytest.mark.parametrize("options", [{"max_epochs": 1}, {"max_epochs": -1, "max_time": "00:00:00:10"}])
def test_without_a_horizon_ramp_steps_is_asked_for(tmp_path, options):
    data = DataLoader(Endless(), batch_size=None)
    with pytest.raises(ConfigurationError, match="ramp_steps="):
        trainer(tmp_path, [MetaPerturbCallback()], **options).fit(module(), data)
    if options == {"max_epochs": 1}:
        watch = Watch()
        trainer(tmp_path, [MetaPerturbCallback(ramp_steps=2, strength=1, full_strength_at=1), watch], **options).fit(
            module(), data
        )
        assert watch.coeff == [0, 0.5, 1]


def test_max_time_alone_with_data_of_known_length(tmp_path):
    with pytest.raises(ConfigurationError, match="max_time"):
        options = {"max_epochs": -1, "max_time": "00:00:00:10"}
        trainer(tmp_path, [MetaPerturbCallback()], **options).fit(module(), loader(2))


def test_max_steps_gives_endless_data_a_horizon(tmp_path):
    watch = Watch()
    data = DataLoader(Endless(5), batch_size=None)
    trainer(tmp_path, [MetaPerturbCallback(strength=1, full_strength_at=1), watch], max_epochs=-1, max_steps=5).fit(
        module(), data
    )
    assert watch.coeff == [0, 0.5, 1, 1, 1]


def test_phi_is_frozen(tmp_path):
    model = module()
    run = trainer(tmp_path, [MetaPerturbCallback(full_strength_at=1)])
    run.fit(model, loader(4))
    attachment = attachment_of(model)
    held = {id(p) for o in run.optimizers for group in o.param_groups for p in group["params"]}
    assert held == {id(p) for p in module().parameters()} or held == {id(p) for p in model.net.parameters()}
    assert not held & {id(value) for value in attachment.buffers()}
    for value, original in zip(attachment.perturbation.phi, load_phi().phi, strict=True):
        assert torch.equal(value, original)
    assert not torch.equal(model.net.fc.weight, module().net.fc.weight)


@pytest.mark.parametrize(("everything", "given", "used"), [("7", None, 7), ("7", 3, 3), (None, None, 0)])
def test_the_noise_has_the_seed_of_everything_unless_it_is_given_one(tmp_path, monkeypatch, everything, given, used):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    if everything is not None:
        monkeypatch.setenv("PL_GLOBAL_SEED", everything)  # where seed_everything leaves it
    model = module()
    trainer(tmp_path, [MetaPerturbCallback(seed=given)], max_epochs=1).fit(model, loader(1))
    assert attachment_of(model).seed == used


def test_a_run_follows_from_its_seed(tmp_path):
    weights = []
    for seed in (0, 0, 1):
        model = module()
        trainer(tmp_path, [MetaPerturbCallback(seed=seed, full_strength_at=1)]).fit(model, loader(4))
        weights.append(model.net.fc.weight.detach())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_training_draws_nothing_from_the_global_generator(tmp_path):
    """Dropout drops the same with and without the callback, whose own noise is at strength zero here."""
    weights = []
    for callbacks in ([], [MetaPerturbCallback(ramp_steps=10**9, clip=None)]):
        model = module(dropout=0.2)
        torch.manual_seed(1)
        trainer(tmp_path, callbacks, max_epochs=1).fit(model, loader(4, shuffle=True))
        weights.append(model.net.fc.weight.detach())
    assert torch.allclose(*weights, atol=1e-5)


def under_the_other_name():
    """Lightning as ``pytorch_lightning``, and a module of it."""
    pytorch_lightning = pytest.importorskip("pytorch_lightning")

    class Other(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = build_backbone("conv4", 10, width=8, image_size=16)

        def forward(self, x):
            return self.net(x)

        training_step, _evaluate = Classifier.training_step, Classifier._evaluate
        validation_step, test_step = Classifier.validation_step, Classifier.test_step
        configure_optimizers = Classifier.configure_optimizers

    return pytorch_lightning, Other


def test_pytorch_lightning_trainer(tmp_path):
    pytorch_lightning, Other = under_the_other_name()
    model = module(Other)
    watch = Watch()
    run = trainer(tmp_path, [MetaPerturbCallback(full_strength_at=1), watch], cls=pytorch_lightning.Trainer)
    run.fit(model, loader(4), loader(2))
    assert int(attachment_of(model).forwards) == 8 and len(watch.coeff) == 8
    assert attachment_of(model).estimates.buffers
    assert run.test(model, loader(2), verbose=False) == run.test(model, loader(2), verbose=False)
    run.save_checkpoint(tmp_path / "other.ckpt")
    restored = MetaPerturbCallback.restore(module(Other, seed=1), tmp_path / "other.ckpt")
    x = digits()[0][:8]
    assert torch.equal(restored(x), model.eval()(x))


@pytest.mark.parametrize("owner", ["module", "datamodule", "datasets"])
def test_training_data_of_pytorch_lightning_are_found_without_a_fit(tmp_path, owner):
    pytorch_lightning, Other = under_the_other_name()

    class Data(pytorch_lightning.LightningDataModule):
        def train_dataloader(self):
            return loader(4)

        def test_dataloader(self):
            return loader(2)

    class WithData(Other):
        train_dataloader, test_dataloader = Data.train_dataloader, Data.test_dataloader

    kind, data = (WithData, None) if owner == "module" else (Other, Data())
    if owner == "datasets":
        data = pytorch_lightning.LightningDataModule.from_datasets(loader(4).dataset, test_dataset=loader(2).dataset)
    model = module(kind)
    options = {"cls": pytorch_lightning.Trainer, "max_epochs": 1}
    run = trainer(tmp_path, [MetaPerturbCallback(full_strength_at=1)], **options)
    run.fit(model, loader(4))
    attachment_of(model).estimates = None  # as of a checkpoint from within the training
    run.save_checkpoint(tmp_path / "within.ckpt")
    restored = MetaPerturbCallback.restore(module(kind), tmp_path / "within.ckpt")
    trainer(tmp_path, [MetaPerturbCallback()], **options).test(restored, datamodule=data, verbose=False)
    assert attachment_of(restored).estimates.buffers


def test_evaluation_without_training_is_plain(tmp_path, recwarn):
    model = module()
    attributes = sorted(vars(model))
    plain = trainer(tmp_path).test(module(), loader(2), verbose=False)
    assert trainer(tmp_path, [MetaPerturbCallback()]).test(model, loader(2), verbose=False) == plain
    assert attachment_of(model) is None
    assert any("never trained with MetaPerturb" in str(w.message) for w in recwarn)
    assert "on_save_checkpoint" in attributes or "on_save_checkpoint" not in vars(model)


def test_a_model_that_is_attached_with_another_phi_is_refused(tmp_path):
    model = module()
    attach(model, initial_phi(0))
    with pytest.raises(ConfigurationError, match="attached already"):
        trainer(tmp_path, [MetaPerturbCallback(initial_phi(1))]).fit(model, loader(2))
    trainer(tmp_path, [MetaPerturbCallback()], max_epochs=1).fit(model, loader(2))  # whatever it is
    assert torch.equal(attachment_of(model).perturbation.op1_all, initial_phi(0).op1_all)


class Late(Classifier):
    """Makes its layers where large models are made."""

    def __init__(self):
        pl.LightningModule.__init__(self)
        self.net, self.dropout = None, 0.0

    def configure_model(self):
        if self.net is None:
            self.net = build_backbone("conv4", 10, width=8, image_size=16)


def test_a_model_made_in_configure_model(tmp_path):
    model = Late()
    run = trainer(tmp_path, [MetaPerturbCallback(full_strength_at=1)])
    run.fit(model, loader(2), loader(1))
    assert int(attachment_of(model).forwards) == 4
    assert "configure_model" not in vars(model)
    run.fit_loop.max_epochs = 4
    run.fit(model, loader(2), loader(1))
    assert int(attachment_of(model).forwards) == 8


@pytest.mark.parametrize("path", ["auto", "reference"])
def test_a_model_made_in_sixteen_bits_has_statistics_in_float32(tmp_path, path):
    """They are made while torch's default dtype is another; compiled code reads them as float32."""
    model = Late()
    trainer(tmp_path, [MetaPerturbCallback(path=path, full_strength_at=1)], precision="bf16-true").fit(model, loader(4))
    attachment = attachment_of(model)
    assert next(model.net.parameters()).dtype == torch.bfloat16
    assert {value.dtype for value in attachment.buffers() if value.is_floating_point()} == {torch.float32}
    assert all(value.isfinite().all() for site in attachment.sites for value in site.statistics.values())
    assert float(attachment.strength) == pytest.approx(0.95)


def test_a_model_without_sites_is_refused(tmp_path):
    class Linear(Classifier):
        def __init__(self):
            pl.LightningModule.__init__(self)
            self.dropout = 0.0
            self.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 256, 10))

    with pytest.raises(SiteError, match="no site"):
        trainer(tmp_path, [MetaPerturbCallback()]).fit(Linear(), loader(1))


@pytest.mark.parametrize(
    ("options", "error", "culprit"),
    [
        ({"phi": "absent.safetensors"}, PhiError, "absent.safetensors"),
        ({"inference": "median"}, ConfigurationError, "median"),
        ({"samples": 0}, ConfigurationError, "samples=0"),
        ({"fit_samples": -1}, ConfigurationError, "^fit_samples=-1"),
        ({"output": "scores"}, ConfigurationError, "scores"),
        ({"ramp_steps": -1}, ConfigurationError, "ramp_steps=-1"),
        ({"full_strength_at": 0}, ConfigurationError, "full_strength_at=0 cannot be used"),
        ({"strength": 1.5}, ConfigurationError, "strength=1.5 cannot be used; give a number above 0 and at most 1"),
    ],
)
def test_bad_options_are_refused_at_once(options, error, culprit):
    with pytest.raises(error, match=culprit):
        MetaPerturbCallback(**options)


def test_an_interrupted_training_leaves_a_model_that_can_be_evaluated(tmp_path):
    class Interrupted(Classifier):
        def training_step(self, batch, batch_idx):
            if batch_idx == 1:
                handle = self.net.conv_layers[1].register_forward_pre_hook(self.stop)
                try:
                    self(batch[0])
                finally:
                    handle.remove()
            return super().training_step(batch, batch_idx)

        def stop(self, module, args):
            raise KeyboardInterrupt

    model = module(Interrupted)
    run = trainer(tmp_path, [MetaPerturbCallback(full_strength_at=1)])
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        run.fit(model, loader(4))
    x = digits()[0][:8]
    model.eval()
    with torch.no_grad(), pytest.warns(UserWarning, match="20 noisy forwards are averaged"):
        model(x)
    assert int(attachment_of(model).evaluations) == 20


@pytest.mark.parametrize("inference", ["mean", "mc"])
def test_an_interrupted_evaluation_leaves_a_model_that_can_be_trained(tmp_path, inference):
    model = module()
    run = trainer(tmp_path, [MetaPerturbCallback(strength=1, full_strength_at=1, inference=inference)])
    run.fit(model, loader(4))
    own = {name: value.clone() for name, value in model.net.named_buffers() if "running" in name}

    def stop(*_):
        raise KeyboardInterrupt

    handle = model.net.conv_layers[1].register_forward_pre_hook(stop)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        run.test(model, loader(1), verbose=False)
    handle.remove()
    assert all(torch.equal(value, own[name]) for name, value in model.net.named_buffers() if "running" in name)
    attachment, x = attachment_of(model), digits()[0][:8]
    attachment.inference = None
    assert attachment.depth == 0
    for training in (True, False):
        model.train(training)
        assert not torch.equal(model(x), model(x)), "noise is drawn"


def test_many_statistics_survive_a_second_fit(tmp_path):
    """A second fit goes on where the first ended: the noise does not start anew, the strength neither."""
    model = module()
    callback, watch = MetaPerturbCallback(strength=1, full_strength_at=1), Watch()
    trainer(tmp_path, [callback], max_epochs=1).fit(model, loader(4))
    before = copy.deepcopy(attachment_of(model).sites.state_dict())
    first = {name: value.clone() for name, value in attachment_of(model).sites.named_buffers()}
    trainer(tmp_path, [callback, watch], max_epochs=1).fit(model, loader(4))
    assert before == {} or before.keys() == attachment_of(model).sites.state_dict().keys()
    assert watch.coeff[0] == 1 and int(attachment_of(model).forwards) == 8
    for name, value in attachment_of(model).sites.named_buffers():
        assert not torch.equal(value, first[name])


@pytest.mark.slow
def test_a_strategy_that_trains_a_copy_says_so(tmp_path, capfd):
    """Under ddp_spawn only the weights come back to this process, and they need the perturbation."""
    model = module()
    run = trainer(tmp_path, [MetaPerturbCallback()], strategy="ddp_spawn", max_epochs=1)
    run.fit(model, loader(2))
    assert "MetaPerturbCallback.restore" in capfd.readouterr().err
    assert attachment_of(model) is None


@pytest.mark.parametrize(
    ("strength", "first", "second"),
    [
        (1, "strength grows over the first 3 of 8 training batches", "at full strength from"),
        (0.25, "strength grows to 0.25 over the first 3 of 8", "at strength 0.25 from"),
    ],
)
def test_a_fit_says_how_its_strength_begins(tmp_path, caplog, strength, first, second):
    model = module()
    for expected in (first, second):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            trainer(tmp_path, [MetaPerturbCallback(strength=strength, full_strength_at=1)]).fit(model, loader(4))
        assert expected in caplog.text


def test_the_strength_follows_the_training_loss_whatever_lightning_divides_it_by(tmp_path):
    class Noted(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            losses.append(float(loss.detach()))
            return loss

    for accumulated in (1, 2):
        losses = []
        model = module(Noted)
        callback = MetaPerturbCallback(initial_phi(0), full_strength_at=0.5, ramp_steps=0)
        trainer(tmp_path, [callback], max_epochs=4, accumulate_grad_batches=accumulated).fit(model, loader(8))
        attachment = attachment_of(model)
        assert float(attachment.fitting.first) == pytest.approx(sum(losses[:5]) / 5)
        factor = (1 - attachment.fitting.recent / attachment.fitting.first) / 0.5
        assert 0 < float(factor) < 1 and float(attachment.coeff) == pytest.approx(float(factor))


@pytest.mark.parametrize(
    ("lr", "ramp", "epochs", "warns"), [(0, 10, 6, True), (0.05, 10, 6, False), (0, 25, 6, False), (0, 4, 3, False)]
)
def test_a_strength_that_stayed_low_says_why(tmp_path, recwarn, lr, ramp, epochs, warns):
    """It says so after the ramp and 20 batches alone: a run that ends before cannot tell."""

    class Learner(Classifier):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=lr)

    model = module(Learner)
    callback = MetaPerturbCallback(initial_phi(0), full_strength_at=0.5, ramp_steps=ramp)
    trainer(tmp_path, [callback], max_epochs=epochs).fit(model, loader(4))
    said = [str(one.message) for one in recwarn if "of its first value" in str(one.message)]
    assert (float(attachment_of(model).fitting.factor()) > 0.1) == (lr > 0)
    assert len(said) == warns
    assert not warns or "where the loss started low, choose full_strength_at=1" in said[0]


@pytest.mark.parametrize(("accumulated", "reached"), [(1, 8 / 1200), (3, 4 / 1200)])
def test_how_short_a_run_is_counts_in_steps_of_the_optimizer(tmp_path, accumulated, reached):
    """Of which the last batches of an epoch make one of their own."""
    model = module()
    for fits in (1, 2):  # the second one goes on
        trainer(tmp_path, [MetaPerturbCallback()], accumulate_grad_batches=accumulated).fit(model, loader(4))
        assert attachment_of(model).ramp_steps == 3
        assert attachment_of(model).reached == pytest.approx(fits * reached)


def test_a_step_that_tells_no_loss_is_told_how(tmp_path, recwarn):
    class ByHand(Classifier):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss)
            self.optimizers().step()
            return loss if tells else None

    for tells in (True, False):
        recwarn.clear()
        model = module(ByHand)
        trainer(tmp_path, [MetaPerturbCallback(initial_phi(0), full_strength_at=0.5, ramp_steps=3)]).fit(
            model, loader(4)
        )
        said = [
            one for one in recwarn if "returning it from a training_step that optimizes by hand" in str(one.message)
        ]
        assert len(said) == (0 if tells else 1)
        assert (float(attachment_of(model).coeff) == 1) != tells


@pytest.mark.parametrize(
    "options",
    [
        {"samples": 2.5},
        {"fit_samples": 0},
        {"ramp_steps": "x"},
        {"ramp_steps": -1},
        {"acts_below": 0.5, "full_strength_at": 0.7},
    ],
)
def test_bad_numbers_are_named_at_once(options):
    with pytest.raises(ConfigurationError, match=next(iter(options)).removeprefix("fit_")):
        MetaPerturbCallback(**options)


def test_another_perturbation_takes_the_place_of_phi(tmp_path, caplog):
    model, noise = module(), FixedNoise()
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, [MetaPerturbCallback(perturbation=noise)], max_epochs=1).fit(model, loader(2))
    assert "perturbation fixed_noise" in messages(caplog)[0]
    attachment = attachment_of(model)
    assert attachment.perturbation is noise and attachment.phi_name == "fixed_noise"
    with pytest.raises(ConfigurationError, match="phi= and perturbation= are both given"):
        MetaPerturbCallback(initial_phi(0), perturbation=noise)


def test_inference_can_be_switched_before_the_trainer_lets_go(tmp_path):
    found = []

    class Switching(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            x = digits()[0][:8]
            pl_module.eval()
            for inference in ("mc", "mean", "fold"):
                callback.switch_inference(trainer, pl_module, inference)
                attachment = attachment_of(pl_module)
                with torch.no_grad():
                    found.append((type(attachment.inference), attachment.estimates is not None, pl_module(x)))

    callback = MetaPerturbCallback(inference="mc", samples=2, full_strength_at=1)
    trainer(tmp_path, [callback, Switching()], max_epochs=1).fit(module(), loader(2))
    kinds, ready, outputs = zip(*found, strict=True)
    assert kinds == (MonteCarlo, Mean, Fold) and ready == (False, True, True)
    assert not torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[1], outputs[2])
