"""Batch norm, and constants, for inference without samples, estimated on training batches.

Batch norm's running statistics belong to the noisy forwards of training. Under the expected noise the distributions
differ, so the statistics are estimated again, in a copy: the buffers of the model stay those of training, and the copy
takes their place only while a forward in evaluation mode runs.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mp_lightning.errors import ConfigurationError
from mp_lightning.sites import Attachment
from mp_lightning.sites.estimates import Estimates, batch_norms

BATCHES = 50  # the most training batches that re-estimation looks at


class _ForwardDone(BaseException):
    """Ends a training step once the model ran; no user code should catch it."""


class _StopAfterForward:
    """Expected noise or constants, and the end of the step as soon as the model, or each of its parts, has run."""

    expects = False

    def __init__(self, attachment: Attachment, folding: bool = False) -> None:
        self._folding = folding
        entries = attachment.entry_modules()
        self._whole = entries.pop("", None)
        self._parts = {id(module) for module in entries.values()}
        self.seen: set[int] = set()

    def begin(self, attachment: Attachment, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        attachment.sampling = False
        attachment.folding = self._folding

    def finish(self, attachment: Attachment, module: nn.Module, output: Any) -> Any:
        attachment.sampling = True
        attachment.folding = False
        if output is None:  # the forward raised, and that error is the one to see
            return None
        self.seen.add(id(module))
        if module is self._whole or self.seen >= self._parts:
            raise _ForwardDone
        return output


def reestimate_batch_norm(attachment: Attachment, forwards: Iterable[Callable[[], Any]], *, fold: bool = False) -> None:
    """Estimate batch norm's statistics under the expected noise, as the plain average over training batches.

    They become the attachment's ``estimates``, which :class:`Mean` uses (empty if there is nothing to re-estimate); the
    model itself is left as it was. Frozen batch norm, and such that the forwards do not reach, keeps its statistics.
    A batch that gives numbers that are not finite is passed over, with a warning.
    Under DDP the statistics of the processes are averaged.

    Args:
        attachment: of the model.
        forwards: functions each of which runs the model on one *training* batch. They may do more than that, as a
            training step does: each is ended as soon as the model has run. At most 50 are run.
        fold: estimate, before that, a constant multiplier for each channel of each site, and batch norm under these,
            which :class:`Fold` uses. ``forwards`` is gone through twice, so it must be a list or the like.

    Raises:
        ConfigurationError: there is no function, or none ran the model; ``forwards`` cannot be gone through, or once
            alone and not twice; ``attachment`` is none.
    """
    if not isinstance(attachment, Attachment):
        raise ConfigurationError(
            f"reestimate_batch_norm was given a {type(attachment).__name__}; give the attachment that attach() returned"
        )
    if not isinstance(forwards, Iterable):
        raise ConfigurationError(
            f"reestimate_batch_norm was given a {type(forwards).__name__} for its functions; give a list of functions "
            "that run the model on a batch, such as [lambda x=x: model(x) for x, _ in loader]"
        )
    if fold and isinstance(forwards, Iterator):
        raise ConfigurationError(
            "reestimate_batch_norm was given a generator or another iterator, and fold=True goes through the functions "
            "twice; give a list of them"
        )
    norms = {
        name: module
        for name, module in batch_norms(attachment.model).items()
        if not _is_frozen(name, module, attachment)
    }
    attachment.estimates = None
    with torch.inference_mode(False), torch.no_grad():
        _estimate(attachment, forwards, norms, fold)


def _estimate(
    attachment: Attachment, forwards: Iterable[Callable[[], Any]], norms: dict[str, _BatchNorm], fold: bool
) -> None:
    constants = _estimate_constants(attachment, forwards, norms) if fold else None
    copies: dict[str, Tensor] = {}
    if norms:
        attachment.estimates = Estimates({}, constants)  # under which batch norm is estimated
        try:
            with _estimating(attachment, list(norms.values()), _StopAfterForward(attachment, fold)) as stop:
                _run(attachment, forwards, stop, list(norms.values()))
                every = _statistics(norms)
                copies = _statistics({name: norm for name, norm in norms.items() if norm.num_batches_tracked})
        finally:
            attachment.estimates = None
        _average_over_processes(copies, every, attachment)
    attachment.estimates = Estimates.for_weights_of(attachment.model, copies, constants)
    unseen = {name for name in norms if f"{name}.running_mean" not in copies}
    if unseen and attachment.trained_norms is not None:
        _warn_of_norms_outside(attachment, unseen)


def _statistics(norms: dict[str, _BatchNorm]) -> dict[str, Tensor]:
    return {
        f"{name}.{leaf}": getattr(norm, leaf).detach().clone()
        for name, norm in norms.items()
        for leaf in ("running_mean", "running_var")
    }


def _estimate_constants(
    attachment: Attachment, forwards: Iterable[Callable[[], Any]], norms: dict[str, _BatchNorm]
) -> dict[str, Tensor]:
    with _estimating(attachment, list(norms.values()), _StopAfterForward(attachment)) as stop:
        attachment.observed = {}
        try:
            _run(attachment, forwards, stop, list(norms.values()))
            constants = {name: total / count for name, (total, count) in attachment.observed.items()}
        finally:
            attachment.observed = None
    device = attachment.coeff.device
    every = {site.spec.name: torch.zeros(site.spec.channels, device=device) for site in attachment.all_sites()}
    _average_over_processes(constants, every, attachment)
    return constants


def _warn_of_norms_outside(attachment: Attachment, unseen: set[str]) -> None:
    """A step is not run beyond the networks that hold the sites."""
    parts = [name for name in attachment.entry_modules() if name]
    outside = sorted(name for name in unseen if not name.startswith(tuple(f"{part}." for part in parts)))
    if not outside:
        return
    more = f" and {len(outside) - 1} more" if len(outside) > 1 else ""
    warnings.warn(
        f"MetaPerturb: batch norm self.{outside[0]}{more} keeps the statistics of training with noise, as it is not "
        f"reached within {' and '.join(f'self.{part}' for part in parts) or 'the model'}; where it follows, give "
        f"{type(attachment.model).__name__} a forward that goes through both, and call that",
        stacklevel=2,
    )


def _run(
    attachment: Attachment, forwards: Iterable[Callable[[], Any]], stop: _StopAfterForward, norms: list[_BatchNorm]
) -> None:
    """Run the model on each batch; a training step may pass over some, and what is not finite is passed over here."""
    done = reached = passed_over = 0
    for forward in islice(forwards, BATCHES):
        done += 1
        stop.seen.clear()
        if not callable(forward):
            raise ConfigurationError(
                f"reestimate_batch_norm was given a {type(forward).__name__} among its functions; give functions that "
                "run the model on a batch, such as [lambda x=x: model(x) for x, _ in loader]"
            )
        statistics = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
        observed = None if attachment.observed is None else dict(attachment.observed)
        try:
            forward()
        except _ForwardDone:
            pass
        except Exception:
            if not stop.seen:
                raise
            # After a forward of the model: a step may want gradients, which there are none of.
        reached += bool(stop.seen)
        sums = [buffer for buffer, _ in statistics] + [total for total, _ in (attachment.observed or {}).values()]
        if not all(values.isfinite().all() for values in sums):
            passed_over += 1
            attachment.observed = observed
            for buffer, before in statistics:
                buffer.copy_(before)
    if passed_over:
        warnings.warn(
            f"MetaPerturb: {passed_over} of {done} batches gave numbers that are not finite, and were passed over when "
            "inference without samples was estimated",
            stacklevel=2,
        )
    if not done:
        raise ConfigurationError("batch norm cannot be re-estimated without a training batch; use inference='mc'")
    if not reached:
        names = " or ".join(f"self.{name}" if name else "self" for name in attachment.entry_modules())
        raise ConfigurationError(
            f"batch norm cannot be re-estimated: no training step called the model ({names}) as a whole; do "
            "so, or, where evaluation does, use inference='mc'"
        )


def _is_frozen(name: str, norm: _BatchNorm, attachment: Attachment) -> bool:
    """Whether training left the statistics of this layer alone; where nothing was trained, whether it would."""
    if attachment.trained_norms is not None:
        return name not in attachment.trained_norms
    if attachment.model.training and not norm.training:
        return True
    return norm.weight is not None and not norm.weight.requires_grad


def _set_modes(model: nn.Module, norms: list[_BatchNorm]) -> None:
    """Evaluation, but for these batch norms."""
    model.eval()
    for norm in norms:
        norm.train()


@contextmanager
def plain_averages(model: nn.Module, norms: list[_BatchNorm]) -> Iterator[None]:
    """In this context batch norms take the plain average over the batches that they see, anew.

    Args:
        model: is set to evaluation mode, but for these batch norms.
        norms: parts of it that have running statistics.
    """
    momenta = [norm.momentum for norm in norms]
    _set_modes(model, norms)
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    try:
        # A plain average needs the count of batches, on which a compiled graph cannot branch.
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


@contextmanager
def _estimating(
    attachment: Attachment, norms: list[_BatchNorm], stop: _StopAfterForward
) -> Iterator[_StopAfterForward]:
    """Everything in evaluation mode but batch norm, which takes the plain average over batches; undone on leaving."""
    modes = [(module, module.training) for module in attachment.model.modules()]
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in attachment.model.parameters()]
    buffers = [(m, {k: v.clone() for k, v in m._buffers.items() if v is not None}) for m in norms]
    previous, attachment.inference = attachment.inference, stop
    chosen = {*norms}

    def set_again(module: nn.Module, args: Any) -> None:  # a step may change modes before it calls the model
        parts = attachment.model.modules()
        if attachment.depth == 0 and any(part.training != (part in chosen) for part in parts):
            _set_modes(attachment.model, norms)

    entries = attachment.entry_modules().values()
    handles = [module.register_forward_pre_hook(set_again, prepend=True) for module in entries]
    try:
        with plain_averages(attachment.model, norms):
            yield stop
    finally:
        for handle in handles:
            handle.remove()
        attachment.inference = previous
        for module, saved in buffers:
            for name, value in saved.items():
                getattr(module, name).copy_(value)
        for parameter, requires_grad, gradient in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
        for module_, training in modes:
            module_.training = training


def _average_over_processes(values: dict[str, Tensor], every: dict[str, Tensor], attachment: Attachment) -> None:
    """Over those that train this model (see ``distributed`` of :func:`attach`), and have reached what a value is of.

    Args:
        values: by name, of this process; those that others alone have are added.
        every: one of the same shape, dtype and device for each name that any process can have.
        attachment: of the model.
    """
    _, world = attachment.rank_and_world()
    if world == 1 or not every:
        return
    names = sorted(every)  # constants are by the order in which the sites were reached, here
    reached = torch.tensor([float(name in values) for name in names], device=every[names[0]].device)
    torch.distributed.all_reduce(reached)
    for name, count in zip(names, reached.tolist(), strict=True):
        if count:
            value = values.setdefault(name, torch.zeros_like(every[name]))
            torch.distributed.all_reduce(value)
            value /= count
