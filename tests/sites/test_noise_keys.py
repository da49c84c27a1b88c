"""What noise is keyed by: never the global generator, the same when recomputed, the same on any number of devices."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
import torch.distributed
import torch.multiprocessing
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from mp_lightning.backbones import build_backbone
from mp_lightning.errors import SiteError
from mp_lightning.inference import Fold, Mean, reestimate_batch_norm
from mp_lightning.perturbation import Phi, initial_phi
from mp_lightning.sites import attach, attachment_of
from mp_lightning.sites.site import _fingerprint

REENTRANT = pytest.mark.parametrize("reentrant", [True, False])


class Recorder:
    """Keeps the noise that each site was given, and multiplies by something that depends on it."""

    name = "recorder"

    def __init__(self):
        self.eps = []

    def initial_statistics(self, channels):
        return {"mean": torch.zeros(channels)}

    def measure(self, x, running, synchronize):
        mean = x.detach().mean((0, 2, 3))
        return {"mean": mean}, {"mean": mean}

    def multiplier(self, x, eps, statistics, norms):
        self.eps.append(None if eps is None else eps.clone())
        return torch.ones_like(x) if eps is None else 1 + 0.5 * eps.tanh()


class Block(nn.Module):
    """A residual block whose last activation is a module, or a function."""

    def __init__(self, channels, functional):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.act = None if functional else nn.ReLU()
        self.inside = None  # a function that runs the block's computation, such as a checkpoint

    def forward(self, x):
        return self._compute(x) if self.inside is None else self.inside(self._compute, x)

    def _compute(self, x):
        out = self.bn(self.conv(x)) + x
        return F.relu(out) if self.act is None else self.act(out)


class SharedNet(nn.Module):
    """A stem, one block that is used twice, another block, and a head; parts can be checkpointed."""

    def __init__(self, functional=False):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.shared, self.last = Block(6, functional), Block(6, functional)
        self.head = nn.Linear(6, 3)
        self.run_blocks = lambda module, x: module(x)
        self.run_segment = None

    def twice(self, x):
        return self.shared(self.shared(x))

    def forward(self, x):
        x = self.stem(x)
        if self.run_segment is not None:
            x = self.run_segment(self.twice, x)
        else:
            x = self.run_blocks(self.shared, self.run_blocks(self.shared, x))
        return self.head(self.run_blocks(self.last, x).mean((2, 3)))


def images(batch=4, seed=0):
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def net(functional=False, seed=0):
    torch.manual_seed(0)
    model = SharedNet(functional)
    attach(model, initial_phi(0), seed=seed)
    return model


def small(seed=0, perturbation=None):
    torch.manual_seed(0)
    model = build_backbone("conv4", 10, width=8, image_size=16)
    attach(model, initial_phi(0) if perturbation is None else None, perturbation=perturbation, seed=seed)
    return model


def gradients(model, loss):
    model.zero_grad()
    loss(model).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def statistics(model):
    return {
        name: value.clone() for name, value in attachment_of(model).named_buffers() if ".mean" in name or ".var" in name
    }


def test_training_leaves_the_global_generator_alone():
    model = small()
    before = torch.random.get_rng_state()
    model(torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))).sum().backward()
    model.eval()(torch.zeros(1, 3, 16, 16))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_seed_decides_and_nothing_else():
    x = torch.randn(4, 3, 16, 16)
    first = small(seed=1)(x)
    torch.manual_seed(123)
    again = small(seed=1)
    torch.randn(7)
    assert torch.equal(again(x), first)
    assert not torch.equal(small(seed=2)(x), first)


def test_forwards_calls_sites_and_modes_all_differ():
    recorder = Recorder()
    torch.manual_seed(0)
    model = SharedNet()
    attach(model, perturbation=recorder)
    model(images())
    model(images())
    model.eval()(images())
    assert len(recorder.eps) == 9
    for one, other in itertools.combinations(recorder.eps, 2):
        assert (one - other).abs().mean() > 0.5


def test_evaluation_does_not_shift_the_noise_of_training():
    x = images()
    plain, interrupted = net(), net()
    plain(x)
    interrupted(x)
    with torch.no_grad():
        interrupted.eval()(images(seed=5))
    assert torch.equal(interrupted.train()(x), plain(x))


@REENTRANT
@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("what", ["block", "segment", "model"])
def test_checkpointing_repeats_the_noise(what, functional, reentrant):
    x = images().requires_grad_()

    def again(function, x):
        return checkpoint(function, x, use_reentrant=reentrant)

    def loss(model):
        out = again(model, x) if what == "model" and model is checkpointed else model(x)
        return out.square().sum()

    plain, checkpointed = net(functional), net(functional)
    if what == "block":
        checkpointed.run_blocks = again
    elif what == "segment":
        checkpointed.run_segment = again
    for _ in range(2):
        expected = gradients(plain, loss)
        actual = gradients(checkpointed, loss)
        for name, value in expected.items():
            assert torch.allclose(actual[name], value, rtol=1e-4, atol=1e-5), name
    # Nothing was counted or recorded twice.
    for name, value in statistics(plain).items():
        assert torch.equal(statistics(checkpointed)[name], value), name
    assert int(attachment_of(checkpointed).forwards) == 2


@REENTRANT
@pytest.mark.parametrize("same_batch", [False, True])
@pytest.mark.parametrize("what", ["block", "model"])
def test_two_forwards_before_one_backward(what, same_batch, reentrant):
    """With one batch twice, as R-Drop does, the first site sees equal numbers under different noise."""
    x, y = images().requires_grad_(), images(seed=0 if same_batch else 1).requires_grad_()

    def again(function, x):
        return checkpoint(function, x, use_reentrant=reentrant)

    def loss(model):
        run = (lambda x: again(model, x)) if what == "model" and model is checkpointed else model
        first, second = run(x), run(y)
        with torch.no_grad():  # and a validation in between
            model.eval()(images(seed=9))
            model.train()
        return (first - 2 * second).square().sum() + first.pow(3).sum()

    plain, checkpointed = net(), net()
    if what == "block":
        checkpointed.run_blocks = again
    expected, actual = gradients(plain, loss), gradients(checkpointed, loss)
    for name, value in expected.items():
        assert torch.allclose(actual[name], value, rtol=1e-3, atol=1e-4 * float(value.abs().max())), name


def checkpointed_inside(reentrant):
    model = net()
    for block in (model.shared, model.last):
        block.inside = lambda function, x: checkpoint(function, x, use_reentrant=reentrant)
    return model


@REENTRANT
@pytest.mark.parametrize("training", [True, False])
def test_a_block_may_checkpoint_its_own_computation(training, reentrant):
    """Its hooks do not run when only its inside is computed again."""
    x = images().requires_grad_()
    plain, checkpointed = net().train(training), checkpointed_inside(reentrant).train(training)
    expected = gradients(plain, lambda model: model(x).square().sum())
    actual = gradients(checkpointed, lambda model: model(x).square().sum())
    for name, value in expected.items():
        assert torch.allclose(actual[name], value, rtol=1e-4, atol=1e-5), name


@REENTRANT
@pytest.mark.parametrize("inference", [Mean(), Fold()])
def test_a_block_that_checkpoints_itself_is_refused_where_its_evaluation_was_re_estimated(inference, reentrant):
    model = checkpointed_inside(reentrant)
    attachment = attachment_of(model)
    x = images().requires_grad_()
    reestimate_batch_norm(attachment, [lambda: model(x)], fold=isinstance(inference, Fold))
    attachment.inference = inference
    with pytest.raises(SiteError, match=r"again as another function.*turn checkpointing off"):
        model.eval()(x).sum().backward()


@REENTRANT
def test_calls_that_are_forgotten_when_they_are_computed_again_are_refused(reentrant, monkeypatch):
    monkeypatch.setattr("mp_lightning.sites.site._REMEMBERED", 4)
    model = checkpointed_inside(reentrant)
    loss = sum(model(images(seed=seed).requires_grad_()).square().sum() for seed in range(6))
    with pytest.raises(SiteError, match="not among its last 4 calls"):
        loss.backward()


@REENTRANT
def test_a_function_that_a_block_checkpoints_is_refused(reentrant):
    """It would be computed again without anyone looking, and give wrong gradients."""
    model = net(functional=True)
    model.shared.inside = lambda function, x: checkpoint(function, x, use_reentrant=reentrant)
    with pytest.raises(SiteError, match="checkpoint the whole block"):
        model(images().requires_grad_())


def test_one_graph_may_be_replayed_twice():
    x = images().requires_grad_()
    plain, checkpointed = net(), net()
    checkpointed.run_blocks = lambda function, x: checkpoint(function, x, use_reentrant=False)
    expected = gradients(plain, lambda model: model(x).square().sum())
    loss = checkpointed(x).square().sum()
    for retain in (True, False):
        checkpointed.zero_grad()
        loss.backward(retain_graph=retain)
        for name, parameter in checkpointed.named_parameters():
            assert torch.allclose(parameter.grad, expected[name], rtol=1e-4, atol=1e-5), name


def test_a_copy_continues_with_the_same_noise():
    model = net()
    model(images())
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images()), model(images()))


# --- two processes -------------------------------------------------------------------------------------------------

SAMPLES = 8
VIVID = Phi(*(30 * value for value in initial_phi(0)))  # of whose statistics the output depends clearly


def _whole_batch():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(SAMPLES, 3, 16, 16, generator=generator), torch.arange(SAMPLES)


def _without_batch_norm():
    """Batch norm, not being ours, has statistics of its own on each process."""
    torch.manual_seed(0)
    return build_backbone("conv4", 10, width=8, image_size=16)


def _replace_norms(model):
    for layer in model.conv_layers:
        layer.bn.eval()  # running statistics: the same on every process
    return model


def _one_process(rank, world, folder, synchronize):
    x, y = _whole_batch()
    mine = slice(rank, None, world)
    recorder = Recorder()
    recorded = _without_batch_norm()
    attach(recorded, perturbation=recorder, seed=11)
    model = _without_batch_norm()
    # Attached before the processes know of each other, as the mixin does.
    attach(model, VIVID, seed=11, synchronize=synchronize)
    if world > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    for _ in range(2):
        recorded(x[mine])
    logits = _replace_norms(model)(x[mine])
    F.cross_entropy(logits, y[mine], reduction="sum").backward()
    gradient = {}
    for name, parameter in model.named_parameters():
        gradient[name] = parameter.grad
        if world > 1:
            torch.distributed.all_reduce(parameter.grad)
    result = {"eps": recorder.eps, "logits": logits.detach(), "gradient": gradient, "statistics": statistics(model)}
    torch.save(result, f"{folder}/{world}_{rank}.pt")
    if world > 1:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def one_and_two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    _one_process(0, 1, folder, True)
    torch.multiprocessing.spawn(_one_process, (2, str(folder), True), nprocs=2)
    return torch.load(folder / "1_0.pt"), [torch.load(folder / f"2_{rank}.pt") for rank in range(2)]


@pytest.mark.slow
def test_each_sample_gets_its_noise_on_any_process(one_and_two_processes):
    whole, parts = one_and_two_processes
    assert len(whole["eps"]) == 8
    for rank, part in enumerate(parts):
        for expected, actual in zip(whole["eps"], part["eps"], strict=True):
            assert torch.equal(actual, expected[rank::2])
    assert not torch.equal(parts[0]["eps"][0], parts[1]["eps"][0])


@pytest.mark.slow
def test_with_synchronized_statistics_two_processes_are_one(one_and_two_processes):
    whole, parts = one_and_two_processes
    for rank, part in enumerate(parts):
        assert torch.allclose(part["logits"], whole["logits"][rank::2], rtol=1e-5, atol=1e-5)
        for name, value in whole["gradient"].items():
            assert (part["gradient"][name] - value).abs().max() <= 1e-5 * max(1.0, float(value.abs().max())), name
        for name, value in whole["statistics"].items():
            assert torch.allclose(part["statistics"][name], value, rtol=1e-5, atol=1e-6), name


def _single_samples(rank, world, folder):
    """Statistics after a batch of two, of which each process has one, by path and whether they are synchronized."""
    if world > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    found = {}
    for path, synchronize in itertools.product(("reference", "auto"), (True, False)):
        model = _without_batch_norm()
        attach(model, VIVID, seed=11, synchronize=synchronize, path=path)
        _replace_norms(model)(_whole_batch()[0][:2][rank::world])
        found[path, synchronize] = statistics(model)
    torch.save(found, f"{folder}/single_{world}_{rank}.pt")
    if world > 1:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_one_sample_on_each_process_has_statistics_where_they_are_synchronized_and_none_elsewhere(tmp_path):
    _single_samples(0, 1, tmp_path)
    torch.multiprocessing.spawn(_single_samples, (2, str(tmp_path)), nprocs=2)
    whole, *parts = (torch.load(tmp_path / f"single_{name}.pt") for name in ("1_0", "2_0", "2_1"))
    fresh = _without_batch_norm()
    attach(fresh, VIVID)
    for part in parts:
        for (_, synchronize), found in part.items():
            expected = whole["reference", True] if synchronize else statistics(fresh)
            for name, value in expected.items():
                assert torch.allclose(found[name], value, rtol=1e-5, atol=1e-6), name
    assert not torch.allclose(whole["auto", True][name], statistics(fresh)[name])


def _estimate_alone(rank, world, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    found = {}
    for distributed in (False, True):
        torch.manual_seed(0)
        model = build_backbone("conv4", 10, width=4, image_size=16)
        attachment = attach(model, initial_phi(0), distributed=distributed)
        x = _whole_batch()[0] + rank
        reestimate_batch_norm(attachment, [lambda model=model, x=x: model(x)])
        found[distributed] = attachment.estimates.buffers
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_that_train_a_network_each_estimate_for_themselves(tmp_path):
    torch.multiprocessing.spawn(_estimate_alone, (2, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    name = "conv_layers.0.bn.running_mean"
    assert not torch.allclose(first[False][name], second[False][name])
    assert torch.allclose(first[True][name], second[True][name])
    assert torch.allclose(first[True][name], (first[False][name] + second[False][name]) / 2, atol=1e-5)


class Branches(nn.Module):
    """Two branches, called in an order, or one of them alone."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(2)
        )
        self.order = (0, 1)

    def forward(self, x):
        return torch.cat([self.branches[number](x) for number in self.order], 1)


