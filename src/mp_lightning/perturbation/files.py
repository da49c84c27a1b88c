"""phi on disk: a safetensors file and, beside it, a card in JSON that says where the numbers come from.

Nothing is ever unpickled. The card carries the SHA-256 of the file, which is verified when the file is loaded.
"""

import ctypes
import hashlib
import json
import os
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from mp_lightning.errors import ConfigurationError, PhiError
from mp_lightning.perturbation.noise import NoisePer, check_noise_per
from mp_lightning.perturbation.phi import SHAPES, Phi
from mp_lightning.whole import write_whole

DEFAULT_PHI = "tiny-imagenet-7"
BUNDLED = Path(__file__).parent / "bundled"
# What a phi is meant for, in its file where it is not 1, which is what the paper's is meant for.
FRACTIONS = ("strength", "share_of_sites", "full_strength_at", "acts_below")
PER_CHANNEL = "noise_per_channel"
_REMEDY = "give a phi.safetensors written by 'python -m mp_lightning.meta fit'"


@dataclass(frozen=True)
class NamedPhi:
    """phi with its name, its card, and what it is meant for.

    Attributes:
        phi: the 82 numbers.
        name: that it is shown under, for ``MetaPerturbCallback(name)`` where it comes with the package.
        card: plain values: sources, settings, seeds, how it was chosen, results, SHA-256 of the file, ...; empty if
            there was none.
        strength: at which it acts.
        noise_per: what its noise is drawn for, 'element' or 'channel'.
        share_of_sites: at how many of a network's sites it acts, counted from the last one.
        full_strength_at: share of the first training loss at or below which the whole strength acts; 1: it does not
            follow the loss.
        acts_below: share of it at or above which nothing acts.

    These four numbers are rounded to seven digits, as a file holds them.
    """

    phi: Phi
    name: str
    card: dict[str, Any] = field(default_factory=dict)
    strength: float = 1.0
    noise_per: NoisePer = "element"
    share_of_sites: float = 1.0
    full_strength_at: float = 1.0
    acts_below: float = 1.0

    def __post_init__(self) -> None:
        for key in FRACTIONS:
            object.__setattr__(self, key, _as_filed(getattr(self, key)))

    def __str__(self) -> str:
        return f"{self.name} ({self.card['status']})" if self.card.get("status") else self.name


def _as_filed(value: Any) -> Any:
    """A number as it comes back from a file, which holds it as float32, of which seven digits are meant."""
    return float(f"{ctypes.c_float(value).value:.7g}") if isinstance(value, float) else value


def phi_digest(phi: NamedPhi) -> str:
    """A few characters that tell a phi, and all that it is meant for (strength, noise, sites, loss), from others."""
    digest = hashlib.sha256()
    for value in phi.phi:
        digest.update(value.detach().float().cpu().numpy().tobytes())
    if phi.strength != 1:
        digest.update(str(phi.strength).encode())
    if phi.noise_per != "element":
        digest.update(phi.noise_per.encode())
    if phi.share_of_sites != 1:
        digest.update(f"sites {phi.share_of_sites}".encode())
    if phi.full_strength_at != 1:
        digest.update(f"full strength at {phi.full_strength_at}".encode())
    if phi.acts_below != 1:
        digest.update(f"acts below {phi.acts_below}".encode())
    return digest.hexdigest()[:12]


