"""Find the sites of a model from what its forward computes; no data is needed and the model is left as it was.

The paper perturbs *before the last activation of every residual block*, not after the stem, and, in plain convolutional
networks, after the normalization and before the activation of every convolution. As rules on the graph of operations:

residual
    A sum of two paths with a common origin, at least one of them with a convolution of its own, is a residual sum. If
    all that follows the sum is an activation (dropout and the like aside), the site is the input of that activation.
pre-activation
    Otherwise the sum is the residual stream, which is never multiplied: the multiplier is about one half, and one half
    to the power of the depth would silence it. The site is the input of the last activation inside the branch. Gates
    of squeeze-and-excitation, which follow a global pooling, do not count.
plain
    In a model without any residual sum: every activation of a normalized convolution.
"""

import operator

import torch
import torch.nn.functional as F
from torch import fx, nn

from mp_lightning.errors import SiteError
from mp_lightning.sites.activations import ACTIVATION_FUNCTIONS, ACTIVATION_METHODS, ACTIVATION_MODULES
from mp_lightning.sites.plan import SitePlan, SiteSpec
from mp_lightning.sites.tracing import CONVOLUTIONS, Region, is_frozen, trace_regions

RESIDUAL = "residual: activation after the sum"
PRE_ACTIVATION = "pre-activation: last activation inside the branch"
PLAIN = "plain: activation after a normalized convolution"

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.InstanceNorm2d)
_TRANSPARENT_MODULES = (nn.Identity, nn.modules.dropout._DropoutNd)
_TRANSPARENT_NAMES = ("StochasticDepth", "DropPath")
_TRANSPARENT_FUNCTIONS = {F.dropout, F.dropout2d, F.alpha_dropout}
_TRANSPARENT_METHODS = {"contiguous", "clone"}
_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample, nn.ZeroPad2d)
_SAME_CHANNELS = {F.pad, F.max_pool2d, F.avg_pool2d, F.interpolate, F.adaptive_avg_pool2d, torch.mul, operator.mul}
_GLOBAL_POOLS = {F.adaptive_avg_pool2d, F.adaptive_max_pool2d, torch.mean}


def find_sites(model: nn.Module) -> SitePlan:
    """The sites of ``model``.

    Args:
        model: any module; of a LightningModule the networks inside are looked at. Frozen networks are left alone.

    Raises:
        SiteError: there is none; the message says what was found instead.
    """
    regions, failures = trace_regions(model)
    graphs = [_Graph(region) for region in regions]
    found = [site for graph in graphs for site in graph.residual_sites()]
    if not found:
        found = [site for graph in graphs for site in graph.plain_sites()]
    unique = {(site.scope, site.activation, site.call): site for site in reversed(found)}
    sites = [site for site in found if unique.get((site.scope, site.activation, site.call)) is site]
    if not sites:
        raise SiteError(_nothing_found(model, graphs, failures))
    return SitePlan(_with_unique_names(sites))


