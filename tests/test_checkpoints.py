"""Checkpoints: what is in them, how they come back, and a run that stops and goes on."""

import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_modules import Classifier, digits, loader, module, trainer
from mp_lightning import MetaPerturb, MetaPerturbCallback, SitePlan, attach, attachment_of, detach, find_sites
from mp_lightning.checkpoints import KEY, MARKER, CheckpointError, read_checkpoint
from mp_lightning.errors import ConfigurationError, SiteError
from mp_lightning.perturbation import NamedPhi, Phi, initial_phi


def trained(path, **options):
    """A trained module, its trainer, and a checkpoint made after fit."""
    model = module()
    run = trainer(path, [MetaPerturbCallback(initial_phi(0), **options)])
    run.fit(model, loader(4), loader(2))
    run.save_checkpoint(path / "end.ckpt")
    return model, run, path / "end.ckpt"


def logits(model):
    with torch.no_grad():
        return model.eval()(digits()[0][400:432])


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_checkpoint_holds_everything(tmp_path, weights_only):
    model, run, _ = trained(tmp_path)
    run.save_checkpoint(tmp_path / "a.ckpt", weights_only=weights_only)
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert ("optimizer_states" in content) is not weights_only
    state, attachment = content[KEY], attachment_of(model)
    for key, value in initial_phi(0)._asdict().items():
        assert torch.equal(state["phi"][key], value)
    assert SitePlan.from_dict(state["plan"]) == find_sites(module())
    for site in attachment.sites:
        kept = state["sites"][site.spec.name]
        assert torch.equal(kept["mean"], site.mean) and torch.equal(kept["var"], site.var)
        assert kept["mean"].any()
    assert state["counters"] == {"steps": 8, "forwards": 8}
    assert state["inference"]["inference"] == "mean"
    # The user's own keys are as they were; one marker stands beside them.
    assert set(content["state_dict"]) - {MARKER} == set(module().state_dict())
    assert content["state_dict"]._metadata == model.state_dict()._metadata


def test_model_checkpoint_with_weights_only(tmp_path):
    saver = ModelCheckpoint(tmp_path, save_weights_only=True, filename="w")
    run = trainer(tmp_path, [MetaPerturbCallback(inference="mc", full_strength_at=1), saver], enable_checkpointing=True)
    model = module()
    run.fit(model, loader(4), loader(2))
    content = torch.load(saver.best_model_path, weights_only=True)
    assert "callbacks" not in content and KEY in content
    restored = MetaPerturbCallback.restore(module(seed=1), saver.best_model_path)
    expected = run.test(model, loader(2), verbose=False)
    assert trainer(tmp_path, [MetaPerturbCallback(inference="mc")]).test(restored, loader(2), verbose=False) == expected


def test_a_plain_strict_load_fails_and_names_the_remedy(tmp_path):
    _, _, path = trained(tmp_path)
    with pytest.raises(RuntimeError, match=r"MetaPerturbCallback\.restore"):
        Classifier.load_from_checkpoint(path)
    with pytest.raises(RuntimeError, match=r"MetaPerturbCallback\.restore"):
        module().load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    with pytest.raises(RuntimeError, match=r"MetaPerturbCallback\.restore"):
        trainer(tmp_path).test(module(), loader(1), ckpt_path=path, verbose=False, weights_only=True)


def test_without_marker_a_plain_load_works(tmp_path):
    model, _, path = trained(tmp_path, marker=False)
    plain = Classifier.load_from_checkpoint(path)
    assert attachment_of(plain) is None
    for name, value in model.state_dict().items():
        assert torch.equal(plain.state_dict()[name], value)
    # A model that was restored from it writes no marker either.
    restored = MetaPerturbCallback.restore(module(seed=1), path)
    checkpoint = {"state_dict": restored.state_dict()}
    restored.on_save_checkpoint(checkpoint)
    assert KEY in checkpoint and MARKER not in checkpoint["state_dict"]


