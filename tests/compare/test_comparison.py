"""A comparison continues with what is missing, and never repeats or loses a run."""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from small_runs import PHI, Counting, Small, SmallData, experiment, made, plan
from torch import nn
from torch.utils.data import DataLoader

from mp_lightning.compare.arms import Arm, parse_arm
from mp_lightning.compare.calibration import moments_path, read_moments, write_moments
from mp_lightning.compare.comparison import RESULTS, _identity, _key, carry_out, check_plan
from mp_lightning.compare.moments import SiteMoments
from mp_lightning.compare.results import Row
from mp_lightning.compare.run import RunError
from mp_lightning.compare.store import RunKey
from mp_lightning.compare.tuning import Budget
from mp_lightning.compare.user_data import UserData
from mp_lightning.errors import ConfigurationError, DataError, SiteError
from mp_lightning.perturbation import NamedPhi, initial_phi, load_phi

MEASURED = {"step_ms", "seconds"}


def results(rows: list[Row]) -> list[dict[str, Any]]:
    """What does not depend on the clock."""
    return [{name: value for name, value in vars(row).items() if name not in MEASURED} for row in rows]


class StopError(Exception):
    """Stands for the end of the process."""


def stopping_after(count: int) -> Callable[..., Any]:
    class Stopping(Counting):
        def __enter__(self):
            shown = super().__enter__()
            finished = shown.finished

            def stop(row: Row) -> None:
                finished(row)
                if len(self.made) == count:
                    raise StopError

            shown.finished = stop
            return shown

    return Stopping()


def test_an_interrupted_comparison_continues_with_the_rest(tmp_path: Path) -> None:
    what = plan(["none", "dropout", "fixed_noise"], budget=Budget(2, 1))
    expected, display = made(what, tmp_path / "whole")
    assert len(display.made) == 8 and display.steps == (8 + 1) * 6, "the runs, and the one in which phi is measured"
    for count in (1, 2, 5):
        folder = tmp_path / str(count)
        folder.mkdir()
        with pytest.raises(StopError):
            carry_out(what, folder, stopping_after(count))
        outcome, rest = made(what, folder)
        assert rest.made == display.made[count:]
        assert results(outcome.rows) == results(expected.rows)
        assert outcome.tuned == expected.tuned and outcome.details.keys() == expected.details.keys()


