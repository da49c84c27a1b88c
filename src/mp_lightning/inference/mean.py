"""Inference in one forward: by the expected noise, or by constants, with batch norm re-estimated for it."""

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mp_lightning.errors import ConfigurationError
from mp_lightning.inference.mc import OutputAverage

if TYPE_CHECKING:
    from mp_lightning.sites import Attachment


class Mean:
    """Expected noise instead of samples, with the attachment's ``evaluation_buffers`` in place of the model's own.

    While a model with batch norm has no such buffers (it was not re-estimated, or was trained on since), expectation
    would be far off; then the outputs of ``samples`` noisy forwards are averaged instead, with a warning.

    Attributes:
        calls: how many forwards of the model were made since this object was.
    """

    expects = True
    _folds = False
    _remedy = "mp_lightning.reestimate_batch_norm"

    def __init__(self, samples: int = 20) -> None:
        self.calls = 0
        self._warned = False
        self._sampling = True
        self._stand_in = OutputAverage(samples)
        self._uses_stand_in = False
        self._has_batch_norm: bool | None = None

    def begin(self, attachment: "Attachment", args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._stand_in.busy:
            attachment.forget_other_weights()
            lacking = self.lacks(attachment)
            self._uses_stand_in = lacking is not None
            self._warn_once(lacking)
        if self._uses_stand_in:
            self._stand_in.begin(attachment, args, kwargs)
            return
        _swap_buffers(attachment)
        self._sampling = attachment.sampling
        attachment.sampling = False
        attachment.folding = self._folds

    def finish(self, attachment: "Attachment", module: nn.Module, output: Any) -> Any:
        self.calls += 1
        if self._uses_stand_in:
            return self._stand_in.finish(attachment, module, output)
        _swap_buffers(attachment)
        attachment.sampling = self._sampling
        attachment.folding = False
        return output

    def lacks(self, attachment: "Attachment") -> str | None:
        """What is still to be done before this inference can be made, in words; None if it can."""
        if attachment.evaluation_buffers is not None and attachment.constants is None:
            return None  # with constants, batch norm was estimated under these
        if self._has_batch_norm is None:
            self._has_batch_norm = any(isinstance(module, _BatchNorm) for module in attachment.model.modules())
        return "batch norm was not re-estimated" if self._has_batch_norm else None

    def _warn_once(self, what: str | None) -> None:
        if what is not None and not self._warned:
            self._warned = True
            warnings.warn(
                f"MetaPerturb: {what} since the model was trained, so the outputs of {self._stand_in.samples} noisy "
                f"forwards are averaged in place of inference by expectation; {self._remedy} mends it",
                stacklevel=2,
            )


def _swap_buffers(attachment: "Attachment") -> None:
    """Exchange the model's buffers with the copies: once to put them in, once more to take them out.

    Raises:
        ConfigurationError: a layer that they belong to is gone; then none is exchanged.
    """
    if not attachment.evaluation_buffers:
        return
    owners = {name: _owner(attachment.model, name) for name in attachment.evaluation_buffers}
    swapped = {}
    for name, copy in attachment.evaluation_buffers.items():
        owner, leaf = owners[name], name.rpartition(".")[-1]
        current = owner._buffers[leaf]
        assert current is not None
        swapped[name], owner._buffers[leaf] = current, _like(copy, current)
    attachment.evaluation_buffers = swapped


def _like(copy: Tensor, current: Tensor) -> Tensor:
    """On the device and in the dtype of another; no tensor of inference mode, which no gradient could pass later."""
    if (copy.dtype, copy.device) == (current.dtype, current.device):
        return copy
    with torch.inference_mode(False):
        return copy.to(current)


def _owner(model: nn.Module, name: str) -> nn.Module:
    """The layer that has a buffer of this name."""
    path, _, leaf = name.rpartition(".")
    try:
        owner = model.get_submodule(path)
    except AttributeError:
        owner = None
    if owner is None or owner._buffers.get(leaf) is None:
        raise ConfigurationError(
            f"batch norm self.{path}, which was re-estimated, was replaced or removed since; detach the perturbation "
            "before such a change, or call mp_lightning.reestimate_batch_norm after it"
        )
    return owner


class Fold(Mean):
    """A constant for each channel of each site, the expected multiplier averaged over training images.

    Nothing learned is left to be computed. It needs :func:`reestimate_batch_norm` with ``fold=True`` (the callback
    calls it); until then the outputs of ``samples`` noisy forwards are averaged instead, with a warning.
    """

    _folds = True
    _remedy = "mp_lightning.reestimate_batch_norm with fold=True"

    def lacks(self, attachment: "Attachment") -> str | None:
        return "the constants were not estimated" if attachment.constants is None else None