class _Graph:
    """The rules on one region."""

    def __init__(self, region: Region) -> None:
        self._region = region
        self._nodes = list(region.graph.nodes)
        self._modules = dict(region.module.named_modules())
        self._order = {node: index for index, node in enumerate(self._nodes)}
        self._ancestors: dict[fx.Node, set[fx.Node]] = {}
        for node in self._nodes:  # in order of execution, so that inputs come first
            inputs = node.all_input_nodes
            self._ancestors[node] = set(inputs).union(*(self._ancestors[i] for i in inputs))
        self.left_out: list[str] = []

    def residual_sites(self) -> list[SiteSpec]:
        sites = []
        for node in self._nodes:
            if self._is_residual_sum(node):
                activation = self._activation_after(node)
                if activation is not None:
                    site = self._site(activation, RESIDUAL, f"sum of {self._describe_inputs(node)}")
                else:
                    inside = self._last_activation_inside(node)
                    site = inside and self._site(inside, PRE_ACTIVATION, f"output of {self._describe_source(inside)}")
                if site:
                    sites.append((self._order[activation or inside], site))
        return [site for _, site in sorted(sites, key=lambda pair: pair[0])]

    def plain_sites(self) -> list[SiteSpec]:
        sites = []
        for node in self.activations():
            norm = self._source(node)
            if norm is not None and self._is_module(norm, _NORMS):
                convolution = self._source(norm)
                if convolution is not None and self._is_module(convolution, CONVOLUTIONS):
                    site = self._site(node, PLAIN, f"output of {self._describe(norm)}")
                    if site:
                        sites.append(site)
        return sites

    def activations(self) -> list[fx.Node]:
        return [node for node in self._nodes if self._is_activation(node)]

    def name(self, node: fx.Node) -> str:
        """A readable name in the model."""
        return self._region.qualified(self._scope(node)[1] + f":{node.name}") if node.op != "call_module" else (
            self._region.qualified(str(node.target))
        )

    def _is_residual_sum(self, node: fx.Node) -> bool:
        functions = node.op == "call_function" and node.target in (operator.add, operator.iadd, torch.add)
        methods = node.op == "call_method" and node.target in ("add", "add_", "__add__")
        if not (functions or methods) or len(node.args) < 2 or not all(isinstance(a, fx.Node) for a in node.args[:2]):
            return False
        left, right = self._paths(node)
        common = self._ancestors[node] - left - right
        return bool(common) and any(self._is_module(n, CONVOLUTIONS) for n in left | right)

    def _paths(self, node: fx.Node) -> tuple[set[fx.Node], set[fx.Node]]:
        """What each of the two summands has of its own."""
        a, b = (self._ancestors[arg] | {arg} for arg in node.args[:2] if isinstance(arg, fx.Node))
        return a - b, b - a

    def _activation_after(self, node: fx.Node) -> fx.Node | None:
        users = list(node.users)
        if len(users) != 1:
            return None
        if self._is_activation(users[0]):
            return users[0]
        return self._activation_after(users[0]) if self._is_transparent(users[0]) else None

    def _last_activation_inside(self, node: fx.Node) -> fx.Node | None:
        branch = set.union(*self._paths(node))
        candidates = [n for n in branch if self._is_activation(n) and not self._is_gate(n, branch)]
        return max(candidates, key=self._order.__getitem__, default=None)

    def _is_gate(self, node: fx.Node, branch: set[fx.Node]) -> bool:
        def pools(n: fx.Node) -> bool:
            return (
                self._is_module(n, (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d))
                or (n.op == "call_function" and n.target in _GLOBAL_POOLS)
                or (n.op == "call_method" and n.target == "mean")
            )

        return any(pools(n) for n in self._between(node, branch))

    def _between(self, node: fx.Node, branch: set[fx.Node]) -> set[fx.Node]:
        """What leads to the node without passing through a multiplication by a gate."""
        reached: set[fx.Node] = set()
        waiting = [n for n in node.all_input_nodes if n in branch]
        while waiting:
            current = waiting.pop()
            if current in reached or (current.op == "call_function" and current.target in (operator.mul, torch.mul)):
                continue
            reached.add(current)
            waiting += [n for n in current.all_input_nodes if n in branch]
        return reached

    def _site(self, node: fx.Node, rule: str, reads: str) -> SiteSpec | None:
        channels = self._channels(node.all_input_nodes[0])
        if channels is None:
            self.left_out.append(self.name(node))
            return None
        key, scope = self._scope(node)
        if node.op == "call_module":
            earlier = [n for n in self._nodes if n.op == "call_module" and n.target == node.target]
            call = sum(self._scope(n)[0] == key for n in earlier[: earlier.index(node)])
            activation = self._region.qualified(str(node.target))
            name = activation
        else:
            call = sum(key in self._stack(n) for n in self.activations() if self._order[n] < self._order[node])
            activation = None
            function = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "activation")
            name = f"{self._region.qualified(scope)}:{function}"
        return SiteSpec(name, self._region.qualified(scope), activation, call, channels, rule, reads)

    def _stack(self, node: fx.Node) -> dict[str, str]:
        """The modules in whose forward the node happens, by the key of that very call: outermost first."""
        stack = {key: value[0] for key, value in (node.meta.get("nn_module_stack") or {}).items()}
        if node.op == "call_module" and stack:
            stack.pop(next(reversed(stack)))  # the module itself
        return {"": "", **stack}

    def _scope(self, node: fx.Node) -> tuple[str, str]:
        return list(self._stack(node).items())[-1]

    def _channels(self, node: fx.Node) -> int | None:
        module = self._modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, CONVOLUTIONS):
            return module.out_channels
        if isinstance(module, nn.GroupNorm):
            return module.num_channels
        if isinstance(module, nn.modules.batchnorm._NormBase):
            return module.num_features
        inputs = node.all_input_nodes
        if node.op == "call_function" and node.target is torch.cat:
            parts = [self._channels(n) for n in inputs]
            return None if None in parts else sum(part for part in parts if part is not None)
        keeps = (
            self._is_transparent(node)
            or self._is_activation(node)
            or isinstance(module, _POOLS)
            or node.op == "call_function"
            and (node.target in _SAME_CHANNELS or node.target in (operator.add, operator.iadd, torch.add))
            or node.op == "call_method"
            and node.target in ("add", "add_", "mul", "mul_")
        )
        if not keeps:
            return None
        return next((channels for n in inputs if (channels := self._channels(n)) is not None), None)

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

    def _is_transparent(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            module = self._modules[str(node.target)]
            return isinstance(module, _TRANSPARENT_MODULES) or type(module).__name__ in _TRANSPARENT_NAMES
        return (node.op == "call_function" and node.target in _TRANSPARENT_FUNCTIONS) or (
            node.op == "call_method" and node.target in _TRANSPARENT_METHODS
        )

    def _describe(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return self._region.qualified(str(node.target))
        return "the input" if node.op == "placeholder" else f"{node.name}"

    def _describe_source(self, node: fx.Node) -> str:
        source = self._source(node)
        return self._describe(source) if source is not None else "the input"

    def _describe_inputs(self, node: fx.Node) -> str:
        left, right = self._paths(node)
        names = []
        for arg, own in zip(node.args[:2], (left, right), strict=True):
            assert isinstance(arg, fx.Node)
            names.append(self._describe(arg) if any(self._is_module(n, CONVOLUTIONS) for n in own) else "the shortcut")
        return " and ".join(names)


def _with_unique_names(sites: list[SiteSpec]) -> list[SiteSpec]:
    names = [site.name for site in sites]
    return [
        SiteSpec(**{**site.__dict__, "name": f"{site.name}#{site.call}"}) if names.count(site.name) > 1 else site
        for site in sites
    ]


def _nothing_found(model: nn.Module, graphs: list[_Graph], failures: list[str]) -> str:
    left_out = [reason for graph in graphs for reason in graph.left_out]
    seen = [graph.name(node) for graph in graphs for node in graph.activations()]
    if is_frozen(model):
        found = "all its parameters are frozen"
    elif not any(isinstance(part, CONVOLUTIONS) for part in model.modules()):
        found = "it has no 2-d convolution"
    elif left_out:
        found = f"what reaches these is no (B, C, H, W) map with a known number of channels: {', '.join(left_out[:5])}"
    elif seen:
        found = f"of its activations ({', '.join(seen[:5])}) none ends a residual block or follows a normalized convolution"
    elif failures:
        found = f"its forward cannot be followed: {', '.join(failures[:3])}"
    else:
        found = "its networks call no activation that can be seen"
    return f"no site for a perturbation in {type(model).__name__}: {found}; name the sites yourself with sites=SitePlan([...])"