def save_phi(path: str | Path, phi: Phi | NamedPhi, card: dict[str, Any]) -> dict[str, Any]:
    """Write ``path`` (.safetensors) and the card beside it (.json); each appears whole or not at all.

    Args:
        path: of the safetensors file.
        phi: the 82 numbers; with what they are meant for, which goes into the file as well, where it is not what the
            paper's are meant for.
        card: where they come from; that of ``phi`` itself is not looked at.

    Returns:
        The card as written, that is with all that phi is meant for, and the file's name and SHA-256.

    Raises:
        PhiError: the numbers are not those of a phi, or not finite.
        ConfigurationError: it is no phi, or what it is meant for is out of range, or there is no such noise; the path
            does not end in .safetensors, or cannot be written to; the card is no dictionary, or holds what JSON cannot;
            or where it goes there is something else.
    """
    if not isinstance(phi, Phi | NamedPhi):
        raise ConfigurationError(f"save_phi writes a Phi or a NamedPhi, not a {type(phi).__name__}; see load_phi")
    path, named = Path(path), load_phi(phi)
    if not isinstance(card, dict):
        raise ConfigurationError(f"the card of phi file '{path}' is a {type(card).__name__}; give a dictionary")
    if path.suffix != ".safetensors":
        raise ConfigurationError(f"phi file '{path}' cannot be written; give a name that ends in .safetensors")
    tensors = {key: value.detach().float().cpu().contiguous() for key, value in named.phi._asdict().items()}
    meant_for = {key: float(getattr(named, key)) for key in FRACTIONS}
    tensors |= {key: torch.tensor(value) for key, value in meant_for.items() if value != 1}
    if named.noise_per == "channel":
        tensors[PER_CHANNEL] = torch.tensor(1.0)
    content = save(tensors)
    card = {
        **card,
        **{key: value for key, value in meant_for.items() if key != "acts_below" or value != 1},
        "noise_per": named.noise_per,
        "file": path.name,
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    try:
        text = json.dumps(card, indent=2) + "\n"
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"the card of phi file '{path}' cannot be written as JSON: {error}") from error
    place = _place_of_card(path)

    def write(partial: Path) -> None:  # both are whole before either takes its place
        partial.write_bytes(text.encode())
        write_whole(path, lambda own: own.write_bytes(content))

    try:
        write_whole(place, write)
    except OSError as error:
        raise ConfigurationError(
            f"phi file '{path}' cannot be written ({error.strerror}); give a place in a folder that exists, can be "
            "written to, and has room"
        ) from error
    return card


def load_phi(source: "str | Path | Phi | NamedPhi | None" = None) -> NamedPhi:
    """phi from a file, from the name of a bundled one, or as it is given.

    Args:
        source: path of a ``.safetensors`` file, a name of :func:`list_phi`, a :class:`Phi` or :class:`NamedPhi`, or
            None for the bundled default.

    Raises:
        PhiError: the file is missing, truncated, a pickle, holds other names or shapes, or numbers that are not
            finite, or it is not the file that its card describes.
        ConfigurationError: what a :class:`NamedPhi` is meant for is out of range.
    """
    if isinstance(source, NamedPhi):
        for key in FRACTIONS:
            check_fraction(getattr(source, key), f"{key} of phi '{source.name}'")
        check_noise_per(source.noise_per, f"noise_per of phi '{source.name}'")
        check_following(source.full_strength_at, source.acts_below, f"acts_below of phi '{source.name}'")
        if not isinstance(source.phi, Phi):
            raise PhiError(f"phi '{source.name}' holds a {type(source.phi).__name__} instead of a Phi; {_REMEDY}")
        _check(source.phi._asdict(), f"phi '{source.name}'")
        return source
    if isinstance(source, Phi):
        _check(source._asdict(), "the given phi")
        return NamedPhi(source, "given phi")
    name = DEFAULT_PHI if source is None else str(source)
    if name in list_phi():
        return _read(BUNDLED / f"{name}.safetensors", name)
    return _read(Path(os.path.expanduser(name)), name)


def list_phi() -> list[str]:
    """Names of the phi that come with the package, for ``MetaPerturbCallback(name)`` and ``describe_phi(name)``."""
    return sorted(path.stem for path in BUNDLED.glob("*.safetensors"))


def _read(path: Path, name: str) -> NamedPhi:
    if os.path.isdir(path):
        raise PhiError(f"phi file '{path}' is a folder; give the file in it, such as '{path / 'phi.safetensors'}'")
    if not os.path.isfile(path):
        known = ", ".join(list_phi()) or "none"
        raise PhiError(f"phi file '{path}' does not exist; {_REMEDY}, or name a bundled phi (there are: {known})")
    try:
        content = path.read_bytes()
        tensors = load(content)
    except OSError as error:
        raise PhiError(f"phi file '{path}' cannot be read ({error.strerror}); {_REMEDY}") from error
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise PhiError(f"phi file '{path}' is not a whole safetensors file; {_REMEDY}") from error
    meant_for = {key: _taken_fraction(tensors, key, f"phi file '{path}'") for key in FRACTIONS}
    if _at_odds(meant_for["full_strength_at"], meant_for["acts_below"]):
        raise PhiError(f"phi file '{path}': 'acts_below' is not above 'full_strength_at'; {_REMEDY}")
    noise_per = _taken_noise_per(tensors, f"phi file '{path}'")
    _check(tensors, f"phi file '{path}'")
    card = _read_card(path.with_suffix(".json"))
    expected = card.get("sha256")
    if expected is not None and hashlib.sha256(content).hexdigest() != expected:
        raise PhiError(
            f"phi file '{path}' is not the one its card describes (SHA-256 differs); restore it, or {_REMEDY}"
        )
    phi = Phi(**{key: tensors[key].float() for key in SHAPES})
    return NamedPhi(phi, name, card, noise_per=noise_per, **meant_for)


