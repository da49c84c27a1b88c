"""Meta-training as a LightningModule: one training step is one joint step of all tasks."""

import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from mp_lightning.errors import UserError
from mp_lightning.meta import exchange
from mp_lightning.meta.checkpoint import RunCheckpointError
from mp_lightning.meta.history import History
from mp_lightning.meta.joint import JointGradient
from mp_lightning.meta.learner import Learner
from mp_lightning.meta.settings import MetaSettings
from mp_lightning.meta.tasks import Task
from mp_lightning.meta.watched import WatchedMetaPerturb
from mp_lightning.perturbation import initial_phi
from mp_lightning.runs import differences, relevant_settings

_LEARNERS = "learners."
_TOLD = 10  # times that a task is said to be left out, of all tasks; then they are counted alone


def _told(difference: str) -> str:
    """A difference of descriptions, of images without the digests, which say nothing to anyone."""
    key, digest, _ = difference.partition(".digest=")
    return f"other images of '{key.removeprefix('tasks.')}'" if digest else difference


class DivergedError(UserError):
    """The loss or gradient of a task is not finite."""

    on_every_rank = True


class DriftError(UserError):
    """The processes of a run no longer hold the same phi."""

    on_every_rank = True


class JointMetaTraining(L.LightningModule):
    """Learns phi over all tasks at once (Algorithm 1 of the paper).

    With several processes each learns some of the tasks: theta stays there, and a step exchanges phi's gradients alone.

    Args:
        tasks: the tasks; each gets a network of its own, and all share one perturbation.
        settings: see :class:`MetaSettings`.
        seed: seed of phi, of the networks, of the batches and of the noise.
        history: where losses, scale, noise and multiplier are written; on the first process alone.
        mine: the numbers of the tasks that this process learns; None: all.
        tell: shows a line to the user.

    Attributes:
        meta_step: joint steps done.
        left_out: by task, the steps whose mean it left, as its loss or gradient was not finite.
        terminated: whether a process was asked to end (SIGTERM); all do so after the step, with a checkpoint.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        settings: MetaSettings,
        seed: int,
        history: History | None,
        mine: Sequence[int] | None = None,
        tell: Callable[[str], None] = print,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.settings = settings
        self.seed = seed
        self.history = history
        self.meta_step = 0
        self.terminated = False
        self.names = [task.name for task in tasks]
        self.left_out = dict.fromkeys(self.names, 0)
        self.perturbation = WatchedMetaPerturb(initial_phi(seed), settings.noise_per)
        self.mine = list(range(len(tasks)) if mine is None else mine)
        self.learners = nn.ModuleDict(
            {tasks[number].name: Learner(tasks[number], self.perturbation, settings, seed) for number in self.mine}
        )
        self.description: dict[str, Any] = {
            "seed": seed,
            **relevant_settings({"meta": asdict(settings)}),
            "tasks": {task.name: task.description() for task in tasks},
        }
        self._tell = tell
        self._keep_theta_from_ddp()

    def learner(self, name: str) -> Learner:
        """The learner of a task that this process has."""
        learner = self.learners[name]
        assert isinstance(learner, Learner)
        return learner

    def check_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another run.

        Raises:
            RunCheckpointError: it was made with another seed, other settings or other tasks; the message says which.
        """
        different = [_told(one) for one in differences(checkpoint["description"], self.description)]
        if different:
            more = f" and {len(different) - 3} more" if len(different) > 3 else ""
            raise RunCheckpointError(
                f"the checkpoint in the run folder was made with {'; '.join(different[:3])}{more}",
                "set it back, choose another folder with hydra.run.dir=, or start anew with run.fresh=true",
            )

    def on_fit_start(self) -> None:
        # Checkpoints are read before the networks move to the device; this takes what does not move with them.
        for number in self.mine:
            self.learner(self.names[number]).settle_on_device()

    def on_train_start(self) -> None:
        # In place of Lightning's handler, which communicates in the middle of whatever the processes are exchanging.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._terminate)
        if self.meta_step == 0 and self.history is not None:
            self.history.resume(0, {})
        self._check_drift()

    def _terminate(self, number: int, frame: Any) -> None:
        self.terminated = True

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(
            self.perturbation.parameters(), lr=self.settings.lr, weight_decay=self.settings.weight_decay
        )

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One joint step. ``batch`` is ignored: each task draws its own by the number of the step."""
        watch = History.is_due(self.meta_step + 1, self.settings.steps)
        phi = list(self.perturbation.parameters())
        joint = JointGradient(phi, len(self.names))
        observed: dict[str, Any] = {}
        for number in self.mine:
            learner = self.learner(self.names[number])
            self._restart_when_due(number)
            step = learner.step(self.meta_step, watch)
            joint.add(number, step)
            if step.observed is not None:
                observed[self.names[number]] = step.observed
        if self.terminated:
            joint.ask_to_stop()
        joint.reduce()
        if joint.invalid:
            self._leave_out(joint.invalid)
        for parameter, gradient in zip(phi, joint.mean(), strict=True):
            parameter.grad = gradient
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        optimizer.step()
        self.meta_step += 1
        self.terminated = self.terminated or joint.stop  # SIGTERM may have come since the others were told
        self.trainer.should_stop = self.trainer.should_stop or joint.stop
        self._record(joint, phi, observed if watch else None)

    def _restart_when_due(self, number: int) -> None:
        """Staggered over the tasks: all networks start at age 0, so none is older than the step; once
        ``restart_after`` steps are done, their ages are spread over as many.
        """
        after, step = self.settings.restart_after, self.meta_step
        if after is not None and step > 0 and (step + number * after // len(self.names)) % after == 0:
            self.learner(self.names[number]).restart()

    def _leave_out(self, invalid: list[int]) -> None:
        names = ", ".join(f"'{self.names[number]}'" for number in invalid)
        what = f"task {names}" if len(invalid) == 1 else f"tasks {names}"
        given = self.settings.on_divergence == "leave_out"
        if not given or len(invalid) == len(self.names):
            raise DivergedError(
                f"{what} diverged at meta-step {self.meta_step + 1}: loss or gradient is not finite; lower "
                "meta.theta_lr or meta.lr, or look at the images"
                + ("" if given else ", or leave such tasks out of a new run by meta.on_divergence=leave_out")
            )
        before = sum(self.left_out.values())
        for number in invalid:
            self.left_out[self.names[number]] += 1
        if before < _TOLD:
            last = "; more of it is only counted" if sum(self.left_out.values()) >= _TOLD else ""
            self._tell(
                f"{what} diverged at meta-step {self.meta_step + 1} and left this step's mean; the network starts "
                f"afresh{last}"
            )
        for number in set(invalid) & set(self.mine):
            self.learner(self.names[number]).restart()

    def _record(self, joint: JointGradient, phi: Sequence[Tensor], observed: dict[str, Any] | None) -> None:
        valid = [pair for pair in joint.losses if pair[0] == pair[0]]
        for index, name in enumerate(("train_loss", "valid_loss")):
            self.log(name, sum(pair[index] for pair in valid) / len(valid), prog_bar=True, logger=False)
        if self.history is not None:
            self.history.add(dict(zip(self.names, joint.losses, strict=True)))
        if observed is None:
            return
        self._check_drift()
        norm = torch.cat([p.grad.flatten() for p in phi if p.grad is not None]).norm()
        observed = exchange.collect(observed, phi[0].device)
        if self.history is not None:
            self.history.observe(float(norm), observed)
            row = self.history.write(self.meta_step)
            for logger in self.loggers:
                logger.log_metrics(row, self.meta_step)

    def _check_drift(self) -> None:
        step = torch.tensor([float(self.meta_step)], device=self._phi_device)
        if not exchange.same_everywhere(
            torch.cat([step, *(p.detach().flatten() for p in self.perturbation.parameters())])
        ):
            raise DriftError(
                f"after meta-step {self.meta_step} phi is not the same on all processes; let all of them read the same "
                "run folder and have the same versions; the same command continues from the last checkpoint"
            )

    @property
    def _phi_device(self) -> torch.device:
        return next(self.perturbation.parameters()).device

    def _keep_theta_from_ddp(self) -> None:
        """The names that DistributedDataParallel must neither compare nor overwrite: all but phi."""
        names = [
            *dict(self.named_parameters(remove_duplicate=False)),
            *dict(self.named_buffers(remove_duplicate=False)),
        ]
        self._ddp_params_and_buffers_to_ignore = [name for name in names if name.startswith(_LEARNERS)]

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """phi alone; theta is kept by task in a checkpoint, see :meth:`on_save_checkpoint`."""
        state: dict[str, Any] = self.perturbation.state_dict(prefix="perturbation.")
        return state

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        phi = {key.removeprefix("perturbation."): value for key, value in state_dict.items()}
        return self.perturbation.load_state_dict(phi, strict, assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # How far the run has come is the module's to know: a trainer gets the remaining steps only.
        del checkpoint["loops"]
        checkpoint.get("callbacks", {}).pop("Timer", None)  # of max_time, which each command has anew
        checkpoint["description"] = self.description
        checkpoint["meta_step"] = self.meta_step
        checkpoint["left_out"] = self.left_out
        if self.history is not None:
            checkpoint["history"] = self.history.pending()
        states = {self.names[number]: self.learner(self.names[number]).state() for number in self.mine}
        checkpoint["tasks"] = exchange.collect(states, self._phi_device)

    def continue_from(self, checkpoint: dict[str, Any]) -> None:
        """Take over a checkpoint without a trainer, as where no step is left."""
        self.on_load_checkpoint(checkpoint)
        self.load_state_dict(checkpoint["state_dict"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check_checkpoint(checkpoint)
        self.meta_step = checkpoint["meta_step"]
        self.left_out = dict(checkpoint["left_out"])
        if self.history is not None:
            self.history.resume(self.meta_step, checkpoint["history"])
        for number in self.mine:
            self.learner(self.names[number]).load_state(checkpoint["tasks"][self.names[number]])
