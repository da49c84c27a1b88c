"""What a model computes, as a torch.fx graph, from one forward of tensors without content.

For models that torch.fx cannot trace by symbols, because they unpack shapes, build lists or look at types. An image
must be guessed; the forward computes shapes alone, so neither the size of the model nor its weights matter.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from mp_lightning.errors import one_line

SHAPE = "shape"  # key of a node's meta: of the tensor that it gives
_SIZES = (224, 64, 32, 128, 256, 384)  # sides of images, in pixels, that are tried
_KNOWN: ContextVar[int | None] = ContextVar("side of the images", default=None)
_OPERATORS = {"__getitem__": "getitem", "__iadd__": "add_", "__imul__": "mul_"}


class NoImageFits(Exception):
    """The forward took none of the images that were guessed."""


def record(module: nn.Module, leaf: Callable[[nn.Module, str], bool]) -> fx.Graph:
    """The operations of one forward in evaluation, each with the shape of what it gives.

    Args:
        module: takes one image (B, C, H, W), clip (B, C, D, H, W) or signal (B, C, L) by position.
        leaf: of a module and its name, whether it is one node of the graph.

    Raises:
        NoImageFits: the forward failed for every image that was guessed; the message is the first failure's.
    """
    return _first_that_fits(module, leaf)[1]


def shape_that_fits(module: nn.Module) -> tuple[int, ...]:
    """The shape (without the batch) of the first guessed image that the forward takes.

    Raises:
        NoImageFits: as :func:`record`.
    """
    return _first_that_fits(module, lambda part, name: False)[0][1:]


def _first_that_fits(module: nn.Module, leaf: Callable[[nn.Module, str], bool]) -> tuple[tuple[int, ...], fx.Graph]:
    reasons: list[str] = []
    failures: list[str] = []  # whole, as a message may name the size of the image at its end
    for shape in _images(module):
        try:
            return shape, _Recorder(module, leaf).run(shape)
        except Exception as error:  # user code that gets the wrong image raises anything
            reasons.append(f"{type(error).__name__}: {one_line(error, 100)}")
            failures.append(str(error))
            if len(failures) > 2 and len(set(failures[-3:])) == 1:
                break  # whatever it is, the size of the image has nothing to do with it
    raise NoImageFits(reasons[0] if reasons else "it has no convolution that would tell what it takes")


def in_channels(module: nn.Module) -> int:
    """The likeliest number of channels of the images that the module takes."""
    return next((shape[1] for shape in _images(module)), 3)


@contextmanager
def images_of(side: int | None) -> Iterator[None]:
    """Within this, images with so many pixels on a side are tried first; None: as outside of it."""
    token = _KNOWN.set(side or _KNOWN.get())
    try:
        yield
    finally:
        _KNOWN.reset(token)


def _images(module: nn.Module) -> Iterator[tuple[int, ...]]:
    """Shapes of the images that the module may take, the likeliest first."""
    convolution = next((m for m in module.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)), None)
    if convolution is None:
        return
    declared_channels, declared_sides = _declared(module)
    dimensions = len(convolution.kernel_size)
    known = [side for side in (_KNOWN.get(),) if side]
    sides = dict.fromkeys((*known, *declared_sides, *_SIZES))
    sizes = [(*([min(side, 16)] if dimensions == 3 else []), *[side] * min(dimensions, 2)) for side in sides]
    cubes = [(side, side, side) for side in sides] if dimensions == 3 else []
    for channels in dict.fromkeys((*declared_channels, convolution.in_channels, 3)):
        for size in (*sizes, *cubes):
            yield (2, channels, *size)


def _declared(module: nn.Module) -> tuple[list[int], list[int]]:
    """The channels and the side that the module says its images have, as timm, transformers and torchvision do."""
    settings = getattr(module, "pretrained_cfg", None)
    size = settings.get("input_size") if isinstance(settings, dict) else None
    size = list(size) if isinstance(size, list | tuple) and size else [None]
    owners = (getattr(module, "config", None), module)
    channels = [size[0], *(getattr(owner, "num_channels", None) for owner in owners)]
    sides = [size[-1], *(getattr(owner, "image_size", None) for owner in owners)]
    return [n for n in channels if isinstance(n, int)], [n for n in sides if isinstance(n, int)]


class _Recorder(TorchFunctionMode):
    """Writes down every call of a module that is a leaf, and of a torch function outside of those."""

    def __init__(self, module: nn.Module, leaf: Callable[[nn.Module, str], bool]) -> None:
        super().__init__()
        self._module = module
        self._leaf = leaf
        self._graph = fx.Graph()
        self._nodes: dict[int, fx.Node] = {}
        self._kept: list[Tensor] = []  # what an id stands for must stay alive
        self._stack: OrderedDict[str, tuple[str, type]] = OrderedDict()
        self._calls = 0
        self._within_leaf = 0

    def run(self, shape: tuple[int, ...]) -> fx.Graph:
        parameter = next(self._module.parameters())
        eager = torch.compiler.set_stance("force_eager")  # parts that are compiled, too
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), _in_silence(), eager, self._hooked():
            image = torch.empty(shape, device=parameter.device, dtype=parameter.dtype)
            self._know(image, self._graph.placeholder("image"))
            with self:
                output = self._module(image)
        self._graph.output(self._as_argument(output))
        return self._graph

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._within_leaf:
            return func(*args, **kwargs)
        inputs = self._as_argument(args), self._as_argument(kwargs)
        output = func(*args, **kwargs)
        if _holds_tensors(output):
            name = getattr(func, "__name__", "")
            if getattr(Tensor, name, None) is func or name in _OPERATORS:
                self._note("call_method", _OPERATORS.get(name, name), *inputs, output)
            else:
                self._note("call_function", func, *inputs, output)
        return output

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        handles: list[RemovableHandle] = []
        for name, part in self._module.named_modules():
            if part is not self._module:
                handles.append(part.register_forward_pre_hook(partial(self._begin, name)))
                handles.append(part.register_forward_hook(partial(self._end, name), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, name: str, module: nn.Module, args: Any) -> None:
        self._calls += 1
        if self._within_leaf:
            self._within_leaf += 1
            return
        self._stack[f"{name}@{self._calls}"] = (name, type(module))
        if self._leaf(module, name):
            self._within_leaf = 1

    def _end(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._within_leaf:
            self._within_leaf -= 1
            if self._within_leaf:
                return
            self._note("call_module", name, self._as_argument(args), self._as_argument(kwargs), output)
        self._stack.popitem()

    def _note(self, op: str, target: Any, args: Any, kwargs: Any, output: Any) -> None:
        node = self._graph.create_node(op, target, args, kwargs)
        node.meta["nn_module_stack"] = OrderedDict(self._stack)
        self._know(output, node)

    def _know(self, output: Any, node: fx.Node) -> None:
        if isinstance(output, Tensor):
            node.meta[SHAPE] = tuple(output.shape)
            self._nodes[id(output)] = node
            self._kept.append(output)
        elif isinstance(output, list | tuple):
            for index, part in enumerate(output):
                if _holds_tensors(part):
                    item = self._graph.call_method("getitem", (node, index))
                    item.meta["nn_module_stack"] = OrderedDict(self._stack)
                    self._know(part, item)
        elif isinstance(output, dict):
            self._know(list(output.values()), node)

    def _as_argument(self, value: Any) -> Any:
        """A call's argument as a graph holds it: nodes for tensors, and plain numbers; None for all else."""
        if isinstance(value, Tensor):
            known = self._nodes.get(id(value))
            return self._graph.create_node("get_attr", "constant") if known is None else known
        if isinstance(value, dict):
            return {str(key): self._as_argument(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return tuple(self._as_argument(part) for part in value)
        return value if isinstance(value, int | float | str | slice | type(Ellipsis)) else None


@contextmanager
def _in_silence() -> Iterator[None]:
    """A wrong guess is no error that anyone should read of."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_tensors, value.values()))
    return isinstance(value, Tensor) or (isinstance(value, list | tuple) and any(map(_holds_tensors, value)))
