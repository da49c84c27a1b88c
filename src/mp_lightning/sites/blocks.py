"""The blocks of a model in which its sites are reached, made from a plan."""

from collections import Counter
from typing import TYPE_CHECKING

from torch import nn

from mp_lightning.sites.calls import ActivationModule, Block
from mp_lightning.sites.plan import SitePlan
from mp_lightning.sites.site import Site

if TYPE_CHECKING:
    from mp_lightning.sites.attachment import Attachment


BY_PARTS = (
    "in the first training batch parts of the network were called one by one, as by forward_features(x), and not the "
    "network itself: each counts as a forward of its own, and batch norm cannot be re-estimated for inference. Call "
    "the network, or put the calls into the forward of a module and call that"
)


def scopes_of(plan: SitePlan) -> list[str]:
    """Names of the modules in whose forwards the sites are reached, once each."""
    return list(dict.fromkeys(spec.scope for spec in plan))


def _in_words(scopes: list[str]) -> str:
    scopes = [f"self.{scope}" if scope else "the module" for scope in scopes]
    return ", ".join(scopes[:3]) + (" and others" if len(scopes) > 3 else "")


def why_unreached(attachment: "Attachment") -> str:
    """Why no site was reached in a training batch, and what to do about it."""
    scopes = scopes_of(attachment.plan)
    evaluating = [scope for scope in scopes if not attachment.hooked.get(scope, attachment.model).training]
    if evaluating:
        return (
            f"the first training batch was computed with {_in_words(evaluating)} in evaluation mode, in which no "
            "statistics are taken for the noise; call train() before, or leave out what is not trained (sites=)"
        )
    return (
        f"nothing was perturbed in the first training batch, as no forward of {_in_words(scopes)} was made by "
        "calling it; call it, and not its forward or other methods, or choose sites that are reached (sites=)"
    )


def make_blocks(attachment: "Attachment", model: nn.Module) -> list[Block]:
    """One for each scope of the plan, with the sites that are reached in it."""
    paths = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    pairs = {(spec.scope, spec.activation) for spec in attachment.plan if spec.activation is not None}
    held = Counter(id(model.get_submodule(activation)) for _, activation in pairs)  # by how many blocks
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
            single = paths[id(module)] == 1 and held[id(module)] == 1
            modules.append(ActivationModule(module, sites, single, container and set(sites) == {0} and single))
        blocks.append(Block(attachment, modules, functional))
    return blocks
