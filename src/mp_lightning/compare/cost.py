"""What training costs: the time of a step, the memory it takes, and the training loss on the way."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor

from mp_lightning.errors import ConfigurationError
from mp_lightning.schedule import total_training_batches, training_loss

POINTS = 50  # of the learning curve
_TIMED = 50  # steps, spread over the run
_UNKNOWN = 1000  # steps that a run is taken to have
_MEASURED = 2  # the step whose memory is measured on a CPU: the first ones may allocate once and for all


class Cost(L.Callback):
    """Times some steps, measures memory, and records the training loss.

    On a GPU the memory is the peak that was allocated; on a CPU, what one step keeps for its backward.

    Args:
        on_step: called after each training batch.
    """

    def __init__(self, on_step: Callable[[int], None] | None = None) -> None:
        super().__init__()
        self._every = self._point = 1
        self._on_step = on_step
        self._step = 0
        self._times: list[float] = []
        self._losses: list[Tensor] = []
        self._kept: KeptForBackward | None = None
        self._start = 0.0
        self._bytes = 0
        self.curve: list[tuple[int, float]] = []

    @property
    def step_ms(self) -> float:
        """Median time of a training step in milliseconds; NaN if none was timed."""
        return 1e3 * statistics.median(self._times) if self._times else float("nan")

    @property
    def memory_mb(self) -> float:
        """Millions of bytes."""
        return self._bytes / 1e6

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        try:
            steps = total_training_batches(trainer)
        except ConfigurationError:
            steps = _UNKNOWN
        self._every, self._point = max(1, steps // _TIMED), max(1, steps // POINTS)
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._step == _MEASURED and pl_module.device.type != "cuda":
            self._kept = KeptForBackward(pl_module)
            self._kept.__enter__()
        if self._step % self._every == 0:
            wait(pl_module.device)
            self._start = time.perf_counter()

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        self._stop_measuring()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        timed = self._step % self._every == 0 and self._step not in (0, _MEASURED)
        if timed:
            wait(pl_module.device)
            self._times.append(time.perf_counter() - self._start)
        self._stop_measuring()
        loss = training_loss(trainer, outputs)
        if loss is not None:
            self._losses.append(loss)
        self._step += 1
        if self._step % self._point == 0:
            self._note_losses()
        if self._on_step is not None:
            self._on_step(1)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._note_losses()
        if pl_module.device.type == "cuda":
            self._bytes = torch.cuda.max_memory_allocated(pl_module.device)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stop_measuring()

    def _stop_measuring(self) -> None:
        if self._kept is not None:
            self._kept.__exit__(None, None, None)
            self._bytes, self._kept = self._kept.bytes, None

    def _note_losses(self) -> None:
        if self._losses:
            self.curve.append((self._step, float(torch.stack([loss.float().mean() for loss in self._losses]).mean())))
            self._losses.clear()


class KeptForBackward:
    """In this context, counts the bytes that forwards keep for a backward; parameters and buffers are left out."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._own = {value.untyped_storage().data_ptr() for value in (*model.parameters(), *model.buffers())}
        self._found: dict[int, int] = {}
        self._alive: list[Tensor] = []  # so that no address is used twice
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        """What was kept so far."""
        return sum(self._found.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own:
            self._found[storage.data_ptr()] = storage.nbytes()
            self._alive.append(tensor)
        return tensor

    def __enter__(self) -> "KeptForBackward":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)
        self._alive.clear()


def wait(device: torch.device) -> None:
    """Until the device has done what it was given, so that time can be measured."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
