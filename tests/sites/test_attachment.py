"""Attach and detach as exact inverses, and what an attached model withstands."""

import copy
import io
import math
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel

from mp_lightning.backbones import build_backbone
from mp_lightning.errors import ConfigurationError, SiteError
from mp_lightning.perturbation import MetaPerturb, NamedPhi, Phi, initial_phi
from mp_lightning.sites import SitePlan, SiteSpec, attach, attachment_of, detach, find_sites
from research_nets import ResearchBlock

attach = partial(attach, sites=1)  # at all sites, whatever the default phi comes with

HOOKS = [name for name in nn.Module().__dict__ if "hooks" in name]


class FunctionalResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(ResearchBlock(8, 8), ResearchBlock(8, 16, 2))
        self.linear = nn.Linear(16, 10)

    def forward(self, x):
        out = self.layer1(F.relu(self.bn1(self.conv1(x))))
        return self.linear(out.mean((2, 3)))


def conv4():
    return build_backbone("conv4", 10, width=8, image_size=16)


def resnet20():
    return build_backbone("resnet20", 10, width=8)


def torchvision_resnet18():
    import torchvision

    return torchvision.models.resnet18(num_classes=10)


def torchvision_vgg11_bn():
    import torchvision

    model = torchvision.models.vgg11_bn(num_classes=10)
    model.classifier = nn.Linear(512 * 49, 10)  # the original one has 120 million parameters
    return model


SIZES = {torchvision_resnet18: 32, torchvision_vgg11_bn: 32}
MODELS = [conv4, resnet20, FunctionalResNet, torchvision_resnet18, torchvision_vgg11_bn]
SITES = dict(zip(MODELS, (4, 9, 2, 8, 8), strict=True))


def images(batch=4, size=16, seed=0):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def fresh(make, seed=0):
    torch.manual_seed(seed)
    return make()


def everything(model):
    """All state of all modules but tensors: hooks and attribute names."""
    return {
        name: ({key: dict(module.__dict__[key]) for key in HOOKS}, sorted(module.__dict__), sorted(module._modules))
        for name, module in model.named_modules()
    }


def outputs(model, x):
    """In training mode, then in evaluation mode with what training left in the buffers."""
    torch.manual_seed(5)  # for dropout
    train = model.train()(x)
    return train.detach(), model.eval()(x).detach()


def buffers_of(attachment):
    return {name: value.clone() for name, value in attachment.named_buffers() if name.endswith((".mean", ".var"))}


