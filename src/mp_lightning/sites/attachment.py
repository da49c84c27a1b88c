"""A perturbation at the sites of one model: what the sites share, and its state."""

import inspect
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, cast, get_args

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from mp_lightning.perturbation import FusedPerturbation, NoisePer, Perturbation, check_noise_per
from mp_lightning.perturbation.mathematics import bound
from mp_lightning.sites.arguments import check_one_of
from mp_lightning.sites.blocks import BY_PARTS, make_blocks, scopes_of, why_unreached
from mp_lightning.sites.copies import Origin
from mp_lightning.sites.estimates import Estimates, batch_norms
from mp_lightning.sites.height import InputHeight
from mp_lightning.sites.layout import height_of
from mp_lightning.sites.plan import SitePlan
from mp_lightning.sites.root import Entry, Inference, OneAtATime, entry_names, refuse_tracing
from mp_lightning.sites.saving import state_of, take_over
from mp_lightning.sites.site import Site, in_backward
from mp_lightning.sites.strength import GrowingStrength

NAME = "_metaperturb"  # the submodule that attach() adds

CLIP = 100.0
_CALL = nn.Module._call_impl.__code__  # of every forward that has hooks
PathName = Literal["auto", "reference"]  # how the perturbation is computed; the same function either way
PATHS: tuple[PathName, ...] = get_args(PathName)


