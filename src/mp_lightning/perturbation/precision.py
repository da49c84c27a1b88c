"""State that keeps its precision when the surrounding model changes its own."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class KeepsPrecision(nn.Module):
    """A module whose own tensors follow ``.to(device)`` but not ``.half()``, ``.bfloat16()`` or ``.double()``.

    phi and running statistics in 16 bits would lose the small increments that they are made of.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep, recurse)
