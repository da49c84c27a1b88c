"""Inference by expectation, and batch norm re-estimated for it."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_modules import Classifier, digits, loader, module, trainer
from mp_lightning import Mean, MetaPerturbCallback, MonteCarlo, attach, attachment_of, reestimate_batch_norm
from mp_lightning.backbones import build_backbone
from mp_lightning.errors import ConfigurationError
from mp_lightning.reestimation_steps import reestimate
from mp_lightning.sites.estimates import Estimates

attach = partial(attach, sites=1)  # at all sites, whatever the default phi comes with


def attached(name="conv4"):
    torch.manual_seed(0)
    model = build_backbone(name, 10, width=8, image_size=16)
    attachment = attach(model)
    with torch.no_grad():
        for x in batches():
            model(x)
    return model, attachment


def batches(count=3):
    return [digits()[0][i * 16 : (i + 1) * 16] for i in range(count)]


def forwards(model, xs):
    return [lambda x=x: model(x) for x in xs]


def snapshot(model):
    return {name: value.clone() for name, value in [*model.state_dict().items(), *model.named_buffers()]}


def same(before, model):
    after = snapshot(model)
    assert before.keys() == after.keys()
    return [name for name in before if not torch.equal(before[name], after[name]) and not name.endswith("evaluations")]


def test_uses_the_expected_noise_at_each_site():
    model, attachment = attached()
    attachment.inference = Mean()
    attachment.estimates = Estimates({})
    attachment.path = "reference"  # whose steps can be watched
    model.eval()
    given = []
    multiplier = attachment.perturbation.multiplier
    attachment.perturbation.multiplier = lambda x, eps, *rest: (given.append(eps), multiplier(x, eps, *rest))[1]
    x = batches()[0]
    assert torch.equal(model(x), model(x))
    assert given == [None] * 8
    attachment.inference = None
    assert not torch.equal(model(x), model(x))


def test_is_near_the_average_of_many_samples():
    """At one site, without anything after it that bends the mean."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()).eval()
    attachment = attach(model)
    seen = []
    attachment.sites[0].register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        for _ in range(600):
            model(x)
        samples = torch.stack(seen)
        attachment.inference = Mean()
        attachment.estimates = Estimates({})
        model(x)
    error = (samples.mean(0) - seen[-1]).abs()
    assert (error <= 6 * samples.std(0) / 600**0.5 + 1e-4).all()


@pytest.mark.parametrize("name", ["conv4", "resnet20"])
def test_reestimated_batch_norm_is_the_average_over_batches(name):
    model, attachment = attached(name)
    xs = batches()
    # By hand: the means and unbiased variances that each batch norm sees, when all others use the batch as well.
    reference = copy.deepcopy(model)
    seen = {}

    def see(key):
        def hook(module, args):
            x = args[0].detach()
            var, mean = torch.var_mean(x, (0, 2, 3))
            seen.setdefault(key, []).append((mean, var))

        return hook

    norms = {key: m for key, m in reference.named_modules() if isinstance(m, nn.BatchNorm2d)}
    reference.eval()
    for key, norm in norms.items():
        norm.train()
        norm.register_forward_pre_hook(see(key))
    attachment_of(reference).sampling = False
    with torch.no_grad():
        for x in xs:
            reference(x)

    before, state = snapshot(model), torch.random.get_rng_state()
    modes = [m.training for m in model.modules()]
    reestimate_batch_norm(attachment, forwards(model, xs))
    assert same(before, model) == []
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    assert attachment.sampling and attachment.inference is None
    assert set(attachment.estimates.buffers) == {
        f"{key}.{leaf}" for key in norms for leaf in ("running_mean", "running_var")
    }
    for key, moments in seen.items():
        for leaf, values in zip(("running_mean", "running_var"), zip(*moments, strict=True), strict=True):
            expected = torch.stack(values).mean(0)
            assert torch.allclose(attachment.estimates.buffers[f"{key}.{leaf}"], expected, rtol=1e-4, atol=1e-5), key
    # And they are what evaluation uses, and only evaluation.
    attachment.inference = Mean()
    substituted = copy.deepcopy(reference).eval()
    substituted.load_state_dict({**model.state_dict(), **attachment.estimates.buffers})
    with torch.no_grad():
        assert torch.allclose(model.eval()(xs[0]), substituted(xs[0]), atol=1e-5)
        plain = copy.deepcopy(model)
        attachment_of(plain).estimates = None
        assert not torch.allclose(model(xs[0]), plain(xs[0]), atol=1e-3)
    assert same(before, model) == []


