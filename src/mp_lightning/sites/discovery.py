"""Find the sites of a model from what its forward computes; no data is needed and the model is left as it was.

The rules by which an activation is a site are in :mod:`mp_lightning.sites.rules`. Here: which networks of a model are
looked at, which of their sites are taken, and what is said where there is none.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy

from mp_lightning.errors import SiteError
from mp_lightning.perturbation import check_fraction
from mp_lightning.sites.activations import ACTIVATION_MODULES
from mp_lightning.sites.arguments import check_model, whole_number
from mp_lightning.sites.plan import SitePlan, SiteSpec
from mp_lightning.sites.recording import NoImageFits, images_of
from mp_lightning.sites.rules import END, SiteGraph
from mp_lightning.sites.tracing import CONVOLUTIONS, Region, is_frozen, record_region, trace_regions

_ROUNDING = 1e-3  # 0.7 of 10 sites are 7, though 0.7 * 10 is more, and 0.334 of 9 are 3


def find_sites(
    model: nn.Module, target: str | None = None, share: float = 1.0, input_size: int | None = None
) -> SitePlan:
    """The sites of ``model``.

    Args:
        model: any module; of a LightningModule the networks inside are looked at. Frozen networks are left alone.
        target: name of the only submodule in which to look, such as 'student'.
        share: how many of the sites of each network, above 0 and at most 1, counted from the last one and rounded up;
            0.5 is the deeper half.
        input_size: height of its images in pixels, where its forward does not compute the same for those of any size.

    Raises:
        SiteError: there is none; the message says what was found instead.
        ConfigurationError: ``share`` or ``input_size`` is out of range, or ``model`` is no module.
    """
    check_fraction(share, "sites")
    if input_size is not None:
        whole_number(input_size, "input_size", 1, "of pixels, the height of the images")
    with images_of(input_size):
        plan, graphs = _plan(model, target, partial(_sites_of, model))
    return plan if share == 1 else SitePlan(_deepest(list(plan), [graph.region.prefix for graph in graphs], share))


def find_activations(model: nn.Module, target: str | None = None) -> SitePlan:
    """All that can be a site of ``model``: every activation, of a module or a function, of maps, tokens or signals.

    Arguments and errors are those of :func:`find_sites`.
    """
    return _plan(model, target, lambda graphs: [site for graph in graphs for site in graph.candidates()])[0]


def _plan(
    model: nn.Module, target: str | None, choose: Callable[[list[SiteGraph]], list[SiteSpec]]
) -> tuple[SitePlan, list[SiteGraph]]:
    check_model(model, "find_sites")
    if isinstance(model, torch.jit.ScriptModule):
        raise SiteError(_compiled(model, "it"))
    prefix = target or ""
    check_target(model, prefix)
    graphs, failures, found = _search(model.get_submodule(prefix), prefix, choose)
    unique = {_where(model, site): site for site in reversed(found)}  # a module may have several names
    sites = [site for site in found if unique[_where(model, site)] is site]
    if not sites:
        raise SiteError(_nothing_found(model.get_submodule(prefix), graphs, failures))
    return SitePlan(_with_unique_names(sites)), graphs


def _where(model: nn.Module, site: SiteSpec) -> tuple[nn.Module, nn.Module | None, int]:
    """Scope, activation and call: what no other site has."""
    activation = None if site.activation is None else model.get_submodule(site.activation)
    return model.get_submodule(site.scope), activation, site.call


def check_target(model: nn.Module, target: str) -> None:
    """Refuse a name of no part.

    Raises:
        SiteError: lists the parts.
    """
    names = [name for name, _ in model.named_children()]
    try:
        model.get_submodule(target)
    except AttributeError as error:
        raise SiteError(
            f"target='{target}' is no part of {type(model).__name__}; its parts are {', '.join(names) or 'none'}"
        ) from error


def _deepest(sites: list[SiteSpec], networks: list[str], share: float) -> list[SiteSpec]:
    """The last sites of each network, so that none of several goes without."""
    chosen: set[SiteSpec] = set()
    for network in networks:
        inside = [site for site in sites if not network or f"{site.scope}.".startswith(f"{network}.")]
        count = max(1, math.ceil(share * len(inside) - _ROUNDING))
        chosen.update(inside[-count:])
    return [site for site in sites if site in chosen]


def _search(
    model: nn.Module, prefix: str, choose: Callable[[list[SiteGraph]], list[SiteSpec]]
) -> tuple[list[SiteGraph], list[str], list[SiteSpec]]:
    for through_lightning in (False, True):  # the layers may be the LightningModule's own
        regions, failures = trace_regions(model, through_lightning, prefix)
        graphs = [SiteGraph(region) for region in regions]
        found = choose(graphs)
        if any(graph.left_out for graph in graphs):
            graphs = [SiteGraph(_with_shapes(graph)) if graph.left_out else graph for graph in graphs]
            found = choose(graphs)
        if found:
            break
    return graphs, failures, found


def _sites_of(model: nn.Module, graphs: list[SiteGraph]) -> list[SiteSpec]:
    found = [site for graph in graphs for site in graph.residual_sites()]
    if all(site.rule == END for site in found):
        found = [site for graph in graphs for site in graph.plain_sites()] or found
    if not found:
        found = [s for graph in graphs for s in graph.unnormalized_sites(_learns_all(graph.region.module, model))]
    return found


def _learns_all(part: nn.Module, model: nn.Module) -> bool:
    return {p for p in model.parameters() if p.requires_grad} <= set(part.parameters())


def _with_shapes(graph: SiteGraph) -> Region:
    """The region with the shapes of its operations, where they can be had."""
    region = graph.region
    try:
        return record_region(region.module, region.prefix)
    except NoImageFits:
        return region


def _with_unique_names(sites: list[SiteSpec]) -> list[SiteSpec]:
    names = [site.name for site in sites]
    return [replace(site, name=f"{site.name}#{site.call}") if names.count(site.name) > 1 else site for site in sites]


_COUNTS = ", ".join(kind.__name__ for kind in ACTIVATION_MODULES)
_SEEN = f"let it call activations that count, of torch.nn or torch.nn.functional: {_COUNTS} (Swish is SiLU)"
_BY_HAND = "sites= a SitePlan that was written by hand"


def _nothing_found(model: nn.Module, graphs: list[SiteGraph], failures: list[str]) -> str:
    left_out = [reason for graph in graphs for reason in graph.left_out]
    seen = [graph.name(node) for graph in graphs for node in graph.activations() if not graph.is_weights(node)]
    remedy = "name the sites yourself with sites="
    if is_frozen(model):
        found = "all its parameters are frozen"
    elif scripted := [name for name, part in model.named_modules() if isinstance(part, torch.jit.ScriptModule)]:
        return _compiled(model, f"its part '{scripted[0]}'")
    elif isinstance(model, fx.GraphModule):
        return _compiled(model, "it")
    elif any(map(is_lazy, model.parameters())):
        found, remedy = "it has lazy layers, which have no weights yet", "run one forward first"
    elif not any(isinstance(part, CONVOLUTIONS) for part in model.modules()):
        found, remedy = "it has no convolution", f"give a network with convolutions, or {_BY_HAND}"
    elif left_out:
        found = f"what reaches these has no known number of channels: {', '.join(left_out[:5])}"
        remedy = f"give {_BY_HAND}"
    elif seen:
        found = (
            f"of its activations ({', '.join(seen[:5])}) none ends a residual block, is inside of one, or follows a "
            "convolution"
        )
    elif frozen := _frozen_networks(model):
        found = f"these networks in it are frozen and left alone: {', '.join(frozen[:5])}"
        remedy = "freeze them after attach(module), or let a finetuning callback freeze them"
    elif failures:
        found = f"its forward cannot be followed: {', '.join(failures[:3])}"
        remedy = f"{_SEEN}, or give {_BY_HAND}"
    else:
        found, remedy = "its networks call no activation that counts", f"{_SEEN}, or give {_BY_HAND}"
    return f"no site for a perturbation in {type(model).__name__}: {found}; {remedy}"


def _compiled(model: nn.Module, what: str) -> str:
    return (
        f"no site for a perturbation in {type(model).__name__}: {what} was scripted, traced or exported, and computes "
        "the same whatever is attached; attach first, or give the model that it was made from (torch.compile may come "
        "before)"
    )


def _frozen_networks(model: nn.Module) -> list[str]:
    """Names of the outermost frozen parts that hold a convolution."""
    names: list[str] = []
    for name, part in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in names):
            continue
        if is_frozen(part) and any(isinstance(inner, CONVOLUTIONS) for inner in part.modules()):
            names.append(name)
    return names
