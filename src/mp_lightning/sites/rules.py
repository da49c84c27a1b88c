"""Which activations of a network are sites: rules on the graph of its operations.

The paper perturbs *before the last activation of every residual block*, not after the stem, and, in plain convolutional
networks, after the normalization and before the activation of every convolution. As rules on the graph of operations:

residual
    A sum of two paths from a common feature map, at least one of them with a convolution of its own, is a residual sum;
    so is one of tokens, where a path has a linear layer and a layer normalization. If all that follows the sum is an
    activation (dropout and the like aside), the site is the input of that activation. No residual sums are those of
    convolutions alone (several kernels, LoRA), which count as one, nor those of a map and what no map leads to but by
    a table, as in conditional batch norm.
pre-activation
    Otherwise the sum is the residual stream, which is never multiplied: the multiplier is about one half, and one half
    to the power of the depth would silence it. The site is the input of the last activation inside the branch: in
    transformers and ConvNeXt, of that between the two linear layers. A branch without one, such as attention, has no
    site. Gates of squeeze-and-excitation, which follow a global pooling, do not count, nor does what no input of the
    block leads to, such as a net that makes position biases.
end
    Where the residual stream is nowhere multiplied, the input of the network's last activation is a site as well, if
    it reads normalized maps and all residual sums lead to it: there the stream has ended. The paper has no such site;
    without it nothing that is perturbed would reach the classifier but through the stream.
plain
    In a model without any residual sum one of whose paths is a shortcut (free of activations), or where the sums give
    no other site than an end: every activation of a normalized convolution.
unnormalized
    In a model without normalized convolutions either: every activation of a convolution, but of that which gives the
    prediction.

Nowhere a site is what leads to nothing but weights that something else is multiplied by: the activations of attention
gates and of squeeze-and-excitation, and parts of an activation written by hand, as a hard sigmoid or Mish.
"""

from collections.abc import Callable
from itertools import pairwise

from torch import fx, nn

from mp_lightning.sites.in_place import InPlaceGraph
from mp_lightning.sites.maps import MapGraph
from mp_lightning.sites.operations import (
    NORMS,
    TOKEN_NORMS,
    adds_a_number,
    is_product,
    is_sum,
    keeps_features,
    readers,
)
from mp_lightning.sites.plan import SiteSpec
from mp_lightning.sites.tracing import CONVOLUTIONS

RESIDUAL = "residual: activation after the sum"
PRE_ACTIVATION = "pre-activation: last activation inside the branch"
END = "end: last activation, after all residual sums"
PLAIN = "plain: activation after a normalized convolution"
UNNORMALIZED = "plain: activation after a convolution"
NAMED = "named by the user"


