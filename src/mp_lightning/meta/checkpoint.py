"""Checkpoints of a meta-training run: always whole, the newest two kept, the newest that can be read continued from."""

import contextlib
import io
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from mp_lightning.errors import UserError
from mp_lightning.meta import exchange
from mp_lightning.runs import unusable
from mp_lightning.whole import write_whole

KEPT = 2
# Between two checkpoints that are due by their steps another is made once this much time has passed.
_LONGEST_SECONDS = 300.0


class RunCheckpointError(UserError):
    """A checkpoint of meta-training is damaged, or belongs to another run.

    Args:
        fault: what is wrong.
        remedy: what to do about it.
    """

    def __init__(self, fault: str, remedy: str) -> None:
        super().__init__(f"{fault}; {remedy}")
        self.fault = fault


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there when it is whole and on the disk."""

    def __init__(self) -> None:
        super().__init__()
        self.failure: OSError | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write ``path``; where the system refuses, the reason is kept in ``failure`` and nothing is left behind."""
        content = io.BytesIO()
        torch.save(checkpoint, content)

        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            write_whole(Path(path), lambda partial: partial.write_bytes(content.getbuffer()))
        except OSError as error:
            self.failure = error


class KeepCheckpoint(Checkpoint):
    """Writes the run's checkpoint after every ``every`` meta-steps, sooner if they take long, and at the end.

    Args:
        folder: where checkpoints are kept.
        every: meta-steps from one checkpoint to the next.
        rows: meta-steps after which the time is looked at.
    """

    def __init__(self, folder: Path, every: int, rows: int = 1) -> None:
        super().__init__()
        self._folder = folder
        self._every = every
        self._rows = rows
        self._saved: int | None = None
        self._time = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = _meta_step(pl_module)
        if step % self._every == 0 or (step % self._rows == 0 and self._late(pl_module.device)):
            self._save(trainer, step)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if _meta_step(pl_module) != self._saved:
            self._save(trainer, _meta_step(pl_module))

    def _late(self, device: torch.device) -> bool:
        return exchange.on_any(time.monotonic() - self._time > _LONGEST_SECONDS, device)

    def _save(self, trainer: L.Trainer, step: int) -> None:
        path = checkpoint_path(self._folder, step)
        trainer.save_checkpoint(path)
        files = trainer.strategy.checkpoint_io
        failure = files.failure if isinstance(files, WholeFiles) else None
        if exchange.on_any(failure is not None, trainer.strategy.root_device):
            error = unusable(self._folder, failure or OSError(0, "see the first process"))
            error.on_every_rank = True
            raise error
        if trainer.is_global_zero:
            for old in checkpoints(self._folder)[KEPT:]:
                _remove(old)
        self._saved, self._time = step, time.monotonic()


def _meta_step(pl_module: L.LightningModule) -> int:
    step = pl_module.meta_step
    assert isinstance(step, int)
    return step


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint after meta-step ``step`` belongs."""
    return folder / f"step-{step:08d}.ckpt"


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints in a folder, the newest first."""
    return sorted(folder.glob("step-*.ckpt"), reverse=True)


def newest_readable(folder: Path, tell: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that can be read, with its content; None where there is no checkpoint.

    Args:
        folder: where checkpoints are kept.
        tell: shows a line to the user, for every checkpoint that is passed over.

    Raises:
        RunCheckpointError: there are checkpoints, and none can be read.
    """
    found = checkpoints(folder)
    for path in found:
        try:
            return path, read_checkpoint(path)
        except RunCheckpointError as error:
            if path == found[-1]:
                raise
            tell(f"{error.fault}; continuing from the one before")
    return None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU; no code of the file is run.

    Raises:
        RunCheckpointError: the file is damaged.
    """
    try:
        # torch does not look at the checksums that it writes.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
    # A damaged file makes torch raise whatever its readers of zip, pickle and tensors raise.
    except Exception as error:
        raise RunCheckpointError(
            f"checkpoint '{path}' is damaged and cannot be continued from", "start the run anew with run.fresh=true"
        ) from error
    if not isinstance(content, dict) or "description" not in content:
        raise RunCheckpointError(
            f"checkpoint '{path}' was not written by this version of meta-training", "start anew with run.fresh=true"
        )
    return content


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # it does no harm where it is
        path.unlink(missing_ok=True)
