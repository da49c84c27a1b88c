"""What stands at the sites in place of phi, to tell what of its effect is learned.

Controls with constants that match the moments of phi's multiplier, and the parts of phi by themselves. All of them are
perturbations: ``attach(model, perturbation=FixedNoise())``.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from mp_lightning.compare.moments import SiteMoments
from mp_lightning.errors import ConfigurationError
from mp_lightning.perturbation import MetaPerturb, NoisePer, Norms, Statistics, check_noise_per, mathematics
from mp_lightning.sites import Attachment


@runtime_checkable
class HasConstants(Protocol):
    """A perturbation with constants at each site, among its statistics, that follow from moments."""

    def constants(self, mean: float, var: float) -> dict[str, float]:
        """The constants of a site where the multiplier to match has this mean and variance."""
        ...


def set_constants(attachment: Attachment, moments: Iterable[SiteMoments]) -> None:
    """Give each site the constants that follow from the moments of a multiplier there.

    Sites without moments, which are not reached, keep the constants they have.

    Args:
        attachment: of one of the controls.
        moments: of phi's multiplier on this model, see :func:`~mp_lightning.compare.moments.site_moments`.

    Raises:
        ConfigurationError: the perturbation has no constants, or there is no site of that name.
    """
    perturbation = attachment.perturbation
    if not isinstance(perturbation, HasConstants):
        raise ConfigurationError(
            f"perturbation '{perturbation.name}' has no constants to set; attach FixedNoise, ShrinkOnly or MeanOne"
        )
    sites = {site.spec.name: site for site in attachment.all_sites()}
    for name, mean, var in moments:
        if name not in sites:
            raise ConfigurationError(
                f"there are moments of a site '{name}' and no such site in the model; measure them at the same plan"
            )
        for key, value in perturbation.constants(mean, var).items():
            sites[name].statistics[key].fill_(value)


class _Constant(ABC):
    """A multiplier that depends on nothing but constants of the site."""

    name: str
    noise_per: NoisePer = "element"

    @abstractmethod
    def initial_statistics(self, channels: int) -> Statistics:
        """The constants before they are set: those of a phi at its initialization."""

    def measure(self, x: Tensor, running: Statistics, synchronize: bool) -> tuple[Statistics, None]:
        """The constants; nothing to record."""
        return running, None


class FixedNoise(_Constant):
    """The multiplier of MetaPerturb with constants for its learned functions.

    It is ``scale * softplus(location + spread * eps)``; ``spread`` is 1, as in MetaPerturb, unless the multiplier to
    match varies more than that can, see :func:`matching_noise`.

    Args:
        noise_per: 'element' or 'channel', as for :class:`~mp_lightning.perturbation.MetaPerturb`.
    """

    name = "fixed_noise"

    def __init__(self, noise_per: NoisePer = "element") -> None:
        check_noise_per(noise_per)
        self.noise_per = noise_per

    def initial_statistics(self, channels: int) -> Statistics:
        constants = {"scale": 0.5, "location": 0.0, "spread": 1.0, "mean": 0.5 * 0.806}
        return {name: torch.tensor(value) for name, value in constants.items()}

    def multiplier(self, x: Tensor, eps: Tensor | None, statistics: Statistics, norms: Norms) -> Tensor:
        """Of the shape of ``eps``, or a tensor without dimensions, its mean, where none is given."""
        scale, location, spread, mean = (statistics[key].to(x.dtype) for key in ("scale", "location", "spread", "mean"))
        return mean if eps is None else scale * mathematics.noise(location, spread * eps)

    def constants(self, mean: float, var: float) -> dict[str, float]:
        """See :func:`matching_noise`."""
        scale, location, spread = matching_noise(mean, var)
        return {"scale": scale, "location": location, "spread": spread, "mean": mean}


class ShrinkOnly(_Constant):
    """The mean of the multiplier, and no noise."""

    name = "shrink_only"

    def initial_statistics(self, channels: int) -> Statistics:
        return {"factor": torch.tensor(0.5 * 0.806)}

    def multiplier(self, x: Tensor, eps: Tensor | None, statistics: Statistics, norms: Norms) -> Tensor:
        """A tensor without dimensions."""
        return statistics["factor"].to(x.dtype)

    def constants(self, mean: float, var: float) -> dict[str, float]:
        return {"factor": mean}


class NoiseOnly(MetaPerturb):
    """phi without its scale: the multiplier is z (ablation of the paper)."""

    name = "noise_only"

    def initial_statistics(self, channels: int) -> Statistics:
        """None: they are those of the scale."""
        return {}

    def measure(self, x: Tensor, running: Statistics, synchronize: bool = False) -> tuple[Statistics, None]:
        return running, None

    def multiplier(self, x: Tensor, eps: Tensor | None, statistics: Statistics, norms: Norms) -> Tensor:
        """z, (B, C, H, W)."""
        return self.noise(x, self.phi.to(x.dtype), eps)


class ScaleOnly(MetaPerturb):
    """phi without its noise: the multiplier is s (ablation of the paper)."""

    name = "scale_only"

    def multiplier(self, x: Tensor, eps: Tensor | None, statistics: Statistics, norms: Norms) -> Tensor:
        """s, (1, C, 1, 1)."""
        return self.scale(x, self.phi.to(x.dtype), statistics, norms)


class MeanOne(MetaPerturb):
    """phi's multiplier divided by its mean at the site.

    The means are set by :func:`set_constants` from the moments of phi's own multiplier, and stay as they are. Where
    these were measured on the network as it is, as on one that is trained already, the mean of its features is left
    about alone; a perturbed site changes what the sites behind it see, so that the mean there is about 1 and not just
    1. In ``compare`` they are those at the end of a training with phi, and phi's multiplier falls as a network learns:
    in the first steps, as far as its strength acts, features are multiplied by more than 1.
    """

    name = "mean_one"

    def initial_statistics(self, channels: int) -> Statistics:
        """Those of phi, and the mean of its multiplier at the site, 1 until it is set."""
        return {**super().initial_statistics(channels), "divisor": torch.tensor(1.0)}

    def measure(
        self, x: Tensor, running: Statistics, synchronize: bool = False
    ) -> tuple[Statistics, Statistics | None]:
        used, recorded = super().measure(x, running, synchronize)
        return {**used, "divisor": running["divisor"]}, recorded

    def multiplier(self, x: Tensor, eps: Tensor | None, statistics: Statistics, norms: Norms) -> Tensor:
        """(B, C, H, W)."""
        return super().multiplier(x, eps, statistics, norms) / statistics["divisor"].to(x.dtype)

    def constants(self, mean: float, var: float) -> dict[str, float]:
        return {"divisor": mean}


def matching_noise(mean: float, var: float) -> tuple[float, float, float]:
    """(scale, location, spread) such that ``scale * softplus(location + spread * eps)`` has this mean and variance.

    eps ~ N(0, 1). The spread is 1 where that reaches the ratio of standard deviation and mean, which falls as the
    location grows and gives the location; from -4 to 1000 it is 1.21 to 0.001. A larger ratio, as of a multiplier that
    differs from channel to channel, takes the location -4 and a spread of up to 2, where it is 2.46. The mean then
    gives the scale. Ratios outside of these are taken for the nearest, with a warning: the mean is matched then, and
    the variance is not.

    Raises:
        ConfigurationError: the mean is not positive, or the variance is negative.
    """
    if not (mean > 0 and var >= 0):
        raise ConfigurationError(
            f"no fixed noise has mean {mean:.4g} and variance {var:.4g}; measure the moments of a multiplier like phi's"
        )
    ratio = var**0.5 / mean
    low, high = _LOCATIONS
    widest, narrowest = _ratio(low, _SPREADS[1]), _ratio(high)
    if not narrowest <= ratio <= widest:
        warnings.warn(
            f"fixed_noise: a standard deviation of {ratio:.4g} times the mean is outside of {narrowest:.3f} to "
            f"{widest:.2f}; the nearest is taken",
            stacklevel=2,
        )
    location, spread = low, 1.0
    if ratio > _ratio(low):
        spread = _where(lambda value: _ratio(low, value) < ratio, *_SPREADS)
    else:
        location = _where(lambda value: _ratio(value) > ratio, low, high)
    return mean / _softplus_moments(location, spread)[0], location, spread


# Below, softplus(location + eps) has hardly a larger ratio (1.31 at most); above, float32 is relatively inexact.
_LOCATIONS = (-4.0, 1000.0)
_SPREADS = (1.0, 2.0)
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(64)


def _where(before: Callable[[float], bool], low: float, high: float) -> float:
    """The number up to which a condition holds, by bisection down to what float64 can tell."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if before(middle) else (low, middle)
    return low


def _softplus_moments(location: float, spread: float) -> tuple[float, float]:
    """Mean and standard deviation of softplus(location + spread * eps), by Gauss-Hermite quadrature in float64."""
    values = np.logaddexp(0.0, location + spread * _NODES)
    weights = _WEIGHTS / _WEIGHTS.sum()
    mean = float(weights @ values)
    return mean, float(weights @ (values - mean) ** 2) ** 0.5


def _ratio(location: float, spread: float = 1.0) -> float:
    mean, std = _softplus_moments(location, spread)
    return std / mean
