"""What a terminal shows while phi is meta-trained."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_UPDATES_PER_SECOND = 4  # the default, 10, costs a few per cent of a small machine


def progress_display(console: Console, *columns: str, enabled: bool, transient: bool) -> Progress:
    """A live bar: description, bar, number of steps, ``columns`` (templates of rich) and the time that is left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        *map(TextColumn, columns),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=console,
        # Where nothing can be overwritten, only what stays is written.
        disable=not enabled or (transient and not console.is_terminal),
        transient=transient,
        refresh_per_second=_UPDATES_PER_SECOND,
    )


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
        if self._enabled:
            self._bar = self._display.add_task(
                "meta-training", total=trainer.max_steps, completed=trainer.global_step, train="", valid=""
            )
            self._display.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._bar is not None:
            train, valid = (f"{float(trainer.callback_metrics[f'{half}_loss']):.3f}" for half in ("train", "valid"))
            self._display.update(self._bar, completed=trainer.global_step, train=train, valid=valid)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._display.stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._display.stop()
