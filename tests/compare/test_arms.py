"""Arms by name: what each does in a run, how they combine, and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from small_runs import PHI, experiment, made, plan
from torch import nn

from mp_lightning.backbones import build_backbone
from mp_lightning.callback import MetaPerturbCallback
from mp_lightning.compare.arm_callbacks import Context, callbacks_of
from mp_lightning.compare.arms import KINDS, Arm, NamedArm, parse_arm
from mp_lightning.compare.at_sites import AtSites
from mp_lightning.compare.mixing import MixUp
from mp_lightning.compare.moments import SiteMoments
from mp_lightning.errors import ConfigurationError, PhiError
from mp_lightning.perturbation import NamedPhi, initial_phi, save_phi

CONTEXT = Context(seed=0, num_classes=3, inference="mc", samples=2)
NOISY = {name for name, kind in KINDS.items() if kind.multiplies} - {"shrink_only", "scale_only"}


@pytest.fixture(scope="module")
def every_arm(tmp_path_factory: pytest.TempPathFactory):
    """One run of every arm there is, and of a combination."""
    names = [*KINDS, "metaperturb+mixup", "dropout:0.2+label_smoothing", "mean_one+manifold_mixup+gaussian:0.1"]
    outcome, _ = made(plan(names, 1), tmp_path_factory.mktemp("arms"))
    return {row.arm: row for row in outcome.rows}, outcome


@pytest.mark.parametrize("name", [name for name in KINDS if name != "none"])
def test_every_arm_trains_otherwise_than_none(every_arm, name: str) -> None:
    rows, _ = every_arm
    assert rows[name].nll != rows["none"].nll
    assert torch.isfinite(torch.tensor(rows[name].nll))


def test_every_combination_differs_from_its_parts(every_arm) -> None:
    rows, _ = every_arm
    assert len({rows[name].nll for name in ("metaperturb", "mixup", "metaperturb+mixup")}) == 3
    assert rows["metaperturb+mixup"].inference == "mc" and rows["mixup"].inference == "plain"
    assert rows["mean_one+manifold_mixup+gaussian:0.1"].inference == "mc"


def test_noise_in_evaluation_is_that_of_the_declared_mode_and_its_mean_is_reported(every_arm) -> None:
    rows, _ = every_arm
    for name, row in rows.items():
        kinds = {part.kind.multiplies for part in parse_arm(name, PHI).parts}
        assert row.inference == ("mc" if True in kinds else "plain"), name
        if row.inference == "plain":
            assert (row.mean_accuracy, row.mean_nll) == (row.accuracy, row.nll), name
    assert all(rows[name].mean_nll != rows[name].nll for name in NOISY)


def test_controls_have_the_multiplier_of_phi(every_arm) -> None:
    """Loosely: what was measured in a pilot run holds about in the run itself."""
    _, outcome = every_arm
    sites = {arm: outcome.details[arm, 0].multiplier for arm in ("metaperturb", "fixed_noise", "shrink_only", "none")}
    (phi,), (fixed,), (shrunk,) = sites["metaperturb"], sites["fixed_noise"], sites["shrink_only"]
    assert sites["none"] == []
    assert fixed.mean == pytest.approx(phi.mean, rel=0.1) and fixed.std == pytest.approx(phi.std, rel=0.2)
    assert shrunk.mean == pytest.approx(fixed.mean, rel=0.1) and shrunk.std == pytest.approx(0, abs=1e-3)


def test_values_and_phi_are_read_from_the_name(tmp_path: Path) -> None:
    save_phi(tmp_path / "mine.safetensors", initial_phi(7), {})
    arm = parse_arm(f"metaperturb:{tmp_path / 'mine.safetensors'}+mixup:0.7", PHI)
    assert torch.equal(arm.parts[0].phi.phi.op1_all, initial_phi(7).op1_all)
    assert arm.parts[1].value == 0.7 and arm.parameters == "alpha=0.7"
    assert parse_arm("fixed_noise", PHI).parts[0].phi is PHI
    assert parse_arm("random_phi", PHI).control and parse_arm("random_phi+mixup", PHI).control
    assert not arm.control


@pytest.mark.parametrize("arm", [name for name, kind in KINDS.items() if kind.multiplies])
def test_all_that_stands_in_place_of_phi_acts_at_its_strength(arm: str) -> None:
    """A control at another strength, with other noise, or at other sites, would be matched to nothing."""
    phi = NamedPhi(
        initial_phi(0),
        "weaker",
        strength=0.6,
        noise_per="channel",
        share_of_sites=0.25,
        full_strength_at=0.3,
        acts_below=0.7,
    )
    parsed = parse_arm(arm, phi)
    parsed = replace(parsed, parts=(replace(parsed.parts[0], moments=[]),))
    callback = callbacks_of(parsed, CONTEXT)[1]
    assert callback is not None
    attachment = callback.attach(build_backbone("conv4", 3, width=4, image_size=16))
    assert float(attachment.strength) == pytest.approx(0.6)
    assert float(attachment.fitting.full_strength_at) == pytest.approx(0.3)
    assert float(attachment.fitting.acts_below) == pytest.approx(0.7)
    assert arm == "shrink_only" or attachment.perturbation.noise_per == "channel"
    assert len(attachment.plan) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dropuot", "arm 'dropuot': 'dropuot' is unknown; use one of none, dropout, dropblock"),
        ("", "'' is unknown"),
        ("metaperturb+", "'' is unknown"),
        ("dropout:much", "p=much is not a number from 0; write for example dropout:0.1"),
        ("dropout:-1", "p=-1 is not a number"),
        ("dropout:nan", "p=nan is not a number"),
        ("none:1", "'none' takes no value; leave ':1' out"),
        ("random_phi:x", "'random_phi' takes no value"),
        ("none+dropout", "name each part once, and 'none' alone"),
        ("dropout+dropout:0.1", "name each part once"),
        ("metaperturb+fixed_noise", "metaperturb and fixed_noise both stand at the sites"),
    ],
)
def test_what_cannot_be_read_or_combined_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_arm(text, PHI)
    assert message in str(caught.value)


def test_a_phi_that_does_not_load_is_refused() -> None:
    with pytest.raises(PhiError, match=r"'nowhere\.safetensors' does not exist"):
        parse_arm("metaperturb:nowhere.safetensors", PHI)


@pytest.mark.parametrize("name", ["mixup", "manifold_mixup", "label_smoothing"])
def test_arms_that_mix_labels_ask_for_the_number_of_classes(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"arm '{name}' needs the number of classes; pass num_classes="):
        callbacks_of(parse_arm(name, PHI), replace(CONTEXT, num_classes=None))


def test_an_arm_is_callbacks_that_can_be_used_elsewhere() -> None:
    (mixup,), none = callbacks_of(parse_arm("mixup:0.5", PHI), CONTEXT)
    assert isinstance(mixup, MixUp) and none is None
    found, perturbation = callbacks_of(parse_arm("dropout+metaperturb", PHI), CONTEXT)
    assert [type(one) for one in found] == [AtSites, MetaPerturbCallback] and found[1] is perturbation
    assert callbacks_of(parse_arm("none", PHI), CONTEXT) == ([], None)


@pytest.mark.parametrize(
    ("half", "share", "names"),
    [
        *(("first", 1.0, ["0", "1", "2"]), ("last", 1.0, ["2", "3", "4"])),
        *(("first", 0.6, ["2", "3"]), ("last", 0.6, ["3", "4"])),
        *(("first", 0.4, ["3"]), ("last", 0.4, ["4"])),
    ],
)
def test_halves_are_those_by_depth_of_the_sites_that_phi_takes(half: str, share: float, names: list[str]) -> None:
    layers = [nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.ReLU()) for _ in range(5)]
    net = nn.Sequential(*layers)
    callback = callbacks_of(parse_arm(f"{half}_sites", replace(PHI, share_of_sites=share)), CONTEXT)[1]
    assert callback is not None
    attachment = callback.attach(net)
    assert [name.partition(".")[0] for name in attachment.plan.names] == names


class Counter(Callback):
    """Counts training batches of all runs."""

    total = 0

    def on_train_batch_end(self, *args, **options) -> None:
        Counter.total += 1


def test_an_arm_of_ones_own(tmp_path: Path) -> None:
    seeds: list[int] = []

    def callbacks(seed: int) -> list[Callback]:
        seeds.append(seed)
        return [Counter()]

    arms = [Arm("counting", callbacks), Arm("noisy", lambda seed: [MetaPerturbCallback(PHI)])]
    outcome, _ = made(plan(arms), tmp_path)
    by_arm = {arm: [row for row in outcome.rows if row.arm == arm] for arm in ("none", "counting", "noisy")}
    assert Counter.total == 12 and len(set(seeds)) == 2
    assert [row.nll for row in by_arm["counting"]] == [row.nll for row in by_arm["none"]]
    assert by_arm["noisy"][0].inference == "mean" and by_arm["noisy"][0].nll == by_arm["noisy"][0].mean_nll


def test_matched_controls_take_moments_site_by_site() -> None:
    arm = parse_arm("shrink_only", PHI)
    part = replace(arm.parts[0], moments=[SiteMoments("net.2", 0.37, 0.01)])
    _, perturbation = callbacks_of(NamedArm("shrink_only", (part,)), CONTEXT)
    assert perturbation is not None
    attachment = perturbation.attach(experiment().module_factory())
    assert list(attachment.plan.names) == ["net.2"]
    assert float(attachment.sites[0].statistics["factor"]) == pytest.approx(0.37)