@pytest.mark.parametrize("make", MODELS)
def test_detach_undoes_attach(make):
    x = images(size=SIZES.get(make, 16))
    model, plain = fresh(make), fresh(make)
    before, keys, parameters = everything(model), list(model.state_dict()), list(model.parameters())
    attachment = attach(model)
    assert len(attachment.sites) == SITES[make]
    assert list(model.state_dict()) == keys
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    perturbed = copy.deepcopy(model).train()(x)
    attachment.detach()
    assert everything(model) == before
    assert list(model.state_dict()) == keys
    assert attachment_of(model) is None
    expected = outputs(plain, x)
    assert not torch.equal(perturbed, expected[0])
    for actual, wanted in zip(outputs(model, x), expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("path", ["auto", "reference"])
@pytest.mark.parametrize("make", MODELS)
def test_without_strength_an_attached_model_is_the_plain_one(make, path):
    """All that acts is the multiplier: the hooks change nothing else, in either mode, and nothing is bounded."""
    x = images(size=SIZES.get(make, 16))
    model, plain = fresh(make), fresh(make)
    attach(model, ramp_steps=10, clip=0.01, path=path)
    for actual, wanted in zip(outputs(model, x), outputs(plain, x), strict=True):
        assert torch.equal(actual, wanted)


def test_detach_twice_and_without_attachment():
    model = conv4()
    detach(model)
    attachment = attach(model)
    detach(model)
    attachment.detach()
    assert attachment_of(model) is None


def test_attached_twice_is_attached_once():
    model = conv4()
    phi = initial_phi(0)
    attachment = attach(model, phi)
    hooks = everything(model)
    assert attach(model) is attachment
    assert attach(model, initial_phi(0)) is attachment
    assert attach(model, sites=find_sites(conv4())) is attachment
    assert everything(model) == hooks


@pytest.mark.parametrize(
    "other",
    [
        {"phi": initial_phi(1)},
        {"perturbation": MetaPerturb(initial_phi(0))},
        {"sites": SitePlan(list(find_sites(conv4()))[:2])},
    ],
)
def test_attached_twice_with_something_else_is_refused(other):
    model = conv4()
    attach(model, initial_phi(0))
    with pytest.raises(ConfigurationError, match="attached already"):
        attach(model, **other)


def test_two_phi_of_the_same_name_are_told_apart():
    model = conv4()
    attachment = attach(model, initial_phi(0))
    assert attachment.phi_name == "given phi"
    with pytest.raises(ConfigurationError, match=r"detach\(\)"):
        attach(model, initial_phi(2))


@pytest.mark.parametrize("make", [conv4, resnet20, FunctionalResNet])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_whole_and_independent(make, how):
    x = images()
    model = fresh(make)
    attachment = attach(model, total_steps=10, full_strength_at=1)
    model(x)
    attachment.step()
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    own, other = attachment_of(model), attachment_of(twin)
    assert other is not own and other.model is twin
    assert torch.equal(other.coeff, own.coeff)
    for actual, wanted in zip(outputs(twin, x), outputs(model, x), strict=True):
        assert torch.equal(actual, wanted)

    before = buffers_of(own)
    forwards = int(own.forwards)
    twin.train()(images(seed=1))
    assert int(own.forwards) == forwards
    assert all(torch.equal(value, before[name]) for name, value in buffers_of(own).items())
    assert any(not torch.equal(value, before[name]) for name, value in buffers_of(other).items())

    other.detach()
    assert everything(twin) == everything(fresh(make))
    assert attachment_of(model) is own
    wanted = model.eval()(x)
    assert not torch.equal(twin.eval()(x), wanted)


def test_a_whole_model_survives_torch_save():
    model = attach(conv4()).model
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again.train()(images()), model.train()(images()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_phi_and_statistics_stay_float32(dtype):
    model = conv4()
    attachment = attach(model)
    phi = [value.clone() for value in attachment.perturbation.phi]
    model.to(dtype)
    floating = [value for value in attachment.buffers() if value.is_floating_point()]
    assert {value.dtype for value in floating} == {torch.float32}
    for value, original in zip(attachment.perturbation.phi, phi, strict=True):
        assert torch.equal(value, original)
    out = model(images().to(dtype))
    assert out.dtype == dtype and out.isfinite().all()
    assert all(site.mean.dtype == torch.float32 and site.mean.any() for site in attachment.sites)


def test_sites_compute_in_float32_under_autocast():
    model = fresh(conv4)
    attachment = attach(model, path="reference")  # whose steps can be watched
    seen, inside = [], []
    measure = attachment.perturbation.measure

    def recording(x, running, synchronize):
        used, measured = measure(x, running, synchronize)
        inside.append((x.dtype, used["mean"].dtype))
        return used, measured

    attachment.perturbation.measure = recording
    for site in attachment.sites:
        site.register_forward_hook(lambda module, args, output: seen.append((args[0].dtype, output.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images())
    assert seen == [(torch.bfloat16, torch.bfloat16)] * 4
    assert inside == [(torch.float32, torch.float32)] * 4
    reference = attach(fresh(conv4)).model(images())
    assert (out.float() - reference).abs().max() < 0.1 * reference.abs().max()


def test_wrong_number_of_channels_names_the_site():
    model = conv4()
    spec = SiteSpec("first", "conv_layers.0", "conv_layers.0.relu", 0, 16, "by hand", "x")
    with pytest.raises(SiteError, match=r"'first' does not fit: it has 8 channels .* and 16"):
        attach(model, sites=SitePlan([spec]))
    assert attachment_of(model) is None


@pytest.mark.parametrize("wrong", [{"scope": "layers.9"}, {"activation": "conv_layers.0.gelu"}])
def test_a_plan_for_another_model_is_refused_and_leaves_no_hook(wrong):
    model = conv4()
    before = everything(model)
    place = {"scope": "conv_layers.0", "activation": "conv_layers.0.relu", **wrong}
    good = SiteSpec("a", "", None, 0, 8, "by hand", "x")
    specs = [good, SiteSpec("b", call=0, channels=8, rule="by hand", reads="x", **place)]
    with pytest.raises(SiteError, match=f"'b' does not fit.*{next(iter(wrong.values()))}"):
        attach(model, sites=SitePlan(specs))
    assert everything(model) == before


def test_a_model_without_sites_is_refused():
    with pytest.raises(SiteError, match="no site"):
        attach(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)))


def test_a_batch_of_one_is_finite_and_leaves_the_statistics_alone():
    model = conv4()
    attachment = attach(model)
    model(images())
    before = buffers_of(attachment)
    out = model(images(batch=1))
    out.sum().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in buffers_of(attachment).items())


@pytest.mark.parametrize("name", ["mean", "var"])
def test_statistics_of_which_one_is_not_finite_are_all_left_alone(name):
    attachment = attach(fresh(conv4), path="reference")
    before, site = buffers_of(attachment), attachment.sites[0]
    measured = {key: value + 1 for key, value in site.statistics.items()}
    site._record({**measured, name: torch.full_like(measured[name], float("inf"))})
    assert all(torch.equal(value, before[key]) for key, value in buffers_of(attachment).items())
    site._record(measured)
    assert not torch.equal(site.var, before["sites.0.var"])


def test_a_phi_in_double_precision_acts_by_the_reference():
    phi, outputs = Phi(*(30 * value.double() for value in initial_phi(0))), []
    for path in ("auto", "reference"):
        model = fresh(conv4)
        attach(model, phi, ramp_steps=0, path=path)
        outputs.append(model(images()))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("path", ["auto", "reference"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_leaves_the_statistics_alone(bad, path):
    model = fresh(resnet20)
    attachment = attach(model, path=path)
    model(images())
    before, weights = buffers_of(attachment), copy.deepcopy(model.state_dict())
    poisoned = images(seed=1)
    poisoned[1, 2, 3, 4] = bad
    model(poisoned)
    assert all(torch.equal(value, before[name]) for name, value in buffers_of(attachment).items())
    model.load_state_dict(weights)  # batch norm, not being ours, keeps what it saw
    assert model(images(seed=2)).isfinite().all()
    after = buffers_of(attachment)
    assert all(value.isfinite().all() and not torch.equal(value, before[name]) for name, value in after.items())
    assert model.eval()(images(seed=3)).isfinite().all()


@pytest.mark.parametrize(("total", "expected"), [(10, [0, 0.25, 0.5, 0.75, 1, 1]), (1, [1, 1]), (5, [0, 0.5, 1, 1])])
def test_ramp_over_the_first_40_percent(total, expected):
    attachment = attach(conv4(), total_steps=total, strength=1, full_strength_at=1)
    seen = []
    for _ in expected:
        seen.append(float(attachment.coeff))
        attachment.step()
    assert seen == expected


@pytest.mark.parametrize(
    ("total", "follows", "reached"), [(10, 0.4, 1 / 120), (300, 0.4, 0.25), (1200, 0.4, 1), (3000, 0.4, 1), (10, 1, 1)]
)
def test_a_short_run_reaches_a_part_of_a_strength_that_follows_the_loss(total, follows, reached):
    attachment = attach(conv4(), total_steps=total, strength=0.8, full_strength_at=follows)
    assert attachment.ramp_steps == 0.4 * total and attachment.reached == pytest.approx(reached)
    for step in range(total):
        attachment.step(0.0 if step else 1.0)
        if step == 1:
            assert float(attachment.coeff) < 0.8 * reached, "the ramp is there as well"
    assert float(attachment.coeff) == pytest.approx(0.8 * reached)


def test_a_length_that_was_given_reaches_all_of_the_strength():
    attachment = attach(conv4(), total_steps=10, strength=0.8, full_strength_at=0.4)
    attachment.ramp_over(2)
    for loss in (1.0, 0.0, 0.0, 0.0):
        attachment.step(loss)
    assert float(attachment.coeff) == pytest.approx(0.8 * attachment.fitting.factor())


def test_a_training_that_goes_on_is_as_long_as_all_of_it():
    attachment = attach(conv4(), total_steps=1200)
    attachment.steps.fill_(900)
    attachment.ramp_over_run(100, before=900)
    assert attachment.reached == 1000 / 1200
    attachment.ramp_over_run(600)  # resumed, with an end that is over already
    assert attachment.reached == 0.75


def test_a_short_run_is_told_in_words():
    attachment = attach(conv4(), total_steps=300, strength=0.8, full_strength_at=0.4)
    assert "grows to 0.2 (25% of 0.8, as the run is short) over the first 120 of 300 tr" in attachment.outlook(300)
    attachment.steps.fill_(50)
    assert "as the run is short) over 120 training batches, 50 of which are done" in attachment.outlook(300)
    attachment.steps.fill_(150)
    assert "at strength 0.2 (25% of 0.8, as the run is short) from the first batch" in attachment.outlook(300)
    attachment.ramp_over_run(3000)
    assert "short" not in attachment.outlook(3000)


def test_what_a_short_run_reached_is_kept():
    short, other = attach(conv4(), total_steps=300), attach(conv4(), total_steps=3000)
    for loss in (1.0, *[0.0] * 200):
        short.step(loss)
    other.load_state(short.state())
    assert other.reached == 0.25 and torch.equal(other.coeff, short.coeff) and 0 < float(short.coeff) < 0.25


def test_ramp_of_a_given_length():
    attachment = attach(conv4(), ramp_steps=3, strength=1)
    seen = []
    for _ in range(4):
        attachment.step()
        seen.append(float(attachment.coeff))
    assert seen == pytest.approx([1 / 3, 2 / 3, 1, 1])
    with pytest.raises(ConfigurationError, match="give a whole number of batches, or 0 for no ramp"):
        attachment.ramp_over(-1)


def test_step_without_a_horizon_is_refused():
    attachment = attach(conv4())
    assert attachment.coeff == attachment.strength
    with pytest.raises(ConfigurationError, match="total_steps="):
        attachment.step()


def test_strength_acts_as_the_formula_says():
    """y = x * (1 + coeff * (multiplier - 1)): half of the way at half of the ramp."""
    x = images().abs() + 0.1
    model = nn.Sequential(nn.Identity(), nn.ReLU())
    plan = SitePlan([SiteSpec("a", "", "1", 0, 3, "by hand", "x")])
    full = attach(copy.deepcopy(model), sites=plan).model(x)
    attachment = attach(model, sites=plan, ramp_steps=2)
    attachment.step()
    assert torch.allclose(model(x), x + 0.5 * (full - x), rtol=1e-5)


@pytest.mark.parametrize("path", ["auto", "reference"])
def test_what_acts_at_the_end_of_the_ramp_is_the_strength(path):
    """1 + strength * (multiplier - 1), that is the mean of the plain map and the fully perturbed one."""
    model, x = fresh(conv4), images()
    first = find_sites(model)
    first = SitePlan(tuple(first)[:1])
    seen = {}
    for strength in (None, 0.25):
        attachment = attach(model, initial_phi(1), sites=first, ramp_steps=2, strength=strength, path=path)
        for step in (0.0, 0.5, 1.0, 1.0):
            assert float(attachment.coeff) == pytest.approx(step * (strength or 1.0))
            attachment.step()
        with torch.no_grad():
            model.train()
            module = model.conv_layers[0]
            seen[strength] = module.relu.register_forward_hook(lambda _, args, out: seen.update(map=args[0]))
            model(x)
            seen.pop(strength).remove()
            seen[strength] = seen["map"]
        attachment.detach()
    hook = model.conv_layers[0].relu.register_forward_hook(lambda _, args, out: seen.update(map=args[0]))
    with torch.no_grad():
        model(x)
    hook.remove()
    expected = 0.75 * seen["map"] + 0.25 * seen[None]
    torch.testing.assert_close(seen[0.25], expected, rtol=1e-4, atol=1e-5)


def test_phi_brings_its_strength_and_a_given_one_takes_its_place():
    phi = NamedPhi(initial_phi(0), "mine", strength=0.5)
    for given, expected in ((None, 0.5), (0.75, 0.75)):
        attachment = attach(fresh(conv4), phi, strength=given)
        assert float(attachment.strength) == float(attachment.coeff) == expected
    assert float(attach(fresh(conv4), perturbation=DropBlockLike()).strength) == 1


def test_another_strength_of_an_attached_model_is_refused():
    model, phi = fresh(conv4), NamedPhi(initial_phi(0), "mine", strength=0.5)
    attachment = attach(model, phi)
    assert attach(model, phi) is attach(model, phi, strength=0.5) is attach(model, strength=0.5) is attachment
    for other, strength in ((phi, 0.6), (initial_phi(0), None), (None, 1.0)):
        with pytest.raises(ConfigurationError, match=r"already, at strength 0\.5 and not"):
            attach(model, other, strength=strength)


@pytest.mark.parametrize("strength", [0.0, 5.0, math.nan, "0.5"])
def test_a_phi_of_an_impossible_strength_is_refused(strength):
    model = fresh(conv4)
    with pytest.raises(ConfigurationError, match=f"strength of phi 'mine'={strength} cannot be used"):
        attach(model, NamedPhi(initial_phi(0), "mine", strength=strength))
    assert attachment_of(model) is None


def test_strength_may_change_between_forward_and_backward():
    model = conv4()
    attachment = attach(model, ramp_steps=4)
    attachment.step()
    loss = model(images()).sum()
    attachment.step()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_phi_is_in_no_optimizer_and_does_not_train():
    model = fresh(conv4)
    attachment = attach(model, total_steps=4, full_strength_at=1)
    phi = [value.clone() for value in attachment.perturbation.phi]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not held & {id(value) for value in attachment.buffers()}
    assert list(attachment.parameters()) == []
    before = copy.deepcopy(model.fc.weight)
    for step in range(4):  # the loop of the docstring
        loss = F.cross_entropy(model(images(seed=step)), torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        attachment.step()
    assert attachment.coeff == attachment.strength and int(attachment.forwards) == 4
    assert not torch.equal(model.fc.weight, before)
    for value, original in zip(attachment.perturbation.phi, phi, strict=True):
        assert torch.equal(value, original) and not value.requires_grad and value.grad is None


class DropBlockLike:
    """Zeroes 3x3 blocks by the given noise and keeps a statistic of its own."""

    name = "blocks"

    def initial_statistics(self, channels):
        return {"level": torch.zeros(channels)}

    def measure(self, x, running, synchronize):
        level = x.detach().abs().mean((0, 2, 3))
        return {"level": level}, {"level": level}

    def multiplier(self, x, eps, statistics, norms):
        if eps is None:
            return torch.full_like(x, 0.5)
        return 1 - F.max_pool2d((eps > 2).to(x.dtype), 3, 1, 1)


@pytest.mark.parametrize("make", [conv4, FunctionalResNet])
def test_another_perturbation_sits_in_the_same_sites(make):
    model = fresh(make)
    attachment = attach(model, perturbation=DropBlockLike())
    assert attachment.plan == find_sites(fresh(make)) and attachment.phi_name == "blocks"
    seen = []
    for site in attachment.sites:
        site.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    model(images()).sum().backward()
    assert len(seen) == len(attachment.plan)
    for site, (x, y) in zip(attachment.sites, seen, strict=True):
        assert ((y == 0) | (y == x)).all() and 0 < (y == 0).float().mean() < 0.9
        assert torch.allclose(site.level, 0.1 * x.detach().abs().mean((0, 2, 3)))
    model.eval()
    attachment.sampling = False
    seen.clear()
    model(images())
    assert torch.equal(seen[0][1], seen[0][0] * 0.5)
    state = attachment.state()
    assert "phi" not in state and state["phi_name"] == "blocks"
    other = attach(fresh(make), perturbation=DropBlockLike())
    other.load_state(state)
    assert torch.equal(other.sites[0].level, attachment.sites[0].level)
    with pytest.raises(ConfigurationError, match="perturbation 'blocks'"):
        attach(fresh(make)).load_state(state)


def test_evaluation_is_bounded_and_says_so():
    model = conv4()
    attachment = attach(model, clip=0.5)
    seen = []
    attachment.sites[0].register_forward_hook(lambda module, args, output: seen.append(output))
    model.eval()
    model(images() * 50)
    assert seen[0].max().item() == 0.5
    assert int(attachment.bound_hits) >= int((seen[0] == 0.5).sum()) > 0
    unbounded = attach(conv4(), clip=None)
    unbounded.model.eval()(images() * 50)
    assert int(unbounded.bound_hits) == 0


def test_input_height_is_the_one_of_training():
    model = resnet20()
    attachment = attach(model)
    model.eval()(images(size=8))  # such as a sanity check
    assert float(attachment.input_size) == 8
    model.train()(images(size=16))
    model(images(size=32))
    model.eval()(images(size=8))
    assert float(attachment.input_size) == 16
    code = attach(nn.Sequential(nn.Upsample(16), resnet20()))
    with pytest.raises(SiteError, match=r"height of the model's input is unknown.*pass input_size="):
        code.model(torch.rand(2, 3, 1, 1))  # what a generator makes an image of
    given = attach(resnet20(), input_size=24)
    given.model(images(size=16))
    assert float(given.input_size) == 24


def test_channel_norm_is_the_one_of_the_default_plan():
    model = resnet20()
    plan = SitePlan(list(find_sites(model))[:2])
    assert max(site.channels for site in plan) == 8
    assert attach(model, sites=plan).channel_norm == 32


def test_an_interrupted_forward_leaves_nothing_behind():
    """A keyboard interrupt skips every hook that would tidy up."""
    model = fresh(FunctionalResNet)
    attachment = attach(model, ramp_steps=0)

    def interrupt(module, args):
        raise KeyboardInterrupt

    handle = model.layer1[1].bn2.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(images())
    handle.remove()
    attachment.step()
    assert torch.overrides._get_current_function_mode() is None
    model(images())
    assert int(attachment.forwards) == 2
    detach(model)
    assert everything(model) == everything(fresh(FunctionalResNet))


def test_blocks_called_one_by_one_get_fresh_noise():
    """Some models are never called as a whole: each block counts as one forward, so that no noise repeats."""
    model = fresh(resnet20)
    attachment = attach(model, input_size=16)
    block, x = model.layer1[0], torch.randn(2, 8, 4, 4)
    first, second = block(x), block(x)
    assert not torch.equal(first, second)
    assert int(attachment.forwards) == 2
    unknown = attach(fresh(resnet20))
    with pytest.raises(SiteError, match="input_size="):
        unknown.model.layer1[0](x)


def test_a_part_of_an_attached_model_is_attached():
    model = nn.Sequential(build_backbone("conv4", 10, width=4, image_size=16), nn.Identity())
    attachment = attach(model)
    assert attach(model[0]) is attachment
    assert attachment_of(model[0]) is attachment
    assert sum(isinstance(module, type(attachment)) for module in model.modules()) == 1


@pytest.mark.parametrize("path", ["auto", "reference"])
@pytest.mark.parametrize("noise_per", ["element", "channel"])
def test_phi_brings_what_its_noise_is_drawn_for(noise_per, path):
    """A phi of zeros multiplies by softplus(eps) / 2: of all of a channel alike, or of no two elements."""
    zeros = Phi(*(torch.zeros_like(value) for value in initial_phi(0)))
    model = fresh(conv4)
    first = SitePlan(tuple(find_sites(model))[:1])
    attach(model, NamedPhi(zeros, "mine", noise_per=noise_per), sites=first, path=path, clip=None)
    seen = {}
    model.conv_layers[0].bn.register_forward_hook(lambda _, args, out: seen.update(before=out.detach()))
    model.conv_layers[0].relu.register_forward_hook(lambda _, args, out: seen.update(after=args[0].detach()))
    model.train()(images())
    factors = (seen["after"] / seen["before"]).flatten(2)
    assert factors.shape[:2] == (len(images()), 8)
    means = factors.mean(dim=2)
    alike = (factors - means[..., None]).abs().amax(dim=2) < 1e-4 * means
    assert alike.all() if noise_per == "channel" else not alike.any()
    assert means.flatten().sort().values.diff().min() > 0  # no two channels, of no two samples


@pytest.mark.parametrize("training", [True, False])
def test_both_paths_draw_the_same_noise_of_channels(training):
    found = []
    for path in ("auto", "reference"):
        model = fresh(conv4)
        attach(model, NamedPhi(Phi(*(20 * value for value in initial_phi(0))), "mine", noise_per="channel"), path=path)
        found.append(model.train(training)(images()))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_other_noise_of_an_attached_model_is_refused():
    model = fresh(conv4)
    attachment = attach(model, NamedPhi(initial_phi(0), "mine", noise_per="channel"))
    assert attach(model, NamedPhi(initial_phi(0), "mine", noise_per="channel")) is attachment
    with pytest.raises(ConfigurationError, match="attached already, with noise per channel and not per element"):
        attach(model, initial_phi(0))
    with pytest.raises(ConfigurationError, match="noise_per of phi 'mine'=row is unknown; use one of element, channel"):
        attach(fresh(conv4), NamedPhi(initial_phi(0), "mine", noise_per="row"))
    other = DropBlockLike()
    other.noise_per = "row"
    with pytest.raises(ConfigurationError, match="noise_per=row is unknown"):
        attach(fresh(conv4), perturbation=other)


def test_weights_of_an_attached_model_can_be_averaged_with_its_buffers():
    model = fresh(conv4)
    attach(model, initial_phi(0), ramp_steps=2)
    averaged = AveragedModel(model, use_buffers=True)
    for _ in range(3):
        model.train()(images())
        averaged.update_parameters(model)
    assert attachment_of(averaged.module).perturbation.noise_per == "element"
    averaged.eval()(images())


def test_what_noise_is_drawn_for_can_be_set_and_goes_with_phi():
    net, twin = (MetaPerturb(initial_phi(0)) for _ in range(2))
    net.noise_per = "channel"
    twin.load_state_dict(net.state_dict())
    assert twin.noise_per == "channel"
    with pytest.raises(ConfigurationError, match="noise_per=row is unknown"):
        net.noise_per = "row"


@pytest.mark.parametrize("persistent", [True, False])
def test_a_phi_that_is_learned_has_82_numbers_in_its_state_and_keeps_its_noise(persistent):
    net = MetaPerturb(initial_phi(0), noise_per="channel", trainable=True, persistent=persistent)
    assert sum(value.numel() for value in net.state_dict().values()) == 82
    net.load_state_dict(MetaPerturb(initial_phi(1), trainable=True).state_dict())
    assert net.noise_per == "channel" and torch.equal(net.phi.op1_all, initial_phi(1).op1_all)
