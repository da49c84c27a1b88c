"""The graph of a region as the rules read it: what each operation is, where it happens, how many channels it gives."""

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from mp_lightning.sites.activations import ACTIVATION_FUNCTIONS, ACTIVATION_METHODS, ACTIVATION_MODULES
from mp_lightning.sites.layout import FIRST, LAST, SEQUENCE
from mp_lightning.sites.recording import SHAPE
from mp_lightning.sites.tracing import CONVOLUTIONS, Region

NORMS = (
    *(nn.modules.batchnorm._BatchNorm, nn.GroupNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)
TOKEN_NORMS = (nn.LayerNorm, nn.RMSNorm)  # over the last dimension
LAYERS: tuple[type[nn.Module], ...] = (*CONVOLUTIONS, *NORMS, *TOKEN_NORMS, nn.Linear)
_DIMENSIONS: dict[type[nn.Module], int] = {
    **{nn.Conv1d: 3, nn.Conv2d: 4, nn.Conv3d: 5},
    **{nn.ConvTranspose1d: 3, nn.ConvTranspose2d: 4, nn.ConvTranspose3d: 5},
}
# What turns a tensor into the weights of a gate.
_SQUASHING_MODULES = (nn.Sigmoid, nn.Hardsigmoid, nn.Softmax, nn.Softmax2d)
_SQUASHING_FUNCTIONS = {torch.sigmoid, F.sigmoid, F.hardsigmoid, torch.softmax, F.softmax}
_SQUASHING_METHODS = {"sigmoid", "softmax"}
_TRANSPARENT_MODULES = (nn.Identity, nn.modules.dropout._DropoutNd)
_TRANSPARENT_NAMES = ("StochasticDepth", "DropPath")
_TRANSPARENT_FUNCTIONS = {F.dropout, F.dropout2d, F.alpha_dropout}
_TRANSPARENT_METHODS = {"contiguous", "clone", "to"}
_POOLS = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample, nn.ZeroPad2d),
)
_SAME_CHANNELS = {
    *(F.pad, F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d),
    *(F.interpolate, F.adaptive_avg_pool2d, torch.mul, operator.mul),
}
# By name: functions and methods that give as many dimensions as they take.
_SAME_DIMENSIONS = {
    *("add", "iadd", "add_", "sub", "mul", "imul", "mul_", "truediv", "cat", "permute", "transpose", "movedim", "roll"),
    *("contiguous", "clone", "to", "dropout", "pad", "relu", "gelu", "silu", "layer_norm", "linear", "interpolate"),
}
_MIXTURES = {"matmul", "bmm"}
_GIVES_SEVERAL = {"chunk", "split", "tensor_split", "unbind", "multi_head_attention_forward"}
_RESHAPES = {
    *("view", "reshape", "unsqueeze", "squeeze", "expand", "expand_as", "repeat", "permute", "transpose", "flatten"),
    *("truediv", "div", "div_", "mul", "imul", "mul_", "chunk", "split", "unbind", "getitem"),
}
_MIXING = {"linear", "conv1d", "conv2d", "conv3d", "matmul", "mm", "einsum"}
_NORMALIZE = {"layer_norm", "rms_norm"}
_SIZE_METHODS = {"size", "dim", "numel"}
_SIZE_ATTRIBUTES = {"shape", "ndim", "dtype", "device"}
_BOUNDED_FUNCTIONS = {F.relu6, F.hardtanh, F.hardtanh_}
_GLOBAL_POOLS = {F.adaptive_avg_pool2d, F.adaptive_max_pool2d}
_CHANNELS = (1, -3)  # the dimension of the channels in (B, C, H, W)