def _read_card(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PhiError(
            f"phi card '{path}' is not readable JSON; restore it, or delete it to load the file alone"
        ) from error
    if not isinstance(card, dict):
        raise PhiError(
            f"phi card '{path}' does not hold a JSON object; restore it, or delete it to load the file alone"
        )
    return card


def check_fraction(value: float, what: str) -> None:
    """Refuse a strength, or a share of the sites, that cannot be used.

    Raises:
        ConfigurationError: it is not a number above 0 and at most 1; the message names it as ``what``.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value <= 1:
        raise ConfigurationError(f"{what}={value} cannot be used; give a number above 0 and at most 1")


def check_following(full_strength_at: float, acts_below: float, what: str) -> None:
    """Refuse a share of the first loss below which a strength is to act that is not above the one of all of it.

    Where the strength does not follow the loss, such a share would be without effect.

    Raises:
        ConfigurationError: the message names the share as ``what``.
    """
    if _at_odds(full_strength_at, acts_below):
        raise ConfigurationError(
            f"{what}={acts_below:g} cannot be used with full_strength_at={full_strength_at:g}; give it a number above "
            "the other, which is below 1 where the strength follows the loss"
        )


def _at_odds(full_strength_at: float, acts_below: float) -> bool:
    return acts_below <= full_strength_at and (full_strength_at < 1 or acts_below < 1)


def _taken_fraction(tensors: dict[str, torch.Tensor], key: str, what: str) -> float:
    """The strength, or the share of the sites, taken out of the tensors of a file."""
    value = tensors.pop(key, torch.ones(()))
    if value.dim() or value.is_complex() or not 0 < float(value) <= 1:  # NaN is neither
        raise PhiError(f"{what}: '{key}' is not a single number above 0 and at most 1; {_REMEDY}")
    return float(value)


def _taken_noise_per(tensors: dict[str, torch.Tensor], what: str) -> NoisePer:
    """What the noise is drawn for, taken out of the tensors of a file."""
    value = tensors.pop(PER_CHANNEL, torch.zeros(()))
    if value.dim() or value.is_complex() or float(value) not in (0.0, 1.0):
        raise PhiError(f"{what}: '{PER_CHANNEL}' is not 0 or 1; {_REMEDY}")
    return "channel" if float(value) else "element"


def _check(tensors: dict[str, torch.Tensor], what: str) -> None:
    if set(tensors) != set(SHAPES):
        raise PhiError(f"{what} holds {_list(tensors)} instead of {_list(SHAPES)}; {_REMEDY}")
    for key, shape in SHAPES.items():
        value = tensors[key]
        if not isinstance(value, torch.Tensor):
            raise PhiError(f"{what}: '{key}' is a {type(value).__name__}; give a tensor {shape} of floating point")
        if tuple(value.shape) != shape or not value.is_floating_point():
            raise PhiError(
                f"{what}: '{key}' is {tuple(value.shape)} {value.dtype}, expected {shape} of floating point; {_REMEDY}"
            )
        if not bool(torch.isfinite(value.float()).all()):  # as it is used; a double may be too large
            raise PhiError(f"{what}: '{key}' holds numbers that are not finite; {_REMEDY}")


def _list(names: Any) -> str:
    return ", ".join(sorted(names)) or "nothing"


def _place_of_card(path: Path) -> Path:
    """Beside a phi file; what is there may be replaced only if it is a card."""
    place = path.with_suffix(".json")
    try:
        known = not place.exists() or "sha256" in _read_card(place)
    except PhiError:
        known = False
    if not known:
        raise ConfigurationError(
            f"phi file '{path}' cannot be written, as its card would replace '{place}', which is something else; "
            "remove that, or give another name"
        )
    return place
