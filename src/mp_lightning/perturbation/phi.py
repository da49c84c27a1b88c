"""phi: the 82 numbers of the perturbation net."""

from typing import NamedTuple

import torch
from torch import Tensor

INITIAL_STD = 0.01


class Phi(NamedTuple):
    """The learned numbers, by their place in Section 3 of the paper. All tensors share one dtype and device."""

    op1_identity: Tensor  # (3, 3) first equivariant layer, applied to the channel itself
    op1_all: Tensor  # (3, 3) first equivariant layer, applied to the mean over channels
    op2_identity: Tensor  # (3, 3) second equivariant layer
    op2_all: Tensor  # (3, 3)
    scale_kernels: Tensor  # (4, 3, 3) filters whose pooled responses describe a channel
    scale_weight: Tensor  # (10,) batch means (4), batch variances (4), channels, size

    def to(self, dtype: torch.dtype) -> "Phi":
        """The same numbers in another dtype."""
        return Phi(*(value.to(dtype) for value in self))


SHAPES: dict[str, tuple[int, ...]] = {
    "op1_identity": (3, 3),
    "op1_all": (3, 3),
    "op2_identity": (3, 3),
    "op2_all": (3, 3),
    "scale_kernels": (4, 3, 3),
    "scale_weight": (10,),
}
FEATURES = SHAPES["scale_kernels"][0]


def initial_phi(seed: int) -> Phi:
    """phi before meta-training: every number drawn from N(0, 0.01^2), float32, from a generator of its own."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(shape, generator=generator, dtype=torch.float32) for name, shape in SHAPES.items()}
    return Phi(**{name: INITIAL_STD * value for name, value in drawn.items()})