@pytest.fixture(autouse=True)
def folders(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()


def test_seeds_and_arms_can_be_added_later(tmp_path: Path) -> None:
    made(plan(["none"], 2), tmp_path)
    outcome, display = made(plan(["none", "metaperturb"], 3), tmp_path)
    assert display.made == [("metaperturb", 0), ("metaperturb", 1), ("none", 2), ("metaperturb", 2)]
    assert [(row.arm, row.seed) for row in outcome.rows] == [
        *(("none", seed) for seed in range(3)),
        *(("metaperturb", seed) for seed in range(3)),
    ]
    assert made(plan(["none", "metaperturb"], 3), tmp_path)[1].made == []


def test_runs_are_made_seed_by_seed_and_the_baseline_is_never_missing(tmp_path: Path) -> None:
    _, display = made(plan(["metaperturb"], 2), tmp_path)
    assert display.made == [("none", 0), ("metaperturb", 0), ("none", 1), ("metaperturb", 1)]


def test_what_was_made_with_other_settings_is_not_taken_for_ours(tmp_path: Path) -> None:
    made(plan(["none", "metaperturb", "dropout:0.1"], 1, settings={"lr": 0.1}), tmp_path)
    _, display = made(plan(["none"], 1, settings={"lr": 0.2}), tmp_path)
    assert display.made == [("none", 0)]
    arms = ["none", "dropout:0.1", "metaperturb"]
    other = load_phi(initial_phi(8))

    changed = plan([parse_arm(arm, other) for arm in arms], 1, settings={"lr": 0.1})
    assert made(changed, tmp_path)[1].made == [("metaperturb", 0)], "another phi under the same name"
    assert (tmp_path / RESULTS).read_text().count("\n") == 6


@pytest.mark.parametrize(
    "meant_for",
    [
        *({"strength": 0.5}, {"noise_per": "channel"}, {"share_of_sites": 0.5}, {"full_strength_at": 0.4}),
        {"full_strength_at": 0.4, "acts_below": 0.6},
    ],
)
def test_a_random_phi_that_acts_otherwise_is_made_again(tmp_path: Path, meant_for: dict[str, Any]) -> None:
    """Its numbers are drawn by seed, so that nothing but what phi is meant for tells the two apart."""
    usual = NamedPhi(initial_phi(8), "same name")
    runs = []
    for phi in (usual, usual, replace(usual, **meant_for)):
        _, display = made(plan([parse_arm("random_phi", phi)], 1), tmp_path)
        runs.append([arm for arm, _ in display.made if arm == "random_phi"])
    assert runs == [["random_phi"], [], ["random_phi"]]


@pytest.mark.parametrize(("steps", "same"), [(1199, False), (1200, True), (None, False)])
def test_runs_that_may_reach_less_of_the_strength_are_told_apart_from_older_ones(steps: int | None, same: bool) -> None:
    """Runs of 1,200 steps and more are those that were made before short ones were treated otherwise."""
    keys = []
    for ramp in (True, False):
        what = plan([parse_arm("metaperturb", load_phi())], 1)
        what = replace(what, experiment=replace(what.experiment, steps=steps, ramp=ramp))
        keys.append(_key(what, what.arms[0], 0))
    assert (keys[0] == keys[1]) == same


@pytest.mark.parametrize("arm", ["fixed_noise", "shrink_only", "mean_one"])
def test_controls_that_are_matched_to_other_moments_are_told_apart(arm: str) -> None:
    """As when the pilot run was made again, or on another machine."""
    parsed = parse_arm(arm, load_phi())
    what = plan([parsed], 1)

    def key(mean: float) -> RunKey:
        part = replace(parsed.parts[0], moments=[SiteMoments("net.2", mean, 0.1)])
        return _key(what, replace(parsed, parts=(part,)), 0)

    assert key(0.3) == key(0.3) != key(math.nextafter(0.3, 1))


@pytest.mark.parametrize("arm", ["first_sites", "last_sites", "metaperturb+dropout:0.1", "metaperturb", "dropout:0.1"])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_arms_that_act_elsewhere_than_before_are_told_apart(arm: str, share: float) -> None:
    """Halves were those of all sites, and layers beside phi were at its sites."""
    what = plan([parse_arm(arm, replace(PHI, share_of_sites=share))], 1)
    parts = [_identity(part) for part in what.arms[0].parts]
    before = [*parts, ["tested when training has ended"]] if arm != "dropout:0.1" else parts
    digest = hashlib.sha256(json.dumps([{}, before], sort_keys=True).encode()).hexdigest()[:12]
    same = share == 1 or arm in ("metaperturb", "dropout:0.1")
    assert (_key(what, what.arms[0], 0).settings == digest) == same


def test_a_control_is_made_again_when_its_moments_are_and_not_when_they_are_brought_back(tmp_path: Path) -> None:
    arms = ["none", "fixed_noise", "metaperturb"]
    made(plan(arms, 1), tmp_path)
    path = moments_path(PHI, tmp_path)
    kept = read_moments(path)
    assert kept is not None
    write_moments(path, PHI.name, [site._replace(mean=site.mean * 1.1) for site in kept])
    assert made(plan(arms, 1), tmp_path)[1].made == [("fixed_noise", 0)]
    path.unlink()
    write_moments(path, PHI.name, kept)
    assert made(plan(arms, 1), tmp_path)[1].made == []


def test_phi_is_measured_once_for_its_controls_and_shown(tmp_path: Path) -> None:
    outcome, display = made(plan(["none", "fixed_noise", "shrink_only"], 1), tmp_path)
    assert display.steps == (len(outcome.rows) + 1) * 6
    assert made(plan(["none", "fixed_noise", "shrink_only"], 1), tmp_path)[1].steps == 0


@pytest.mark.slow
def test_several_processes_give_the_same_rows(tmp_path: Path) -> None:
    what = plan(["none", "dropout", "metaperturb"], 2)
    expected, _ = made(what, tmp_path / "whole")
    outcome, display = made(plan(["none", "dropout", "metaperturb"], 2, processes=2), tmp_path)
    assert results(outcome.rows) == results(expected.rows)
    assert display.steps == 6 * 6 and sorted(display.made) == sorted((row.arm, row.seed) for row in outcome.rows)


@pytest.mark.slow
def test_an_error_in_another_process_comes_back_with_its_run(tmp_path: Path) -> None:
    what = plan(["none", "mixup"], 2, processes=2, experiment=experiment(module_factory=Broken))
    arm = r"arm ('none'|'mixup'( \(alpha=0\.4\))?)"
    with pytest.raises(RunError, match=rf"{arm}, seed [01] failed: ValueError: no such layer"):
        made(what, tmp_path)


class Broken(Small):
    """Fails in its first step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise ValueError("no such\nlayer")


def test_what_cannot_be_sent_to_other_processes_is_said(tmp_path: Path) -> None:
    what = plan(["none"], 2, processes=2, experiment=experiment(module_factory=lambda: Small()))
    with pytest.raises(ConfigurationError, match=r"the experiment cannot be sent to other processes .*; use jobs=1"):
        made(what, tmp_path)


class Plain(Small):
    """Without a site."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(108, 3))


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        (plan(["none", "none"]), ConfigurationError, "arm 'none' is named twice"),
        (plan(["dropout"], experiment=experiment(module_factory=Plain)), SiteError, "no site for a perturbation"),
        (plan(["metaperturb"], experiment=experiment(module_factory=Plain)), SiteError, "no site for a perturbation"),
        (
            plan(["mixup"], experiment=experiment(num_classes=None)),
            ConfigurationError,
            "arm 'mixup' needs the number of classes",
        ),
        (
            plan(["none", "dropout"], experiment=experiment(module_factory=dict)),
            ConfigurationError,
            "module_factory made a dict, not a LightningModule",
        ),
    ],
    ids=["twice", "no site for a layer", "no site for phi", "classes", "no module"],
)
def test_what_would_fail_later_is_refused_before_the_first_step(what, error, message) -> None:
    with pytest.raises(error, match=message):
        check_plan(what)


