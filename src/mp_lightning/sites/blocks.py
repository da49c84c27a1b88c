"""The blocks of a model in which its sites are reached, made from a plan."""

from collections import Counter
from typing import TYPE_CHECKING

from torch import nn

from mp_lightning.errors import ConfigurationError
from mp_lightning.sites.calls import ActivationModule, Block
from mp_lightning.sites.plan import SitePlan
from mp_lightning.sites.site import Site

if TYPE_CHECKING:
    from mp_lightning.sites.attachment import Attachment


def scopes_of(plan: SitePlan) -> list[str]:
    """Names of the modules in whose forwards the sites are reached, once each."""
    return list(dict.fromkeys(spec.scope for spec in plan))


def _in_words(scopes: list[str]) -> str:
    scopes = [f"self.{scope}" if scope else "the module" for scope in scopes]
    return ", ".join(scopes[:3]) + (" and others" if len(scopes) > 3 else "")


def why_unreached(plan: SitePlan, model: nn.Module) -> str:
    """Why no site of a plan was reached in a training batch, and what to do about it."""
    evaluating = [scope for scope in scopes_of(plan) if not model.get_submodule(scope).training]
    if evaluating:
        return (
            f"the first training batch was computed with {_in_words(evaluating)} in evaluation mode, in which no "
            "statistics are taken for the noise; call train() before, or leave out what is not trained (sites=)"
        )
    return (
        f"nothing was perturbed in the first training batch, as no forward of {_in_words(scopes_of(plan))} was made by "
        "calling it; call it, and not its forward or other methods, or choose sites that are reached (sites=)"
    )


def check_there(model: nn.Module, hooked: dict[str, nn.Module]) -> None:
    """Refuse a model of which a part that has hooks is not there any more.

    Raises:
        ConfigurationError: names it.
    """
    for name, module in hooked.items():
        try:
            found = model.get_submodule(name)
        except AttributeError:
            found = None
        if found is module or getattr(found, "_orig_mod", None) is module:  # compiled since
            continue
        if module not in {*model.modules()}:  # under another name it would do
            raise ConfigurationError(
                f"self.{name} was replaced or removed since MetaPerturb was attached to it, so that nothing acts there;"
                " call mp_lightning.detach(model) before such a change, and attach again after it"
            )


def make_blocks(attachment: "Attachment", model: nn.Module) -> list[Block]:
    """One for each scope of the plan, with the sites that are reached in it."""
    paths = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    blocks = []
    for scope in scopes_of(attachment.plan):
        by_module: dict[str, dict[int, Site]] = {}
        functional: dict[int, Site] = {}
        for site in attachment.all_sites():
            if site.spec.scope == scope:
                calls = functional if site.spec.activation is None else by_module.setdefault(site.spec.activation, {})
                calls[site.spec.call] = site
        container = type(model.get_submodule(scope)).forward is nn.Sequential.forward
        modules = []
        for name, sites in by_module.items():
            module = model.get_submodule(name)
            modules.append(ActivationModule(module, sites, container and set(sites) == {0} and paths[id(module)] == 1))
        blocks.append(Block(attachment, modules, functional))
    return blocks
