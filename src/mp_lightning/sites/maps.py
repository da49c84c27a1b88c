"""Which feature maps an operation gives a mixture of, to tell them from what only scales or shifts them."""

import torch.nn.functional as F
from torch import fx, nn

from mp_lightning.sites.operations import LAYERS, OperationGraph, is_product, is_sum, name_of, reads_size
from mp_lightning.sites.tracing import CONVOLUTIONS, Region


class MapGraph(OperationGraph):
    """The operations of one region, and the feature maps that each of them is made of.

    Sizes, parameters and tables are none. A table holds one number for each channel: it was pooled, looked up, or is
    spread out to scale or shift maps, as in frozen or conditional batch norm.
    """

    def __init__(self, region: Region) -> None:
        super().__init__(region)
        self._maps: dict[fx.Node, set[fx.Node]] = {}
        for node in self._nodes:
            self._maps[node] = self._find_maps(node)

    def _find_maps(self, node: fx.Node) -> set[fx.Node]:
        """Itself included."""
        if reads_size(node) or self._pools_all(node) or self._looks_up(node) or self._spreads(node):
            return set()
        before = set[fx.Node]().union(*(self._maps[i] for i in node.all_input_nodes))
        return before | {node} if before or node.op == "placeholder" or self._makes_map(node) else before

    def _pools_all(self, node: fx.Node) -> bool:
        """Whether the node pools over all of space, and not over one of its axes, which leaves a sequence."""
        if not self._pools(node):
            return False
        if name_of(node) == "mean":
            dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
            of_one = isinstance(dims, int) or (isinstance(dims, list | tuple) and len(dims) == 1)
            return not of_one or self._dimensions(node.all_input_nodes[0]) == 3
        size = self._pooled_size(node)
        return size == 1 or set(size) == {1}

    def _makes_map(self, node: fx.Node) -> bool:
        """Whether the node may make a map of a table: by a convolution of more than a pixel, or in another shape."""
        if node.op == "call_module":
            layer = self._layer(node)
            made = isinstance(layer, nn.Unflatten) or (isinstance(layer, CONVOLUTIONS) and max(layer.kernel_size) > 1)
        else:
            made = name_of(node) in ("view", "reshape") and len(_sizes(node)) > 3 and _sizes(node)[-1] != 1
        return made and any(n.op == "placeholder" for n in self._ancestors[node])

    def _looks_up(self, node: fx.Node) -> bool:
        return self._is_module(node, nn.Embedding) or (node.op == "call_function" and node.target is F.embedding)

    def _spreads(self, node: fx.Node) -> bool:
        """Whether the node gives what a layer made last dimensions of one, as in ``scale[:, :, None, None]``."""
        sizes = _sizes(node)
        spread = {
            "getitem": len(sizes) > 1 and sizes[-1] is None,
            "unsqueeze": sizes in ((-1,), (3,)),
            **dict.fromkeys(("view", "reshape"), len(sizes) > 2 and all(size == 1 for size in sizes[2:])),
        }
        layers = (*LAYERS, nn.Embedding)
        return spread.get(name_of(node), False) and any(self._is_layer(n, layers) for n in self._ancestors[node])

    def _layer_before(self, node: fx.Node) -> fx.Node | None:
        """What the node reads, through dropout and the like, and through what scales or shifts it by no other map."""
        source = self._source(node)
        while source is not None and (is_product(source) or is_sum(source)):
            maps = [n for n in source.all_input_nodes if self._maps[n]]
            if len(maps) != 1 or self._is_layer(source, LAYERS):
                break
            source = self._source(maps[0]) if self._is_transparent(maps[0]) else maps[0]
        return source


def _sizes(node: fx.Node) -> tuple[object, ...]:
    """The arguments of an operation behind its tensor, given one by one or as one tuple."""
    rest = node.args[1:]
    return tuple(rest[0]) if len(rest) == 1 and isinstance(rest[0], list | tuple) else rest
