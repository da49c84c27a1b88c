"""A plan: where a model is perturbed. It can be printed, narrowed down, saved as plain data and given back."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from mp_lightning.errors import SiteError
from mp_lightning.sites.layout import FIRST, LAYOUTS
from mp_lightning.whole import write_text

_HEAD = """# Where a model is perturbed, in order of execution. Take out what you do not want, and give the file back:
# MetaPerturbCallback(sites="THIS_FILE.yaml").
"""
VERSION = 1


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
        layout: 'channels first', (B, C, H, W), (B, C, L) or (B, C, D, H, W), 'channels last', (B, N, C) or
            (B, H, W, C), or 'sequence first', (L, B, C).
        calls: of a function, how many activations a forward of the scope called when the site was found; 0 where that
            is not known, as in a plan from a file.
    """

    name: str
    scope: str
    activation: str | None
    call: int
    channels: int
    rule: str
    reads: str
    layout: str = FIRST
    calls: int = field(default=0, compare=False, repr=False)

    @property
    def place(self) -> tuple[str, str | None, int]:
        """Scope, activation and call: what no other site has."""
        return self.scope, self.activation, self.call


_KEPT = {field.name: field.type for field in fields(SiteSpec) if field.compare}  # in plain data


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
            for key in (site.name, site.place):
                if key in seen:
                    raise SiteError(f"sites '{seen[key]}' and '{site.name}' of the plan are the same; keep one of them")
                seen[key] = site.name

    def __len__(self) -> int:
        return len(self._sites)

    def __iter__(self) -> Iterator[SiteSpec]:
        return iter(self._sites)

    def __eq__(self, other: object) -> bool:
        """Whether it is the same sites; what is only there for people, the rule and what is read, does not count."""
        return isinstance(other, SitePlan) and self._places() == other._places()

    def __hash__(self) -> int:
        return hash(self._places())

    def _places(self) -> tuple[SiteSpec, ...]:
        return tuple(replace(site, rule="", reads="") for site in self._sites)

    @property
    def names(self) -> list[str]:
        """Names of the sites in order of execution."""
        return [site.name for site in self._sites]

    @property
    def size(self) -> str:
        """How many sites there are, in words."""
        return f"{len(self)} site{'' if len(self) == 1 else 's'}"

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
        return {
            "version": VERSION,
            "sites": [{key: value for key, value in asdict(site).items() if key in _KEPT} for site in self._sites],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "SitePlan":
        """From what :meth:`to_dict` gave.

        Raises:
            SiteError: it is not that.
        """
        version = data.get("version") if isinstance(data, dict) else None
        if version != VERSION or not isinstance(data.get("sites"), list):
            raise SiteError(f"this is not a plan of version {VERSION}; make one with find_sites(model).to_dict()")
        return cls([_site(entry, number) for number, entry in enumerate(data["sites"], start=1)])

    def save(self, path: str | Path) -> None:
        """Write the plan as YAML, to be read, edited, and given back as ``sites=path``.

        Raises:
            SiteError: the file cannot be written.
        """
        text = yaml.safe_dump(self.to_dict(), sort_keys=False, width=120, allow_unicode=True)
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            write_text(Path(path), _HEAD + text)
        except OSError as error:
            raise SiteError(f"plan '{path}' cannot be written ({error.strerror}); choose another place") from error

    @classmethod
    def load(cls, path: str | Path) -> "SitePlan":
        """From a file that :meth:`save` wrote, edited or not.

        Raises:
            SiteError: the file is missing or holds no plan; the message names the entry.
        """
        try:
            data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise SiteError(f"plan '{path}' cannot be read ({error.strerror}); give the path of a YAML file") from error
        except (yaml.YAMLError, ValueError) as error:
            line = getattr(getattr(error, "problem_mark", None), "line", None)
            where = "" if line is None else f" in line {line + 1}"
            raise SiteError(f"plan '{path}' is no YAML{where}; write it again with SitePlan.save") from error
        try:
            return cls.from_dict(data)
        except SiteError as error:
            raise SiteError(f"plan '{path}': {error}") from error

    def __str__(self) -> str:
        rows = [("site", "channels", "rule", "reads")]
        rows += [(site.name, str(site.channels), site.rule, site.reads) for site in self._sites]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )

    def __repr__(self) -> str:
        return f"SitePlan({self.size}: {', '.join(self.names)})"

    def _matching(self, patterns: tuple[str, ...]) -> set[str]:
        chosen: set[str] = set()
        for pattern in patterns:
            found = {name for name in self.names if fnmatchcase(name, pattern)}
            if not found:
                raise SiteError(f"no site matches '{pattern}'; the sites are: {', '.join(self.names)}")
            chosen |= found
        return chosen


def _site(entry: Any, number: int) -> SiteSpec:
    name = entry.get("name", f"number {number}") if isinstance(entry, dict) else f"number {number}"
    if not isinstance(entry, dict):
        raise SiteError(f"site {name} of the plan is {entry!r}; give its {', '.join(_KEPT)}")
    wrong = sorted({str(key) for key in entry} ^ set(_KEPT))
    if wrong:
        unknown = wrong[0] in entry
        raise SiteError(f"site '{name}' of the plan {'has an unknown' if unknown else 'has no'} key '{wrong[0]}'")
    for key, kind in _KEPT.items():
        value = entry[key]
        good = isinstance(value, kind) and value is not True and value is not False  # type: ignore[arg-type]
        if not good or (key == "layout" and value not in LAYOUTS) or (key == "channels" and value < 1):
            wanted = " or ".join(f"'{layout}'" for layout in LAYOUTS) if key == "layout" else f"{kind}"
            raise SiteError(f"site '{name}' of the plan has {key}={value!r}; give {wanted}")
    return SiteSpec(**entry)
