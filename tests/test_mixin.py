"""The perturbation declared as part of a module."""

import warnings

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint

from lightning_modules import Classifier, digits, loader, module, trainer
from mp_lightning import MetaPerturbCallback, MetaPerturbMixin, attachment_of
from mp_lightning.checkpoints import MARKER
from mp_lightning.errors import ConfigurationError
from mp_lightning.perturbation import NamedPhi, initial_phi


class Declared(MetaPerturbMixin, Classifier):
    def __init__(self, phi_seed=0, **options):
        super().__init__()
        self.save_hyperparameters()
        self.perturb(initial_phi(phi_seed), **options)


class Forgotten(MetaPerturbMixin, Classifier):
    """Its author has the mixin but never calls perturb()."""


class WithCallbacks(Declared):
    def configure_callbacks(self):
        return [*super().configure_callbacks(), ModelCheckpoint(filename="mine")]


class OneCallback(Classifier):
    def configure_callbacks(self):
        return LearningRateMonitor()  # Lightning allows one without a list


class InheritsOneCallback(MetaPerturbMixin, OneCallback):
    def __init__(self):
        super().__init__()
        self.perturb(initial_phi(0))


def test_phi_and_statistics_are_in_the_state_dict():
    model = module(Declared)
    added = set(model.state_dict()) - set(module().state_dict())
    assert {f"_metaperturb.perturbation.{name}" for name in initial_phi(0)._fields} <= added
    sites = [f"_metaperturb.sites.{index}.{name}" for index in range(4) for name in ("mean", "var")]
    assert set(sites) <= added
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in module().named_parameters()]


def test_trains_as_with_the_callback(tmp_path):
    declared, called = module(Declared), module()
    run = trainer(tmp_path)
    run.fit(declared, loader(4), loader(2))
    trainer(tmp_path, [MetaPerturbCallback(initial_phi(0))]).fit(called, loader(4), loader(2))
    for name, value in called.state_dict().items():
        assert torch.equal(declared.state_dict()[name], value), name
    assert not torch.equal(called.net.fc.weight, module().net.fc.weight)
    x = digits()[0][:8]
    assert torch.equal(declared.eval()(x), called.eval()(x))
    assert run.test(declared, loader(2), verbose=False) == run.test(declared, loader(2), verbose=False)


@pytest.mark.parametrize("inference", ["mean", "mc"])
def test_load_from_checkpoint(tmp_path, inference):
    model = module(Declared, inference=inference, samples=3)
    run = trainer(tmp_path)
    run.fit(model, loader(4), loader(2))
    run.save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert MARKER not in content["state_dict"]
    loaded = Declared.load_from_checkpoint(tmp_path / "a.ckpt", phi_seed=3)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert torch.equal(attachment_of(loaded).perturbation.op1_all, initial_phi(0).op1_all)
    expected = run.test(model, loader(2), verbose=False)
    assert trainer(tmp_path).test(loaded, loader(2), verbose=False) == expected
    x = digits()[0][:8]
    model.eval()
    loaded.eval()
    for m in (model, loaded):
        attachment_of(m).evaluations.zero_()
    assert torch.equal(loaded(x), model(x))


def test_a_declared_module_averages_samples_before_batch_norm_is_reestimated():
    """Not a single sample of noise, whatever trainer or loop it comes to."""
    model = module(Declared).eval()
    attachment_of(model).ramp_over(0)
    with torch.no_grad(), pytest.warns(UserWarning, match="20 noisy forwards are averaged"):
        model(digits()[0][:8])
    assert int(attachment_of(model).evaluations) == 20


def test_a_declared_module_that_nothing_was_trained_in_is_evaluated_in_one_forward():
    """Nothing acts in it, so there is nothing to average, and nothing to warn of."""
    model, calls = module(Declared).eval(), []
    model.net.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        model(digits()[0][:8])
    assert len(calls) == 1


def test_a_file_of_a_module_that_did_not_declare_it_is_loaded_like_any_other(tmp_path):
    called = module()
    run = trainer(tmp_path, [MetaPerturbCallback(initial_phi(0))])
    run.fit(called, loader(4))
    run.save_checkpoint(tmp_path / "called.ckpt")
    declared = Declared.load_from_checkpoint(tmp_path / "called.ckpt", weights_only=True).eval()
    x = digits()[0][:8]
    assert torch.equal(declared(x), called.eval()(x))
    assert int(attachment_of(declared).steps) == 8


def test_plain_state_dict_round_trip():
    model, other = module(Declared), module(Declared, seed=1, phi_seed=1)
    model.train()(digits()[0][:8])
    other.load_state_dict(model.state_dict())
    x = digits()[0][8:16]
    assert torch.equal(other.train()(x), model.train()(x))
    assert float(attachment_of(other).input_size) == 16


