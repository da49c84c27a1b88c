"""The arms of a comparison by name: what is known, and what may be combined.

An arm is written as one name, ``dropout``, with a value where it takes one, ``dropout:0.3`` or
``metaperturb:phi.safetensors``, and combined with others by ``+``. Each stands for callbacks: see
:mod:`mp_lightning.compare.arm_callbacks`.

Layers (``dropout``, ``dropblock`` and the like) act at all sites that :func:`~mp_lightning.find_sites` gives, alone and
in combinations. What stands in place of phi acts at the share of them that phi comes with, a third for the default one.
Controls are matched to phi by itself, in combinations, too.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from lightning.pytorch.callbacks import Callback

from mp_lightning.compare.moments import SiteMoments
from mp_lightning.errors import ConfigurationError
from mp_lightning.perturbation import NamedPhi, load_phi

BASELINE = "none"
Role = Literal["baseline", "regularizer", "learned", "control", "ablation"]


@dataclass(frozen=True)
class Kind:
    """A kind of arm.

    Attributes:
        role: 'control' for what shows whether learning is the reason of a gain.
        what: one line for lists.
        parameter: name of its hyperparameter; None if it has none.
        values: of the hyperparameter, in the order in which tuning tries them; the first is taken where nothing is
            tuned.
        takes_phi: whether the value of the arm is a phi.
        needs_moments: whether phi's multiplier is measured for it beforehand.
        multiplies: whether it stands at the sites in place of phi; only one such can be in a combination.
    """

    role: Role
    what: str
    parameter: str | None = None
    values: tuple[float, ...] = ()
    takes_phi: bool = False
    needs_moments: bool = False
    multiplies: bool = False


def _multiplies(role: Role, what: str, *, takes_phi: bool = True, needs_moments: bool = False) -> Kind:
    return Kind(role, what, takes_phi=takes_phi, needs_moments=needs_moments, multiplies=True)


KINDS: dict[str, Kind] = {
    BASELINE: Kind("baseline", "no regularizer but the weight decay and augmentation that all arms have"),
    "dropout": Kind("regularizer", "torch's Dropout at all sites", "p", (0.1, 0.03, 0.3, 0.5)),
    "dropblock": Kind("regularizer", "torchvision's DropBlock at all sites", "p", (0.05, 0.02, 0.1, 0.2)),
    "gaussian": Kind("regularizer", "multiplication by N(1, std^2) at all sites", "std", (0.3, 0.15, 0.6, 1.0)),
    "mixup": Kind("regularizer", "torchvision's MixUp of images", "alpha", (0.4, 0.2, 1.0, 2.0)),
    "manifold_mixup": Kind("regularizer", "Manifold Mixup at the input or any site", "alpha", (1.0, 0.2, 2.0, 0.5)),
    "information_dropout": Kind("regularizer", "Information Dropout at all sites", "beta", (0.1, 0.01, 1.0, 0.3)),
    "label_smoothing": Kind("regularizer", "smoothed labels", "smoothing", (0.1, 0.05, 0.2, 0.3)),
    "metaperturb": _multiplies("learned", "phi"),
    "fixed_noise": _multiplies("control", "constant noise with the moments of phi's multiplier", needs_moments=True),
    "shrink_only": _multiplies("control", "the mean of phi's multiplier, no noise", needs_moments=True),
    "random_phi": _multiplies("control", "phi as it is before meta-training", takes_phi=False),
    "noise_only": _multiplies("ablation", "phi's noise without its scale"),
    "scale_only": _multiplies("ablation", "phi's scale without its noise"),
    "first_sites": _multiplies("ablation", "phi at the first half of its sites"),
    "last_sites": _multiplies("ablation", "phi at the last half of its sites"),
    "mean_one": _multiplies("ablation", "phi's multiplier over its mean when training ends", needs_moments=True),
}


@dataclass(frozen=True, eq=False)
class Arm:
    """An arm of one's own: a name, and what makes its callbacks, given a seed.

    Example::

        Arm("weight noise", lambda seed: [WeightNoise(0.1)])

    With several processes ``callbacks`` must be a function at the top level of a module. It is called once more before
    the first run, to see what it gives.
    """

    name: str
    callbacks: Callable[[int], Sequence[Callback]]
    control: bool = False


@dataclass(frozen=True, eq=False)
class Part:
    """One part of a combination: its kind, the value of its hyperparameter where it is fixed, and its phi.

    What stands at the sites in place of phi is used as ``like`` is meant to be, at its strength and share of the sites
    and so on: the part's phi, or, for a random phi, the phi for the arms that name none. None for all else.
    """

    name: str
    value: float | None = None
    phi: NamedPhi | None = None
    like: NamedPhi | None = None
    moments: list[SiteMoments] | None = None

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]


@dataclass(frozen=True, eq=False)
class NamedArm:
    """An arm of a name, parsed."""

    name: str
    parts: tuple[Part, ...]

    @property
    def control(self) -> bool:
        """Whether a part is a control."""
        return any(part.kind.role == "control" for part in self.parts)

    @property
    def parameters(self) -> str:
        """Its hyperparameters as text, such as 'p=0.3'."""
        found = [
            f"{part.kind.parameter}={part.value:g}"
            for part in self.parts
            if part.kind.parameter is not None and part.value is not None
        ]
        return " ".join(found)


AnyArm = Arm | NamedArm


def follows_the_loss(arm: AnyArm) -> bool:
    """Whether the strength of something in this arm follows the training loss, by the phi that it stands for."""
    parts = arm.parts if isinstance(arm, NamedArm) else ()
    return any(part.like is not None and part.like.full_strength_at < 1 for part in parts)


def parse_arm(text: str, phi: NamedPhi) -> NamedArm:
    """An arm from its name.

    Args:
        text: such as 'dropout', 'dropout:0.3', 'metaperturb:my-phi.safetensors' or 'metaperturb+mixup'.
        phi: for the parts that take one and name none.

    Raises:
        ConfigurationError: a part is unknown or its value out of place, or parts cannot be combined.
        PhiError: a phi cannot be loaded.
    """
    text = str(text)
    parts = tuple(_part(text, word.strip(), phi) for word in text.split("+"))
    names = [part.name for part in parts]
    if len(set(names)) < len(names) or (BASELINE in names and len(names) > 1):
        raise ConfigurationError(f"arm '{text}' cannot be combined so; name each part once, and 'none' alone")
    multiplying = [part.name for part in parts if part.kind.multiplies]
    if len(multiplying) > 1:
        raise ConfigurationError(
            f"arm '{text}': {' and '.join(multiplying)} both stand at the sites in place of phi; combine one of them "
            "with other regularizers"
        )
    return NamedArm(text, parts)


def _part(arm: str, word: str, phi: NamedPhi) -> Part:
    name, colon, value = word.partition(":")
    if name not in KINDS:
        raise ConfigurationError(
            f"arm '{arm}': '{name}' is unknown; use one of {', '.join(KINDS)}, or a combination with +"
        )
    kind = KINDS[name]
    if kind.takes_phi:
        own = load_phi(value) if colon else phi
        return Part(name, phi=own, like=own)
    if not colon:
        return Part(name, like=phi if kind.multiplies else None)
    if kind.parameter is None:
        raise ConfigurationError(f"arm '{arm}': '{name}' takes no value; leave ':{value}' out")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or number < 0:
        raise ConfigurationError(
            f"arm '{arm}': {kind.parameter}={value} is not a number from 0; write for example {name}:{kind.values[0]}"
        )
    return Part(name, number)