def test_what_was_estimated_can_be_saved_while_a_forward_runs():
    model, attachment = attached()
    reestimate_batch_norm(attachment, forwards(model, batches()))
    attachment.inference = Mean()
    before, found = copy.deepcopy(attachment.state()["evaluation_buffers"]), []
    model.fc.register_forward_hook(lambda *_: found.append(copy.deepcopy(attachment.state()["evaluation_buffers"])))
    model.eval()(batches()[0])
    assert before and before.keys() == found[0].keys()
    assert all(torch.equal(value, found[0][name]) for name, value in before.items())


def test_buffers_come_back_when_a_forward_raises():
    model, attachment = attached()
    reestimate_batch_norm(attachment, forwards(model, batches()))
    attachment.inference = Mean()
    model.eval()
    x = batches()[0]
    with torch.no_grad():
        expected = model(x)
    before = snapshot(model)

    def fail(module, args):
        raise ValueError("on purpose")

    for where in (model.conv_layers[2].bn, model):
        handle = where.register_forward_pre_hook(fail)
        with pytest.raises(ValueError, match="on purpose"):
            model(x)
        handle.remove()
        assert same(before, model) == []
    with torch.no_grad():
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_buffers_come_back_after_an_interrupt(kind):
    model, attachment = attached()
    reestimate_batch_norm(attachment, forwards(model, batches()))
    attachment.inference = Mean()
    model.eval()
    before = snapshot(model)

    def interrupt(module, args):
        raise kind

    handle = model.conv_layers[2].bn.register_forward_pre_hook(interrupt)
    with pytest.raises(kind):
        model(batches()[0])
    handle.remove()
    attachment.settle()
    assert same(before, model) == []


def test_a_model_that_changes_precision_takes_its_copies_along():
    model, attachment = attached()
    reestimate_batch_norm(attachment, forwards(model, batches()))
    attachment.inference = Mean()
    model.double().eval()
    with torch.no_grad():
        out = model(batches()[0].double())
    assert out.dtype == torch.float64 and out.isfinite().all()
    assert model.conv_layers[0].bn.running_mean.dtype == torch.float64


@pytest.mark.parametrize("raises", [False, True])
def test_the_momentum_of_batch_norm_comes_back(raises):
    model, attachment = attached()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    norms[1].momentum = 0.25
    before, seen = [norm.momentum for norm in norms], []

    def step():
        seen.extend(norm.momentum for norm in norms)
        if raises:
            raise ValueError("on purpose")
        model(batches(1)[0])

    if raises:
        with pytest.raises(ValueError, match="on purpose"):
            reestimate_batch_norm(attachment, [step])
    else:
        reestimate_batch_norm(attachment, [step])
    assert seen == [None] * 4
    assert [norm.momentum for norm in norms] == before


def test_what_a_step_freezes_and_thaws_comes_back():
    model, attachment = attached()
    model.fc.bias.requires_grad_(False)
    before = [parameter.requires_grad for parameter in model.parameters()]

    def step():
        for parameter in model.parameters():
            parameter.requires_grad_(not parameter.requires_grad)
        model(batches(1)[0])

    reestimate_batch_norm(attachment, [step])
    assert [parameter.requires_grad for parameter in model.parameters()] == before


def test_what_is_estimated_in_inference_mode_serves_outside_of_it():
    model, attachment = attached()
    with torch.inference_mode():
        reestimate_batch_norm(attachment, forwards(model, batches()))
    assert not any(value.is_inference() for value in [*attachment.estimates.buffers.values(), *model.buffers()])
    attachment.inference = Mean()
    model.eval()(batches()[0]).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_batch_norm_whose_weight_is_frozen_before_any_training_is_not_reestimated():
    model = build_backbone("conv4", 10, width=8, image_size=16)
    attachment = attach(model)
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    frozen = next(iter(norms))
    norms[frozen].weight.requires_grad_(False)
    reestimate_batch_norm(attachment, forwards(model, batches()))
    assert {name.rpartition(".")[0] for name in attachment.estimates.buffers} == norms.keys() - {frozen}


@pytest.mark.parametrize("inference", [Mean(), MonteCarlo(2)])
def test_a_forward_leaves_it_as_it_was_whether_noise_is_drawn(inference):
    model, attachment = attached()
    reestimate_batch_norm(attachment, forwards(model, batches()))
    attachment.inference, attachment.sampling = inference, False
    model.eval()(batches()[0])
    assert attachment.sampling is False and inference.calls == 1


@pytest.mark.parametrize("functions", [[], [lambda: None]])
def test_without_a_forward_it_is_refused_and_nothing_changes(functions):
    model, attachment = attached()
    before = snapshot(model)
    with pytest.raises(ConfigurationError, match="inference='mc'"):
        reestimate_batch_norm(attachment, functions)
    assert same(before, model) == []
    assert attachment.estimates is None  # and not 'none needed'


