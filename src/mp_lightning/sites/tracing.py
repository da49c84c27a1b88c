"""What a model computes, as torch.fx graphs, without running it."""

import copy
import inspect
import random
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from mp_lightning.sites.recording import NoImageFits, record

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Region:
    """A part of the model whose forward could be traced as one graph.

    Attributes:
        prefix: its qualified name in the model ('' is the model itself).
        module: the part.
        graph: its operations; modules of torch.nn are single nodes, all others are seen through.
    """

    prefix: str
    module: nn.Module
    graph: fx.Graph

    def qualified(self, name: str) -> str:
        """The name in the model of a submodule of the region."""
        return ".".join(part for part in (self.prefix, name) if part)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # torchvision's and others' stochastic depth draws random numbers while it is traced.
        return type(m).__name__ in ("StochasticDepth", "DropPath") or super().is_leaf_module(m, module_qualified_name)


def trace_regions(
    model: nn.Module, through_lightning: bool = False, prefix: str = ""
) -> tuple[list[Region], list[str]]:
    """Trace the model, or, where that is impossible, its parts.

    Left out are parts without convolutions, parts whose parameters are all frozen (teachers, perceptual losses) and
    torchmetrics. The forward of a LightningModule, which may do anything, is traced only on demand.

    Args:
        model: the model.
        through_lightning: trace a LightningModule's own forward, too.
        prefix: the name of the model in the one that it is a part of.

    Returns:
        The regions in order of registration, and what could not be traced, for messages.
    """
    regions: list[Region] = []
    failures: list[str] = []
    _trace(model, prefix, through_lightning, regions, failures)
    return regions, failures


def _trace(module: nn.Module, prefix: str, through_lightning: bool, regions: list[Region], failures: list[str]) -> None:
    if not any(isinstance(part, CONVOLUTIONS) for part in module.modules()) or _is_metric(module) or is_frozen(module):
        return
    children = list(module.named_children())
    if _is_traceable(module, through_lightning) and not _holds_other_networks(module):
        try:
            with _left_as_it_was(module):
                regions.append(Region(prefix, module, _Tracer().trace(module, _defaults(module))))
            return
        except Exception as error:  # user code that meets a proxy raises anything
            reason = str(error).strip().split("\n")[0][:100]
            failures.append(f"'{prefix or type(module).__name__}' ({type(error).__name__}: {reason})")
        try:
            regions.append(record_region(module, prefix))
            return
        except NoImageFits as error:
            failures.append(f"'{prefix or type(module).__name__}' ({error})")
    for name, child in children:
        _trace(child, f"{prefix}.{name}" if prefix else name, through_lightning, regions, failures)


def record_region(module: nn.Module, prefix: str) -> Region:
    """A part as one graph whose operations have shapes.

    Raises:
        NoImageFits: its forward fails for every image that was tried.
    """
    with _left_as_it_was(module):
        return Region(prefix, module, record(module, _Tracer().is_leaf_module))


def is_frozen(module: nn.Module) -> bool:
    """Whether the module has parameters and none of them is trained."""
    parameters = list(module.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


def _is_traceable(module: nn.Module, through_lightning: bool) -> bool:
    if not through_lightning and any(base.__name__ == "LightningModule" for base in type(module).__mro__):
        return False
    return not isinstance(module, nn.ModuleList | nn.ModuleDict)


def _holds_other_networks(module: nn.Module) -> bool:
    """Whether a part must be left out, so that the parts have to be looked at one by one."""
    with_convolutions = [c for c in module.children() if any(isinstance(m, CONVOLUTIONS) for m in c.modules())]
    return any(_is_metric(c) or (is_frozen(c) and not isinstance(c, CONVOLUTIONS)) for c in with_convolutions)


def _is_metric(module: nn.Module) -> bool:
    return any(b.__name__ == "Metric" and b.__module__.startswith("torchmetrics") for b in type(module).__mro__)


def _defaults(module: nn.Module) -> dict[str, Any]:
    """Arguments of forward that have a default keep it, so that ``if mask is not None`` can be decided."""
    parameters = inspect.signature(module.forward).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


@contextmanager
def _left_as_it_was(module: nn.Module) -> Iterator[None]:
    """Trace the forward of evaluation, without hooks, and undo what it stores on the module or draws.

    In training, code such as ``if self.training and torch.rand(1) < p: return x`` would make the sites a matter of
    chance. Hooks and attributes of the user would get symbols instead of tensors.
    """
    saved = [(part, dict(part.__dict__), dict(part._buffers)) for part in module.modules()]
    contents = [(v, copy.copy(v)) for _, attributes, _ in saved for v in attributes.values() if type(v) is list]
    numbers = random.getstate()
    try:
        for part, _, _ in saved:
            part.__dict__["training"] = False
            for hooks in ("_forward_hooks", "_forward_pre_hooks"):
                part.__dict__[hooks] = OrderedDict()
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(numbers)
        for value, content in contents:
            value[:] = content
        for part, attributes, buffers in saved:
            part.__dict__.clear()
            part.__dict__.update(attributes)
            part._buffers.clear()
            part._buffers.update(buffers)
