"""Which call of which activation is a site: the hooks that find it while the model runs.

Two mechanisms, because models write activations in two ways. An activation *module* gets a forward pre-hook that counts
its calls within the block. A *functional* activation is seen by a torch function mode that is active while its block
runs. All hooks are bound methods of plain objects, so that copies and pickles of a model hold hooks of their own.
"""

import warnings
from collections.abc import Callable
from itertools import islice
from traceback import walk_stack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils.hooks import RemovableHandle

from mp_lightning.errors import SiteError
from mp_lightning.sites.activations import ACTIVATION_FUNCTIONS
from mp_lightning.sites.root import refuse_graph, refuse_tracing
from mp_lightning.sites.site import Site, in_backward

if TYPE_CHECKING:
    from mp_lightning.sites.attachment import Attachment


_Changed = tuple[tuple[Any, ...], dict[str, Any]]


class Block:
    """One block (a module) and the sites reached during its forward.

    Args:
        attachment: what all sites share.
        module_sites: the activation modules with sites, each of which has them by index of its call within one forward
            of the block.
        functional_sites: the sites by index among all activation calls within one forward of the block.
    """

    def __init__(
        self, attachment: "Attachment", module_sites: list["ActivationModule"], functional_sites: dict[int, Site]
    ) -> None:
        self.attachment = attachment
        self.calls = 0  # forwards of this block within the current forward of the model
        self.training = False
        self.active = 0
        self._module_sites = module_sites
        self.functional_sites = functional_sites
        self._found = max((site.spec.calls for site in functional_sites.values()), default=0)
        self._modes: list[_ActivationMode] = []
        self._activations: dict[bool, tuple[int, ...]] = {}  # called in a forward of the block, in training and not
        self._told = False
        self.told_of_parts = False
        for activation in module_sites:
            activation.block = self

    def register(self, module: nn.Module) -> list[RemovableHandle]:
        """Hook the block's module and its activation modules."""
        handles = [
            module.register_forward_pre_hook(self.begin),
            module.register_forward_hook(self.end, always_call=True),
        ]
        return handles + [activation.register() for activation in self._module_sites]

    def begin(self, module: nn.Module, args: Any) -> None:
        refuse_tracing(args)
        self.attachment.begin_block(module.training)
        self.training = module.training
        self.active += 1
        for activation in self._module_sites:
            activation.seen = 0
        if self.functional_sites:
            mode = _ActivationMode(self)
            self._modes.append(mode)
            mode.__enter__()

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self.active:  # another pre-hook raised before ours
            return
        self.active -= 1
        self.calls += 1
        functional = 0
        if self.functional_sites:
            mode = self._modes.pop()
            mode.__exit__(None, None, None)
            functional = mode.seen
        if output is not None and not torch.compiler.is_compiling():
            self._note_activations(module, (functional, *(activation.seen for activation in self._module_sites)))

    def _note_activations(self, module: nn.Module, counts: tuple[int, ...]) -> None:
        """Sites are told by how many activations were called before them, which must not depend on mode or image."""
        self._activations[self.training] = counts
        as_found = self._found in (0, counts[0])
        if self._told or (as_found and len({*self._activations.values()}) < 2):
            return
        self._told = True
        sites = [self.functional_sites, *(activation.sites for activation in self._module_sites)]
        names = ", ".join(site.spec.name for by_call in sites for site in by_call.values())
        now, then = "in training", "in evaluation"
        remedy = ""
        if not as_found:
            now, then = now if self.training else then, "when its sites were found"
            remedy = "give the height of the images (input_size=), where it depends on that; "
        warnings.warn(
            f"MetaPerturb: {type(module).__name__} calls another number of activations {now} than {then}, so that "
            f"{names} may be another activation there; {remedy}put what is called in training alone, such as an "
            "auxiliary classifier, into a module of its own that is called last, or leave these sites out",
            stacklevel=2,
        )

    def abandon(self) -> None:
        """Forget forwards that will never end."""
        self.active = 0
        while self._modes and _get_current_function_mode() is self._modes[-1]:
            self._modes.pop().__exit__(None, None, None)
        self._modes.clear()

    def begin_forward(self) -> None:
        """Called when a forward of the model begins."""
        self.calls = 0
        for activation in self._module_sites:
            activation.calls_alone = 0

    def perturb(self, site: Site, x: Tensor, training: bool | None = None, call: int | None = None) -> Tensor:
        """The perturbed x. The activation functions that a perturbation uses by itself are not calls of the model.

        Args:
            site: of this block.
            x: as for the site.
            training: of the block; None for that of its forward in progress.
            call: how many times the site was reached before; None where that is the number of forwards of the block.
        """
        self.attachment.perturbing = True
        try:
            return site(x, self.calls if call is None else call, self.training if training is None else training)
        finally:
            self.attachment.perturbing = False