def test_an_error_in_a_training_step_is_the_one_that_is_seen():
    model, attachment = attached()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"expected input\[16, 5, 16, 16\] to have 3 channels"):
        reestimate_batch_norm(attachment, [lambda: model(torch.zeros(16, 5, 16, 16))])
    assert same(before, model) == [] and attachment.depth == 0


@pytest.mark.parametrize("fold", [False, True])
def test_a_batch_that_is_not_finite_is_passed_over(fold):
    model, attachment = attached()
    good, bad = batches()[:2], batches()[0] * float("inf")
    reestimate_batch_norm(attachment, forwards(model, good), fold=fold)
    expected = {**attachment.estimates.buffers, **(attachment.estimates.constants or {})}
    with pytest.warns(UserWarning, match="1 of 3 batches gave numbers that are not finite"):
        reestimate_batch_norm(attachment, forwards(model, [good[0], bad, good[1]]), fold=fold)
    found = {**attachment.estimates.buffers, **(attachment.estimates.constants or {})}
    assert found.keys() == expected.keys() and len(found) > 0
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_a_model_without_batch_norm_needs_none():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU())
    attachment = attach(model)
    reestimate_batch_norm(attachment, [])
    assert attachment.estimates.buffers == {}


def test_at_most_fifty_batches():
    model, attachment = attached()
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield lambda: model(batches(1)[0])

    reestimate_batch_norm(attachment, endless())
    assert len(taken) == 50


class Busy(Classifier):
    """Does much around its forward: metrics, logging, and several batches in one."""

    def __init__(self):
        super().__init__()
        self.seen = torchmetrics.SumMetric()
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(10)
        self.steps = 0

    def training_step(self, batch, batch_idx):
        self.steps += self.trainer.training and batch_idx == 0
        self.seen.update(len(batch[0]))
        self.log("before", float(batch_idx))
        self.log_dict({"other": 1.0})
        optimizer = self.optimizers()
        self.toggle_optimizer(optimizer)
        optimizer.zero_grad()
        noise = torch.randn(3)
        logits = self(batch[0] + 1e-3 * noise.view(1, 3, 1, 1))
        self.untoggle_optimizer(optimizer)
        self.accuracy(logits, batch[1])
        self.log("after", self.accuracy)
        return F.cross_entropy(logits, batch[1])


class Probe(MetaPerturbCallback):
    """Compares everything before and after re-estimation."""

    def on_train_end(self, trainer, pl_module):
        seen, accuracy = pl_module.seen, pl_module.accuracy

        def state():
            return {
                **{f"model.{k}": v for k, v in snapshot(pl_module).items() if not k.endswith("evaluations")},
                "rng": torch.random.get_rng_state(),
                "metrics": torch.stack([seen.sum_value, accuracy.tp.sum(), accuracy.fn.sum()]),
                "updates": torch.tensor([seen._update_count, accuracy._update_count]),
                "logged": torch.stack([torch.as_tensor(v) for _, v in sorted(trainer.callback_metrics.items())]),
                "gradients": torch.cat([p.grad.flatten() for p in pl_module.parameters()]),
                "requires": torch.tensor([p.requires_grad for p in pl_module.parameters()]),
                "loader": trainer.train_dataloader.generator.get_state(),
            }

        pl_module.log_attribute = "log" in vars(pl_module)
        for index, p in enumerate(pl_module.parameters()):
            p.grad = torch.full_like(p, float(index))
        before = state()
        optimizer = copy.deepcopy(trainer.optimizers[0].state_dict())
        super().on_train_end(trainer, pl_module)
        after = state()
        assert before.keys() == after.keys()
        self.differences = [key for key in before if not torch.equal(before[key], after[key])]
        self.same_optimizer = all(
            torch.equal(value, optimizer["state"][k][name])
            for k, entry in trainer.optimizers[0].state_dict()["state"].items()
            for name, value in entry.items()
        )
        assert ("log" in vars(pl_module)) is pl_module.log_attribute


def test_reestimation_disturbs_nothing_in_a_training_step(tmp_path):
    probe = Probe()
    x, y = digits()
    data = DataLoader(
        TensorDataset(x[:64], y[:64]), batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(0)
    )
    model = module(Busy)
    run = trainer(tmp_path, [probe])
    run.fit(model, data, loader(2))
    assert probe.differences == []
    assert probe.same_optimizer
    buffers = attachment_of(model).estimates.buffers
    assert len(buffers) == 8 and all(value.isfinite().all() for value in buffers.values())
    state = torch.random.get_rng_state()
    reestimate(run, model, attachment_of(model), "mean")
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("mode", ["max_size_cycle", "min_size", "max_size"])
def test_several_loaders_are_read_as_in_training(tmp_path, mode):
    class Several(Classifier):
        def training_step(self, batch, batch_idx):
            parts = [part for part in batch.values() if part is not None]
            assert len(parts) == (1 if mode == "max_size" and batch_idx == 2 else 2)
            return F.cross_entropy(self(torch.cat([x for x, _ in parts])), torch.cat([y for _, y in parts]))

    model = module(Several)
    data = CombinedLoader({"a": loader(2), "b": loader(3, start=100)}, mode)
    trainer(tmp_path, [MetaPerturbCallback(full_strength_at=1)], max_epochs=1).fit(model, data)
    assert len(attachment_of(model).estimates.buffers) == 8