class OperationGraph:
    """The operations of one region, in order of execution."""

    def __init__(self, region: Region) -> None:
        self.region = region
        self._nodes = list(region.graph.nodes)
        self._modules = dict(region.module.named_modules())
        self._order = {node: index for index, node in enumerate(self._nodes)}
        self._ancestors: dict[fx.Node, set[fx.Node]] = {}
        for node in self._nodes:  # in order of execution, so that inputs come first
            inputs = node.all_input_nodes
            self._ancestors[node] = set(inputs).union(*(self._ancestors[i] for i in inputs))
        self._known_dimensions: dict[fx.Node, int | None] = {}
        self._known_layouts: dict[fx.Node, str] = {}
        self._known_batches: dict[fx.Node, int | None] = {}
        self._callers: dict[str, list[tuple[str, str]]] = {}
        self.left_out: list[str] = []

    def activations(self) -> list[fx.Node]:
        return [node for node in self._nodes if self._is_activation(node)]

    def name(self, node: fx.Node) -> str:
        """A readable name in the model."""
        return self.region.qualified(
            str(node.target) if node.op == "call_module" else f"{self._scope(node)[1]}:{node.name}"
        )

    def _pools(self, node: fx.Node) -> bool:
        if (node.op, node.target) in (("call_function", torch.mean), ("call_method", "mean")):
            dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
            # The mean over the channels belongs to a normalization.
            return not (dim in _CHANNELS or (isinstance(dim, list | tuple) and set(dim) <= set(_CHANNELS)))
        size = self._pooled_size(node)
        return size == 1 or (isinstance(size, list | tuple) and 1 in size)

    def _pooled_size(self, node: fx.Node) -> Any:
        """What an adaptive pool is asked for; None of any other operation."""
        if self._is_module(node, (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)):
            return self._modules[str(node.target)].output_size
        if node.op == "call_function" and node.target in _GLOBAL_POOLS:
            return node.args[1] if len(node.args) > 1 else node.kwargs.get("output_size")
        return None

    def _squashes(self, node: fx.Node) -> bool:
        return (
            self._is_module(node, _SQUASHING_MODULES)
            or (node.op == "call_function" and node.target in _SQUASHING_FUNCTIONS)
            or (node.op == "call_method" and node.target in _SQUASHING_METHODS)
        )

    def _is_tanh(self, node: fx.Node) -> bool:
        return self._is_module(node, nn.Tanh) or (node.op != "call_module" and name_of(node) == "tanh")

    def _stack(self, node: fx.Node) -> dict[str, str]:
        """The modules in whose forward the node happens, by the key of that very call: outermost first."""
        stack = {key: value[0] for key, value in (node.meta.get("nn_module_stack") or {}).items()}
        if node.op == "call_module" and stack:
            stack.pop(next(reversed(stack)))  # the module itself
        return {"": "", **stack}

    def _scope(self, node: fx.Node) -> tuple[str, str]:
        return list(self._stack(node).items())[-1]

    def _channels(self, node: fx.Node) -> int | None:
        """C of what an operation gives: read off its shape where that was recorded, else by the layers before it."""
        shape: tuple[int, ...] = node.meta.get(SHAPE, ())
        if len(shape) in (3, 4):  # five dimensions may be channels in groups, and not a volume
            return shape[-1 if self._layout(node) == LAST else 1]
        layer = self._layer(node)
        if isinstance(layer, CONVOLUTIONS):
            return layer.out_channels
        if isinstance(layer, nn.GroupNorm):
            return layer.num_channels
        if isinstance(layer, nn.modules.batchnorm._NormBase):
            return layer.num_features
        if isinstance(layer, nn.Linear):
            return layer.out_features
        if isinstance(layer, TOKEN_NORMS):
            return int(layer.normalized_shape[-1])
        inputs = node.all_input_nodes
        if node.op == "call_function" and node.target is torch.cat:
            dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
            parts = [self._channels(n) for n in inputs]
            if dim not in _CHANNELS:
                return parts[0]
            return None if None in parts else sum(part for part in parts if part is not None)
        if not self._keeps_channels(node):
            return None
        return next((channels for n in inputs if (channels := self._channels(n)) is not None), None)

    def _layout(self, node: fx.Node) -> str:
        """Where the channels are in what an operation gives: as the last layer before it wrote them, moved since."""
        if node not in self._known_layouts:
            self._known_layouts[node] = self._find_layout(node)
        return self._known_layouts[node]

    def _find_layout(self, node: fx.Node) -> str:
        layer = self._layer(node)
        if isinstance(layer, NORMS) and self._reads_features(node):
            return LAST
        if isinstance(layer, LAYERS) and not self._moves_around_norm(node):
            return LAST if isinstance(layer, (nn.Linear, *TOKEN_NORMS)) else FIRST
        inputs = node.all_input_nodes
        if not inputs:
            return FIRST
        before = self._values(node)
        layout, dimensions = self._layout(before), self._dimensions(before)
        order = _moved(node, dimensions)
        if order is None or dimensions is None:
            return layout
        position = order.index(1 if layout == FIRST else dimensions - 1)
        return FIRST if position == 1 else LAST if position == dimensions - 1 else layout

    def _layout_at(self, node: fx.Node) -> str:
        """The layout of a tensor that a site reads."""
        layout = self._layout(node)
        return SEQUENCE if layout == LAST and self._batch(node) == 1 and self._dimensions(node) in (3, None) else layout

    def _batch(self, node: fx.Node) -> int | None:
        """Which dimension of what an operation gives holds the images; None where it does not come from any image."""
        if not self._known_batches:
            for each in self._nodes:  # in order of execution, as a network may be deeper than Python's stack
                self._known_batches[each] = self._find_batch(each)
        return self._known_batches[node]

    def _find_batch(self, node: fx.Node) -> int | None:
        inputs = node.all_input_nodes
        if not inputs:
            return 0 if node.op == "placeholder" else None
        known = self._known_batches
        before = next((n for n in (self._values(node), *inputs) if known[n] is not None), None)
        batch = None if before is None else known[before]
        if before is None or batch is None:
            return None
        order = _moved(node, self._dimensions(before))
        if order is not None and batch in order:
            return order.index(batch)
        if name_of(node) in ("view", "reshape") and SHAPE in before.meta and SHAPE in node.meta:
            ahead, shape = math.prod(before.meta[SHAPE][:batch]), node.meta[SHAPE]
            return next((place for place in range(len(shape)) if math.prod(shape[:place]) == ahead), batch)
        return batch - _taken_before(node, before, batch)

    def _moves_around_norm(self, node: fx.Node) -> bool:
        """Whether the node is part of a normalization of channels that come first, but not the one that normalizes."""
        return node.op != "call_module" and self._is_layer(node, TOKEN_NORMS) and name_of(node) not in _NORMALIZE

    def _normalizes_maps(self, node: fx.Node) -> bool:
        """Whether the node is (the end of) a normalization of maps."""
        return self._is_layer(node, NORMS) or (self._is_layer(node, TOKEN_NORMS) and self._layout(node) == FIRST)

    def _values(self, node: fx.Node) -> fx.Node:
        """The tensor whose layout an operation keeps: where values are mixed by attention, that of the values."""
        inputs = node.all_input_nodes
        if name_of(node) in _MIXTURES and len(inputs) > 1:
            return inputs[0] if self._is_attention(inputs[1]) else inputs[1]
        return inputs[min(2, len(inputs) - 1)] if name_of(node) == "scaled_dot_product_attention" else inputs[0]

    def _is_attention(self, node: fx.Node) -> bool:
        """Whether the tensor holds weights of attention, perhaps dropped out or transposed."""
        while not self._squashes(node) and name_of(node) in _SAME_DIMENSIONS and node.all_input_nodes:
            node = node.all_input_nodes[0]
        return self._squashes(node)

    def _reads_features(self, node: fx.Node) -> bool:
        """Whether a normalization over samples and space gets a table (N, C), as of tokens one below the other."""
        source = self._source(self._first_of_layer(node))
        return self._dimensions(node) == 2 or (source is not None and self._is_layer(source, (nn.Linear,)))

    def _dimensions(self, node: object) -> int | None:
        """How many dimensions a tensor has, as far as its operations tell; None: they do not."""
        if not isinstance(node, fx.Node):
            return None
        if node not in self._known_dimensions:
            self._known_dimensions[node] = self._count_dimensions(node)
        return self._known_dimensions[node]

    def _count_dimensions(self, node: fx.Node) -> int | None:
        if SHAPE in node.meta:
            return len(node.meta[SHAPE])
        if node.op not in ("call_module", "call_function", "call_method"):
            return None
        layer = self._layer(node)
        if isinstance(layer, CONVOLUTIONS):
            return next((count for kind, count in _DIMENSIONS.items() if isinstance(layer, kind)), None)
        if self._is_module(node, nn.Flatten):
            assert isinstance(layer, nn.Flatten)
            return layer.start_dim + 1 if layer.start_dim >= 0 and layer.end_dim == -1 else None
        name = name_of(node)
        before = self._dimensions(node.args[0]) if node.args else None
        if node.op == "call_module":
            return None if self._is_module(node, (nn.Unflatten, nn.Unfold, nn.Fold)) else before
        rest = node.args[1:]
        if name in ("view", "reshape"):
            sizes = rest[0] if len(rest) == 1 else rest
            return len(sizes) if isinstance(sizes, list | tuple) else None
        if name == "flatten":
            start = rest[0] if rest else node.kwargs.get("start_dim", 0)
            return start + 1 if isinstance(start, int) and start >= 0 and len(rest) < 2 else None
        if name == "getitem" and before is not None:
            index = rest[0] if isinstance(rest[0], tuple) else (rest[0],)
            return before - sum(not isinstance(part, slice | type(Ellipsis)) for part in index)
        if name in ("mean", "sum", "amax") and before is not None:
            dim = rest[0] if rest else node.kwargs.get("dim")
            kept = node.kwargs.get("keepdim", rest[1] if len(rest) > 1 else False)
            if kept or dim is None:
                return before if kept else 0
            return before - (len(dim) if isinstance(dim, list | tuple) else 1)
        known = (self._dimensions(argument) for argument in node.all_input_nodes) if name in _SAME_DIMENSIONS else ()
        return max((count for count in known if count is not None), default=None)

    def _keeps_channels(self, node: fx.Node) -> bool:
        if node.op == "call_function" and node.target is F.pad:
            width = node.args[1] if len(node.args) > 1 else node.kwargs.get("pad")
            return isinstance(width, list | tuple) and len(width) <= 4  # more of them also pad the channels
        if node.op == "call_module" and self._is_module(node, _POOLS):
            return True
        sums = (operator.add, operator.iadd, torch.add)
        return (
            self._is_transparent(node)
            or self._is_activation(node)
            or (node.op == "call_function" and (node.target in _SAME_CHANNELS or node.target in sums))
            or (node.op == "call_method" and node.target in ("add", "add_", "mul", "mul_"))
        )

    def _layer(self, node: fx.Node) -> nn.Module | None:
        """The module that the node calls, or the convolution or norm, of a user's own class, that it is part of."""
        if node.op == "call_module":
            return self._modules[str(node.target)]
        owner = self._modules.get(self._scope(node)[1])
        return owner if isinstance(owner, LAYERS) else None

    def _is_layer(self, node: fx.Node, kinds: tuple[type, ...]) -> bool:
        return isinstance(self._layer(node), kinds)

    def _has_weights(self, node: fx.Node) -> bool:
        """Whether the node is of a layer, or of a module or function that mixes features as one does."""
        if node.op != "call_module":
            return self._is_layer(node, LAYERS) or name_of(node) in _MIXING
        return next(self._modules[str(node.target)].parameters(), None) is not None and not self._is_activation(node)

    def _is_norm_by_name(self, node: fx.Node) -> bool:
        """Whether the node is part of a normalization of the user's own, such as an RMSNorm, or of what replaces it."""
        owner = self._modules.get(str(node.target) if node.op == "call_module" else self._scope(node)[1])
        return any(word in type(owner).__name__.lower() for word in ("norm", "affine"))

    def _first_of_layer(self, node: fx.Node) -> fx.Node:
        """The first operation of the layer's call that the node is part of."""
        if node.op == "call_module":
            return node
        key = self._scope(node)[0]
        return next(n for n in self._nodes if n.op != "call_module" and self._scope(n)[0] == key and n.all_input_nodes)

    def _source(self, node: fx.Node) -> fx.Node | None:
        """What the node reads, through dropout and the like."""
        inputs = node.all_input_nodes
        if not inputs:
            return None
        return self._source(inputs[0]) if self._is_transparent(inputs[0]) else inputs[0]

    def _is_module(self, node: fx.Node, kinds: type | tuple[type, ...]) -> bool:
        return node.op == "call_module" and isinstance(self._modules[str(node.target)], kinds)

    def _is_activation(self, node: fx.Node) -> bool:
        return (
            self._is_module(node, ACTIVATION_MODULES)
            or (node.op == "call_function" and node.target in ACTIVATION_FUNCTIONS)
            or (node.op == "call_method" and node.target in ACTIVATION_METHODS)
        )

    def _is_bounded(self, node: fx.Node) -> bool:
        """Whether the node is an activation that ends at a number, as of a hard sigmoid."""
        return self._is_module(node, nn.Hardtanh) or (node.op == "call_function" and node.target in _BOUNDED_FUNCTIONS)

    def _is_transparent(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            module = self._modules[str(node.target)]
            return isinstance(module, _TRANSPARENT_MODULES) or type(module).__name__ in _TRANSPARENT_NAMES
        return (node.op == "call_function" and node.target in _TRANSPARENT_FUNCTIONS) or (
            node.op == "call_method" and node.target in _TRANSPARENT_METHODS
        )

    def _describe(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return self.region.qualified(str(node.target))
        return "the input" if node.op == "placeholder" else f"{node.name}"

    def _describe_source(self, node: fx.Node) -> str:
        source = self._source(node)
        return self._describe(source) if source is not None else "the input"


def name_of(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _moved(node: fx.Node, dimensions: int | None) -> list[int] | None:
    """For each dimension of what the operation gives, which one it was; None: as far as is known, none is moved."""
    if node.op == "call_module" or name_of(node) not in ("permute", "transpose", "swapaxes"):
        return None
    numbers = _numbers(node)
    if dimensions is None:
        if any(number < 0 for number in numbers):
            return None
        dimensions = len(numbers) if name_of(node) == "permute" else 1 + max(numbers, default=0)
    order = [number % dimensions for number in numbers]
    if name_of(node) == "permute":
        return order if sorted(order) == list(range(dimensions)) else None
    moved = list(range(dimensions))
    if len(order) == 2:
        moved[order[0]], moved[order[1]] = order[1], order[0]
    return moved


def _numbers(node: fx.Node) -> list[int]:
    """Those that a call gets beside its tensor, by themselves or as one list."""
    rest = [*node.args[1:], *node.kwargs.values()]
    given = rest[0] if len(rest) == 1 and isinstance(rest[0], list | tuple) else rest
    return [number for number in given if isinstance(number, int)]


def _taken_before(node: fx.Node, before: fx.Node, batch: int) -> int:
    """How many dimensions ahead of that of the batch are gone, as after 'q, k, v = qkv.permute(2, 0, 3, 1, 4)'."""
    if name_of(node) == "getitem" and before.op != "call_module" and name_of(before) not in _GIVES_SEVERAL:
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        return sum(isinstance(part, int) for part in index[:batch])
    if name_of(node) in ("unbind", "select", "squeeze"):
        return int((_numbers(node) or [0])[0] in range(batch))
    return 0


def reads_size(node: fx.Node) -> bool:
    """Whether the node gives how large a tensor is, or of what kind, and nothing of what is in it."""
    attribute = node.op == "call_function" and node.target is getattr and node.args[1] in _SIZE_ATTRIBUTES
    return attribute or (node.op == "call_method" and node.target in _SIZE_METHODS)


def readers(node: fx.Node) -> list[fx.Node]:
    """What uses the content of a tensor."""
    return [user for user in node.users if not reads_size(user)]


def is_product(node: fx.Node) -> bool:
    return (node.op == "call_function" and node.target in (operator.mul, operator.imul, torch.mul)) or (
        node.op == "call_method" and node.target in ("mul", "mul_")
    )


def is_sum(node: fx.Node) -> bool:
    return len(node.args) > 1 and (
        (node.op == "call_function" and node.target in (operator.add, operator.iadd, torch.add))
        or (node.op == "call_method" and node.target in ("add", "add_", "__add__"))
    )


def adds_a_number(node: fx.Node) -> bool:
    return len(node.all_input_nodes) == 1 and name_of(node) in ("add", "iadd", "add_") and len(node.args) == 2


def keeps_features(node: fx.Node) -> bool:
    """Whether the node gives one tensor, or a part of it, in another shape, or multiplied or divided by a number."""
    return len(node.all_input_nodes) == 1 and name_of(node) in _RESHAPES
