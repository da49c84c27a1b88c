"""A plan: where a model is perturbed. It can be printed, narrowed down, saved as plain data and given back."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from typing import Any

from mp_lightning.errors import SiteError
from mp_lightning.sites.layout import FIRST, LAYOUTS

VERSION = 2  # of version 1, all layouts were channels first


@dataclass(frozen=True)
class SiteSpec:
    """One site: the input of one call of one activation.

    Attributes:
        name: unique in its plan.
        scope: module during whose forward the call happens, relative to the model ('' is the model itself).
        activation: the activation module, or None for an activation function.
        call: index of the call within one forward of the scope: among the calls of that module, or, for a function,
            among all activation calls, those of modules included.
        channels: C of the tensor.
        rule: the rule that chose it.
        reads: what the tensor is, for people.
        layout: 'channels first', (B, C, H, W), (B, C, L) or (B, C, D, H, W), or 'channels last', (B, N, C) or
            (B, H, W, C).
    """

    name: str
    scope: str
    activation: str | None
    call: int
    channels: int
    rule: str
    reads: str
    layout: str = FIRST


class SitePlan:
    """The sites of a model in order of execution; it does not change.

    Raises:
        SiteError: there is no site, or two of them have the same name or the same place.
    """

    def __init__(self, sites: "tuple[SiteSpec, ...] | list[SiteSpec]") -> None:
        self._sites = tuple(sites)
        if not self._sites:
            raise SiteError("a plan needs at least one site; leave the plan out to have the sites found")
        seen: dict[object, str] = {}
        for site in self._sites:
            for key in (site.name, (site.scope, site.activation, site.call)):
                if key in seen:
                    raise SiteError(f"sites '{seen[key]}' and '{site.name}' of the plan are the same; keep one of them")
                seen[key] = site.name

    def __len__(self) -> int:
        return len(self._sites)

    def __iter__(self) -> Iterator[SiteSpec]:
        return iter(self._sites)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SitePlan) and self._sites == other._sites

    def __hash__(self) -> int:
        return hash(self._sites)

    @property
    def names(self) -> list[str]:
        """Names of the sites in order of execution."""
        return [site.name for site in self._sites]

    @property
    def channel_norm(self) -> int:
        """The largest number of channels of any site."""
        return max(site.channels for site in self._sites)

    def only(self, *patterns: str) -> "SitePlan":
        """The sites whose names match one of the patterns (``layer1.*``).

        Raises:
            SiteError: a pattern matches no site.
        """
        chosen = self._matching(patterns)
        return SitePlan([site for site in self._sites if site.name in chosen])

    def without(self, *patterns: str) -> "SitePlan":
        """The sites whose names match none of the patterns.

        Raises:
            SiteError: a pattern matches no site, or no site remains.
        """
        chosen = self._matching(patterns)
        return SitePlan([site for site in self._sites if site.name not in chosen])

    def to_dict(self) -> dict[str, Any]:
        """Plain data: dicts, lists, strings and integers only."""
        return {"version": VERSION, "sites": [asdict(site) for site in self._sites]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "SitePlan":
        """From what :meth:`to_dict` gave.

        Raises:
            SiteError: it is not that.
        """
        names = {field.name for field in fields(SiteSpec)}
        try:
            version, entries = data["version"], data["sites"]
            if version == 1:
                entries = [{"layout": FIRST, **entry} for entry in entries]
            if version not in (1, VERSION) or any(
                set(entry) != names or entry["layout"] not in LAYOUTS for entry in entries
            ):
                raise ValueError
            return cls([SiteSpec(**entry) for entry in entries])
        except (KeyError, TypeError, ValueError) as error:
            raise SiteError(
                f"this is not a plan of version {VERSION}; make one with find_sites(model).to_dict()"
            ) from error

    def __str__(self) -> str:
        rows = [("site", "channels", "rule", "reads")]
        rows += [(site.name, str(site.channels), site.rule, site.reads) for site in self._sites]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )

    def __repr__(self) -> str:
        return f"SitePlan({len(self)} sites: {', '.join(self.names)})"

    def _matching(self, patterns: tuple[str, ...]) -> set[str]:
        chosen: set[str] = set()
        for pattern in patterns:
            found = {name for name in self.names if fnmatchcase(name, pattern)}
            if not found:
                raise SiteError(f"no site matches '{pattern}'; the sites are: {', '.join(self.names)}")
            chosen |= found
        return chosen
