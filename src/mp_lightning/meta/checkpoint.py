"""One checkpoint of a meta-training run, always whole."""

import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint

from mp_lightning.errors import UserError
from mp_lightning.runs import LAST_CHECKPOINT


class RunCheckpointError(UserError):
    """A checkpoint of meta-training is damaged, or belongs to another run."""


class KeepCheckpoint(Checkpoint):
    """Writes the run's checkpoint after every ``every`` meta-steps and at the end; the old one stays until then.

    Args:
        folder: where ``last.ckpt`` is kept.
        every: meta-steps from one checkpoint to the next.
    """

    def __init__(self, folder: Path, every: int) -> None:
        super().__init__()
        self._folder = folder
        self._every = every
        self._saved: int | None = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self._every == 0:
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step != self._saved:
            self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        partial = self._folder / f"{LAST_CHECKPOINT}.partial"
        trainer.save_checkpoint(partial)
        os.replace(partial, self._folder / LAST_CHECKPOINT)
        self._saved = trainer.global_step


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU; no code of the file is run.

    Raises:
        RunCheckpointError: the file is damaged.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    # A damaged file makes torch raise whatever its readers of zip, pickle and tensors raise.
    except Exception as error:
        raise RunCheckpointError(
            f"checkpoint '{path}' is damaged and cannot be continued from; start the run anew with run.fresh=true"
        ) from error
    if not isinstance(content, dict) or "description" not in content:
        raise RunCheckpointError(
            f"checkpoint '{path}' was not written by this version of meta-training; start anew with run.fresh=true"
        )
    return content
