"""Monte Carlo inference: several forwards with noise, their probabilities averaged (Section 4 of the paper)."""

import warnings
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from mp_lightning.errors import ConfigurationError
from mp_lightning.sites.arguments import check_one_of, whole_number
from mp_lightning.sites.root import layer_beside

if TYPE_CHECKING:
    from mp_lightning.sites import Attachment
    from mp_lightning.sites.copies import Origin

Output = Literal["logits", "probabilities", "log_probabilities"]
OUTPUTS: tuple[Output, ...] = get_args(Output)
_TOLERANCE = 1e-3
_EVIDENCE = 32  # numbers that a judgement on all outputs needs
Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # of a forward


class MonteCarlo:
    """Averages the probabilities of ``samples`` noisy forwards of the model.

    The averaged output is of the kind that the model gives: where that is logits, the output is the logarithm of the
    mean probability, so that softmax, cross-entropy and argmax afterwards are those of the mean.

    Args:
        samples: number of forwards.
        output: what the model's (B, K) output holds; None finds out from the numbers, once for each model.

    Attributes:
        calls: how many forwards of the model were averaged since this object was made.
        busy: whether one of the forwards that are averaged is in progress.
    """

    expects = False
    _averages = True

    def __init__(self, samples: int, output: Output | None = None) -> None:
        if output is not None:
            check_one_of(output, "output", OUTPUTS)
        self.samples = whole_number(samples, "samples", 1, "of noisy forwards, at least one")
        self.output: Output | None = output
        self._found_for: Origin | None = None  # of whose output it was found; None where it was declared
        self.calls = 0
        self._warned = False
        self.busy = False
        self._sampling = True
        self._inputs: Arguments = ((), {})

    def lacks(self, attachment: "Attachment") -> str | None:
        """Nothing: this inference can always be made."""
        return None

    def begin(self, attachment: "Attachment", args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Noise is drawn, not averaged, in each forward, where there is an average."""
        if not self.busy:
            self._sampling = attachment.sampling
            self._inputs = _copied((args, kwargs))  # a model may change them in place
        attachment.sampling = self._averages

    def _again(self, module: nn.Module) -> Any:
        """One more forward of what the first one was given."""
        args, kwargs = _copied(self._inputs)
        return module(*args, **kwargs)

    def _end(self, attachment: "Attachment") -> None:
        self.busy = False
        self._inputs = ((), {})
        attachment.sampling = self._sampling

    def finish(self, attachment: "Attachment", module: nn.Module, output: Any) -> Any:
        """The averaged output.

        Raises:
            ConfigurationError: the output is not a (B, K) tensor of class scores.
        """
        if self.busy:
            return output
        if output is None:
            self._end(attachment)
            return output
        self.calls += 1
        self.busy = True
        try:
            trained = int(attachment.steps) > 0
            if self._found_for not in (None, attachment.origin):
                self.output = self._found_for = None
            kind = output_kind(output, type(module).__name__, self.output, trained)
            if self.output is None and trained and output.numel() >= _EVIDENCE:
                self.output, self._found_for = kind, attachment.origin
            self._warn_of_features(attachment, module)
            mean = probabilities_of(output, kind).clone()  # a model may use its outputs again
            for _ in range(1, self.samples):
                mean = mean + probabilities_of(self._again(module), kind)
        finally:
            self._end(attachment)
        mean = mean / self.samples
        result = mean if kind == "probabilities" else mean.clamp(min=torch.finfo(mean.dtype).tiny).log()
        return result.to(output.dtype)

    def _warn_of_features(self, attachment: "Attachment", module: nn.Module) -> None:
        """Where a network in the model was called, other layers may go on from what is taken for class scores."""
        if self._warned or torch.compiler.is_compiling():
            return
        self._warned = True
        if module is attachment.model or (rest := layer_beside(attachment.model, module)) is None:
            return
        own = next(name for name, entry in attachment.entry_modules().items() if entry is module)
        warnings.warn(
            f"MetaPerturb: the output of self.{own} is averaged as class scores; where other layers, as self.{rest}, "
            f"go on from it, give {type(attachment.model).__name__} a forward that goes through both, and call that, "
            "or use inference='mean' without output=",
            stacklevel=2,
        )


class OutputAverage(MonteCarlo):
    """Averages the outputs of noisy forwards as they are, whatever they mean; what has no average: the expected noise.

    For the validation epochs of a run of which nothing was said about its outputs: they may be logits as well as
    regression targets, boxes or images. In tuples, lists and dictionaries each floating-point tensor is averaged;
    other tensors, and tensors of which the next forward gives another number or shape, have no average.
    """

    def finish(self, attachment: "Attachment", module: nn.Module, output: Any) -> Any:
        if self.busy:
            return output
        if output is None or not self._averages:
            self._end(attachment)
            return output
        self.calls += 1
        self.busy = True
        try:
            average = self._average(module, output)
            if average is not None:
                return average
            self._averages = False
            return self._again(module)
        finally:
            self._end(attachment)

    def _average(self, module: nn.Module, output: Any) -> Any:
        """None if there is none."""
        first, form = tree_flatten(output)
        values = _tensors(first)
        if values is None:
            return None
        total = [value.clone() for value in values]  # a model may use its outputs again
        for _ in range(1, self.samples):
            leaves, other_form = tree_flatten(self._again(module))
            values = _tensors(leaves)
            if values is None or (other_form, _shapes(values)) != (form, _shapes(total)):
                return None
            total = [a + b for a, b in zip(total, values, strict=True)]
        means = iter(total)
        return tree_unflatten(
            [(next(means) / self.samples).to(leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in first], form
        )


def _copied(inputs: Arguments) -> Arguments:
    copies: Arguments = tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, inputs)
    return copies


def _tensors(leaves: list[Any]) -> list[Tensor] | None:
    """Those of an output, in float32 at least; None unless they all, and at least one, are floating-point numbers."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors or not all(tensor.is_floating_point() for tensor in tensors):
        return None
    return [_lifted(tensor) for tensor in tensors]


def _lifted(tensor: Tensor) -> Tensor:
    """In float32 where it has less precision."""
    return tensor.float() if torch.finfo(tensor.dtype).bits < 32 else tensor


def _shapes(tensors: list[Tensor]) -> list[torch.Size]:
    return [tensor.shape for tensor in tensors]


def output_kind(output: Any, model: str, declared: Output | None = None, trained: bool = True) -> Output:
    """What a model's output holds: as declared, else judged by the numbers.

    Args:
        output: of the model.
        model: its name.
        declared: by the user.
        trained: whether it was; the first logits of a model may happen to lie between 0 and 1.

    Raises:
        ConfigurationError: it is not a (B, K) floating-point tensor with K > 1, or looks like one probability per
            output, so that averaging would be a guess.
    """
    if not isinstance(output, Tensor) or output.dim() != 2 or output.shape[1] < 2 or not output.is_floating_point():
        what = (
            f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        )
        raise ConfigurationError(
            f"{model} gives {what}; Monte Carlo inference averages class probabilities and needs a (B, K) tensor with "
            "K > 1; use inference='mean'"
        )
    if declared is not None:
        return declared
    if not len(output):
        return "logits"  # of no image, which tells nothing
    values = output.detach().float()
    tolerance = tolerance_of(output.dtype)
    if bool((values >= 0).all()) and bool((values.sum(dim=1) - 1).abs().max() < tolerance):
        return "probabilities"
    if bool((values <= 0).all()) and bool(values.logsumexp(dim=1).abs().max() < tolerance):
        return "log_probabilities"
    if not values.any():
        return "logits"  # of a head that starts with zeros
    if trained and values.numel() >= _EVIDENCE and bool(((values >= 0) & (values <= 1)).all()):
        raise ConfigurationError(
            f"{model} gives numbers from 0 to 1 that do not add up to 1 in each row, such as one probability per label;"
            " Monte Carlo inference averages class probabilities; use inference='mean', or set output="
        )
    return "logits"


def tolerance_of(dtype: torch.dtype) -> float:
    """How far the probabilities of an image, computed in this dtype, may be from adding up to 1."""
    return max(_TOLERANCE, 4 * torch.finfo(dtype).eps)


def probabilities_of(output: Tensor, kind: Output) -> Tensor:
    """Class probabilities (B, K), float32 at least, from an output (B, K) of this kind."""
    values = _lifted(output)
    if kind == "logits":
        return values.softmax(dim=1)
    return values if kind == "probabilities" else values.exp()
