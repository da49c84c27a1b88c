"""Joint meta-training on tiny tasks: it learns, and a run that was killed ends as if it had not been."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from tiny_runs import NAMES, SETTINGS, BeforeStep, assert_same, fit, new_module, tiny_tasks

from mp_lightning.meta.checkpoint import RunCheckpointError, checkpoints, read_checkpoint
from mp_lightning.meta.history import History
from mp_lightning.meta.module import JointMetaTraining
from mp_lightning.meta.settings import MetaSettings
from mp_lightning.perturbation import initial_phi

pytestmark = pytest.mark.filterwarnings("ignore:.*before the epoch ended.*", "ignore:.*LeafSpec.*")


class Killed(Exception):
    """Stands for the end of a process in the middle of a step."""


def kill(module: JointMetaTraining) -> None:
    """Leave behind what a kill in the middle does: networks that have moved on since the checkpoint."""
    module.learner("first-a").step(module.meta_step)
    raise Killed


def train(folder: Path, settings: MetaSettings = SETTINGS, kill_after: int | None = None) -> JointMetaTraining:
    """Meta-train in ``folder``, from the checkpoint there if there is one."""
    module = new_module(settings, history=History(folder / "metrics.csv"))
    return fit(module, folder, *([] if kill_after is None else [BeforeStep(kill_after, kill)]))


def newest(folder: Path) -> Path:
    return checkpoints(folder / "checkpoints")[0]


def assert_same_training(module: JointMetaTraining, other: JointMetaTraining) -> None:
    """phi; all networks, their optimizers' and the sites' state, bit for bit."""
    assert module.meta_step == other.meta_step and module.names == other.names
    assert_same(module.state_dict(), other.state_dict())
    for name in module.names:
        assert_same(module.learner(name).state(), other.learner(name).state(), name)


def test_three_steps_change_phi_and_every_network(tmp_path: Path) -> None:
    settings = replace(SETTINGS, steps=3)
    fresh = new_module(settings)
    for value, initial in zip(fresh.perturbation.phi, initial_phi(7), strict=True):
        assert torch.equal(value, initial)
    trained = train(tmp_path, settings)
    assert trained.meta_step == 3
    for name, before in fresh.perturbation.named_parameters():
        assert not torch.equal(before, trained.perturbation.get_parameter(name)), name
    for name in NAMES:
        before = dict(fresh.learner(name).model.named_parameters())
        moved = [not torch.equal(before[n], p) for n, p in trained.learner(name).model.named_parameters()]
        assert sum(moved) > 0.9 * len(moved), name


def test_all_tasks_share_one_phi(tmp_path: Path) -> None:
    module = train(tmp_path, replace(SETTINGS, steps=1))
    for name in NAMES:
        assert module.learner(name).attachment.perturbation is module.perturbation
    assert sum(p.numel() for p in module.perturbation.parameters()) == 82


def test_networks_differ_between_tasks_and_seeds() -> None:
    one, other = (new_module(seed=seed) for seed in (0, 1))
    weight = one.learner("first-a").model.fc.weight
    assert not torch.equal(weight, other.learner("first-a").model.fc.weight)
    assert not torch.equal(weight, one.learner("second-a").model.fc.weight)
    assert not torch.equal(one.perturbation.scale_weight, other.perturbation.scale_weight)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int | None], tuple[JointMetaTraining, Path]]:
    """By ``restart_after``, what a run without interruption ends with, and its folder."""

    @cache
    def run(restart_after: int | None) -> tuple[JointMetaTraining, Path]:
        folder = tmp_path_factory.mktemp("whole")
        return train(folder, replace(SETTINGS, restart_after=restart_after)), folder

    return run


@pytest.mark.parametrize(("kill_after", "restart_after"), [(1, None), (2, 4), (5, None), (5, 4)])
def test_killed_and_resumed_equals_uninterrupted(
    tmp_path: Path, uninterrupted: Callable, kill_after: int, restart_after: int | None
) -> None:
    settings = replace(SETTINGS, restart_after=restart_after)
    expected, whole = uninterrupted(restart_after)
    with pytest.raises(Killed):
        train(tmp_path, settings, kill_after)
    assert bool(checkpoints(tmp_path / "checkpoints")) == (kill_after >= 2)
    assert_same_training(train(tmp_path, settings), expected)
    own, its = (read_checkpoint(newest(folder)) for folder in (tmp_path, whole))
    for key in ("state_dict", "optimizer_states", "meta_step", "history", "description", "tasks"):
        assert_same(own[key], its[key], key)
    assert (tmp_path / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()


def test_a_run_continues_before_a_damaged_checkpoint(
    tmp_path: Path, uninterrupted: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, whole = uninterrupted(None)
    with pytest.raises(Killed):
        train(tmp_path, kill_after=5)
    damaged = newest(tmp_path)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert_same_training(train(tmp_path), expected)
    assert f"'{damaged}' is damaged and cannot be continued from; continuing from the one" in capsys.readouterr().out
    assert (tmp_path / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()


def test_a_finished_run_is_not_trained_further(tmp_path: Path) -> None:
    first = train(tmp_path)
    again = train(tmp_path)
    assert again.meta_step == SETTINGS.steps
    assert_same_training(again, first)


def test_networks_restart_one_after_the_other() -> None:
    """With four tasks restarted every four steps, one network is new at each step."""
    module = new_module(replace(SETTINGS, restart_after=4))
    restarted = []
    for step in range(1, 9):
        module.meta_step = step
        before = {name: module.learner(name).model for name in NAMES}
        for number in range(len(NAMES)):
            module._restart_when_due(number)
        restarted.append([name for name in NAMES if module.learner(name).model is not before[name]])
    assert restarted == [[name] for name in reversed(NAMES)] * 2


def test_checkpoint_holds_plain_values_and_phi_once(tmp_path: Path) -> None:
    module = train(tmp_path)
    content = torch.load(newest(tmp_path), weights_only=True)
    assert content["meta_step"] == SETTINGS.steps
    assert set(content["tasks"]) == set(NAMES)
    assert content["state_dict"].keys() == {f"perturbation.{field}" for field in module.perturbation.phi._fields}
    for name, task in content["tasks"].items():
        assert "phi" not in task["attachment"]
        theta = {key for key, _ in task_parameters(module, name)}
        assert theta <= set(task["theta"]) and not [key for key in task["theta"] if "scale_weight" in key]


def task_parameters(module: JointMetaTraining, name: str) -> list[tuple[str, torch.Tensor]]:
    """theta of one task: what its optimizer holds, by name."""
    learner = module.learner(name)
    held = {id(p) for group in learner.optimizer.param_groups for p in group["params"]}
    return [(key, p) for key, p in learner.model.named_parameters() if id(p) in held]


def test_a_process_with_some_of_the_tasks_takes_them_out_of_the_checkpoint_of_all(tmp_path: Path) -> None:
    train(tmp_path, replace(SETTINGS, steps=2))
    content = read_checkpoint(newest(tmp_path))
    part = new_module(replace(SETTINGS, steps=2), mine=[3, 1])
    assert set(part.learners) == {"first-b", "second-b"}
    part.on_load_checkpoint(content)
    part.load_state_dict(content["state_dict"])
    assert part.meta_step == 2
    for name in part.learners:
        assert_same(part.learner(name).state(), content["tasks"][name], name)


def test_ddp_would_see_phi_alone() -> None:
    module = new_module()
    ignored = set(module._ddp_params_and_buffers_to_ignore)
    seen = {name: p for name, p in module.named_parameters(remove_duplicate=False) if name not in ignored}
    assert {id(p) for p in seen.values()} == {id(p) for p in module.perturbation.parameters()} and len(seen) < 10
    assert not {name for name, _ in module.named_buffers(remove_duplicate=False)} - ignored


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    train(tmp_path, replace(SETTINGS, steps=2))
    with pytest.raises(RunCheckpointError, match=r"made with meta.lr=0.01, not 0.02; meta.steps=2, not 6; .*fresh"):
        train(tmp_path, replace(SETTINGS, lr=2e-2))
    other = new_module(replace(SETTINGS, steps=2), tasks=tiny_tasks(seed=1))
    with pytest.raises(RunCheckpointError, match=r"was made with other images of 'first-a'; .*; set it back"):
        other.check_checkpoint(read_checkpoint(newest(tmp_path)))
