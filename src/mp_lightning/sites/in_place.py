"""Activations that change their input in place: what else sees the change."""

from torch import fx, nn

from mp_lightning.sites.operations import OperationGraph, name_of, readers

# By name: functions and methods that may give their input, or a view of it, in evaluation.
_VIEWS = {
    *("view", "view_as", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "expand", "expand_as", "narrow"),
    *("permute", "transpose", "movedim", "swapaxes", "chunk", "split", "unbind", "getitem", "detach", "contiguous"),
    *("to", "dropout", "dropout2d", "alpha_dropout"),
}


class InPlaceGraph(OperationGraph):
    """The operations of one region, and which of them share their memory."""

    def _is_used_in_place(self, node: fx.Node) -> bool:
        """Whether the activation changes its input in place, and that is used again later, perhaps by another name."""
        if not self._acts_in_place(node):
            return False
        aliases = self._aliases(node.all_input_nodes[0])
        return any(self._order[user] > self._order[node] for alias in aliases for user in readers(alias))

    def _acts_in_place(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return bool(getattr(self._modules[str(node.target)], "inplace", False))
        flags = (*node.args[1:], node.kwargs.get("inplace"))
        return name_of(node).endswith("_") or any(flag is True for flag in flags)

    def _aliases(self, node: fx.Node) -> set[fx.Node]:
        """What may share its memory with the node in evaluation, itself included, but no part that lies beside it."""
        chain = [node]
        while self._is_view(chain[-1]) and chain[-1].all_input_nodes:
            chain.append(chain[-1].all_input_nodes[0])
        parts = {n.all_input_nodes[0] for n in chain if name_of(n) == "getitem"}
        found, waiting = set(chain), list(chain)
        while waiting:
            current = waiting.pop()
            views = set(filter(self._is_view, current.users)) - found
            if current in parts:
                views = {view for view in views if name_of(view) != "getitem"}
            waiting += views
            found |= views
        return found

    def _is_view(self, node: fx.Node) -> bool:
        """Whether the node may give its input, or a view of it."""
        if node.op == "call_module":
            return self._is_transparent(node) or self._is_module(node, (nn.Flatten, nn.Unflatten))
        return name_of(node) in _VIEWS