def test_restore_gives_identical_outputs(tmp_path):
    model, _, path = trained(tmp_path)
    restored = MetaPerturbCallback.restore(module(seed=1), path)
    assert not restored.training
    assert torch.equal(logits(restored), logits(model))
    assert attachment_of(restored).estimates.buffers.keys() == attachment_of(model).estimates.buffers.keys() != set()
    # And it is a whole one: detached it is a plain module, saved it is the same checkpoint.
    trainer(tmp_path, [MetaPerturbCallback()]).test(restored, loader(1), verbose=False)
    checkpoint = {"state_dict": restored.state_dict()}
    restored.on_save_checkpoint(checkpoint)
    assert torch.equal(checkpoint[KEY]["phi"]["op1_all"], initial_phi(0).op1_all)
    detach(restored)
    assert "on_save_checkpoint" not in vars(restored) and attachment_of(restored) is None


@pytest.mark.parametrize("strength", [None, 0.3])
def test_restore_brings_the_strength_back(tmp_path, strength):
    model = module()
    run = trainer(tmp_path, [MetaPerturbCallback(NamedPhi(initial_phi(0), "weaker", strength=0.6), strength=strength)])
    run.fit(model, loader(4), loader(2))
    run.save_checkpoint(tmp_path / "end.ckpt")
    restored = MetaPerturbCallback.restore(module(seed=1), tmp_path / "end.ckpt")
    assert float(attachment_of(restored).coeff) == pytest.approx(strength or 0.6)
    assert attachment_of(restored).perturbation.noise_per == "element"
    assert torch.equal(logits(restored), logits(model))


def test_resuming_keeps_the_strength_and_says_so(tmp_path, recwarn):
    _, _, path = trained(tmp_path, strength=0.5)
    model = module()
    run = trainer(tmp_path, [MetaPerturbCallback(initial_phi(0), strength=0.75)], max_epochs=3)
    run.fit(model, loader(4), loader(2), ckpt_path=path, weights_only=True)
    assert float(attachment_of(model).coeff) == 0.5
    assert any("trained at strength 0.5, which stays in force instead of 0.75" in str(one.message) for one in recwarn)


def test_a_second_fit_keeps_seed_and_clip_and_says_so(tmp_path, recwarn):
    model, _, _ = trained(tmp_path, seed=3, clip=50.0)
    trainer(tmp_path, [MetaPerturbCallback(initial_phi(0), seed=4, clip=None)]).fit(model, loader(4), loader(2))
    assert (attachment_of(model).seed, attachment_of(model).clip) == (3, 50.0)
    said = {str(one.message) for one in recwarn if "stays in force" in str(one.message)}
    assert said == {
        "MetaPerturb: the model was trained with seed=3, which stays in force instead of 4",
        "MetaPerturb: the model was trained with clip=50.0, which stays in force instead of None",
    }


def test_a_second_fit_computes_by_the_path_that_it_is_given(tmp_path):
    model, _, _ = trained(tmp_path)
    trainer(tmp_path, [MetaPerturbCallback(path="reference")]).fit(model, loader(4), loader(2))
    assert attachment_of(model).path == "reference"


def test_restore_brings_the_loss_that_the_strength_follows_back(tmp_path):
    model = module()
    run = trainer(tmp_path, [MetaPerturbCallback(initial_phi(0), full_strength_at=0.5, acts_below=0.9)], max_epochs=8)
    run.fit(model, loader(4), loader(2))
    run.save_checkpoint(tmp_path / "end.ckpt")
    restored = MetaPerturbCallback.restore(module(seed=1), tmp_path / "end.ckpt")
    assert float(attachment_of(restored).fitting.acts_below) == pytest.approx(0.9)
    assert attachment_of(restored).fitting.state() == attachment_of(model).fitting.state()
    assert 0 < float(attachment_of(restored).coeff) == float(attachment_of(model).coeff) < 1
    assert torch.equal(logits(restored), logits(model))


