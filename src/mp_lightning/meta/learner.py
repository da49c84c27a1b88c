"""theta of one task: a network, its optimizer, and where it is perturbed."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mp_lightning.errors import ConfigurationError
from mp_lightning.meta.settings import MetaSettings
from mp_lightning.meta.step import phi_gradient, theta_step
from mp_lightning.meta.tasks import Task
from mp_lightning.meta.watched import WatchedMetaPerturb
from mp_lightning.randomness import derived_seed, random_state
from mp_lightning.sites import Attachment, attach
from mp_lightning.sites.attachment import NAME


class TaskStep(NamedTuple):
    """What a task gives to a joint step: both losses (nats), phi's gradient by tensor, and what was watched."""

    train_loss: Tensor
    valid_loss: Tensor
    gradients: list[Tensor]
    observed: dict[str, list[float]] | None = None


class Learner(nn.Module):
    """Learns one task. All randomness follows from seed, task and step: nothing of it needs to be saved.

    Args:
        task: the task.
        perturbation: phi, shared with all other tasks.
        settings: of meta-training.
        seed: of the run.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    attachment: Attachment

    def __init__(self, task: Task, perturbation: WatchedMetaPerturb, settings: MetaSettings, seed: int) -> None:
        super().__init__()
        self.task = task
        self.seed = seed
        self._settings = settings
        # In a tuple, so that it is not a submodule once more.
        self._shared = (perturbation,)
        self.generation = 0
        self._start()

    def restart(self) -> None:
        """Throw the network away and begin with another one."""
        self.generation += 1
        self._start()

    def _start(self) -> None:
        task, (perturbation,) = self.task, self._shared
        model = task.architecture.build(task.train, derived_seed(self.seed, task.name, "theta", self.generation))
        model.to(self._device)
        self.attachment = attach(
            model,
            perturbation=perturbation,
            seed=derived_seed(self.seed, task.name, "noise", self.generation),
            sites=self._settings.share_of_sites,
            strength=self._settings.strength,
            # Each process trains networks of its own, on whole batches.
            distributed=False,
        )
        self.model = model
        theta = [p for name, p in model.named_parameters() if p.requires_grad and not name.startswith(NAME)]
        self.optimizer = torch.optim.Adam(
            theta, lr=self._settings.theta_lr, weight_decay=self._settings.theta_weight_decay
        )

    def step(self, number: int, watch: bool = False) -> TaskStep:
        """One optimizer step on theta, then the gradient of phi at the new theta.

        Args:
            number: of the meta-step, from 0; it decides the batches and everything random.
            watch: note scale, noise and multiplier of every site in the forward that phi's gradient comes from.

        Raises:
            ConfigurationError: the network's output depends on no weight that is trained, or not on phi.
        """
        try:
            return self._step(number, watch)
        except ConfigurationError as error:
            raise ConfigurationError(f"architecture '{self.task.architecture}': {error}") from error

    def _step(self, number: int, watch: bool) -> TaskStep:
        task, size, (perturbation,) = self.task, self._settings.batch_size, self._shared
        self.model.train()
        phi = list(perturbation.parameters())
        with random_state(derived_seed(self.seed, task.name, "step", number), self._device):
            x, y = task.batch("train", number, size, self.seed, self._device)
            train_loss = theta_step(self.model, self.optimizer, x, y)
            x, y = task.batch("valid", number, size, self.seed, self._device)
            if not watch:
                return TaskStep(train_loss, *phi_gradient(self.model, phi, x, y))
            with perturbation.watching() as sites:
                valid_loss, gradients = phi_gradient(self.model, phi, x, y)
            return TaskStep(train_loss, valid_loss, gradients, sites.means())

    def state(self) -> dict[str, Any]:
        """All that a checkpoint needs to continue this task, without phi; tensors and plain values only."""
        theta = {name: value for name, value in self.model.state_dict().items() if not name.startswith(NAME)}
        attachment = self.attachment.state()
        del attachment["phi"], attachment["perturbation"]
        return {
            "generation": self.generation,
            "theta": {name: value.detach().clone() for name, value in theta.items()},
            "optimizer": self.optimizer.state_dict(),
            "attachment": attachment,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` gave."""
        self.generation = state["generation"]
        self._start()
        # phi is here already, and a strict load asks for it.
        here = {name: value for name, value in self.model.state_dict().items() if name.startswith(NAME)}
        self.model.load_state_dict({**here, **state["theta"]})
        self.optimizer.load_state_dict(state["optimizer"])
        own = {key: value.detach().clone() for key, value in self._shared[0].state_dict().items()}
        self.attachment.load_state({**state["attachment"], "phi": own, "perturbation": own})

    def settle_on_device(self) -> None:
        """Bring the optimizer's state and the images to where the network is now."""
        self.optimizer.load_state_dict(self.optimizer.state_dict())
        self.task = self.task.on(self._device)

    @property
    def _device(self) -> torch.device:
        return next(self._shared[0].parameters()).device
