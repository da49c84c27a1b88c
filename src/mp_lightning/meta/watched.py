"""The perturbation as meta-training watches it: mean scale, noise and multiplier of every site, when asked."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from mp_lightning.perturbation import MetaPerturb, NoisePer, Norms, Phi, Statistics


@dataclass
class Watch:
    """Means over each site of each forward, in order of execution: of the scale s, the noise z, and of s * z."""

    scales: list[Tensor] = field(default_factory=list)
    noises: list[Tensor] = field(default_factory=list)
    multipliers: list[Tensor] = field(default_factory=list)

    def means(self) -> dict[str, list[float]]:
        """By quantity, what the sites gave, as plain numbers."""
        every = {"scale": self.scales, "noise": self.noises, "multiplier": self.multipliers}
        return {name: [float(value) for value in values] for name, values in every.items()}


class WatchedMetaPerturb(MetaPerturb):
    """A :class:`MetaPerturb` that can note the mean scale, noise and multiplier at the sites."""

    def __init__(self, phi: Phi, noise_per: NoisePer = "element") -> None:
        super().__init__(phi, noise_per=noise_per, trainable=True)
        self._watch: Watch | None = None

    @contextmanager
    def watching(self) -> Iterator[Watch]:
        """What is seen at the sites inside this context."""
        self._watch = Watch()
        try:
            yield self._watch
        finally:
            self._watch = None

    def fuses(self, x: Tensor) -> bool:
        """Where it is watched, s and z must be computed as such."""
        return self._watch is None and self.has_fast_path(x)

    def multiplier(self, x: Tensor, eps: Tensor | None, statistics: Statistics, norms: Norms) -> Tensor:
        product = super().multiplier(x, eps, statistics, norms)
        if self._watch is not None:
            self._watch.multipliers.append(product.detach().mean())
        return product

    def scale(self, x: Tensor, phi: Phi, statistics: Statistics, norms: Norms) -> Tensor:
        s = super().scale(x, phi, statistics, norms)
        if self._watch is not None:
            self._watch.scales.append(s.detach().mean())
        return s

    def noise(self, x: Tensor, phi: Phi, eps: Tensor | None) -> Tensor:
        z = super().noise(x, phi, eps)
        if self._watch is not None:
            self._watch.noises.append(z.detach().mean())
        return z