def test_a_short_run_that_is_resumed_reaches_as_much_as_one_at_a_stretch(tmp_path):
    trainer(tmp_path, [MetaPerturbCallback(), saver := ModelCheckpoint(tmp_path)], enable_checkpointing=True).fit(
        module(), loader(4)
    )
    resumed, whole = module(), module()
    trainer(tmp_path, [MetaPerturbCallback()], max_epochs=4).fit(
        resumed, loader(4), ckpt_path=saver.best_model_path, weights_only=True
    )
    trainer(tmp_path, [MetaPerturbCallback()], max_epochs=4).fit(whole, loader(4))
    assert attachment_of(resumed).reached == attachment_of(whole).reached == pytest.approx(16 / 1200)


def test_resuming_keeps_what_the_strength_follows_and_says_so(tmp_path, recwarn):
    _, _, path = trained(tmp_path)
    run = trainer(tmp_path, [MetaPerturbCallback(initial_phi(0), full_strength_at=0.5)], max_epochs=3)
    model = module()
    run.fit(model, loader(4), loader(2), ckpt_path=path, weights_only=True)
    assert float(attachment_of(model).fitting.full_strength_at) == 1
    said = "trained with full_strength_at=1, which stays in force instead of 0.5"
    assert any(said in str(one.message) for one in recwarn)


def test_restore_twice(tmp_path):
    model, _, path = trained(tmp_path)
    restored = MetaPerturbCallback.restore(module(seed=1), path)
    assert MetaPerturbCallback.restore(restored, path) is restored
    assert torch.equal(logits(restored), logits(model))


@pytest.mark.parametrize("inference", ["mean", "mc"])
def test_a_fresh_trainer_gives_identical_metrics(tmp_path, inference):
    options = {"inference": inference, "samples": 3}
    model, run, path = trained(tmp_path, **options)
    expected = run.test(model, loader(2, start=400), verbose=False)
    restored = MetaPerturbCallback.restore(module(seed=1), path)
    fresh = trainer(tmp_path, [MetaPerturbCallback(**options)])
    assert fresh.test(restored, loader(2, start=400), verbose=False) == expected
    # The same by ckpt_path, with a module that was never attached.
    fresh = trainer(tmp_path, [MetaPerturbCallback(**options)])
    found = fresh.test(module(seed=2), loader(2, start=400), ckpt_path=path, verbose=False, weights_only=True)
    assert found == expected


def test_restoring_a_checkpoint_from_within_fit_says_what_is_missing(tmp_path, recwarn):
    saver = ModelCheckpoint(tmp_path, filename="during")
    run = trainer(tmp_path, [MetaPerturbCallback(full_strength_at=1), saver], enable_checkpointing=True)
    run.fit(module(), loader(4), loader(2))
    recwarn.clear()
    MetaPerturbCallback.restore(module(), saver.best_model_path)
    assert any("batch norm was not re-estimated" in str(w.message) for w in recwarn)


