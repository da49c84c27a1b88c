"""Sharing tasks over processes gives what DistributedDataParallel would give, whose reduction is not ours."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import StrategyRegistry
from tiny_runs import SETTINGS, fit, new_module, tiny_tasks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mp_lightning.meta import exchange
from mp_lightning.meta.learner import Learner
from mp_lightning.meta.module import JointMetaTraining
from mp_lightning.meta.step import batch_norm_in_evaluation, theta_step
from mp_lightning.meta.strategy import RANK_LOST, TaskParallelStrategy, _WatchedLauncher

STEPS = 20
SETTINGS_LONG = replace(SETTINGS, steps=STEPS)
SEED = 7


class Validation(nn.Module):
    """The validation loss of one task, as DistributedDataParallel wraps it: phi comes first, then theta."""

    def __init__(self, module: JointMetaTraining, learner: Learner) -> None:
        super().__init__()
        self.perturbation = module.perturbation
        self.model = learner.model

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.model(x), y)


def _with_stock_ddp(rank: int, world: int, folder: str) -> None:
    """Meta-train with torch's own averaging of gradients, one task a process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    tasks = tiny_tasks()[:world]
    module = JointMetaTraining(tasks, SETTINGS, SEED, None, [rank])
    learner = module.learner(tasks[rank].name)
    validation = Validation(module, learner)
    theta = [name for name, _ in validation.named_parameters(remove_duplicate=False) if name.startswith("model.")]
    buffers = [name for name, _ in validation.named_buffers(remove_duplicate=False)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(validation, [*theta, *buffers])
    parallel = DistributedDataParallel(validation)
    optimizer = torch.optim.Adam(module.perturbation.parameters(), lr=SETTINGS.lr, weight_decay=SETTINGS.weight_decay)
    learner.model.train()
    device = torch.device("cpu")
    for number in range(STEPS):
        x, y = learner.task.batch("train", number, SETTINGS.batch_size, SEED, device)
        theta_step(learner.model, learner.optimizer, x, y)
        x, y = learner.task.batch("valid", number, SETTINGS.batch_size, SEED, device)
        optimizer.zero_grad()
        # Watched, as every step of so short a run is: by the same path, so that rounding is the same.
        with batch_norm_in_evaluation(learner.model), module.perturbation.watching():
            parallel(x, y).backward()
        optimizer.step()
    torch.save(dict(module.perturbation.state_dict()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*")
def test_phi_is_that_of_stock_ddp_with_an_ignore_list(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_with_stock_ddp, (2, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    ours = fit(new_module(SETTINGS_LONG, tasks=tiny_tasks()[:2]), tmp_path).perturbation.state_dict()
    for name, value in ours.items():
        assert torch.equal(first[name], second[name])
        assert (first[name] - value).abs().max() <= 1e-5 * value.abs().max(), name


def _drifting(rank: int, world: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    values = torch.tensor([1.0, -0.0, float("nan")])
    same = exchange.same_everywhere(values)
    if rank == 1:
        values[0] = torch.nextafter(values[0], torch.tensor(2.0))
    other = exchange.same_everywhere(values)
    collected = exchange.collect({f"task{rank}": {"x": torch.full((rank + 1,), 5.0), "n": rank}}, torch.device("cpu"))
    torch.save({"same": same, "other": other, "names": sorted(collected)}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_processes_compare_bits_and_collect_states(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_drifting, (2, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first["same"] and second["same"] and not first["other"] and not second["other"]
    assert first["names"] == ["task0", "task1"] and second["names"] == ["task1"]


def test_alone_nothing_is_exchanged() -> None:
    values = torch.arange(3.0)
    exchange.add_up(values)
    assert torch.equal(values, torch.arange(3.0)) and exchange.same_everywhere(values)
    assert exchange.collect({"a": 1}, torch.device("cpu")) == {"a": 1}


def test_lightning_knows_the_strategy_by_its_name() -> None:
    assert "task_parallel" in StrategyRegistry.available_strategies()
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy="task_parallel", logger=False)
    assert isinstance(trainer.strategy, TaskParallelStrategy) and trainer.world_size == 2


def test_children_that_are_stopped_are_ended_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """They do not act on SIGTERM, and would hold the output open."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    os.kill(child.pid, signal.SIGSTOP)
    strategy, codes = TaskParallelStrategy(), []
    strategy._launcher = _WatchedLauncher(LightningEnvironment(), 2, 1)
    strategy._launcher.procs = [child]
    monkeypatch.setattr(os, "_exit", codes.append)
    strategy._end_without(1)
    assert codes == [RANK_LOST] and child.wait(10) == -signal.SIGKILL


def test_ddp_leaves_all_of_theta_alone() -> None:
    """Buffers that are forgotten here would be overwritten by those of the first process, in silence."""
    module = JointMetaTraining(tiny_tasks(), SETTINGS, SEED, None)
    named = [*dict(module.named_parameters()), *dict(module.named_buffers())]
    left = set(named) - set(module._ddp_params_and_buffers_to_ignore)
    assert left == {name for name in named if name.startswith("perturbation.")} and len(left) == 6