class ActivationModule:
    """An activation module of a block, whose inputs at some calls are sites.

    Args:
        module: the activation.
        sites: by index of its call within one forward of the block.
        single: no other block has it, and no other module does.
        alone: that, and the block is a container, which calls it once.
    """

    block: Block

    def __init__(self, module: nn.Module, sites: dict[int, Site], single: bool, alone: bool) -> None:
        self.seen = 0
        self.calls_alone = 0  # without the block, within the current forward of the model
        self._module = module
        self.sites = sites
        self._single = single
        self._alone = alone

    def register(self) -> RemovableHandle:
        return self._module.register_forward_pre_hook(self.before, with_kwargs=True)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "_Changed | None":
        if args:
            changed = self._changed(module, args)
            return None if changed is None else (changed, kwargs)
        names = [name for name, value in kwargs.items() if isinstance(value, Tensor)][:1]
        changed = self._changed(module, tuple(kwargs[name] for name in names)) if names else None
        return None if changed is None else ((), {**kwargs, names[0]: changed[0]})

    def _changed(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not self.block.active:
            if in_backward():
                return self._replay(args)
            if self._alone:  # 'for layer in net', net[:5], checkpoint_sequential
                return (self._perturb_alone(args[0], module.training), *args[1:])
            if self._single and self.block.attachment.depth == 0:
                self._pass_over(args)
            return None
        site = self.sites.get(self.seen)
        self.seen += 1
        return None if site is None else (self.block.perturb(site, args[0]), *args[1:])

    def _perturb_alone(self, x: Tensor, training: bool) -> Tensor:
        """As in a forward of the block, whose parts are called without it."""
        self.block.attachment.begin_block(training)
        self.calls_alone += 1
        return self.block.perturb(self.sites[0], x, training, self.calls_alone - 1)

    def _pass_over(self, args: tuple[Any, ...]) -> None:
        """Say that nothing is perturbed, as which call of the block this is cannot be known.

        Raises:
            SiteError: torch.fx traces the network, or runs what it has traced.
        """
        refuse_tracing(args)
        if torch.compiler.is_compiling():
            return
        if _called_by_a_graph():
            refuse_graph()
        if self.block.told_of_parts:
            return
        self.block.told_of_parts = True
        spec = next(iter(self.sites.values())).spec
        whole = f"self.{spec.scope}" if spec.scope else f"the {type(self.block.attachment.model).__name__}"
        warnings.warn(
            f"MetaPerturb: self.{spec.activation} was called outside of a forward of {whole}, as by features(x), and "
            "nothing is perturbed there; call the model as a whole, and take features by forward hooks of its layers",
            stacklevel=2,
        )

    def _replay(self, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """A block that checkpoints a part of itself computes that part again without being called."""
        for site in self.sites.values():
            past = site.recall_input(args[0])
            if past is not None:
                return (self.block.perturb(site, args[0], past.training), *args[1:])
        every = self._alone or (self._single and self.seen == len(self.sites))  # of its calls is a site
        for site in self.sites.values():
            site.refuse_unknown(every)
        return None


class _ActivationMode(TorchFunctionMode):
    """Counts activation calls, of functions and modules alike, and perturbs the input of those that are sites."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self._block = block
        self.seen = 0
        self._surroundings = None if torch.compiler.is_compiling() else _surroundings()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in ACTIVATION_FUNCTIONS and not self._block.attachment.perturbing and not self._is_in_a_graph():
            site = self._block.functional_sites.get(self.seen)
            self.seen += 1
            compiled = self._surroundings is None or torch.compiler.is_compiling()
            if site is not None and not compiled and self._surroundings != _surroundings():
                raise SiteError(
                    f"site '{site.spec.name}' is a functional activation that its block checkpoints by itself, and "
                    "would be missed when it is computed again; checkpoint the whole block, or make the activation a "
                    "module"
                )
            if site is not None and args:
                args = (self._block.perturb(site, args[0]), *args[1:])
            elif site is not None:
                kwargs = {**kwargs, "input": self._block.perturb(site, kwargs["input"])}
        return func(*args, **kwargs)

    def _is_in_a_graph(self) -> bool:
        """Whether a compiled graph of torch's own functions runs (``backend="eager"``), into which the sites went."""
        if self._surroundings is not None or torch.compiler.is_compiling():
            return False
        return _called_by_a_graph()


def _called_by_a_graph() -> bool:
    """Whether a graph of torch.fx called what runs, itself or by a function or module of torch."""
    frames = islice(walk_stack(None), 10)
    return any(frame.f_code.co_filename.startswith("<eval_with_key>") for frame, _ in frames)


def _surroundings() -> Any:
    """What activation checkpointing changes for the code that runs in it."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    checkpointed = hooks is not None and "_checkpoint_hook" in getattr(hooks[0], "__qualname__", "")
    return torch.is_grad_enabled(), id(hooks[0]) if checkpointed else None
