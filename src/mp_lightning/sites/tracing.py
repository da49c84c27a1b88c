"""What a model computes, as torch.fx graphs, without running it."""

import copy
import functools
import inspect
import random
import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from mp_lightning.sites.recording import NoImageFits, record, shape_that_fits

_HOOKS = (
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
    *("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called"),
)
_AVERAGES = {"AveragedModel", "ModelEma", "ModelEmaV2", "ModelEmaV3"}  # of torch.optim.swa_utils and timm.utils
_OTHERS = {"torch", "timm", "torchmetrics"}
_MEMORY: ContextVar[dict[Any, Any] | None] = ContextVar("traced models", default=None)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Of torch.nn, but with activations of their own inside, which count like those of any other module.
_TRANSFORMERS = (
    *(nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder),
    *(nn.TransformerEncoderLayer, nn.TransformerDecoderLayer),
)


@dataclass(frozen=True)
class Region:
    """A part of the model whose forward could be traced as one graph.

    Attributes:
        prefix: its qualified name in the model ('' is the model itself).
        module: the part.
        graph: its operations; modules of torch.nn but for its transformers are single nodes, others are seen through.
    """

    prefix: str
    module: nn.Module
    graph: fx.Graph

    def qualified(self, name: str) -> str:
        """The name in the model of a submodule of the region."""
        return ".".join(part for part in (self.prefix, name) if part)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, _TRANSFORMERS):
            return False
        # torchvision's and others' stochastic depth draws random numbers while it is traced.
        return type(m).__name__ in ("StochasticDepth", "DropPath") or super().is_leaf_module(m, module_qualified_name)


def trace_regions(
    model: nn.Module, through_lightning: bool = False, prefix: str = ""
) -> tuple[list[Region], list[str]]:
    """Trace the model, or, where that is impossible, its parts.

    Left out are parts without convolutions, parts whose parameters are all frozen (teachers, perceptual losses),
    averaged weights (EMA teachers) and torchmetrics, and what is a part of another region under a second name. The
    forward of a LightningModule, which may do anything, is traced only on demand.

    Args:
        model: the model.
        through_lightning: trace a LightningModule's own forward, too.
        prefix: the name of the model in the one that it is a part of.

    Returns:
        The regions in order of registration, and what could not be traced, for messages.
    """
    key = ("traced", id(model), prefix, through_lightning)
    memory = _MEMORY.get()
    if memory is not None and key in memory:
        known: tuple[list[Region], list[str]] = memory[key]
        return known
    regions: list[Region] = []
    failures: list[str] = []
    _trace(model, prefix, through_lightning, regions, failures)
    inner = [{*region.module.modules()} - {region.module} for region in regions]
    regions = [region for region in regions if not any(region.module in parts for parts in inner)]
    if memory is not None:
        memory[key] = regions, failures
    return regions, failures


def _trace(module: nn.Module, prefix: str, through_lightning: bool, regions: list[Region], failures: list[str]) -> None:
    if not any(isinstance(part, CONVOLUTIONS) for part in module.modules()) or _is_left_alone(module):
        return
    children = list(module.named_children())
    if _is_traceable(module, through_lightning) and not _holds_other_networks(module):
        try:
            with _left_as_it_was(module) as copied:
                regions.append(Region(prefix, module, _Tracer().trace(copied, _defaults(copied))))
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
    key = ("recorded", id(module), prefix)
    memory = _MEMORY.get()
    if memory is None or key not in memory:
        with _left_as_it_was(module) as copied:
            region = Region(prefix, module, record(copied, _Tracer().is_leaf_module))
        if memory is None:
            return region
        memory[key] = region
    found: Region = memory[key]
    return found


def image_shape(module: nn.Module) -> tuple[int, ...]:
    """The shape of images that the module takes, without the batch: what it declares, or the first that was guessed.

    Raises:
        NoImageFits: its forward fails for every image that was tried.
    """
    with _left_as_it_was(module) as copied:
        return shape_that_fits(copied)


@contextmanager
def remembered() -> Iterator[None]:
    """Within this, a model is traced once however often it is asked for; it must not change."""
    token = _MEMORY.set({})
    try:
        yield
    finally:
        _MEMORY.reset(token)


