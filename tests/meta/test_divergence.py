"""A task whose loss or gradient is not finite ends the run, or leaves the mean of the step; never does it reach phi."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_runs import NAMES, SETTINGS, BeforeStep, assert_same, fit, new_module, tiny_tasks
from torch import Tensor, nn

from mp_lightning.meta.history import History
from mp_lightning.meta.module import DivergedError, JointMetaTraining
from mp_lightning.runs import RunFolderError

pytestmark = pytest.mark.filterwarnings("ignore:.*before the epoch ended.*", "ignore:.*LeafSpec.*")

TASKS = tiny_tasks(architectures=["conv4-2"])
STOP, LEAVE_OUT = replace(SETTINGS, steps=3), replace(SETTINGS, steps=3, on_divergence="leave_out")


class EndlessSlope(nn.Module):
    """A head whose input, where theta is constant and only phi has a gradient, has an infinite derivative."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        if not any(parameter.requires_grad for parameter in self.head.parameters()):
            x = x + (x.detach() - x).sqrt()
        return self.head(x)


def lose_the_loss(module: JointMetaTraining, *names: str) -> None:
    """Let the loss of these tasks be no number from now on."""
    for name in names:
        with torch.no_grad():
            module.learner(name).model.fc.bias.fill_(torch.nan)


def lose_the_slope(module: JointMetaTraining, *names: str) -> None:
    """Let the gradients of phi, and nothing else, be infinite in these tasks."""
    for name in names:
        model = module.learner(name).model
        model.fc = EndlessSlope(model.fc)


WAYS: dict[str, Callable[..., None]] = {"the loss": lose_the_loss, "the gradient of phi": lose_the_slope}


def state_of_phi(module: JointMetaTraining) -> list[object]:
    """Copies of phi and of what its optimizer keeps."""
    return deepcopy([module.state_dict(), module.optimizers().state_dict()["state"]])


def test_the_gradient_alone_can_be_what_is_not_finite() -> None:
    """Otherwise the second of the two ways below would be the first again."""
    module = new_module(tasks=TASKS)
    lose_the_slope(module, "first-b")
    step = module.learner("first-b").step(0)
    assert step.train_loss.isfinite() and step.valid_loss.isfinite()
    assert not torch.cat([gradient.flatten() for gradient in step.gradients]).isfinite().any()
    theta = module.learner("first-b").state()["theta"]
    assert all(value.isfinite().all() for value in theta.values())


@pytest.mark.parametrize("way", WAYS)
def test_stop_names_the_task_and_leaves_phi_as_it_was(tmp_path: Path, way: str) -> None:
    module, before = new_module(STOP, tasks=TASKS), []

    def spoil(module: JointMetaTraining) -> None:
        before.append(state_of_phi(module))
        WAYS[way](module, "second-a")

    message = r"^task 'second-a' diverged at meta-step 3: loss or gradient .* lower meta.theta_lr .*=leave_out$"
    with pytest.raises(DivergedError, match=message) as caught:
        fit(module, tmp_path, BeforeStep(2, spoil))
    assert caught.value.on_every_rank
    assert_same(state_of_phi(module), before[0])
    assert module.meta_step == 2


def test_several_tasks_are_all_named(tmp_path: Path) -> None:
    spoil = BeforeStep(0, lambda module: lose_the_loss(module, "second-a", "first-b"))
    with pytest.raises(DivergedError, match=r"^tasks 'first-b', 'second-a' diverged at meta-step 1:"):
        fit(new_module(STOP, tasks=TASKS), tmp_path, spoil)


def test_a_step_too_long_for_theta_diverges(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"tasks? '(first|second)-[ab]'.* diverged at meta-step \d: .*theta_lr"):
        fit(new_module(replace(STOP, theta_lr=1e30), tasks=TASKS), tmp_path)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", [["first-b"], ["first-a", "second-b"]])