class SiteGraph(MapGraph, InPlaceGraph):
    """The operations of one region, and those that the rules make sites of.

    The methods give them in the order of the graph.
    """

    def candidates(self) -> list[SiteSpec]:
        maps = filter(self._reads_map, self.activations())
        sites = [self._site(node, NAMED, f"output of {self._describe_source(node)}") for node in maps]
        return [site for site in sites if site is not None]

    def residual_sites(self) -> list[SiteSpec]:
        sites = []
        sums = [node for node in self._nodes if self._is_residual_sum(node) and self._reaches_output(node)]
        if not any(map(self._has_shortcut, sums)):
            return []  # branches side by side
        for node in sums:
            activation = self._activation_after(node)
            if activation is not None:
                site = self._site(activation, RESIDUAL, f"sum of {self._describe_inputs(node)}")
            else:
                inside = self._last_activation_inside(node)
                if inside is None:
                    continue
                activation = inside
                site = self._site(inside, PRE_ACTIVATION, f"output of {self._describe_source(inside)}")
            if site is not None:
                sites.append((self._order[activation], site))
        multiplied = any(site.rule == RESIDUAL for _, site in sites)
        end = None if multiplied else self._last_activation_after(set(sums))
        if end is not None and (site := self._site(end, END, f"output of {self._describe_source(end)}")) is not None:
            sites.append((self._order[end], site))
        return [site for _, site in sorted(sites, key=lambda pair: pair[0])]

    def _last_activation_after(self, sums: set[fx.Node]) -> fx.Node | None:
        """That of normalized maps, to which all residual sums lead; None where there are no sums."""
        found = [node for node in self.activations() if sums and sums <= self._ancestors[node]]
        maps = filter(self._reads_map, reversed(found))
        return next((node for node in maps if self._norm_before(node) is not None), None)

    def _reads_map(self, node: fx.Node) -> bool:
        return self._dimensions(node.all_input_nodes[0]) not in (1, 2)

    def _norm_before(self, node: fx.Node) -> fx.Node | None:
        norm = self._layer_before(node)
        return norm if norm is not None and self._normalizes_maps(norm) else None

    def _is_convolution(self, node: fx.Node | None) -> bool:
        return node is not None and (self._is_layer(node, CONVOLUTIONS) or self._sums_convolutions(node))

    def plain_sites(self) -> list[SiteSpec]:
        sites = []
        for node in self.activations():
            norm = self._norm_before(node)
            if norm is None or not self._reaches_output(node):
                continue
            if self._is_convolution(self._layer_before(self._first_of_layer(norm))):
                site = self._site(node, PLAIN, f"output of {self._describe(norm)}")
                if site:
                    sites.append(site)
        return sites

    def unnormalized_sites(self, whole: bool) -> list[SiteSpec]:
        """``whole``: nothing else of the model learns, so that what comes out is the prediction."""
        sources = ((node, self._layer_before(node)) for node in self.activations())
        sites = [
            self._site(node, UNNORMALIZED, f"output of {self._describe(source)}")
            for node, source in sources
            if source is not None and self._is_convolution(source)
            if not self._gives_prediction(node, whole) and self._reaches_output(node)
        ]
        return [site for site in sites if site is not None]

    def _gives_prediction(self, node: fx.Node, whole: bool) -> bool:
        """Whether no layer follows: a depth or a variance, and in a convolutional classifier the maps it pools."""
        later = [n for n in self._nodes if node in self._ancestors[n]]
        return (whole or any(self._pools(n) for n in later)) and not any(self._has_weights(n) for n in later)

    def _is_residual_sum(self, node: fx.Node) -> bool:
        if not self._sums_paths(node) or self._sums_convolutions(node):
            return False
        left, right = self._paths(node)
        tokens = self._sums_tokens(node, left | right)
        if any(self._is_flat(arg) for arg in node.args[:2] if isinstance(arg, fx.Node)) and not tokens:
            return False  # logits of two heads, not maps
        return tokens or any(self._is_layer(n, CONVOLUTIONS) for n in left | right)

    def _sums_paths(self, node: fx.Node) -> bool:
        """Whether the node adds two tensors that are made of the same feature map."""
        return is_sum(node) and all(isinstance(arg, fx.Node) for arg in node.args[:2]) and bool(self._origin(node))

    def _sums_convolutions(self, node: fx.Node) -> bool:
        """Whether the node adds convolutions of one map, as a layer of several kernels or with LoRA: it is one too."""
        return self._sums_paths(node) and all(
            any(self._is_layer(n, CONVOLUTIONS) for n in path)
            and not any(self._is_activation(n) or self._squashes(n) or self._is_layer(n, NORMS) for n in path)
            for path in self._paths(node)
        )

    def _has_shortcut(self, node: fx.Node) -> bool:
        """Whether a path of a residual sum is without activation."""
        return any(not any(map(self._is_activation, path)) for path in self._paths(node))

    def _sums_tokens(self, node: fx.Node, paths: set[fx.Node]) -> bool:
        """Whether the branch is a transformer's: a linear layer, and a normalization of tokens in it or after it."""
        dimensions = self._dimensions(node)
        if dimensions == 2:
            return False  # features of whole images
        norms = TOKEN_NORMS if dimensions is None else (*TOKEN_NORMS, *NORMS)
        normalized = any(self._is_layer(n, norms) or self._is_norm_by_name(n) for n in (*paths, *node.users))
        return normalized and any(self._is_layer(n, (nn.Linear,)) for n in paths)

    def _is_flat(self, node: fx.Node) -> bool:
        """Whether the node is the output of a linear layer, so no map, unless of tokens."""
        source: fx.Node | None = node
        while source is not None and (self._is_transparent(source) or self._is_activation(source)):
            source = self._source(source)
        return source is not None and self._is_module(source, nn.Linear)

    def _paths(self, node: fx.Node) -> tuple[set[fx.Node], set[fx.Node]]:
        """What each of the two summands has of its own."""
        a, b = (self._ancestors[arg] | {arg} for arg in node.args[:2] if isinstance(arg, fx.Node))
        return a - b, b - a

    def _origin(self, node: fx.Node) -> set[fx.Node]:
        """The feature maps that both summands are made of."""
        return set[fx.Node].intersection(*(self._maps[arg] for arg in node.args[:2] if isinstance(arg, fx.Node)))

    def _activation_after(self, node: fx.Node) -> fx.Node | None:
        users = readers(node)
        if len(users) != 1:
            return None
        if self._is_activation(users[0]):
            return users[0]
        return self._activation_after(users[0]) if self._is_transparent(users[0]) else None

    def _last_activation_inside(self, node: fx.Node) -> fx.Node | None:
        branch = set.union(*self._paths(node))
        origin = self._origin(node)
        candidates = [
            n for n in branch if self._is_activation(n) and self._maps[n] & origin and not self._is_gate(n, branch)
        ]
        return max(candidates, key=self._order.__getitem__, default=None)

    def _is_gate(self, node: fx.Node, branch: set[fx.Node]) -> bool:
        """Whether the node only computes weights: it follows a global pooling, or all it leads to is a sigmoid."""
        pooled = any(self._pools(n) for n in self._before(node, branch))
        return pooled or self.is_weights(node) or not self._leads_out(node, branch)

    def _before(self, node: fx.Node, branch: set[fx.Node]) -> set[fx.Node]:
        """What leads to the node without passing through a multiplication by a gate."""
        reached: set[fx.Node] = set()
        waiting = [n for n in node.all_input_nodes if n in branch]
        while waiting:
            current = waiting.pop()
            if current in reached or is_product(current):
                continue
            reached.add(current)
            waiting += [n for n in current.all_input_nodes if n in branch]
        return reached

    def _reaches_output(self, node: fx.Node) -> bool:
        """Whether some path from the node ends without being weights that something else is multiplied by."""
        return _leads(node, to=lambda n: not n.users or n.op == "output", past=self.is_weights)

    def is_weights(self, node: fx.Node) -> bool:
        """Whether a product follows the node at once, and it squashes what it reads, or is a hard sigmoid by hand.

        Or what it reads is the other factor, as in Mish by hand, ``x * tanh(softplus(x))``.
        """
        products = [n for n in self._followers(node) if is_product(n) and len(n.all_input_nodes) > 1]
        by_hand = self._is_bounded(node) and adds_a_number(node.all_input_nodes[0])
        own = self._is_activation(node) and any(node.all_input_nodes[0] in n.all_input_nodes for n in products)
        return own or (bool(products) and (by_hand or self._squashes(node)))

    def _followers(self, node: fx.Node) -> set[fx.Node]:
        """What reads the node, as it is or in another shape or scale, or its tanh."""
        found: set[fx.Node] = set()
        waiting = list(node.users)
        while waiting:
            current = waiting.pop()
            if current not in found:
                found.add(current)
                passed = keeps_features(current) or self._is_tanh(current)
                waiting += current.users if passed else ()
        return found

    def _leads_out(self, node: fx.Node, branch: set[fx.Node]) -> bool:
        """Whether some path from the node leaves the branch without a sigmoid on it."""
        return _leads(node, to=lambda n: n not in branch, past=self._squashes)

    def _site(self, node: fx.Node, rule: str, reads: str) -> SiteSpec | None:
        if not readers(node) or self._is_used_in_place(node):
            return None  # 'relu(x)' as a statement, or x used after it: what the site passes on would not be seen
        channels = self._channels(node.all_input_nodes[0])
        if not channels:  # of a lazy layer, 0
            self.left_out.append(self.name(node))
            return None
        key, scope = self._scope_of_site(node)
        if node.op == "call_module":
            earlier = [n for n in self._nodes if n.op == "call_module" and n.target == node.target]
            calls = 0
            call = sum(key in self._stack(n) for n in earlier[: earlier.index(node)])
            activation = self.region.qualified(str(node.target))
            # A module shared by several blocks is registered under one of them only.
            inside = not scope or str(node.target).startswith(f"{scope}.")
            name = activation if inside else f"{self.region.qualified(scope)}:{activation}"
        else:
            called = [n for n in self.activations() if key in self._stack(n)]
            call, calls = called.index(node), len(called)
            activation = None
            function = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "activation")
            name = f"{self.region.qualified(scope)}:{function}"
        layout = self._layout_at(node.all_input_nodes[0])
        return SiteSpec(name, self.region.qualified(scope), activation, call, channels, rule, reads, layout, calls)

    def _scope_of_site(self, node: fx.Node) -> tuple[str, str]:
        """The innermost module call that the node happens in, but no module that wraps an activation for many places.

        The calls of such a one cannot be told apart within itself.
        """
        stack = list(self._stack(node).items())
        while len(stack) > 1 and self._is_shared_wrapper(stack[-1][1]):
            stack.pop()
        return stack[-1]

    def _is_shared_wrapper(self, path: str) -> bool:
        """Whether a module without parameters is called in several others, or several times in one call of another."""
        if path not in self._callers:
            self._callers[path] = self._find_callers(path)
        callers = self._callers[path]
        shared = len({module for module, _ in callers}) > 1 or len({call for _, call in callers}) < len(callers)
        return shared and next(self._modules[path].parameters(), None) is None

    def _find_callers(self, path: str) -> list[tuple[str, str]]:
        """For each call of a module, the module that makes it, and the call of that one."""
        found: dict[str, tuple[str, str]] = {}
        for node in self._nodes:
            stack = list(self._stack(node).items())
            for (call, module), (key, own) in pairwise(stack):
                if own == path:
                    found[key] = (module, call)
        return list(found.values())

    def _describe_inputs(self, node: fx.Node) -> str:
        left, right = self._paths(node)
        names = []
        for arg, own in zip(node.args[:2], (left, right), strict=True):
            assert isinstance(arg, fx.Node)
            names.append(self._describe(arg) if any(self._is_layer(n, CONVOLUTIONS) for n in own) else "the shortcut")
        return " and ".join(names)


def _leads(node: fx.Node, to: Callable[[fx.Node], bool], past: Callable[[fx.Node], bool]) -> bool:
    """Whether some path from the node comes to one of these nodes, without going past one of those."""
    reached: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if to(current):
            return True
        if current not in reached and not past(current):
            reached.add(current)
            waiting += readers(current)
    return False
