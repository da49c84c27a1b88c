"""Inference by expectation: one forward, with the expected noise at each site and batch norm re-estimated for it.

Batch norm's running statistics belong to the noisy forwards of training. Under the expected noise the distributions
differ, so the statistics are estimated again, in a copy: the buffers of the model stay those of training, and the copy
takes their place only while a forward in evaluation mode runs.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mp_lightning.errors import ConfigurationError

if TYPE_CHECKING:
    from mp_lightning.sites import Attachment

BATCHES = 50  # the most training batches that re-estimation looks at


class Mean:
    """Expected noise instead of samples, with the attachment's ``evaluation_buffers`` in place of the model's own."""

    def __init__(self) -> None:
        self._sampling = True

    def begin(self, attachment: "Attachment") -> None:
        self._sampling = attachment.sampling
        attachment.sampling = False
        _swap_buffers(attachment)

    def finish(
        self, attachment: "Attachment", module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        _swap_buffers(attachment)
        attachment.sampling = self._sampling
        return output


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
    """Ends a training step after its first forward; no user code should catch it."""


class _StopAfterForward(Mean):
    def finish(
        self, attachment: "Attachment", module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        super().finish(attachment, module, args, kwargs, output)
        if output is None:  # the forward raised, and that error is the one to see
            return None
        raise _ForwardDone


def reestimate_batch_norm(attachment: "Attachment", forwards: Iterable[Callable[[], Any]]) -> None:
    """Estimate batch norm's statistics under the expected noise, as the plain average over training batches.

    They become the attachment's ``evaluation_buffers`` (empty if the model has no batch norm), which :class:`Mean`
    uses; the model itself is left as it was.

    Args:
        attachment: of the model.
        forwards: functions each of which runs the model on one *training* batch. They may do more than that, as a
            training step does: each is ended as soon as the model's forward returns. At most 50 are run.

    Raises:
        ConfigurationError: there is no function, or one never ran the model.
    """
    norms = {
        name: module
        for name, module in attachment.model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    attachment.evaluation_buffers = None
    if not norms:
        attachment.evaluation_buffers = {}
        return
    with torch.inference_mode(False), torch.no_grad(), _estimating(attachment, list(norms.values())):
        done = 0
        for forward in islice(forwards, BATCHES):
            done += 1
            try:
                forward()
            except _ForwardDone:
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
        }
    _average_over_processes(copies)
    attachment.evaluation_buffers = copies


@contextmanager
def _estimating(attachment: "Attachment", norms: list[_BatchNorm]) -> Iterator[None]:
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
    attachment.inference = _StopAfterForward()
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