def _estimate_other_branches(rank, world, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    found = {}
    for orders, distributed in itertools.product([((0, 1), (1, 0)), ((0, 1), (1,))], (False, True)):
        torch.manual_seed(0)
        model = Branches()
        attachment = attach(model, VIVID, sites=1, distributed=distributed, ramp_steps=0)
        model.order = orders[rank]
        x = _whole_batch()[0] * (1 + rank)
        reestimate_batch_norm(attachment, [lambda model=model, x=x: model(x)], fold=True)
        found[orders, distributed] = attachment.estimates.buffers | attachment.estimates.constants
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_what_some_processes_reach_in_another_order_or_not_at_all_is_the_mean_over_those_that_reach_it(tmp_path):
    torch.multiprocessing.spawn(_estimate_other_branches, (2, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for (orders, distributed), alone in first.items():
        if distributed:
            continue
        both = first[orders, True]
        assert both.keys() == second[orders, True].keys() == alone.keys() and len(alone) == 6
        for name, value in both.items():
            own = [of[orders, False][name] for of in (first, second) if name in of[orders, False]]
            assert torch.equal(value, second[orders, True][name])
            # Batch norm after the first is estimated under constants, of which there is one for both.
            assert torch.allclose(value, torch.stack(own).mean(0), rtol=1e-4, atol=1e-5), name
    assert len(second[((0, 1), (1,)), False]) == 3


def test_the_noise_of_another_input_is_not_taken_for_that_of_a_call_that_is_computed_again():
    model = net()
    site = attachment_of(model).sites[0]
    checkpoint(model, images().requires_grad_(), use_reentrant=False)
    (call, *_) = site._calls
    seen = torch.rand(call.shape)
    site._calls.clear()
    site._calls.append(replace(call, fingerprint=_fingerprint(seen)))
    assert site.recall(seen * (1 + 1e-4)) is not None and site.recall(torch.rand(call.shape) - 0.5) is None


@pytest.mark.parametrize("training", [True, False])
def test_only_calls_that_may_be_computed_again_are_remembered(training):
    model = net().train(training)
    site = attachment_of(model).sites[0]
    model(images())
    with torch.no_grad():
        model.eval()(images())
    assert len(site._calls) == 0
    checkpoint(model.train(training), images().requires_grad_(), use_reentrant=False)
    assert len(site._calls) > 0
