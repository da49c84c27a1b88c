"""One checkpoint of a meta-training run, always whole."""

import os
from pathlib import Path
from typing import Any

import lightning as L

from mp_lightning.runs import LAST_CHECKPOINT


class KeepCheckpoint(L.Callback):
    """Writes the run's checkpoint after every ``every`` meta-steps and after the last; the old one stays until then."""

    def __init__(self, folder: Path, every: int) -> None:
        super().__init__()
        self._folder = folder
        self._every = every

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step % self._every and step < trainer.max_steps:
            return
        partial = self._folder / f"{LAST_CHECKPOINT}.partial"
        trainer.save_checkpoint(partial)
        os.replace(partial, self._folder / LAST_CHECKPOINT)
