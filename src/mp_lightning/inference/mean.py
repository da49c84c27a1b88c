"""Inference in one forward: by the expected noise, or by constants, with batch norm re-estimated for it."""

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mp_lightning.inference.mc import OutputAverage
from mp_lightning.sites.estimates import norm_of

if TYPE_CHECKING:
    from mp_lightning.sites import Attachment


class Mean:
    """Expected noise instead of samples, with batch norm of the attachment's ``estimates`` in place of the model's own.

    While a model with batch norm has no estimates (it was not re-estimated, or was trained on since), expectation
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
        self._looked = False
        self._sampling = True
        self._stand_in = OutputAverage(samples)
        self._uses_stand_in = False
        self._own: list[tuple[nn.Module, str, Tensor]] = []

    def begin(self, attachment: "Attachment", args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._stand_in.busy:
            attachment.forget_other_weights()
            lacking = self.lacks(attachment)
            self._uses_stand_in = lacking is not None
            self._warn_once(lacking)
            self._warn_of_copies(attachment)
        if self._uses_stand_in:
            self._stand_in.begin(attachment, args, kwargs)
            return
        self._own = _put_in(attachment)
        self._sampling = attachment.sampling
        attachment.sampling = False
        attachment.folding = self._folds and _constants(attachment) is not None

    def finish(self, attachment: "Attachment", module: nn.Module, output: Any) -> Any:
        self.calls += 1
        if self._uses_stand_in:
            return self._stand_in.finish(attachment, module, output)
        for layer, leaf, buffer in self._own:
            layer._buffers[leaf] = buffer
        self._own = []
        attachment.sampling = self._sampling
        attachment.folding = False
        return output

    def lacks(self, attachment: "Attachment") -> str | None:
        """What is still to be done before this inference can be made, in words; None if it can."""
        lacking = self._lacks(attachment)
        if lacking is None or torch.compiler.is_compiling():
            return lacking
        return None if attachment.persistent and attachment.never_acted() else lacking

    def _lacks(self, attachment: "Attachment") -> str | None:
        if attachment.estimates is not None and attachment.estimates.constants is None:
            return None  # with constants, batch norm was estimated under these
        return "batch norm was not re-estimated" if attachment.batch_norms() else None

    def _warn_once(self, what: str | None) -> None:
        if what is not None and not self._warned:
            self._warned = True
            warnings.warn(
                f"MetaPerturb: {what} since the model was trained, so the outputs of {self._stand_in.samples} noisy "
                f"forwards are averaged in place of inference by expectation; {self._remedy} mends it",
                stacklevel=2,
            )

    def _warn_of_copies(self, attachment: "Attachment") -> None:
        """Of models that were saved and read before any training, whose strength nobody moves."""
        if self._looked or torch.compiler.is_compiling():
            return
        self._looked = True
        told = attachment.origin.copied and attachment.origin.original() is not None
        if attachment.persistent or told or not attachment.never_acted():
            return
        warnings.warn(
            f"MetaPerturb: nothing acts in this {type(attachment.model).__name__}, for which no training batch was "
            "counted; where it is a copy of a model that was trained, such as one with averaged weights, let "
            "attachment_of(copy).load_state(attachment.state()) bring it to the strength of that one",
            stacklevel=2,
        )


def _constants(attachment: "Attachment") -> dict[str, Tensor] | None:
    return None if attachment.estimates is None else attachment.estimates.constants


def _put_in(attachment: "Attachment") -> list[tuple[nn.Module, str, Tensor]]:
    """Let the copies take the places of the model's own buffers, which are returned with their layers and names.

    Raises:
        ConfigurationError: a layer that they belong to is gone; then none is put in.
    """
    copies = {} if attachment.estimates is None else attachment.estimates.buffers
    layers = {path: norm_of(attachment.model, path) for path in {name.rpartition(".")[0]: None for name in copies}}
    own = []
    for name, copy in copies.items():
        path, _, leaf = name.rpartition(".")
        buffer = layers[path]._buffers[leaf]
        assert buffer is not None
        copies[name] = layers[path]._buffers[leaf] = _like(copy, buffer)
        own.append((layers[path], leaf, buffer))
    return own


def _like(copy: Tensor, current: Tensor) -> Tensor:
    """On the device and in the dtype of another; no tensor of inference mode, which no gradient could pass later."""
    if (copy.dtype, copy.device) == (current.dtype, current.device):
        return copy
    with torch.inference_mode(False):
        return copy.to(current)


class Fold(Mean):
    """A constant for each channel of each site, the expected multiplier averaged over training images.

    Nothing learned is left to be computed. It needs :func:`reestimate_batch_norm` with ``fold=True`` (the callback
    calls it); until then the outputs of ``samples`` noisy forwards are averaged instead, with a warning.
    """

    _folds = True
    _remedy = "mp_lightning.reestimate_batch_norm with fold=True"

    def _lacks(self, attachment: "Attachment") -> str | None:
        return "the constants were not estimated" if _constants(attachment) is None else None
