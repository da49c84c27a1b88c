"""The sum over tasks that a joint step is made of."""

from itertools import permutations

import pytest
import torch

from mp_lightning.meta.joint import JointGradient
from mp_lightning.meta.learner import TaskStep

SHAPES = [(2, 3), (4,), (1, 2, 2)]


def task_step(number: int, train_loss: float = 1.0, valid_loss: float = 2.0) -> TaskStep:
    """The step of a task: random gradients whose sizes differ from task to task, as they do in training."""
    generator = torch.Generator().manual_seed(number)
    gradients = [torch.randn(shape, generator=generator) * 10.0 ** (number % 3 - 2) for shape in SHAPES]
    return TaskStep(torch.tensor(train_loss), torch.tensor(valid_loss), gradients)


def joint_of(steps: dict[int, TaskStep], tasks: int) -> JointGradient:
    """The joint gradient of these tasks, added in the order of the dictionary."""
    joint = JointGradient([torch.zeros(shape) for shape in SHAPES], tasks)
    for number, step in steps.items():
        joint.add(number, step)
    joint.reduce()
    return joint


def test_the_mean_is_over_the_tasks_and_in_the_shapes_of_phi() -> None:
    steps = {number: task_step(number) for number in range(5)}
    mean = joint_of(steps, 5).mean()
    assert [tuple(part.shape) for part in mean] == SHAPES
    for position, part in enumerate(mean):
        expected = torch.stack([step.gradients[position].double() for step in steps.values()]).mean(dim=0)
        assert part.dtype == torch.float32
        assert torch.equal(part, expected.float())


def test_the_mean_of_one_task_is_its_gradient() -> None:
    step = task_step(3)
    assert all(torch.equal(a, b) for a, b in zip(joint_of({0: step}, 1).mean(), step.gradients, strict=True))


def test_losses_stand_at_their_tasks() -> None:
    steps = {number: task_step(number, 0.1 * number, 10.0 + number) for number in (2, 0, 1)}
    joint = joint_of(steps, 3)
    assert joint.losses == [(float(steps[n].train_loss), float(steps[n].valid_loss)) for n in range(3)]
    assert joint.invalid == []


NOT_FINITE = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("where", ["train_loss", "valid_loss", 0, 1, 2])
def test_a_task_that_is_not_finite_anywhere_is_left_out(where: str | int, value: float) -> None:
    steps = {number: task_step(number) for number in range(4)}
    if isinstance(where, str):
        steps[1] = steps[1]._replace(**{where: torch.tensor(value)})
    else:
        steps[1].gradients[where].view(-1)[-1] = value
    joint = joint_of(steps, 4)
    others = joint_of({0: steps[0], 1: steps[2], 2: steps[3]}, 3)
    assert joint.invalid == [1]
    assert all(torch.equal(a, b) for a, b in zip(joint.mean(), others.mean(), strict=True))
    assert [train != train and valid != valid for train, valid in joint.losses] == [False, True, False, False]
    assert [joint.losses[number] for number in (0, 2, 3)] == others.losses


def test_a_finite_gradient_is_valid_however_large() -> None:
    largest = torch.finfo(torch.float32).max
    steps = {number: task_step(number) for number in range(2)}
    for step in steps.values():
        step.gradients[0].fill_(largest)
    joint = joint_of(steps, 2)
    assert joint.invalid == []
    assert bool((joint.mean()[0] == largest).all()), "the sum does not fit into float32, but the mean does"


def test_the_order_of_the_tasks_leaves_no_trace_in_the_mean() -> None:
    steps = {number: task_step(number) for number in range(6)}
    means, sums = set(), set()
    for order in permutations(steps):
        mean = joint_of({number: steps[number] for number in order}, 6).mean()
        means.add(torch.cat([part.flatten() for part in mean]).numpy().tobytes())
        added = torch.zeros(SHAPES[0])
        for number in order:
            added += steps[number].gradients[0]
        sums.add(added.numpy().tobytes())
    assert len(means) == 1
    assert len(sums) > 1, "these gradients would show no order in any case"


def test_the_tasks_of_several_processes_add_up_to_those_of_one() -> None:
    """What is exchanged is one flat tensor, and its sum over processes is what one process would have had."""
    steps = {number: task_step(number, 0.5 * number, 1.0 + number) for number in range(5)}
    steps[4] = steps[4]._replace(valid_loss=torch.tensor(torch.inf))
    phi = [torch.zeros(shape) for shape in SHAPES]
    here, there = JointGradient(phi, 5), JointGradient(phi, 5)
    for number, step in steps.items():
        (here, there)[number % 2].add(number, step)
    here._flat += there._flat
    here.reduce()
    together = joint_of(steps, 5)
    assert here.invalid == together.invalid == [4]
    assert here.losses[:4] == together.losses[:4]
    assert all(torch.equal(a, b) for a, b in zip(here.mean(), together.mean(), strict=True))
