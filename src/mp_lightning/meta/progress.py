"""What a terminal shows while phi is meta-trained."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import TaskID

from mp_lightning.compare.progress import progress_display
from mp_lightning.meta.module import JointMetaTraining


class MetaTrainingBar(ProgressBar):
    """Meta-steps, the losses of both halves (mean over the tasks, nats), and the time that is left."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._display = progress_display(
            console, "train {task.fields[train]}", "valid {task.fields[valid]}", enabled=True, transient=False
        )
        self._bar: TaskID | None = None
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, JointMetaTraining)
        if self._enabled and trainer.is_global_zero:
            self._bar = self._display.add_task(
                "meta-training", total=pl_module.settings.steps, completed=pl_module.meta_step, train="", valid=""
            )
            self._display.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, JointMetaTraining)
        if self._bar is not None:
            train, valid = (f"{float(trainer.callback_metrics[f'{half}_loss']):.3f}" for half in ("train", "valid"))
            self._display.update(self._bar, completed=pl_module.meta_step, train=train, valid=valid)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._display.stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._display.stop()
