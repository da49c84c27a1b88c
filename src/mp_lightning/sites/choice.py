"""From what a user says about the sites, in one of several ways, to the plan."""

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard

from torch import nn

from mp_lightning.errors import SiteError
from mp_lightning.sites.activations import ACTIVATION_FUNCTIONS, ACTIVATION_MODULES
from mp_lightning.sites.discovery import check_target, find_activations, find_sites
from mp_lightning.sites.plan import SitePlan, SiteSpec

# A plan, a file with one, a share of those found, names or patterns, classes of modules, activation functions,
# conditions, or several of the last four.
Sites: TypeAlias = "SitePlan | float | str | Path | type[nn.Module] | Callable[..., Any] | Iterable[Any] | None"


def choose_sites(model: nn.Module, sites: Sites = None, target: str | None = None) -> SitePlan:
    """The plan that ``sites`` says, for this model.

    Args:
        model: that is to be perturbed.
        sites: None takes those of :func:`find_sites`, and a number such as 0.5 that share of them, counted from the
            last one of each network. A :class:`SitePlan`, or the path of a YAML file with one
            (``.yaml``, ``.yml``), is taken as it is. All else chooses, and several may stand in a list:

            - a name or pattern (``layer1.*``): the found sites of these names; if there are none, the activations;
            - a class of modules: the found sites inside its modules; of an activation, such as ``nn.GELU``, all calls
              of its modules;
            - an activation function, such as ``F.relu``: all its calls;
            - any other function: the found sites for whose :class:`SiteSpec` it is true.
        target: name of the only submodule of ``model`` in which sites are looked for.

    Raises:
        SiteError: nothing fits, something is said twice, or the plan is that of another model.
        ConfigurationError: the share is not above 0 and at most 1.
    """
    if target is not None:
        check_target(model, target)
    if is_share(sites):
        return find_sites(model, target, sites)
    if sites is None:
        return find_sites(model, target)
    if isinstance(sites, SitePlan):
        plan = sites
    elif is_file(sites):
        plan = SitePlan.load(sites)
    else:
        several = isinstance(sites, Iterable) and not isinstance(sites, str | type | nn.Module)
        return _chosen(model, list(sites) if several else [sites], target)  # type: ignore[arg-type]
    check_fits(plan, model, target)
    return plan


def is_share(sites: Sites) -> TypeGuard[float]:
    """Whether it is a number, the share of the sites that is wanted."""
    return isinstance(sites, int | float) and not isinstance(sites, bool)


def is_file(sites: Sites) -> TypeGuard[str | Path]:
    """Whether it is the path of a file with a plan."""
    return isinstance(sites, str | Path) and str(sites).endswith((".yaml", ".yml"))


def _chosen(model: nn.Module, wishes: list[Any], target: str | None) -> SitePlan:
    candidates = _Candidates(model, target)
    chosen: dict[SiteSpec, str] = {}
    for wish in wishes:
        words = wish if isinstance(wish, str) else getattr(wish, "__name__", repr(wish))
        found = candidates.for_wish(wish)
        if not found:
            names = ", ".join(site.name for site in candidates.all()[:8])
            raise SiteError(
                f"sites={words}: no activation of {type(model).__name__} fits; those that can be sites are {names}, "
                "... (print(find_activations(model)) lists them all)"
            )
        for site in found:
            if site in chosen:
                raise SiteError(
                    f"site '{site.name}' is reached twice, by '{chosen[site]}' and by '{words}'; leave out one of them"
                )
            chosen[site] = words
    return SitePlan([site for site in candidates.all() if site in chosen])


class _Candidates:
    """What can be chosen: the sites that the rules find, and all other activations."""

    def __init__(self, model: nn.Module, target: str | None) -> None:
        self._model = model
        self._target = target
        self._all = list(find_activations(model, target))
        try:
            found = {site.place: site for site in find_sites(model, target)}
        except SiteError:
            found = {}
        self._found = list(found.values())
        self._all = [found.get(site.place, site) for site in self._all]

    def all(self) -> list[SiteSpec]:
        return self._all

    def for_wish(self, wish: Any) -> list[SiteSpec]:
        if isinstance(wish, str):
            return self._named(wish, self._found) or self._named(wish, self._all)
        if isinstance(wish, type) and issubclass(wish, nn.Module):
            if issubclass(wish, ACTIVATION_MODULES):
                return [site for site in self._all if site.activation and isinstance(self._at(site.activation), wish)]
            return [site for site in self._found if any(isinstance(m, wish) for m in self._around(site))]
        if not callable(wish) or isinstance(wish, nn.Module):
            raise SiteError(
                f"sites={str(wish)[:80]} cannot be used; give a SitePlan, a YAML file, a share such as 0.5, names, "
                "patterns, classes of modules, activation functions, or a function of a SiteSpec"
            )
        if wish in ACTIVATION_FUNCTIONS:
            functions = (site for site in self._all if site.activation is None)
            return [site for site in functions if _function(site) == getattr(wish, "__name__", "").rstrip("_")]
        return [site for site in self._found if wish(site)]

    def _named(self, pattern: str, sites: list[SiteSpec]) -> list[SiteSpec]:
        start = f"{self._target}." if self._target else ""  # names within the target will do
        return [
            site
            for site in sites
            if fnmatchcase(site.name, pattern) or fnmatchcase(site.name.removeprefix(start), pattern)
        ]

    def _at(self, name: str) -> nn.Module:
        return self._model.get_submodule(name)

    def _around(self, site: SiteSpec) -> list[nn.Module]:
        parts = site.scope.split(".") if site.scope else []
        return [self._at(".".join(parts[:length])) for length in range(len(parts) + 1)]


def check_fits(plan: SitePlan, model: nn.Module, target: str | None = None) -> None:
    """Refuse a plan that was made for another model, or before this one was changed.

    Raises:
        SiteError: names the first site that does not fit.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for spec in plan:
        for name in (spec.scope, spec.activation):
            if name is not None and name not in modules:
                raise SiteError(
                    f"site '{spec.name}' does not fit: {type(model).__name__} has no module '{name}'; "
                    "give the model that the plan was made for"
                )
        if target is not None and not f"{spec.scope}.".startswith(f"{target}."):
            raise SiteError(f"site '{spec.name}' is outside of target '{target}'; leave out one of the two")
    try:
        known = {site.place: site for site in find_activations(model)}
    except SiteError:
        return  # a model that cannot be followed, for which the plan was written by hand
    scopes = {site.scope for site in known.values()}
    for spec in plan:
        now = known.get(spec.place)
        if now is None and spec.scope in scopes:
            raise SiteError(
                f"site '{spec.name}' does not fit: '{spec.scope or type(model).__name__}' has no such activation call; "
                "the model was changed after the plan was made, or is for images of another size; make the plan again "
                "with find_sites(model), with the same input_size= as here"
            )
        if now is not None and (now.channels, now.layout) != (spec.channels, spec.layout):
            raise SiteError(
                f"site '{spec.name}' does not fit: it has {now.channels} channels ({now.layout}), and "
                f"{spec.channels} ({spec.layout}) in the plan; the model was changed after the plan was made, so make "
                "the plan again with find_sites(model)"
            )


def _function(site: SiteSpec) -> str:
    return site.name.rpartition(":")[2].partition("#")[0].rstrip("_")
