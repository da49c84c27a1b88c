"""The blocks of a model in which its sites are reached, made from a plan."""

from collections import Counter
from typing import TYPE_CHECKING

from torch import nn

from mp_lightning.sites.calls import ActivationModule, Block
from mp_lightning.sites.plan import SitePlan
from mp_lightning.sites.site import Site

if TYPE_CHECKING:
    from mp_lightning.sites.attachment import Attachment


def scopes_of(plan: SitePlan) -> list[str]:
    """Names of the modules in whose forwards the sites are reached, once each."""
    return list(dict.fromkeys(spec.scope for spec in plan))


def scopes_in_words(plan: SitePlan) -> str:
    """What has to be called for the sites of a plan to be reached, for messages."""
    scopes = [f"self.{scope}" if scope else "the module" for scope in scopes_of(plan)]
    return ", ".join(scopes[:3]) + (" and others" if len(scopes) > 3 else "")


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
