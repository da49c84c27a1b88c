"""Meta-training as a LightningModule: one training step is one joint step of all tasks."""

from dataclasses import asdict, dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from mp_lightning.errors import UserError
from mp_lightning.meta.checkpoint import RunCheckpointError
from mp_lightning.meta.history import History
from mp_lightning.meta.step import phi_gradient, theta_step
from mp_lightning.meta.tasks import Task, derived_seed
from mp_lightning.meta.watched import WatchedMetaPerturb
from mp_lightning.perturbation import initial_phi
from mp_lightning.runs import differences
from mp_lightning.sites import Attachment, attach
from mp_lightning.sites.attachment import NAME

_PHI_KEYS = f".{NAME}."


@dataclass(frozen=True)
class MetaSettings:
    """Settings of meta-training; ``steps`` are joint meta-steps, ``lr`` and ``weight_decay`` those of phi."""

    steps: int
    lr: float
    weight_decay: float
    theta_lr: float
    theta_weight_decay: float
    batch_size: int
    restart_after: int | None


class DivergedError(UserError):
    """The loss of a task is not finite."""


class JointMetaTraining(L.LightningModule):
    """Learns phi over all tasks at once (Algorithm 1 of the paper), on one device.

    Args:
        tasks: the tasks; each gets a network of its own, and all share one perturbation.
        settings: see :class:`MetaSettings`.
        seed: seed of phi, of the networks, of the batches and of the noise.
        history: where losses, scale and noise are written.
    """

    def __init__(self, tasks: list[Task], settings: MetaSettings, seed: int, history: History) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.tasks = tasks
        self.settings = settings
        self.seed = seed
        self.history = history
        self.meta_step = 0
        self.perturbation = WatchedMetaPerturb(initial_phi(seed))
        self.thetas = nn.ModuleDict()
        self.theta_optimizers: dict[str, torch.optim.Optimizer] = {}
        self.attachments: dict[str, Attachment] = {}
        for task in tasks:
            self._start_theta(task)
        self.description: dict[str, Any] = {
            "seed": seed,
            "meta": asdict(settings),
            "tasks": {task.name: task.description() for task in tasks},
        }

    def check_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another run.

        Raises:
            RunCheckpointError: it was made with another seed, other settings or other tasks; the message says which.
        """
        different = differences(checkpoint["description"], self.description)
        if different:
            more = f" and {len(different) - 3} more" if len(different) > 3 else ""
            raise RunCheckpointError(
                f"the checkpoint in the run folder was made with {'; '.join(different[:3])}{more}: set it back, choose "
                "another folder with hydra.run.dir=, or start anew with run.fresh=true"
            )

    def on_fit_start(self) -> None:
        # Checkpoints are read before the networks move to the device; this takes the optimizers' state after them.
        for optimizer in self.theta_optimizers.values():
            optimizer.load_state_dict(optimizer.state_dict())

    def on_train_start(self) -> None:
        if self.meta_step == 0:
            self.history.resume(0, {})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(
            self.perturbation.parameters(), lr=self.settings.lr, weight_decay=self.settings.weight_decay
        )

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One joint step. ``batch`` is ignored: each task draws its own by the number of the step."""
        watch = self.history.is_due(self.meta_step + 1, self.settings.steps)
        results = [self._task_step(index, task, watch) for index, task in enumerate(self.tasks)]
        phi = list(self.perturbation.parameters())
        for position, parameter in enumerate(phi):
            parameter.grad = torch.stack([gradients[position] for _, _, gradients in results]).mean(dim=0)
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        optimizer.step()
        self.meta_step += 1
        train_losses, valid_losses = [float(r[0]) for r in results], [float(r[1]) for r in results]
        self.log("train_loss", sum(train_losses) / len(results), prog_bar=True)
        self.log("valid_loss", sum(valid_losses) / len(results), prog_bar=True)
        names = [task.name for task in self.tasks]
        self.history.add(self.meta_step, dict(zip(names, zip(train_losses, valid_losses, strict=True), strict=True)))
        if watch:
            self.history.write(self.meta_step)

    def _task_step(self, index: int, task: Task, watch: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
        settings, step = self.settings, self.meta_step
        if settings.restart_after is not None:
            # Staggered, so that at any step phi sees networks of all ages.
            age = step + index * settings.restart_after // len(self.tasks)
            if step > 0 and age % settings.restart_after == 0:
                self._start_theta(task, generation=age // settings.restart_after)
        model = self.thetas[task.name].train()
        phi = list(self.perturbation.parameters())
        x, y = task.batch("train", step, settings.batch_size, self.seed, self.device)
        train_loss = theta_step(model, self.theta_optimizers[task.name], x, y)
        x, y = task.batch("valid", step, settings.batch_size, self.seed, self.device)
        if watch:
            with self.perturbation.watching() as (scales, noises):
                valid_loss, gradients = phi_gradient(model, phi, x, y)
            self.history.observe(task.name, [float(s) for s in scales], [float(z) for z in noises])
        else:
            valid_loss, gradients = phi_gradient(model, phi, x, y)
        if not all(bool(value.isfinite().all()) for value in (train_loss, valid_loss, *gradients)):
            raise DivergedError(
                f"task '{task.name}' diverged at meta-step {step + 1}: its loss or gradient is not finite; lower "
                "meta.theta_lr or meta.lr, or look at its images"
            )
        return train_loss, valid_loss, gradients

    def _start_theta(self, task: Task, generation: int = 0) -> None:
        model = task.architecture.build(task.train, derived_seed(self.seed, task.name, "theta", generation))
        model.to(next(self.perturbation.parameters()).device)
        self.attachments[task.name] = attach(
            model,
            perturbation=self.perturbation,
            seed=derived_seed(self.seed, task.name, "noise", generation),
        )
        self.thetas[task.name] = model
        theta = [p for name, p in model.named_parameters() if not name.startswith(NAME)]
        self.theta_optimizers[task.name] = torch.optim.Adam(
            theta, lr=self.settings.theta_lr, weight_decay=self.settings.theta_weight_decay
        )

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """theta of every task and phi, which the tasks share, once."""
        full = super().state_dict(*args, **kwargs)
        return {key: value for key, value in full.items() if _PHI_KEYS not in key}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        shared = {key: value for key, value in super().state_dict().items() if _PHI_KEYS in key}
        for key in shared:
            shared[key] = state_dict[f"perturbation.{key.rpartition('.')[2]}"]
        return super().load_state_dict({**state_dict, **shared}, strict, assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["description"] = self.description
        checkpoint["meta_step"] = self.meta_step
        checkpoint["history"] = self.history.pending()
        checkpoint["tasks"] = {
            task.name: {
                "optimizer": self.theta_optimizers[task.name].state_dict(),
                "attachment": self.attachments[task.name].state(),
            }
            for task in self.tasks
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check_checkpoint(checkpoint)
        self.meta_step = checkpoint["meta_step"]
        self.history.resume(self.meta_step, checkpoint["history"])
        for task in self.tasks:
            saved = checkpoint["tasks"][task.name]
            self.theta_optimizers[task.name].load_state_dict(saved["optimizer"])
            self.attachments[task.name].load_state(saved["attachment"])
