"""The callbacks that an arm stands for; each can be used without us."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from lightning.pytorch.callbacks import Callback
from torch import nn

from mp_lightning.callback import MetaPerturbCallback
from mp_lightning.compare.arms import BASELINE, AnyArm, Arm, NamedArm, Part
from mp_lightning.compare.at_sites import AtSites, InformationDropoutCallback
from mp_lightning.compare.controls import FixedNoise, MeanOne, NoiseOnly, ScaleOnly, ShrinkOnly, set_constants
from mp_lightning.compare.layers import DropBlock, GaussianDropout
from mp_lightning.compare.mixing import LabelSmoothing, ManifoldMixup, MixUp
from mp_lightning.compare.moments import SiteMoments
from mp_lightning.errors import ConfigurationError, UserError, one_line
from mp_lightning.perturbation import NamedPhi, Perturbation, initial_phi
from mp_lightning.sites import Attachment, SitePlan, find_sites
from mp_lightning.sites.choice import is_share

Inference = Literal["mc", "mean"]
SEED_OF_RANDOM_PHI = 0
_HALF = 0.5


@dataclass(frozen=True)
class Context:
    """What an arm's callbacks depend on beside the arm.

    Attributes:
        seed: of the noise.
        num_classes: of the target; None where it is not known.
        inference: how arms with noise in evaluation classify.
        samples: noisy forwards of 'mc'.
        ramp: whether the strength of what stands in place of phi grows over the first 40 % of the run, or longer, as
            for the callback.
    """

    seed: int
    num_classes: int | None
    inference: Inference
    samples: int
    ramp: bool = True


def callbacks_of(arm: AnyArm, context: Context) -> tuple[list[Callback], MetaPerturbCallback | None]:
    """The callbacks of an arm in their order, and the one whose noise acts in evaluation as well, if there is one.

    Raises:
        ConfigurationError: the arm needs the number of classes, which is not known.
    """
    if isinstance(arm, Arm):
        made = _made(arm, context.seed)
        return made, next((one for one in made if isinstance(one, MetaPerturbCallback)), None)
    first: list[Callback] = []
    perturbation = None
    for part in arm.parts:
        if part.kind.multiplies:
            perturbation = _perturbation(part, context)
        elif part.name != BASELINE:
            first.append(_regularizer(part, arm, context))
    # The one with noise in evaluation comes last: what mixes batches is gone when it re-estimates batch norm.
    return ([*first, perturbation] if perturbation is not None else first), perturbation


def listed(callbacks: Any) -> list[Any]:
    """Callbacks as Lightning takes them: None, one, or several."""
    if callbacks is None:
        return []
    return list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks]


def _made(arm: Arm, seed: int) -> list[Callback]:
    try:
        made = listed(arm.callbacks(seed))
    except UserError:
        raise
    except Exception as error:  # whatever the user's function does
        why = f"{type(error).__name__}: {one_line(error)}"
        raise ConfigurationError(f"arm '{arm.name}': its callbacks(seed) failed with {why}; mend it") from error
    for one in made:
        if not isinstance(one, Callback):
            raise ConfigurationError(
                f"arm '{arm.name}': its callbacks(seed) gives a {type(one).__name__}; give a list of callbacks of "
                "Lightning"
            )
    return made


class FirstSites(MetaPerturbCallback):
    """:class:`MetaPerturbCallback` at the first half of the sites that it would take; of three, the first two."""

    def attach(self, module: nn.Module) -> Attachment:
        share = self.phi.share_of_sites if self.sites is None else self.sites
        if is_share(share):
            taken = list(find_sites(module, self.target, share))
            self.sites = SitePlan(taken[: math.ceil(_HALF * len(taken))])
        return super().attach(module)


class MatchedPerturbation(MetaPerturbCallback):
    """A perturbation whose constants at each site follow from moments of phi's multiplier.

    Args:
        perturbation: one of :mod:`mp_lightning.compare.controls` that has constants.
        moments: of :func:`~mp_lightning.compare.moments.site_moments`.
        options: as for :class:`MetaPerturbCallback`.
    """

    def __init__(self, perturbation: Perturbation, moments: list[SiteMoments], **options: Any) -> None:
        super().__init__(perturbation=perturbation, **options)
        self._moments = moments

    def attach(self, module: nn.Module) -> Attachment:
        attachment = super().attach(module)
        set_constants(attachment, self._moments)
        return attachment


def _perturbation(part: Part, context: Context) -> MetaPerturbCallback:
    like = part.like
    assert like is not None
    options: dict[str, Any] = {
        "inference": context.inference,
        "samples": context.samples,
        "seed": context.seed,
        "marker": False,
        "ramp_steps": None if context.ramp else 0,
        "strength": like.strength,
        "sites": like.share_of_sites,
        "full_strength_at": like.full_strength_at,
        "acts_below": like.acts_below,
    }
    if part.name == "random_phi":
        random = NamedPhi(initial_phi(SEED_OF_RANDOM_PHI), part.name, noise_per=like.noise_per)
        return MetaPerturbCallback(random, **options)
    assert part.phi is not None
    match part.name:
        case "metaperturb":
            return MetaPerturbCallback(part.phi, **options)
        case "first_sites":
            return FirstSites(part.phi, **options)
        case "last_sites":
            return MetaPerturbCallback(part.phi, **{**options, "sites": _HALF * like.share_of_sites})
        case "noise_only":
            return MetaPerturbCallback(perturbation=NoiseOnly(part.phi.phi, noise_per=like.noise_per), **options)
        case "scale_only":
            return MetaPerturbCallback(perturbation=ScaleOnly(part.phi.phi, noise_per=like.noise_per), **options)
    assert part.moments is not None
    controls: dict[str, Callable[[], Perturbation]] = {
        "fixed_noise": lambda: FixedNoise(like.noise_per),
        "shrink_only": ShrinkOnly,
        "mean_one": lambda: MeanOne(part.phi.phi, noise_per=like.noise_per),  # type: ignore[union-attr]
    }
    return MatchedPerturbation(controls[part.name](), part.moments, **options)


def _regularizer(part: Part, arm: NamedArm, context: Context) -> Callback:
    value = part.kind.values[0] if part.value is None else part.value
    match part.name:
        case "dropout":
            return AtSites(lambda channels: nn.Dropout(value), "dropout")
        case "dropblock":
            return AtSites(lambda channels: DropBlock(value), "dropblock")
        case "gaussian":
            return AtSites(lambda channels: GaussianDropout(value), "gaussian")
        case "information_dropout":
            return InformationDropoutCallback(value)
    if context.num_classes is None:
        raise ConfigurationError(f"arm '{arm.name}' needs the number of classes; pass num_classes=")
    match part.name:
        case "mixup":
            return MixUp(context.num_classes, value)
        case "label_smoothing":
            return LabelSmoothing(context.num_classes, value)
        case _:
            return ManifoldMixup(context.num_classes, value)
