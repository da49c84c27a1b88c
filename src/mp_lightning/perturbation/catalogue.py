"""The phi that come with the package: which there are, and what their cards say."""

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mp_lightning.errors import PhiError
from mp_lightning.perturbation.files import BUNDLED, DEFAULT_PHI, NamedPhi, list_phi, load_phi

_WIDTH = 100
# In this order, under these headings; what a card holds beside them is in PhiDescription.card.
_HEADINGS = {
    "status": "status",
    "kind": "kind",
    "sources": "learned from",
    "data_terms": "terms of the data",
    "architectures": "networks",
    "tasks": "tasks",
    "seed": "seed",
    "settings": "settings",
    "used": "how it is used",
    "selection": "selection",
    "results": "results",
    "known_limits": "known limits",
    "command": "command",
    "versions": "versions",
    "created": "made on",
    "sha256": "SHA-256",
}


@dataclass(frozen=True, repr=False)
class PhiDescription(NamedPhi):
    """A phi with all that is known of it. Printed, it is the card as text.

    Attributes:
        default: whether it is the one that is taken where none is named.
        picture: a PNG of its filters and its response; None if there is none.
    """

    default: bool = False
    picture: Path | None = None

    def __str__(self) -> str:
        default = " (the default)" if self.default else ""
        sites = "all sites" if self.share_of_sites == 1 else f"the last {100 * self.share_of_sites:.0f} % of the sites"
        strength = f"strength {self.strength:g}"
        if self.full_strength_at != 1:
            strength += f" at {100 * self.full_strength_at:g} % of the first loss, 0 at {100 * self.acts_below:g} %"
        lines = [f"{self.name}{default}, {strength}, noise per {self.noise_per}, at {sites}"]
        width = max(map(len, _HEADINGS.values()))
        for key, heading in _HEADINGS.items():
            first, then = f"  {heading:<{width}}  ", " " * (width + 4)
            for part in _parts(key, self.card[key]) if key in self.card else ():
                lines += textwrap.wrap(
                    part,
                    _WIDTH,
                    initial_indent=first,
                    subsequent_indent=then + "  " * part.startswith("- "),
                    break_long_words=False,
                    break_on_hyphens=False,
                )
                first = then
        if self.picture is not None:
            lines.append(f"  {'picture':<{width}}  {self.picture}")
        return "\n".join(lines)

    __repr__ = __str__


def describe_phi(name: str | Path | None = None) -> PhiDescription:
    """The card of a phi, its SHA-256 verified.

    Args:
        name: one of :func:`list_phi`, or a file of one's own with a card beside it; None for the one that is taken
            where none is named.

    Raises:
        PhiError: there is none of that name, or its file is not the one that its card describes.
    """
    if name is not None and not isinstance(name, str | Path):
        raise PhiError(
            f"describe_phi was given a {type(name).__name__}; give a file, or one of {', '.join(list_phi())}"
        )
    name = DEFAULT_PHI if name is None else str(name)
    bundled = name in list_phi()
    if not bundled and not name.endswith(".safetensors"):
        raise PhiError(
            f"no phi '{name}' comes with the package; name one of {', '.join(list_phi())}, or a .safetensors file"
        )
    phi = load_phi(name)
    picture = BUNDLED / f"{name}.png" if bundled else Path(name).expanduser().with_suffix(".png")
    return PhiDescription(**vars(phi), default=name == DEFAULT_PHI, picture=picture if picture.is_file() else None)


def _parts(key: str, value: Any) -> list[str]:
    """What stands under a heading, each part on lines of its own; members of lists that are long are parts."""
    if key == "tasks" and isinstance(value, list):
        return [str(len(value))]
    if not isinstance(value, dict) or len(_text(key, value)) < 3 * _WIDTH:
        return [_text(key, value)]
    parts = []
    for name, one in value.items():
        members = one if isinstance(one, list) and len(one) > 1 else []
        parts += (
            [f"{name}:", *(f"- {_text('', member)}" for member in members)]
            if members
            else [f"{name}: {_text('', one)}"]
        )
    return parts


def _text(key: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={_text('', one)}" for name, one in value.items())
    if isinstance(value, list):
        return "; ".join(_text("", one) for one in value)
    return str(value)
