"""What inference estimates holds for the weights of a model: its batch norms, and whether these are its weights."""

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from mp_lightning.errors import ConfigurationError

# Relative difference up to which two weights are taken for the same: they may have been in half precision meanwhile.
_SAME = 2e-3


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
def weights_of(model: nn.Module) -> list[float]:
    """What tells the weights of a model from others: the norm of each parameter, and then a projection of each."""
    there = [parameter.detach() for parameter in model.parameters() if not is_lazy(parameter)]
    there = [torch.view_as_real(parameter) if parameter.is_complex() else parameter for parameter in there]
    flat = [parameter.float().flatten() for parameter in there]
    norms = [values.norm() for values in flat]
    projections = [(values * _ramp(values)).sum() for values in flat]  # in float32 under autocast, too
    values = [value.to(norms[0].device) for value in (*norms, *projections)]
    found: list[float] = torch.stack(values).tolist() if values else []  # a GPU waits once
    return found


def _ramp(values: Tensor) -> Tensor:
    return torch.linspace(-1, 1, len(values), dtype=values.dtype, device=values.device)


def are_those_of(model: nn.Module, weights: list[float]) -> bool:
    """Whether a model has the weights of which :func:`weights_of` gave this."""
    own = weights_of(model)
    count = len(own) // 2
    norms = own[:count]
    if len(weights) not in (count, 2 * count):  # once the norms alone were kept
        return False
    if not all(math.isclose(a, b, rel_tol=_SAME, abs_tol=1e-6) for a, b in zip(norms, weights, strict=False)):
        return False
    projections = zip(own[count:], weights[count:], norms, strict=False)
    return all(abs(a - b) <= 4 * _SAME * norm + 1e-6 for a, b, norm in projections)
