"""What inference in one forward uses in place of what training left, for the weights for which it was estimated."""

import math
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from mp_lightning.errors import ConfigurationError

# Relative difference up to which two weights are taken for the same: they may have been in half precision meanwhile.
_SAME = 2e-3


class Estimates:
    """Batch norm, and constants, for inference without samples, and the weights of the model that they belong to.

    Args:
        buffers: of batch norm, by name, which take the place of the model's own; empty where there is none.
        constants: by site, the multiplier of each channel (C,), where inference by constants was asked for.
        weights: of :func:`weights_of`; None where they belong to the weights whatever these are.

    Attributes:
        as the arguments.
    """

    def __init__(
        self,
        buffers: dict[str, Tensor],
        constants: dict[str, Tensor] | None = None,
        weights: list[list[float]] | None = None,
    ) -> None:
        self.buffers, self.constants, self.weights = buffers, constants, weights
        self._compared_at: int | None = None  # how often the model's weights had been changed; None: look again
        self._watched: list[nn.Parameter] | None = None

    @classmethod
    def for_weights_of(
        cls, model: nn.Module, buffers: dict[str, Tensor], constants: dict[str, Tensor] | None
    ) -> "Estimates":
        """For the weights that a model has now."""
        found = cls(buffers, constants, weights_of(model, buffers))
        found._compared_at = found._changes(model)
        return found

    def look_again(self) -> None:
        """The model's parameters may be others, or have been changed where nothing counts it."""
        self._compared_at = self._watched = None

    def still_hold(self, model: nn.Module) -> bool:
        """Whether the model still has these weights.

        Raises:
            ConfigurationError: it has not, nor a batch norm of then, which was merged into a convolution, say.
        """
        changes = self._changes(model)
        if self.weights is None or changes == self._compared_at:
            return True
        self._compared_at = changes
        if self.are_for(model):
            return True
        for name in self.buffers:
            norm_of(model, name.rpartition(".")[0])
        return False

    def are_for(self, model: nn.Module) -> bool:
        """Whether the weights of the model, each of which is looked at, are those that they belong to."""
        if self.weights is None:
            return True
        own = weights_of(model, self.buffers)
        return len(own) == len(self.weights) and all(
            _close(a, b, now[0])
            for now, then in zip(own, self.weights, strict=True)
            for a, b in zip(now, then, strict=True)
        )

    def _changes(self, model: nn.Module) -> int:
        """How often the parameters of the model were changed in place, but by ``.data``."""
        if self._watched is None:  # to go through the modules takes ten times as long
            self._watched = [parameter for parameter in model.parameters() if not parameter.is_inference()]
        return sum(parameter._version for parameter in self._watched)


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Those that have running statistics, by name."""
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, _BatchNorm))
    return {name: module for name, module in found if module.running_mean is not None}


def norm_of(model: nn.Module, path: str) -> nn.Module:
    """The batch norm of this name, which was re-estimated.

    Raises:
        ConfigurationError: it is gone.
    """
    try:
        layer = model.get_submodule(path)
    except AttributeError:
        layer = None
    if layer is None or layer._buffers.get("running_mean") is None:
        raise ConfigurationError(
            f"batch norm self.{path}, which was re-estimated, was replaced or removed since; detach the perturbation "
            "before such a change, or call mp_lightning.reestimate_batch_norm after it"
        )
    return layer


@torch.no_grad()
def weights_of(model: nn.Module, buffers: Iterable[str]) -> list[list[float]]:
    """What tells the weights of a model from others: the norm of each parameter, and a projection of it.

    Args:
        model: the model.
        buffers: by name, those of the batch norms that were re-estimated. Layers that come after the last of these and
            the last convolution, as registered, such as a classifier, do not count: they may be replaced.
    """
    there = [parameter.detach() for parameter in _up_to_the_head(model, {name.rpartition(".")[0] for name in buffers})]
    there = [torch.view_as_real(parameter) if parameter.is_complex() else parameter for parameter in there]
    flat = [parameter.float().flatten() for parameter in there]
    pairs = [value for values in flat for value in (values.norm(), (values * _ramp(values)).sum())]  # in float32 always
    found = torch.stack([value.to(pairs[0].device) for value in pairs]).view(-1, 2).tolist() if pairs else []
    return cast(list[list[float]], found)  # a GPU waits once


def _up_to_the_head(model: nn.Module, norms: set[str]) -> list[nn.Parameter]:
    """Parameters up to the last of these layers and of the convolutions; all, where the place of a norm is unknown."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if not is_lazy(parameter)]
    holders = [name.rpartition(".")[0] for name, _ in named]
    if not norms or not norms <= set(holders):
        return [parameter for _, parameter in named]
    ends = norms | {holder for holder, (_, parameter) in zip(holders, named, strict=True) if parameter.dim() > 2}
    last = max(place for place, holder in enumerate(holders) if holder in ends)
    return [parameter for _, parameter in named[: last + 1]]


def _ramp(values: Tensor) -> Tensor:
    return torch.linspace(-1, 1, len(values), dtype=values.dtype, device=values.device)


def _close(a: float, b: float, norm: float) -> bool:
    """Whether a norm, or a projection, is another one up to rounding; of weights that are not finite, too."""
    return abs(a - b) <= 4 * _SAME * norm + 1e-6 or a == b or (math.isnan(a) and math.isnan(b))