@pytest.mark.parametrize("by", ["weights", "state"])
def test_images_of_an_evaluation_do_not_change_the_height_that_was_loaded(by):
    model, other = module(Declared), module(Declared)
    model.train()(digits()[0][:8])
    if by == "weights":
        other.load_state_dict(model.state_dict())
    else:
        attachment_of(other).load_state(attachment_of(model).state())
    other.eval()(torch.rand(2, 3, 24, 24))
    assert float(attachment_of(other).input_size) == 16


def test_resume(tmp_path):
    whole, parts = module(Declared), module(Declared)
    trainer(tmp_path, max_epochs=3).fit(whole, loader(3))
    first = trainer(tmp_path, max_epochs=2)
    first.fit(parts, loader(3))
    first.save_checkpoint(tmp_path / "a.ckpt")
    again = module(Declared, seed=1)
    trainer(tmp_path, max_epochs=3).fit(again, loader(3), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert int(attachment_of(again).forwards) == 9
    assert not torch.equal(again.net.fc.weight, parts.net.fc.weight)
    # The ramp follows the run that it is in: 2 of 6 batches in the first part, so only the counters agree with `whole`.
    assert int(attachment_of(whole).steps) == int(attachment_of(again).steps) == 9


def test_a_forgotten_perturb_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"Forgotten.*self\.perturb\(\)"):
        trainer(tmp_path).fit(module(Forgotten), loader(1))


@pytest.mark.parametrize("cls", [WithCallbacks, InheritsOneCallback])
def test_callbacks_of_the_module_are_kept(tmp_path, cls):
    model = module(cls)
    run = trainer(tmp_path, max_epochs=1, logger=True, enable_checkpointing=True)
    run.fit(model, loader(2))
    kinds = [type(callback) for callback in run.callbacks]
    assert kinds.count(MetaPerturbCallback) == 1
    assert (LearningRateMonitor in kinds) is (cls is InheritsOneCallback)
    assert int(attachment_of(model).steps) == 2


def test_a_callback_in_the_trainer_as_well_acts_once(tmp_path):
    model = module(Declared)
    run = trainer(tmp_path, [MetaPerturbCallback(full_strength_at=1)], max_epochs=1)
    run.fit(model, loader(2))
    assert int(attachment_of(model).steps) == 2


class Weaker(MetaPerturbMixin, Classifier):
    def __init__(self):
        super().__init__()
        self.perturb(NamedPhi(initial_phi(0), "weaker", strength=0.5))


def test_a_declared_module_trains_on_with_the_strength_that_it_loaded(tmp_path):
    weights = Weaker().state_dict()
    weights["_metaperturb.strength"] = torch.tensor(0.25)
    model = Weaker()
    model.load_state_dict(weights)
    trainer(tmp_path).fit(model, loader(4))
    assert float(attachment_of(model).coeff) == 0.25


class Everywhere(MetaPerturbMixin, Classifier):
    def __init__(self, sites=1):
        super().__init__()
        self.perturb(sites=sites)


@pytest.mark.parametrize("strict", [True, False])
def test_weights_of_another_number_of_sites_are_refused(strict):
    """Statistics are kept by the numbers of the sites, and would come to the wrong ones."""
    with pytest.raises(RuntimeError, match=r"at 1 sites of this module and at 4 .*such as self\.perturb\(sites=1\)"):
        Everywhere(0.25).load_state_dict(Everywhere().state_dict(), strict=strict)
    Everywhere().load_state_dict(Everywhere().state_dict(), strict=strict)
    Everywhere(0.25).load_state_dict(Everywhere(0.25).state_dict(), strict=strict)


class OfChannels(MetaPerturbMixin, Classifier):
    def __init__(self):
        super().__init__()
        self.perturb(NamedPhi(initial_phi(1), "of channels", noise_per="channel"))


@pytest.mark.parametrize("strict", [True, False])
def test_weights_decide_what_noise_is_drawn_for(strict):
    """The class that reads them has no say, since phi comes with them."""
    model = Weaker()
    model.load_state_dict(OfChannels().state_dict(), strict=strict)
    assert attachment_of(model).perturbation.noise_per == "channel"
    model = OfChannels()
    model.load_state_dict(Weaker().state_dict(), strict=strict)
    assert attachment_of(model).perturbation.noise_per == "element"


def test_the_mixin_comes_before_the_lightning_module():
    class Behind(Classifier, MetaPerturbMixin):
        def __init__(self):
            super().__init__()
            self.perturb()

    with pytest.raises(ConfigurationError, match=r"name the mixin first: class Behind\(MetaPerturbMixin"):
        Behind()
