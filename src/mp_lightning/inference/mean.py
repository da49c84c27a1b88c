"""Inference by expectation: one forward, with the expected noise at each site and batch norm re-estimated for it.

Batch norm's running statistics belong to the noisy forwards of training. Under the expected noise the distributions
differ, so the statistics are estimated again, in a copy: the buffers of the model stay those of training, and the copy
takes their place only while a forward in evaluation mode runs.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mp_lightning.errors import ConfigurationError
from mp_lightning.inference.mc import OutputAverage

if TYPE_CHECKING:
    from mp_lightning.sites import Attachment

BATCHES = 50  # the most training batches that re-estimation looks at


class Mean:
    """Expected noise instead of samples, with the attachment's ``evaluation_buffers`` in place of the model's own.

    While a model with batch norm has no such buffers (it was not re-estimated, or was trained on since), expectation
    would be far off; then the outputs of ``samples`` noisy forwards are averaged instead, with a warning.
    """

    def __init__(self, samples: int = 20) -> None:
        self._sampling = True
        self._stand_in = OutputAverage(samples)
        self._uses_stand_in = False
        self._has_batch_norm: bool | None = None

    def begin(self, attachment: "Attachment") -> None:
        if not self._stand_in.busy:
            self._uses_stand_in = attachment.evaluation_buffers is None and self._needs_buffers(attachment)
        if self._uses_stand_in:
            self._stand_in.begin(attachment)
            return
        self._sampling = attachment.sampling
        attachment.sampling = False
        _swap_buffers(attachment)

    def finish(
        self, attachment: "Attachment", module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        if self._uses_stand_in:
            return self._stand_in.finish(attachment, module, args, kwargs, output)
        _swap_buffers(attachment)
        attachment.sampling = self._sampling
        return output

    def _needs_buffers(self, attachment: "Attachment") -> bool:
        if self._has_batch_norm is None:
            self._has_batch_norm = any(isinstance(module, _BatchNorm) for module in attachment.model.modules())
            if self._has_batch_norm:
                warnings.warn(
                    "MetaPerturb: batch norm was not re-estimated since the model was trained, so the outputs of "
                    f"{self._stand_in.samples} noisy forwards are averaged in place of inference by expectation; "
                    "mp_lightning.reestimate_batch_norm mends it",
                    stacklevel=2,
                )
        return self._has_batch_norm


def _swap_buffers(attachment: "Attachment") -> None:
    """Exchange the model's buffers with the copies: once to put them in, once more to take them out."""
    if not attachment.evaluation_buffers:
        return
    swapped = {}
    for name, copy in attachment.evaluation_buffers.items():
        path, _, leaf = name.rpartition(".")
        owner = attachment.model.get_submodule(path)
        current = owner._buffers[leaf]
        assert current is not None
        swapped[name], owner._buffers[leaf] = current, copy.to(current)
    attachment.evaluation_buffers = swapped


class _ForwardDone(BaseException):
    """Ends a training step once the model ran; no user code should catch it."""


class _StopAfterForward:
    """Expected noise, and the end of the step as soon as the model, or each of its parts, has run."""

    def __init__(self, attachment: "Attachment") -> None:
        entries = attachment.entry_modules()
        self._whole = entries.pop("", None)
        self._parts = {id(module) for module in entries.values()}
        self.seen: set[int] = set()

    def begin(self, attachment: "Attachment") -> None:
        attachment.sampling = False

    def finish(
        self, attachment: "Attachment", module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        attachment.sampling = True
        if output is None:  # the forward raised, and that error is the one to see
            return None
        self.seen.add(id(module))
        if module is self._whole or self.seen >= self._parts:
            raise _ForwardDone
        return output


def reestimate_batch_norm(attachment: "Attachment", forwards: Iterable[Callable[[], Any]]) -> None:
    """Estimate batch norm's statistics under the expected noise, as the plain average over training batches.

    They become the attachment's ``evaluation_buffers`` (empty if there is nothing to re-estimate), which :class:`Mean`
    uses; the model itself is left as it was. Frozen batch norm, and such that the forwards do not reach, keeps its
    statistics. Under DDP the statistics of the processes are averaged.

    Args:
        attachment: of the model.
        forwards: functions each of which runs the model on one *training* batch. They may do more than that, as a
            training step does: each is ended as soon as the model has run. At most 50 are run.

    Raises:
        ConfigurationError: there is no function, or one never ran the model.
    """
    norms = {
        name: module
        for name, module in attachment.model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None and not _is_frozen(module, attachment)
    }
    attachment.evaluation_buffers = None
    if not norms:
        attachment.evaluation_buffers = {}
        return
    stop = _StopAfterForward(attachment)
    with torch.inference_mode(False), torch.no_grad(), _estimating(attachment, list(norms.values()), stop):
        done = 0
        for forward in islice(forwards, BATCHES):
            done += 1
            stop.seen.clear()
            try:
                forward()
            except _ForwardDone:
                continue
            if stop.seen:
                continue
            names = " or ".join(f"self.{name}" if name else "self" for name in attachment.entry_modules())
            raise ConfigurationError(
                f"batch norm cannot be re-estimated: a training step did not call the model ({names}); call it there, "
                "or use inference='mc'"
            )
        if not done:
            raise ConfigurationError("batch norm cannot be re-estimated without a training batch; use inference='mc'")
        copies = {
            f"{name}.{leaf}": getattr(module, leaf).detach().clone()
            for name, module in norms.items()
            for leaf in ("running_mean", "running_var")
            if module.num_batches_tracked is None or module.num_batches_tracked > 0
        }
    _average_over_processes(copies)
    attachment.evaluation_buffers = copies


def _is_frozen(norm: _BatchNorm, attachment: "Attachment") -> bool:
    """Whether training left the statistics of this layer alone."""
    if attachment.model.training and not norm.training:
        return True
    return norm.weight is not None and not norm.weight.requires_grad


@contextmanager
def _estimating(attachment: "Attachment", norms: list[_BatchNorm], stop: _StopAfterForward) -> Iterator[None]:
    """Everything in evaluation mode but batch norm, which takes the plain average over batches; undone on leaving."""
    modes = [(module, module.training) for module in attachment.model.modules()]
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in attachment.model.parameters()]
    buffers = [(m, {k: v.clone() for k, v in m._buffers.items() if v is not None}, m.momentum) for m in norms]
    previous = attachment.inference
    attachment.model.eval()
    for module in norms:
        module.train()
        module.reset_running_stats()
        module.momentum = None
    attachment.inference = stop
    try:
        yield
    finally:
        attachment.inference = previous
        for module, saved, momentum in buffers:
            module.momentum = momentum
            for name, value in saved.items():
                getattr(module, name).copy_(value)
        for parameter, requires_grad, gradient in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
        for module_, training in modes:
            module_.training = training


def _average_over_processes(copies: dict[str, Tensor]) -> None:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    for value in copies.values():
        torch.distributed.all_reduce(value)
        value /= torch.distributed.get_world_size()
