"""The activations that a site may stand before, as modules, functions and methods."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Gates (sigmoid, softmax) are left out: what they give is a weight, not a feature map.
ACTIVATION_MODULES: tuple[type[nn.Module], ...] = (
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardswish,
    nn.Hardtanh,  # nn.ReLU6 is a kind of it, and calls its function
    nn.LeakyReLU,
    nn.Mish,
    nn.PReLU,
    nn.ReLU,
    nn.ReLU6,
    nn.RReLU,
    nn.SELU,
    nn.SiLU,
    nn.Softplus,
)
# Everything that one of these modules calls first, and everything that a model may call itself. A module of the list
# above causes exactly one call of a function of this set that is not made by another one.
ACTIVATION_FUNCTIONS: frozenset[Callable[..., Any]] = frozenset(
    {
        *(F.celu, F.elu, F.gelu, F.hardswish, F.hardtanh, F.leaky_relu, F.mish, F.prelu, F.relu, F.relu6, F.rrelu),
        *(F.celu_, F.elu_, F.hardtanh_, F.leaky_relu_, F.rrelu_, F.selu_),
        *(F.selu, F.silu, F.softplus, torch.relu, torch.relu_, torch.prelu, torch.selu, torch.celu, torch.rrelu),
        *(Tensor.relu, Tensor.relu_, Tensor.prelu),
    }
)
ACTIVATION_METHODS = frozenset({"relu", "relu_", "prelu"})
