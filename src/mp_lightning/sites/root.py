"""The forwards of the model: when one begins and ends, and what may be wrapped around it in evaluation."""

import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from mp_lightning.errors import ConfigurationError, SiteError
from mp_lightning.sites.hooked import check_there
from mp_lightning.sites.plan import SitePlan
from mp_lightning.sites.site import in_backward
from mp_lightning.sites.tracing import CONVOLUTIONS

if TYPE_CHECKING:
    from mp_lightning.sites.attachment import Attachment


_DETOUR = "_ForwardRedirection"  # of Lightning's strategies


class Inference(Protocol):
    """What happens around one forward of the model in evaluation mode.

    Attributes:
        expects: take the expected noise, also in blocks that run outside of any forward of the model.
    """

    expects: bool

    def begin(self, attachment: "Attachment", args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Called before the forward, with its arguments."""
        ...

    def finish(self, attachment: "Attachment", module: nn.Module, output: Any) -> Any:
        """Called after the forward of ``module``, also when it raised (then ``output`` is None); returns the output."""
        ...


class OneAtATime:
    """Lets one thread at a time through the forwards of a model, which share what is known of them."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        return (OneAtATime, ())  # a copy has its own

    def take(self) -> bool:
        """Wait for one's turn; False where there is none to be taken.

        Activation checkpointing computes forwards again in threads of autograd, which a forward may be waiting for.
        """
        if torch.compiler.is_compiling() or in_backward():
            return False
        return self._lock.acquire()

    def give_back(self, taken: bool) -> None:
        """Let others go on; nothing where another thread took the turn, of a forward that never ended."""
        if taken:
            with suppress(RuntimeError):
                self._lock.release()


class Entry:
    """Counts the forwards of a module that users may call as 'the model'.

    Which one they call is not known beforehand: ``model(x)``, or, in a LightningModule, ``self.net(x)``. So the module
    that was given and the networks in it are all watched; the outermost forward in progress counts.
    """

    def __init__(self, attachment: "Attachment", name: str) -> None:
        self.name = name
        self._attachment = attachment
        # Forwards of this module in progress: does each count as a forward of the model, and what is wrapped around it,
        # and has it taken its turn?
        self._stack: list[tuple[bool, Inference | None, bool]] = []

    def register(self, module: nn.Module) -> list[RemovableHandle]:
        return [
            module.register_forward_pre_hook(self.enter, with_kwargs=True, prepend=True),
            module.register_forward_hook(self.leave, with_kwargs=True, always_call=True),
        ]

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        attachment = self._attachment
        taken = attachment.turn.take()
        # A strategy's detour to training_step is not a forward of the model.
        detour = "forward" in module.__dict__ and _DETOUR in getattr(module.forward, "__qualname__", "")
        outermost = not detour and attachment.depth == 0
        plain = module.training or attachment.only_drawn(module.training)
        inference = attachment.inference if outermost and not plain else None
        self._stack.append((outermost, None, taken))
        if not outermost:
            return
        attachment.depth += 1
        refuse_tracing(args)
        if not torch.compiler.is_compiling():
            check_there(attachment.model, attachment.hooked)
        attachment.begin_forward(module.training, first_image((*args, *kwargs.values())))
        if inference is not None:
            if isinstance(inference, type) or not hasattr(inference, "begin"):  # a class, a name
                raise ConfigurationError(
                    f"attachment.inference is {inference!r}; give an object, such as mp_lightning.Mean() or "
                    "mp_lightning.MonteCarlo(samples=20)"
                )
            inference.begin(attachment, args, kwargs)
            self._stack[-1] = (outermost, inference, taken)  # now that it began, it is to be finished

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        attachment = self._attachment
        if not self._stack:  # another pre-hook raised before ours
            return None
        outermost, inference, taken = self._stack.pop()
        try:
            if not outermost:
                return None
            attachment.depth -= 1
            return None if inference is None else inference.finish(attachment, module, output)
        finally:
            attachment.turn.give_back(taken)

    def abandon(self) -> None:
        """Forget forwards that will never end."""
        while self._stack:
            _, inference, taken = self._stack.pop()
            if inference is not None:
                inference.finish(self._attachment, self._attachment.model, None)
            self._attachment.turn.give_back(taken)


def refuse_tracing(args: tuple[Any, ...]) -> None:
    """A graph of torch.fx would hold the network without its perturbation.

    Raises:
        SiteError: the arguments are those of a symbolic trace.
    """
    if not torch.compiler.is_compiling() and any(isinstance(value, fx.Proxy) for value in args):
        refuse_graph()


def refuse_graph() -> None:
    """Of torch.fx.

    Raises:
        SiteError: always.
    """
    raise SiteError(
        "torch.fx traces this network, as a feature extractor does, and would leave its perturbation out; take "
        "features by forward hooks of its layers while it is called as a whole, or detach the perturbation first "
        "where they are to be those of the plain network"
    )


def entry_names(model: nn.Module, plan: SitePlan) -> list[str]:
    """The model itself ('') and its outermost submodules with a forward of their own that hold the sites.

    A network may be held under several names, as by itself and in an ``nn.Sequential`` with its head; each counts. Of a
    model that is a network, and no holder of networks, the later stages are none: they are given feature maps.
    """
    scopes = {id(model.get_submodule(spec.scope)) for spec in plan}
    names = {id(model): ""}
    for scope, module in model.named_modules(remove_duplicate=False):
        path = scope.split(".") if scope and id(module) in scopes else []
        for length in range(1, len(path) + 1):
            outer = model.get_submodule(name := ".".join(path[:length]))
            if not isinstance(outer, nn.ModuleList | nn.ModuleDict):
                if _holds_networks(model) or _begins_with(model, outer):
                    names.setdefault(id(outer), name)
                break
    return sorted(names.values())


def _holds_networks(model: nn.Module) -> bool:
    """Whether others than its own forward call its parts: a LightningModule, or a module without a forward."""
    return hasattr(model, "training_step") or type(model).forward is nn.Module.forward


def _begins_with(model: nn.Module, part: nn.Module) -> bool:
    """Whether no convolution that learns, which would give this part feature maps, is registered before it."""
    layers = (m for m in model.modules() if isinstance(m, CONVOLUTIONS))
    first = next((m for m in layers if any(p.requires_grad for p in m.parameters())), None)
    return first is None or any(m is first for m in part.modules())


def layer_beside(model: nn.Module, network: nn.Module) -> str | None:
    """Name of a layer of the model that is trained and no part of this network in it; None where there is none."""
    own = {*network.parameters()}
    parameters = ((name, p) for name, p in model.named_parameters() if p.requires_grad and p.dim() > 1)
    name = next((name for name, parameter in parameters if parameter not in own), None)
    return None if name is None else name.rpartition(".")[0] or name


def first_image(values: tuple[Any, ...]) -> Tensor | None:
    """The first image among a forward's arguments: (B, C, H, W), or, where there is none, a clip or a signal.

    A tensor (B, C, 1, 1) is none, but the code that a generator makes an image of. Lists and dictionaries are looked
    into where no argument is an image itself; in a list an image may be by itself, (C, H, W), as detectors take them.
    """
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    signals = [value for value in tensors if value.dim() == 3 and value.is_floating_point()]
    images = [value for dim in (4, 5) for value in tensors if value.dim() == dim and value.shape[2:].numel() > 1]
    if images or signals:
        return (images or signals)[0]
    inside = [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]
    batches = (value for value in inside if value.dim() in (4, 5) and value.shape[2:].numel() > 1)
    single = (value[None] for value in inside if value.dim() == 3 and value.is_floating_point() and len(value) <= 4)
    return next(batches, None) if any(value.dim() in (4, 5) for value in inside) else next(single, None)
