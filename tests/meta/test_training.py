"""Joint meta-training on tiny tasks: it learns, and a run that was killed ends as if it had not been."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mp_lightning.data import image_set
from mp_lightning.meta.checkpoint import KeepCheckpoint, RunCheckpointError, read_checkpoint
from mp_lightning.meta.history import History
from mp_lightning.meta.module import DivergedError, JointMetaTraining, MetaSettings
from mp_lightning.meta.tasks import Source, Task, make_tasks
from mp_lightning.perturbation import initial_phi
from mp_lightning.runs import LAST_CHECKPOINT

SETTINGS = MetaSettings(
    steps=6, lr=1e-2, weight_decay=1e-4, theta_lr=1e-2, theta_weight_decay=5e-4, batch_size=4, restart_after=None
)

pytestmark = pytest.mark.filterwarnings("ignore:.*before the epoch ended.*", "ignore:.*LeafSpec.*")


class Killed(Exception):
    """Stands for the end of a process in the middle of a step."""


class KillAfter(L.Callback):
    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            # What a kill in the middle leaves behind: networks that have moved on since the checkpoint.
            pl_module._task_step(0, pl_module.tasks[0], False)
            raise Killed


def tiny_tasks(seed: int = 0) -> list[Task]:
    sources = []
    for number, name in enumerate(("first", "second")):
        images = np.random.default_rng(number).integers(0, 255, (18, 3, 16, 16), dtype=np.uint8)
        sources.append(Source(image_set(name, images, np.arange(18) % 3), flip=bool(number)))
    options = {"groups": 1, "train_per_class": None, "valid_per_class": None}
    return make_tasks(sources, ["conv4-3", "resnet20-2"], seed=seed, **options)


def train(
    folder: Path, settings: MetaSettings = SETTINGS, kill_after: int | None = None, every: int = 2
) -> JointMetaTraining:
    """Meta-train in ``folder``, from the checkpoint there if there is one."""
    module = JointMetaTraining(tiny_tasks(), settings, 7, History(folder / "metrics.csv"))
    trainer = L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        max_steps=settings.steps,
        max_epochs=1,
        callbacks=[KeepCheckpoint(folder, every), KillAfter(kill_after)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    checkpoint = folder / LAST_CHECKPOINT
    loader = DataLoader(range(settings.steps), batch_size=None)
    trainer.fit(module, loader, ckpt_path=checkpoint if checkpoint.exists() else None, weights_only=True)
    return module


def assert_same(module: JointMetaTraining, other: JointMetaTraining) -> None:
    """phi, all networks, the optimizers' and the sites' state, bit for bit."""
    own, its = module.state_dict(), other.state_dict()
    assert own.keys() == its.keys()
    different = [key for key in own if not torch.equal(own[key], its[key])]
    assert not different, f"different: {different[:5]}"
    for task in module.tasks:
        states = [m.theta_optimizers[task.name].state_dict()["state"] for m in (module, other)]
        for number, state in states[0].items():
            assert all(torch.equal(state[key], states[1][number][key]) for key in state)
        first, second = (m.attachments[task.name].state() for m in (module, other))
        assert (first["seed"], first["counters"]) == (second["seed"], second["counters"])
        for site, statistics in first["sites"].items():
            assert all(torch.equal(statistics[key], second["sites"][site][key]) for key in statistics)


def test_three_steps_change_phi_and_every_network(tmp_path: Path) -> None:
    settings = replace(SETTINGS, steps=3)
    fresh = JointMetaTraining(tiny_tasks(), settings, 7, History(tmp_path / "unused.csv"))
    for value, initial in zip(fresh.perturbation.phi, initial_phi(7), strict=True):
        assert torch.equal(value, initial)
    trained = train(tmp_path, settings)
    assert trained.meta_step == 3
    for name, before in fresh.perturbation.named_parameters():
        assert not torch.equal(before, trained.perturbation.get_parameter(name)), name
    for task in trained.tasks:
        before = dict(fresh.thetas[task.name].named_parameters())
        moved = [not torch.equal(before[n], p) for n, p in trained.thetas[task.name].named_parameters()]
        assert sum(moved) > 0.9 * len(moved), task.name


def test_all_tasks_share_one_phi(tmp_path: Path) -> None:
    module = train(tmp_path, replace(SETTINGS, steps=1))
    for task in module.tasks:
        assert module.attachments[task.name].perturbation is module.perturbation
    assert sum(p.numel() for p in module.perturbation.parameters()) == 82


def test_networks_differ_between_tasks_and_seeds(tmp_path: Path) -> None:
    one, other = (JointMetaTraining(tiny_tasks(), SETTINGS, seed, History(tmp_path / "h.csv")) for seed in (0, 1))
    weight = one.thetas["first-a"].fc.weight
    assert not torch.equal(weight, other.thetas["first-a"].fc.weight)
    assert not torch.equal(weight, one.thetas["second-a"].fc.weight)
    assert not torch.equal(one.perturbation.scale_weight, other.perturbation.scale_weight)


@pytest.mark.parametrize(("kill_after", "restart_after"), [(1, None), (2, 4), (5, None), (5, 4)])
def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path, kill_after: int, restart_after: int | None) -> None:
    settings = replace(SETTINGS, restart_after=restart_after)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    expected = train(whole, settings)
    with pytest.raises(Killed):
        train(broken, settings, kill_after)
    assert (broken / LAST_CHECKPOINT).exists() == (kill_after >= 2)
    assert_same(train(broken, settings), expected)
    assert (broken / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()


def test_a_finished_run_is_not_trained_further(tmp_path: Path) -> None:
    first = train(tmp_path)
    again = train(tmp_path)
    assert again.meta_step == SETTINGS.steps
    assert_same(again, first)


def test_networks_restart_one_after_the_other(tmp_path: Path) -> None:
    """With four tasks restarted every four steps, one network is new at each step."""
    module = JointMetaTraining(tiny_tasks(), replace(SETTINGS, restart_after=4), 7, History(tmp_path / "h.csv"))
    restarted = []
    for step in range(1, 9):
        module.meta_step = step
        before = {task.name: module.thetas[task.name] for task in module.tasks}
        for index, task in enumerate(module.tasks):
            module._task_step(index, task, False)
        restarted.append([task.name for task in module.tasks if module.thetas[task.name] is not before[task.name]])
    names = [task.name for task in module.tasks]
    assert restarted == [[name] for name in reversed(names)] * 2


def test_a_restarted_network_is_another_one(tmp_path: Path) -> None:
    module = JointMetaTraining(tiny_tasks(), SETTINGS, 7, History(tmp_path / "h.csv"))
    task = module.tasks[0]
    first, seed = module.thetas[task.name].fc.weight.clone(), module.attachments[task.name].seed
    module._start_theta(task, generation=1)
    assert not torch.equal(module.thetas[task.name].fc.weight, first)
    assert module.attachments[task.name].seed != seed
    assert not module.theta_optimizers[task.name].state_dict()["state"]


def test_checkpoint_holds_plain_values_and_phi_once(tmp_path: Path) -> None:
    train(tmp_path)
    content = torch.load(tmp_path / LAST_CHECKPOINT, weights_only=True)
    assert content["meta_step"] == SETTINGS.steps
    assert set(content["tasks"]) == {"first-a", "first-b", "second-a", "second-b"}
    phi = [key for key in content["state_dict"] if "scale_weight" in key]
    assert phi == ["perturbation.scale_weight"]
    assert not list(tmp_path.glob("*.partial")) and len(list(tmp_path.glob("*.ckpt"))) == 1


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, keep: int) -> None:
    train(tmp_path, replace(SETTINGS, steps=1))
    path = tmp_path / LAST_CHECKPOINT
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(RunCheckpointError, match=r"last.ckpt' is damaged .* run.fresh=true"):
        read_checkpoint(path)


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / LAST_CHECKPOINT)
    with pytest.raises(RunCheckpointError, match="not written by this version"):
        read_checkpoint(tmp_path / LAST_CHECKPOINT)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    train(tmp_path, replace(SETTINGS, steps=2))
    with pytest.raises(RunCheckpointError, match=r"made with meta.lr=0.01, not 0.02; meta.steps=2, not 6: .*fresh"):
        train(tmp_path, replace(SETTINGS, lr=2e-2))
    other = JointMetaTraining(tiny_tasks(seed=1), replace(SETTINGS, steps=2), 7, History(tmp_path / "h.csv"))
    with pytest.raises(RunCheckpointError, match=r"tasks.first-a.digest="):
        other.check_checkpoint(read_checkpoint(tmp_path / LAST_CHECKPOINT))


def test_a_task_that_diverges_is_named(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"task '(first|second)-[ab]' diverged at meta-step \d: .*meta.theta_lr"):
        train(tmp_path, replace(SETTINGS, theta_lr=1e30))


def test_images_that_give_no_number_are_named(tmp_path: Path) -> None:
    module = JointMetaTraining(tiny_tasks(), SETTINGS, 7, History(tmp_path / "h.csv"))
    task = module.tasks[2]
    with torch.no_grad():
        module.thetas[task.name].fc.bias.fill_(torch.nan)
    with pytest.raises(DivergedError, match=f"task '{task.name}' diverged at meta-step 1"):
        module._task_step(2, task, False)
