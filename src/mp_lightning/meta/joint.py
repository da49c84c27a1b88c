"""The sum over tasks that a joint step is made of: all that the processes of a run exchange in it, in one flat call."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mp_lightning.meta.exchange import add_up
from mp_lightning.meta.learner import TaskStep


class JointGradient:
    """Adds up phi's gradients over the tasks that are valid, and counts them.

    A task is valid if its losses and gradients are finite; the others add nothing to the gradient, so they cannot harm
    phi. The losses of every task travel in places of their own. Sums are kept in float64: then the order in which tasks
    are added, which depends on the number of processes, leaves no trace in a float32 gradient.

    Args:
        phi: the tensors that the gradients belong to.
        tasks: number of tasks, of all processes.

    Attributes:
        stop: whether any process asked to stop, once reduced.
        losses: training and validation loss (nats) of each task, once reduced; NaN for those that were not valid.
    """

    stop = False
    losses: Sequence[tuple[float, float]] = ()

    def __init__(self, phi: Sequence[Tensor], tasks: int) -> None:
        self._phi = phi
        self._tasks = tasks
        self._numbers = sum(p.numel() for p in phi)
        # phi's gradient, the number of valid tasks, of requests to stop, the training losses, the validation losses.
        self._flat = torch.zeros(self._numbers + 2 + 2 * tasks, dtype=torch.float64, device=phi[0].device)

    def add(self, task: int, step: TaskStep) -> None:
        """Add the step of the task with this number."""
        gradient = torch.cat([g.flatten() for g in step.gradients]).double()
        losses = torch.stack([step.train_loss, step.valid_loss]).double()
        valid = gradient.isfinite().all() & losses.isfinite().all()
        self._flat[: self._numbers] += torch.where(valid, gradient, 0.0)
        self._flat[self._numbers] += valid
        # A loss that is not finite is what tells the others which task it was.
        first = self._numbers + 2 + task
        self._flat[first :: self._tasks] += torch.where(valid, losses, torch.nan)

    def ask_to_stop(self) -> None:
        """Let all processes stop after this step, as one of them was told to."""
        self._flat[self._numbers + 1] = 1.0

    def reduce(self) -> None:
        """Add the tasks of all other processes."""
        add_up(self._flat)
        values = self._flat.tolist()
        self._count = round(values[self._numbers])
        self.stop = values[self._numbers + 1] > 0
        losses = values[self._numbers + 2 :]
        self.losses = list(zip(losses[: self._tasks], losses[self._tasks :], strict=True))

    @property
    def invalid(self) -> list[int]:
        """The numbers of the tasks that are left out."""
        return [task for task, (train, _) in enumerate(self.losses) if train != train]

    def mean(self) -> list[Tensor]:
        """The gradient of each tensor of phi, averaged over the valid tasks, of which there must be one."""
        mean = (self._flat[: self._numbers] / self._count).to(self._phi[0].dtype)
        parts = mean.split([p.numel() for p in self._phi])
        return [part.view_as(p) for part, p in zip(parts, self._phi, strict=True)]