def _damaged(path, kind):
    if kind == "missing":
        return path / "absent.ckpt"
    target = path / f"{kind}.ckpt"
    if kind == "damaged":
        content = (path / "end.ckpt").read_bytes()
        target.write_bytes(content[: len(content) // 2])
    elif kind == "pickle":
        torch.save({"state_dict": {}, "anything": random.Random(0)}, target)
    elif kind == "folder":
        target.mkdir()
    else:
        torch.save(
            {"foreign": {"state_dict": {}}, "tensor": torch.zeros(2), "odd": {KEY: 3, "state_dict": {}}}[kind], target
        )
    return target


@pytest.mark.parametrize("kind", ["missing", "damaged", "pickle", "folder", "foreign", "tensor", "odd"])
def test_bad_checkpoints_are_named(tmp_path, kind):
    if kind == "damaged":
        trained(tmp_path)
    target = _damaged(tmp_path, kind)
    with pytest.raises(CheckpointError) as caught:
        MetaPerturbCallback.restore(module(), target)
    assert str(target) in str(caught.value) and "\n" not in str(caught.value)


def test_restore_into_another_model_leaves_it_plain(tmp_path):
    _, _, path = trained(tmp_path)
    other = module(name="resnet20")
    with pytest.raises(CheckpointError, match="not those of a Classifier"):
        MetaPerturbCallback.restore(other, path)
    assert attachment_of(other) is None
    assert not any(m._forward_pre_hooks for m in other.modules())


class KeepsRandomStates(pl.Callback):
    """What a user needs for shuffled data: Lightning does not restore random states."""

    states = None

    def state_dict(self):
        return {"torch": torch.get_rng_state(), "numpy": list(np.random.get_state()[1].tolist())}

    def load_state_dict(self, state_dict):
        self.states = state_dict

    def on_fit_start(self, trainer, pl_module):
        if self.states is not None:
            torch.set_rng_state(self.states["torch"])
            name, _, *rest = np.random.get_state()
            np.random.set_state((name, np.array(self.states["numpy"], dtype=np.uint32), *rest))


class StopAfter(pl.Callback):
    """Ends a run as a killed process does: after the epoch's checkpoint, before anything that ends a training."""

    def __init__(self, epochs):
        self.epochs = epochs

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epochs:
            raise RuntimeError("killed")


def everything(model):
    attachment = attachment_of(model)
    state = attachment.state()
    tensors = dict(model.state_dict())
    for site, statistics in state["sites"].items():
        tensors |= {f"{site}.{name}": value for name, value in statistics.items()}
    tensors |= {f"evaluation.{name}": value for name, value in state["evaluation_buffers"].items()}
    return tensors, state["counters"], float(attachment.coeff), float(attachment.input_size)


def _epochs(path, shuffled, epochs=4, stop=None, seed=0):
    torch.manual_seed(seed)
    np.random.seed(seed)
    saver = ModelCheckpoint(path, filename="{epoch}", save_top_k=-1)
    callbacks = [MetaPerturbCallback(full_strength_at=1), saver]
    if shuffled:
        callbacks.insert(0, KeepsRandomStates())
    if stop is not None:
        callbacks.append(StopAfter(stop))
    run = trainer(path, callbacks, max_epochs=epochs, enable_checkpointing=True)
    return run, module(seed=seed, dropout=0.1 if shuffled else 0.0)


@pytest.fixture(scope="module", params=[False, True], ids=["unshuffled", "shuffled"])
def uninterrupted(request, tmp_path_factory):
    run, model = _epochs(tmp_path_factory.mktemp("whole"), request.param)
    torch.manual_seed(7)
    run.fit(model, loader(3, shuffle=request.param), loader(1, start=400))
    return request.param, everything(model)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_run_that_stops_and_goes_on_ends_bit_identical(tmp_path, uninterrupted, stop):
    shuffled, (tensors, *numbers) = uninterrupted
    run, model = _epochs(tmp_path, shuffled, stop=stop)
    torch.manual_seed(7)
    with pytest.raises(RuntimeError, match="killed"):
        run.fit(model, loader(3, shuffle=shuffled), loader(1, start=400))
    run, model = _epochs(tmp_path, shuffled, seed=1)
    path = tmp_path / f"epoch={stop - 1}.ckpt"
    run.fit(model, loader(3, shuffle=shuffled), loader(1, start=400), ckpt_path=path, weights_only=True)
    found, *found_numbers = everything(model)
    assert found_numbers == numbers and numbers[0] == {"steps": 12, "forwards": 12}
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert torch.equal(found[name], value), name


def test_resuming_with_other_sites_is_refused(tmp_path):
    _, _, path = trained(tmp_path)
    plan = find_sites(module()).without("net.conv_layers.0*")
    run = trainer(tmp_path, [MetaPerturbCallback(sites=plan, full_strength_at=1)])
    with pytest.raises(SiteError, match=r"other sites.*conv_layers\.0"):
        run.fit(module(), loader(4), ckpt_path=path, weights_only=True)


def test_resuming_takes_the_checkpoints_phi(tmp_path):
    _, _, path = trained(tmp_path)
    model = module()
    trainer(tmp_path, [MetaPerturbCallback(initial_phi(1))], max_epochs=3).fit(
        model, loader(4), ckpt_path=path, weights_only=True
    )
    for key, value in initial_phi(0)._asdict().items():
        assert torch.equal(Phi(**attachment_of(model).state()["phi"])._asdict()[key], value)


class WithOwnState(Classifier):
    """A user's module that keeps something in checkpoints."""

    def on_save_checkpoint(self, checkpoint):
        checkpoint["mine"] = {"answer": 42, "keys": len(checkpoint["state_dict"])}

    def on_load_checkpoint(self, checkpoint):
        self.found = checkpoint["mine"]["answer"]
        self.saw_marker = MARKER in checkpoint["state_dict"]


def test_the_modules_own_hooks_still_run(tmp_path):
    model = module(WithOwnState)
    run = trainer(tmp_path, [MetaPerturbCallback(full_strength_at=1)])
    run.fit(model, loader(2))
    run.save_checkpoint(tmp_path / "own.ckpt")
    content = read_checkpoint(tmp_path / "own.ckpt")
    assert content["mine"] == {"answer": 42, "keys": len(module().state_dict())}
    again = module(WithOwnState)
    trainer(tmp_path, [MetaPerturbCallback()], max_epochs=3).fit(
        again, loader(2), ckpt_path=tmp_path / "own.ckpt", weights_only=True
    )
    assert again.found == 42 and not again.saw_marker


def test_hooks_that_someone_set_on_the_object_still_run(tmp_path):
    model, seen = module(), []

    def save(checkpoint):
        seen.append("saved")

    model.on_save_checkpoint = save
    run = trainer(tmp_path, [MetaPerturbCallback(full_strength_at=1)])
    run.fit(model, loader(2))
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert seen == ["saved"] and KEY in torch.load(tmp_path / "a.ckpt", weights_only=True)
    detach(model)
    assert model.on_save_checkpoint is save


class KeepsAnExtra(Classifier):
    extra = 0

    def on_save_checkpoint(self, checkpoint):
        checkpoint["extra"] = 5

    def on_load_checkpoint(self, checkpoint):
        self.extra = checkpoint["extra"]


def test_restore_runs_the_hook_of_the_module(tmp_path):
    model = module(KeepsAnExtra)
    run = trainer(tmp_path, [MetaPerturbCallback()])
    run.fit(model, loader(2))
    run.save_checkpoint(tmp_path / "end.ckpt")
    assert MetaPerturbCallback.restore(module(KeepsAnExtra), tmp_path / "end.ckpt").extra == 5


def test_a_python_object_in_the_checkpoint_is_named(tmp_path):
    _, _, path = trained(tmp_path)
    content = torch.load(path, weights_only=True)
    content["hyper_parameters"] = {"optimizer": torch.optim.Adam}
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"Python object \(torch\.optim\.adam\.Adam\).*save_hyperparameters"):
        read_checkpoint(path)


def test_restore_brings_the_noise_of_channels_back(tmp_path):
    model = module()
    phi = NamedPhi(initial_phi(0), "mine", noise_per="channel")
    run = trainer(tmp_path, [MetaPerturbCallback(phi, inference="mc")])
    run.fit(model, loader(4), loader(2))
    run.save_checkpoint(tmp_path / "end.ckpt")
    restored = MetaPerturbCallback.restore(module(seed=1), tmp_path / "end.ckpt")
    assert attachment_of(restored).perturbation.noise_per == "channel"
    expected = run.test(model, loader(2), verbose=False)
    assert trainer(tmp_path, [MetaPerturbCallback(inference="mc")]).test(restored, loader(2), verbose=False) == expected


def test_resuming_keeps_the_noise_and_says_so(tmp_path, recwarn):
    _, _, path = trained(tmp_path)
    run = trainer(
        tmp_path, [MetaPerturbCallback(NamedPhi(initial_phi(0), "given phi", noise_per="channel"))], max_epochs=3
    )
    model = module(seed=1)
    run.fit(model, loader(4), loader(2), ckpt_path=path, weights_only=True)
    assert attachment_of(model).perturbation.noise_per == "element"
    assert any(
        "noise per element, which stays in force instead of noise per channel" in str(one.message) for one in recwarn
    )


def test_restore_takes_the_weights_that_the_module_chooses(tmp_path):
    class Averaged(Classifier):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["averages"] = {
                name: torch.full_like(value, 0.5) if name == "net.fc.bias" else value / 2 if value.dim() == 4 else value
                for name, value in checkpoint["state_dict"].items()
            }

        def on_load_checkpoint(self, checkpoint):
            checkpoint["state_dict"] = dict(checkpoint["averages"])

    run = trainer(tmp_path, [MetaPerturbCallback(full_strength_at=1)])
    run.fit(module(Averaged), loader(2))
    run.save_checkpoint(tmp_path / "a.ckpt")
    restored = MetaPerturbCallback.restore(module(Averaged, seed=1), tmp_path / "a.ckpt")
    assert bool((restored.net.fc.bias == 0.5).all())
    with pytest.warns(UserWarning, match="not re-estimated"):  # which was done for the other weights
        restored(digits()[0][:4])


def test_restore_is_as_strict_as_the_module(tmp_path):
    class Lax(Classifier):
        strict_loading = False

        def on_save_checkpoint(self, checkpoint):
            del checkpoint["state_dict"]["net.fc.bias"]  # as of a part that is loaded from elsewhere

    run = trainer(tmp_path, [MetaPerturbCallback(full_strength_at=1)])
    run.fit(module(Lax), loader(2))
    run.save_checkpoint(tmp_path / "a.ckpt")
    model = module(Lax, seed=1)
    own = model.net.fc.bias.detach().clone()
    assert torch.equal(MetaPerturbCallback.restore(model, tmp_path / "a.ckpt").net.fc.bias, own)


class Halved(MetaPerturb):
    """Computes something else than phi alone says."""

    def multiplier(self, x, eps, statistics, norms):
        return super().multiplier(x, eps, statistics, norms) / 2


def trained_with(path, perturbation):
    model = module()
    run = trainer(path, [MetaPerturbCallback(perturbation=perturbation, sites=1.0, ramp_steps=0)])
    run.fit(model, loader(4))
    run.save_checkpoint(path / "own.ckpt")
    return model, path / "own.ckpt"


@pytest.mark.parametrize("persistent", [True, False])
def test_a_subclass_of_metaperturb_is_not_restored_as_what_it_is_not(tmp_path, persistent):
    own = Halved(initial_phi(0), persistent=persistent)
    model, checkpoint = trained_with(tmp_path, own)
    with pytest.raises(ConfigurationError, match="perturbation 'metaperturb', which it does not hold; attach it with"):
        MetaPerturbCallback.restore(module(seed=1), checkpoint)
    again = module(seed=1)
    attach(again, perturbation=Halved(initial_phi(0), persistent=persistent), sites=1.0)
    MetaPerturbCallback.restore(again, checkpoint)
    assert torch.equal(logits(again), logits(model))


def test_a_metaperturb_that_was_given_as_a_perturbation_is_restored(tmp_path):
    model, checkpoint = trained_with(tmp_path, MetaPerturb(initial_phi(0), noise_per="channel"))
    restored = MetaPerturbCallback.restore(module(seed=1), checkpoint)
    assert attachment_of(restored).perturbation.noise_per == "channel"
    assert torch.equal(logits(restored), logits(model))
