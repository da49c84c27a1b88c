"""What a site asks of a perturbation, so that ours, DropBlock, fixed noise or an ablation can sit in the same sites."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

Statistics = dict[str, Tensor]


@dataclass(frozen=True)
class Norms:
    """What the size of a feature map is relative to.

    Attributes:
        channels: the largest number of channels of any site of the network.
        size: height of the network's input in pixels (a tensor without dimensions, or a number).
    """

    channels: float
    size: float | Tensor


@runtime_checkable
class Perturbation(Protocol):
    """A multiplier for feature maps. It may learn and may keep running statistics per site; it owns neither.

    A site calls :meth:`measure` once per forward, then :meth:`multiplier`. It keeps the running statistics, ramps the
    strength and bounds the result by itself.
    """

    name: str

    def initial_statistics(self, channels: int) -> Statistics:
        """Running statistics of a new site with ``channels`` channels, by name; empty if none are needed."""
        ...

    def measure(self, x: Tensor, running: Statistics, synchronize: bool) -> tuple[Statistics, Statistics | None]:
        """Statistics of the batch ``x`` (B, C, H, W) for training: those to use, and those to record (None: none)."""
        ...

    def multiplier(self, x: Tensor, eps: Tensor | None, statistics: Statistics, norms: Norms) -> Tensor:
        """What ``x`` is multiplied by, broadcastable to x.

        ``eps`` is N(0, 1) noise of the shape of x; None asks for the expected multiplier instead.
        """
        ...