def test_a_network_without_sites_can_be_compared_with_arms_that_need_none() -> None:
    check_plan(plan(["none", "mixup", Arm("mine", lambda seed: [])], experiment=experiment(module_factory=Plain)))


class NoForward(Small):
    forward = L.LightningModule.forward

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


class NoBatch(SmallData):
    def train_dataloader(self) -> Any:
        return []


class Boxes(SmallData):
    def test_dataloader(self) -> Any:
        return DataLoader([(x, float(y)) for x, y in self.test], batch_size=6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"module_factory": NoForward}, ConfigurationError, "NoForward has no forward; .* pass predict="),
        ({"data": UserData(NoBatch())}, DataError, "train_dataloader gives no batch"),
        ({"data": UserData(Boxes())}, ConfigurationError, r"labels are \(6,\) torch.float64, not one class number"),
        ({"trainer": {"max_epochs": 1, "accelerater": "cpu"}}, RunError, "arm 'none', seed 0 failed: TypeError"),
    ],
    ids=["forward", "no batch", "labels", "trainer"],
)
def test_what_a_user_gives_ends_in_a_sentence(tmp_path: Path, options, error, message) -> None:
    with pytest.raises(error, match=message) as caught:
        made(plan(["none"], 1, experiment=experiment(**options)), tmp_path)
    assert "\n" not in str(caught.value)


def test_a_function_to_predict_with_stands_in_for_forward(tmp_path: Path) -> None:
    def predict(module: Any, batch: Any) -> Any:
        return module.net(batch[0]).softmax(dim=1), batch[1]

    outcome, _ = made(plan(["none"], 1, experiment=experiment(module_factory=NoForward, predict=predict)), tmp_path)
    expected, _ = made(plan(["none"], 1), tmp_path / "whole")
    assert outcome.rows[0].nll == pytest.approx(expected.rows[0].nll, rel=1e-5), "probabilities were recognized"