def test_a_training_step_without_the_model_does_not_lose_the_training(tmp_path):
    class ByLayers(Classifier):
        def training_step(self, batch, batch_idx):
            x = batch[0]
            for layer in self.net.conv_layers:
                x = layer(x)
            return F.cross_entropy(self.net.fc(x.flatten(1)), batch[1])

    run = trainer(tmp_path, [MetaPerturbCallback(input_size=16, full_strength_at=1)])
    model = module(ByLayers)
    with pytest.warns(UserWarning, match=r"no training step called the model.*self\.net"):
        run.fit(model, loader(2))
    assert attachment_of(model).estimates is None


def test_evaluation_without_training_data_says_so(tmp_path, recwarn):
    model = module()
    run = trainer(tmp_path, [MetaPerturbCallback(full_strength_at=1)])
    run.fit(model, loader(2))
    attachment_of(model).estimates = None  # as after a checkpoint from within fit
    fresh = trainer(tmp_path, [MetaPerturbCallback()])
    fresh.test(model, loader(2), verbose=False)
    assert any("not re-estimated" in str(w.message) for w in recwarn)
    run.test(model, loader(2), verbose=False)  # the trainer that trained can make up for it
    assert attachment_of(model).estimates.buffers


def test_a_checkpoint_from_within_fit_is_tested_like_the_model_it_holds(tmp_path):
    """The usual trainer.test(ckpt_path='best'): the copies for evaluation were not there when it was saved."""
    saver = ModelCheckpoint(tmp_path, filename="last-epoch")
    run = trainer(tmp_path, [MetaPerturbCallback(full_strength_at=1), saver], enable_checkpointing=True)
    model = module()
    run.fit(model, loader(4), loader(2))
    expected = run.test(model, loader(2, start=400), verbose=False)
    found = run.test(ckpt_path="best", dataloaders=loader(2, start=400), verbose=False, weights_only=True)
    assert found == expected


class EncoderDecoder(nn.Module):
    """Two parts with sites, called one after the other by code outside, and a part that training leaves frozen."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.decoder = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.unused = nn.BatchNorm2d(4)


def test_every_part_that_a_step_calls_is_reestimated_and_no_other():
    model = EncoderDecoder()
    attachment = attach(model, input_size=16)
    model.decoder[1].eval()  # as fine-tuning freezes statistics
    x = batches()[0]
    ran_on = []

    def step():
        model.decoder(model.encoder(x))
        ran_on.append(1)

    reestimate_batch_norm(attachment, [step])
    assert attachment.estimates is not None
    assert set(attachment.estimates.buffers) == {"encoder.1.running_mean", "encoder.1.running_var"}
    assert not ran_on  # the step ended when both parts had run
    model.decoder[1].train()
    reestimate_batch_norm(attachment, [step])
    assert {name.split(".")[0] for name in attachment.estimates.buffers} == {"encoder", "decoder"}


def test_every_part_that_a_step_calls_sees_every_batch():
    model = EncoderDecoder()
    attachment = attach(model, input_size=16)
    counts = {name: [] for name in ("encoder", "decoder")}
    for name, seen in counts.items():
        norm = model.get_submodule(name)[1]
        norm.register_forward_hook(lambda norm, args, y, seen=seen: seen.append(int(norm.num_batches_tracked)))
    reestimate_batch_norm(attachment, [lambda x=x: model.decoder(model.encoder(x)) for x in batches()])
    assert counts == {"encoder": [1, 2, 3], "decoder": [1, 2, 3]}


def test_training_on_makes_the_reestimated_statistics_void():
    model, attachment = attached()
    reestimate_batch_norm(attachment, forwards(model, batches()))
    assert attachment.estimates.buffers
    model.train()(batches()[0])
    assert attachment.estimates is None


def test_without_reestimated_batch_norm_samples_are_averaged_with_a_warning():
    model, attachment = attached()
    attachment.inference = Mean(samples=7)
    model.eval()
    x = batches()[0]
    with torch.no_grad(), pytest.warns(UserWarning, match="outputs of 7 noisy forwards are averaged"):
        averaged = model(x)
    assert int(attachment.evaluations) == 7
    attachment.inference = None
    attachment.evaluations.zero_()
    with torch.no_grad():
        torch.testing.assert_close(averaged, torch.stack([model(x) for _ in range(7)]).mean(0))