def test_left_out_is_as_if_the_task_were_not_there(tmp_path: Path, way: str, bad: list[str]) -> None:
    settings = replace(LEAVE_OUT, steps=1)
    told: list[str] = []
    module = new_module(settings, tasks=TASKS, tell=told.append)
    fit(module, tmp_path / "with", BeforeStep(0, lambda m: WAYS[way](m, *bad)))
    without = new_module(settings, tasks=[task for task in TASKS if task.name not in bad])
    fit(without, tmp_path / "without")
    assert_same(state_of_phi(module), state_of_phi(without))
    for name in without.names:
        assert_same(module.learner(name).state(), without.learner(name).state())
    (line,) = told
    assert all(f"'{name}'" in line for name in bad) and "diverged at meta-step 1 and left this step's mean" in line
    assert [module.learner(name).generation for name in NAMES] == [int(name in bad) for name in NAMES]
    for name in bad:
        fresh = new_module(settings, tasks=TASKS).learner(name)
        fresh.restart()
        assert_same(module.learner(name).state(), fresh.state())


def test_the_network_that_starts_afresh_takes_part_again(tmp_path: Path) -> None:
    told: list[str] = []
    module = new_module(LEAVE_OUT, tasks=TASKS, tell=told.append, history=History(tmp_path / "metrics.csv"))
    fit(module, tmp_path, BeforeStep(1, lambda m: lose_the_loss(m, "second-b")))
    assert len(told) == 1 and module.meta_step == 3
    table = module.history.read()
    finite = [loss == loss for loss in table["second-b/valid_loss"]]
    assert finite == [True, False, True]
    assert all(loss == loss for name in NAMES[:3] for loss in table[f"{name}/valid_loss"])


@pytest.mark.parametrize("way", WAYS)
def test_where_every_task_diverges_nothing_is_left_to_learn_from(tmp_path: Path, way: str) -> None:
    module = new_module(LEAVE_OUT, tasks=TASKS)
    before = deepcopy(module.state_dict())
    everyone = ", ".join(f"'{name}'" for name in NAMES)
    with pytest.raises(DivergedError, match=f"^tasks {everyone} diverged at meta-step 1.* or look at the images$"):
        fit(module, tmp_path, BeforeStep(0, lambda m: WAYS[way](m, *NAMES)))
    assert_same(module.state_dict(), before)


def test_left_out_steps_are_counted_on_after_a_checkpoint_and_told_a_few_times(tmp_path: Path) -> None:
    settings, told = replace(LEAVE_OUT, steps=16), []

    def spoil(module: JointMetaTraining) -> None:
        lose_the_loss(module, "second-b")

    first = new_module(replace(settings, steps=16), tasks=TASKS, tell=told.append)
    stop = BeforeStep(4, lambda module: setattr(module.trainer, "should_stop", True))
    with pytest.raises(RunFolderError, match="stopped after 5 of 16"):
        fit(first, tmp_path, stop, *(BeforeStep(step, spoil) for step in range(5)))
    assert first.left_out == {"first-a": 0, "first-b": 0, "second-a": 0, "second-b": 5} and len(told) == 5
    second = new_module(settings, tasks=TASKS, tell=told.append)
    fit(second, tmp_path, *(BeforeStep(step, spoil) for step in range(16)))
    assert second.left_out["second-b"] == 16 and len(told) == 10
    assert ["only counted" in line for line in told] == [False] * 9 + [True]


def test_phi_stays_finite_however_often_tasks_diverge(tmp_path: Path) -> None:
    settings, told = replace(LEAVE_OUT, steps=5), []
    module = new_module(settings, tasks=TASKS, tell=told.append)
    plan = {0: ["first-a"], 1: NAMES[1:], 2: ["first-a", "second-a"], 4: ["second-b"]}

    def spoil(step: int, module: JointMetaTraining) -> None:
        for number, name in enumerate(plan.get(step, [])):
            list(WAYS.values())[number % 2](module, name)

    def look(module: JointMetaTraining) -> None:
        assert all(value.isfinite().all() for value in module.state_dict().values())
        for state in module.optimizers().state_dict()["state"].values():
            assert all(value.isfinite().all() for value in state.values())

    callbacks = [BeforeStep(step, partial(spoil, step)) for step in plan]
    fit(module, tmp_path, *callbacks, *(BeforeStep(step, look) for step in range(5)))
    look(module)
    assert len(told) == len(plan)
