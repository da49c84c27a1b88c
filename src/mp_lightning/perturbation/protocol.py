"""What a site asks of a perturbation, so that ours, DropBlock, fixed noise or an ablation can sit in the same sites."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from mp_lightning.perturbation.noise import NoiseKey

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

        ``eps`` is N(0, 1) noise of the shape of x, or (B, C, 1, 1) for a perturbation whose attribute ``noise_per``
        is 'channel'; None asks for the expected multiplier instead.
        """
        ...


class Perturbed(NamedTuple):
    """A perturbed feature map.

    Attributes:
        y: like x.
        measured: the statistics to record, as :meth:`Perturbation.measure` gives them; None: none.
        hits: in evaluation, int64 numbers that add up to how many elements of y reached the bound; None: not counted.
    """

    y: Tensor
    measured: Statistics | None
    hits: Tensor | None


@runtime_checkable
class FusedPerturbation(Perturbation, Protocol):
    """A perturbation that can also do all that a site does at once, faster: the same function."""

    def fuses(self, x: Tensor) -> bool:
        """Whether :meth:`fused` can be used for x on this machine."""
        ...

    def fused(
        self,
        x: Tensor,
        key: NoiseKey | None,
        running: Statistics,
        norms: Norms,
        *,
        coeff: Tensor,
        clip: float | None,
        training: bool,
        synchronize: bool,
    ) -> Perturbed:
        """Perturb x (B, C, H, W).

        Args:
            x: float32, or of 16 bits, in which y is given as well.
            key: draws the noise; None asks for the expected multiplier.
            running: the running statistics of the site.
            norms: what sizes are relative to.
            coeff: strength, a tensor without dimensions.
            clip: upper bound of y.
            training: use, and give, the statistics of the batch; otherwise the running ones.
            synchronize: take the statistics over all processes.
        """
        ...

    def record(self, running: Statistics, measured: Statistics, momentum: float) -> None:
        """Move ``running`` towards what was ``measured``, in place; leave it alone where that is not finite."""
        ...