class Attachment(GrowingStrength):
    """A perturbation at the sites of one model: what the sites share. Made by :func:`~mp_lightning.attach`.

    Attributes, beside those of :class:`~mp_lightning.sites.strength.GrowingStrength`:
        plan: the sites.
        phi_name: what the perturbation is called in messages.
        path: 'auto' takes the fast path wherever there is one, 'reference' the readable one always.
        inference: what wraps the model's forward in evaluation mode, if anything.
        sampling: draw noise in evaluation mode; otherwise use its expectation.
        estimates: batch norm and constants for inference in one forward, if there are any for the model's weights.
        trained_norms: the batch norms, by name, whose statistics training has moved; None before any training.
        folding: use the constants.
        observed: by site, the sum of the expected multipliers of each channel (C,) and of how many forwards, while
            constants are estimated.
        frozen: see :meth:`freeze`.
        perturbed: whether a site was reached in training.
        hooked: the parts of the model that have hooks, by name.
        persistent: its numbers are in the model's ``state_dict``.
        managed: made by the callback, which makes another where a part of the model was replaced.
        origin: which attachment this is a copy of.
        strays: how many blocks ran in evaluation mode outside of any forward of the model.
        trained_by_parts: a block ran in training outside of any forward of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: SitePlan,
        perturbation: Perturbation,
        *,
        phi_name: str,
        channel_norm: int,
        input_size: int | None,
        strength: float,
        full_strength_at: float,
        acts_below: float,
        seed: int,
        clip: float | None,
        synchronize: bool,
        persistent: bool,
        path: PathName = "auto",
        distributed: bool = True,
    ) -> None:
        super().__init__(strength, persistent, full_strength_at, acts_below)
        check_one_of(path, "path", PATHS)
        self.plan = plan
        self.perturbation = perturbation
        check_noise_per(self.noise_per)
        self.found_at: int | None = None  # height of the images for which the sites were looked for, if it was given
        self.phi_name = phi_name
        self.channel_norm = channel_norm
        self.seed = int(seed)
        self.clip = None if clip is None else float(clip)
        self.synchronize = synchronize
        self.path: PathName = path
        self._can_fuse = isinstance(perturbation, FusedPerturbation)
        self.distributed = distributed
        self.shard = self.rank_and_world()
        self.sampling = True
        self.inference: Inference | None = None
        self.estimates: Estimates | None = None
        self.trained_norms: set[str] | None = None
        self.observed: dict[str, tuple[Tensor, int]] | None = None
        self.folding = False
        self.on_detach: list[Callable[[], None]] = []
        self.perturbing = False
        self.depth = 0
        self.turn = OneAtATime()
        self.managed = False
        self.origin = Origin(self)
        self.strays = 0
        self._told_of_strays = False
        self.trained_by_parts = False
        self.perturbed = False
        self._looked = False
        self._norms: dict[str, _BatchNorm] | None = None
        self.persistent = persistent
        self.frozen = False
        self.training_forward = model.training  # whether the model's current forward is one of training
        self.with_gradients = False  # whether it began with autograd enabled
        self.height = InputHeight(input_size, persistent)
        for name, kept in {"forwards": persistent, "evaluations": False, "bound_hits": False}.items():
            self.register_buffer(name, torch.zeros((), dtype=torch.int64), persistent=kept)
        self.sites = nn.ModuleList(Site(spec, index, self, persistent) for index, spec in enumerate(plan))
        self.__dict__["_model"] = model
        self._blocks = make_blocks(self, model)
        self._entries = [Entry(self, name) for name in entry_names(model, plan)]
        self.hooked: dict[str, nn.Module] = {}
        self._handles = self._register(model)

    forwards: Tensor
    evaluations: Tensor
    bound_hits: Tensor

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        start = f"{prefix}sites."
        places = {key.removeprefix(start).split(".")[0] for key in state_dict if key.startswith(start)}
        if places and len(places) != len(self.sites):  # by their numbers, statistics would come to the wrong sites
            errors: list[str] = args[-1]
            errors.append(
                f"MetaPerturb is at {len(self.sites)} sites of this module and at {len(places)} of the one that was "
                "saved; give the sites of that one, such as self.perturb(sites=1) for all"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Any) -> Any:
        """The identity: containers such as ``nn.Sequential`` call every submodule, this one included."""
        refuse_tracing((x,))
        return x

    def step(self, loss: Tensor | float | None = None) -> None:
        """Count one training batch and move the ramp along.

        Then ``coeff = strength * reached * min(1, batches / ramp_steps)``, where ``reached`` is 1 but in a short run
        with a strength that follows the loss; and there ``coeff`` is that times :meth:`Fitting.factor`. Several
        processes that hold parts of one global batch must all call it; the mean of their losses counts.

        Args:
            loss: of the batch, a number, or a tensor whose mean counts.

        Raises:
            ConfigurationError: the length of the ramp is not known, or ``loss`` is no number.
        """
        self.settle()
        self.origin.copied = False
        if self.model.training:  # and not in a validation before the batch is counted
            self._note_norms()
        self.count(loss, *self.rank_and_world())
        if not self._looked:
            self._looked = True
            if self.rank_and_world()[0] == 0 and (self.trained_by_parts or not self.perturbed):
                why = BY_PARTS if self.perturbed else why_unreached(self)
                warnings.warn(f"MetaPerturb: {why}", stacklevel=2)

    def _note_norms(self) -> None:
        """Which batch norms move in this training; they may be frozen when they are re-estimated."""
        moving = {name for name, norm in self.batch_norms().items() if norm.training and norm.track_running_stats}
        self.trained_norms = (self.trained_norms or set()) | moving

    def begin_forward(self, training: bool, image: Tensor | None) -> None:
        """Called when a forward of the model begins."""
        if in_backward() or self.only_drawn(training):  # in backward, checkpointing computes this forward again
            return
        self.training_forward, self.with_gradients = training, torch.is_grad_enabled()
        if self.frozen:
            return
        if training:
            self.estimates = None  # of the weights before this step
            self.note_forward()
        else:
            self.origin.warn(self)
        self.shard = self.rank_and_world()  # now: a model may be attached before the processes know of each other
        (self.forwards if training else self.evaluations).add_(1)
        for block in self._blocks:
            block.begin_forward()
        if image is not None:
            self.height.note(float(height_of(image)), training)

    def only_drawn(self, training: bool) -> bool:
        """Whether a graph is traced for a logger to show, before or in training; noise would be a constant of it."""
        if torch.compiler.is_compiling() or not torch.jit.is_tracing():
            return False
        return training or int(self.steps) == 0 or (self.managed and self.inference is None)

    def forget_other_weights(self) -> None:
        """Drop what was estimated for weights that the model does not have any more.

        Raises:
            ConfigurationError: see :meth:`~mp_lightning.sites.estimates.Estimates.still_hold`.
        """
        if self.estimates is None or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return
        if not self.estimates.still_hold(self.model):
            self.estimates = None

    def look_again(self) -> None:
        """Compare the model's weights with those of the estimates at the next forward."""
        if self.estimates is not None:
            self.estimates.look_again()

    def _part_loaded(self, module: nn.Module, incompatible: Any) -> None:
        self.look_again()

    def begin_block(self, training: bool) -> None:
        """Called when the forward of a block begins. Outside of any forward of the model it counts as one by itself."""
        if self.depth == 0 and not self.frozen and not in_backward():
            self.strays += not training
            self.trained_by_parts |= training
            self.begin_forward(training, None)
            if (
                not training
                and self._expects_alone()
                and not self._told_of_strays
                and not torch.compiler.is_compiling()
            ):
                self._told_of_strays = True
                warnings.warn(
                    "MetaPerturb: blocks of the model were called one by one, in evaluation mode; they take the "
                    "expected noise, but batch norm as it was in training. Call the model as a whole",
                    stacklevel=2,
                )

    @property
    def draws(self) -> bool:
        """Whether noise is drawn in evaluation mode, by the block that runs now."""
        return self.sampling and not self._expects_alone()

    def _expects_alone(self) -> bool:
        """Whether no forward of the model is in progress, and inference takes the expected noise."""
        return self.depth == 0 and self.inference is not None and self.inference.expects

    def train(self, mode: bool = True) -> "Attachment":
        """As any module."""
        if not self._is_within_a_forward():
            self.settle()
        self._norms = None  # some may be others
        super().train(mode)
        self.look_again()
        if not mode:  # a compiled forward does not look
            self.forget_other_weights()
            self.look_again()
        return self

    def batch_norms(self) -> dict[str, _BatchNorm]:
        """Those of the model that have running statistics, by name, as of its last change of modes."""
        if self._norms is None:
            self._norms = batch_norms(self.model)
        return self._norms

    def _is_within_a_forward(self) -> bool:
        """Whether this is called by a forward of the model, which then goes on; other forwards have ended somehow."""
        if self.depth == 0 or torch.compiler.is_compiling():
            return False
        entries = {id(module) for module in self.entry_modules().values()}
        frame = inspect.currentframe()
        while frame is not None:
            if frame.f_code is _CALL and id(frame.f_locals.get("self")) in entries:
                return True
            frame = frame.f_back
        return False

    def settle(self) -> None:
        """Forget forwards that never ended, as after a keyboard interrupt. None may be in progress."""
        for entry in self._entries:
            entry.abandon()
        for block in self._blocks:
            block.abandon()
        self.depth = 0
        self.perturbing = False
        self.turn = OneAtATime()

    def bound(self) -> float | Tensor | None:
        """The upper bound of a perturbed feature map: none while nothing acts."""
        return self.clip if self.clip is None or self.frozen else bound(self.clip, self.coeff)

    def fused_for(self, x: Tensor) -> FusedPerturbation | None:
        """The perturbation, where it is to be computed for ``x`` by its fast path."""
        if self.path == "reference" or not self._can_fuse or self.observed is not None:
            return None
        fused = cast(FusedPerturbation, self.perturbation)
        return fused if fused.fuses(x) else None

    @property
    def noise_per(self) -> NoisePer:
        """What each number of the noise is drawn for: 'element', unless the perturbation says 'channel'."""
        noise_per: NoisePer = getattr(self.perturbation, "noise_per", "element")
        return noise_per

    @property
    def input_size(self) -> Tensor:
        """Height of the model's input in pixels, as a float32 tensor without dimensions; 0 while it is not known."""
        return self.height.pixels

    def detach(self) -> None:
        """Take the perturbation away; the model is as it was before :func:`attach`."""
        self.settle()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        while self.on_detach:
            self.on_detach.pop()()
        model = self.model
        if model._modules.get(NAME) is self:
            del model._modules[NAME]

    def all_sites(self) -> list[Site]:
        """In the order of the plan."""
        return [site for site in self.sites if isinstance(site, Site)]

    @property
    def model(self) -> nn.Module:
        """The module that the perturbation is attached to."""
        model: nn.Module = self.__dict__["_model"]
        return model

    def entry_modules(self) -> dict[str, nn.Module]:
        """The modules that may be called as 'the model', by name ('' is the model that was given)."""
        return {entry.name: self.model.get_submodule(entry.name) for entry in self._entries}

    def freeze(self, folding: bool) -> None:
        """Stay in one deterministic mode of evaluation for good: nothing is counted or measured any more.

        Args:
            folding: by the constants, which become a buffer of each site; otherwise by the expected noise.
        """
        estimates = self.estimates or Estimates({})
        for name, value in estimates.buffers.items():
            path, _, leaf = name.rpartition(".")
            buffers = self.model.get_submodule(path)._buffers
            own = buffers[leaf]
            assert own is not None
            buffers[leaf] = value.detach().clone().to(own)
        for site in self.all_sites():
            if folding and site.spec.name in (estimates.constants or {}):  # another may not be reached, or says so
                site.factor = site.factor_by_constants()
        self.estimates, self.inference = Estimates({}, estimates.constants), None
        self.clip = self.clip if float(self.coeff) > 0 else None
        self.sampling, self.folding, self.frozen = False, folding, True
        self.path = "reference"

    def state(self) -> dict[str, Any]:
        """Everything that a checkpoint needs, as tensors, dicts, lists, strings and numbers only."""
        return state_of(self)

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` gave, before or after the weights that belong to it are loaded.

        The length of the ramp, and the share of the strength that it reaches, are those of the state, too; call
        ``ramp_over`` or ``ramp_over_run`` after it where the training goes on for longer.

        Args:
            state: of an attachment at the same sites.

        Raises:
            SiteError: it was saved with other sites.
            ConfigurationError: it was saved with another kind of perturbation, or is no such state.
        """
        take_over(self, state)
        self.update_coeff()

    def rank_and_world(self) -> tuple[int, int]:
        """(rank, number of processes): where this process's samples stand in the global batch."""
        if self.distributed and torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1

    def _register(self, model: nn.Module) -> list[RemovableHandle]:
        handles: list[RemovableHandle] = [model.register_load_state_dict_post_hook(_weights_loaded)]
        self.hooked.update({entry.name: model.get_submodule(entry.name) for entry in self._entries})
        # Blocks first: inference may run a module again when its forward ends, and its block has to have ended by then.
        for scope, block in zip(scopes_of(self.plan), self._blocks, strict=True):
            self.hooked[scope] = model.get_submodule(scope)
            handles += block.register(self.hooked[scope])
        for entry in self._entries:
            handles += entry.register(self.hooked[entry.name])
            handles.append(self.hooked[entry.name].register_load_state_dict_post_hook(self._part_loaded))
        activations = {spec.activation for spec in self.plan if spec.activation is not None}
        self.hooked |= {name: model.get_submodule(name) for name in sorted(activations)}
        del self.hooked[""]  # the model itself
        self._keep_from_nesting(model)
        return handles

    def _keep_from_nesting(self, model: nn.Module) -> None:
        """In evaluation, torch's encoders pack what is padded into nested tensors, which layers with hooks refuse."""
        hooked = set(self.hooked.values())
        for part in model.modules():
            if isinstance(part, nn.TransformerEncoder) and part.use_nested_tensor and hooked & {*part.modules()}:
                part.use_nested_tensor = False
                self.on_detach.append(partial(setattr, part, "use_nested_tensor", True))

    def extra_repr(self) -> str:
        return f"{self.plan.size}, phi={self.phi_name!r}"


def _weights_loaded(module: nn.Module, incompatible: Any) -> None:
    """What was estimated for other weights is of no use with those that were loaded now."""
    attachment = module._modules.get(NAME)
    if not isinstance(attachment, Attachment) or attachment.estimates is None:
        return
    if not attachment.estimates.are_for(module):
        attachment.estimates = None