def is_frozen(module: nn.Module) -> bool:
    """Whether the module has parameters and none of them is trained."""
    parameters = list(module.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


def _is_traceable(module: nn.Module, through_lightning: bool) -> bool:
    if not through_lightning and _is_lightning(module):
        return False
    return not isinstance(module, nn.ModuleList | nn.ModuleDict)


def _is_lightning(module: nn.Module) -> bool:
    return any(base.__name__ == "LightningModule" for base in type(module).__mro__)


def _holds_other_networks(module: nn.Module) -> bool:
    """Whether a part must be left out, so that the parts have to be looked at one by one."""
    with_convolutions = [c for c in module.children() if any(isinstance(m, CONVOLUTIONS) for m in c.modules())]
    if all(is_frozen(child) for child in with_convolutions) and not _is_lightning(module):
        return False  # one network, whose head alone is trained
    return any(_is_left_alone(child) and not isinstance(child, CONVOLUTIONS) for child in with_convolutions)


def _is_left_alone(module: nn.Module) -> bool:
    """Whether it is no network that is trained: frozen, a metric of torchmetrics, or averaged weights of another."""
    names = {base.__name__ for base in type(module).__mro__ if base.__module__.split(".")[0] in _OTHERS}
    return is_frozen(module) or not names.isdisjoint(_AVERAGES | {"Metric"})


def _defaults(module: nn.Module) -> dict[str, Any]:
    """Arguments of forward that have a default keep it, so that ``if mask is not None`` can be decided."""
    parameters = inspect.signature(module.forward).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


@contextmanager
def _left_as_it_was(module: nn.Module) -> Iterator[nn.Module]:
    """A copy to trace, with the parameters of the module itself, in the forward of evaluation and without hooks.

    In training, code such as ``if self.training and torch.rand(1) < p: return x`` would make the sites a matter of
    chance. Hooks, buffers, and whatever a forward keeps would get symbols, or tensors without content. A module that
    cannot be copied is traced itself, and its attributes are put back.
    """
    numpy: Any = sys.modules.get("numpy")  # where nothing has imported it, nothing draws by it
    numbers, arrays = random.getstate(), numpy and numpy.random.get_state()
    devices = list({p.device for p in module.parameters() if p.device.type == "cuda"})
    misses = {cache: cache.cache_info().misses for cache in _caches(module)}
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operation for a layer of a transformer, in evaluation alone
    try:
        copied = _copy(module)
        with torch.random.fork_rng(devices), nullcontext(copied) if copied is not module else _put_back(module):
            for part in copied.modules():
                part.__dict__["training"] = False
            yield copied
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        random.setstate(numbers)
        if numpy:
            numpy.random.set_state(arrays)
        for cache, before in misses.items():
            if cache.cache_info().misses != before:
                cache.cache_clear()  # of what tracing gave it: symbols, tensors without content


def _copy(module: nn.Module) -> nn.Module:
    shared: list[Any] = [*module.parameters()]
    # Of a LightningModule, what leads to everything else.
    shared += [
        part.__dict__[name] for part in module.modules() for name in ("_trainer", "_fabric") if name in vars(part)
    ]
    memo: dict[int, Any] = {id(value): value for value in shared}
    memo |= {id(hooks): OrderedDict() for part in module.modules() for hooks in map(part.__dict__.get, _HOOKS)}
    memo.pop(id(None), None)
    try:
        return copy.deepcopy(module, memo)
    except Exception:  # of many kinds, for locks, generators, tensors with a history
        return module


@contextmanager
def _put_back(module: nn.Module) -> Iterator[None]:
    saved = [(part, dict(part.__dict__), dict(part._buffers)) for part in module.modules()]
    contents = [(v, copy.copy(v)) for _, attributes, _ in saved for v in attributes.values() if type(v) is list]
    try:
        for part, _, _ in saved:
            for name in _HOOKS:
                part.__dict__[name] = OrderedDict()
        yield
    finally:
        for value, content in contents:
            value[:] = content
        for part, attributes, buffers in saved:
            part.__dict__.clear()
            part.__dict__.update(attributes)
            part._buffers.clear()
            part._buffers.update(buffers)


def _caches(module: nn.Module) -> list[Any]:
    """The functions that remember their results, in the module's classes and beside them."""
    classes = {kind for part in module.modules() for kind in type(part).__mro__}
    names = {kind.__module__ for kind in classes}
    places = [*map(vars, classes), *(vars(sys.modules[name]) for name in names if name in sys.modules)]
    wrapper = functools._lru_cache_wrapper
    return [value for place in places for value in list(place.values()) if isinstance(value, wrapper)]
