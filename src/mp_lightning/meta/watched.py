"""The perturbation as meta-training watches it: mean scale and noise of every site, when asked."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from mp_lightning.perturbation import MetaPerturb, Norms, Phi, Statistics


class WatchedMetaPerturb(MetaPerturb):
    """A :class:`MetaPerturb` that can note the mean scale s and the mean noise z of the sites of one forward."""

    def __init__(self, phi: Phi) -> None:
        super().__init__(phi, trainable=True)
        self._scales: list[Tensor] | None = None
        self._noises: list[Tensor] | None = None

    @contextmanager
    def watching(self) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Two lists that fill, in order of execution, with the mean s and the mean z of each site."""
        self._scales, self._noises = [], []
        try:
            yield self._scales, self._noises
        finally:
            self._scales = self._noises = None

    def fuses(self, x: Tensor) -> bool:
        """Where it is watched, s and z must be computed as such."""
        return self._scales is None and self.has_fast_path(x)

    def scale(self, x: Tensor, phi: Phi, statistics: Statistics, norms: Norms) -> Tensor:
        s = super().scale(x, phi, statistics, norms)
        if self._scales is not None:
            self._scales.append(s.detach().mean())
        return s

    def noise(self, x: Tensor, phi: Phi, eps: Tensor | None) -> Tensor:
        z = super().noise(x, phi, eps)
        if self._noises is not None:
            self._noises.append(z.detach().mean())
        return z
