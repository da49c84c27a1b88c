"""What remains in a checkpoint: phi, the plan, the statistics, and a marker against loading weights without them."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mp_lightning.errors import ConfigurationError, SiteError, UserError
from mp_lightning.perturbation import NamedPhi, Phi
from mp_lightning.sites import Attachment, SitePlan, attach, attachment_of
from mp_lightning.sites.attachment import NAME
from mp_lightning.sites.recording import images_of
from mp_lightning.sites.saving import check_state
from mp_lightning.sites.surgery import attachment_to_train, detach_changed

KEY = "mp_lightning"
# A strict load of the plain weights fails and quotes this key, so the key is the message.
MARKER = (
    "this checkpoint was trained with MetaPerturb attached and needs it: load it with "
    "mp_lightning.MetaPerturbCallback.restore(model, checkpoint)"
)


_HOOKS = ("on_save_checkpoint", "on_load_checkpoint")


class CheckpointError(UserError):
    """A checkpoint cannot be read, or was not made with MetaPerturb."""


class CheckpointHooks:
    """Puts the state of the perturbation into every checkpoint of a LightningModule and takes it out again.

    It stands before the module's own ``on_save_checkpoint`` and ``on_load_checkpoint``, because Lightning calls those
    for weights-only files too, while it leaves out the callbacks.

    Args:
        module: the LightningModule.
        inference: the declared inference, kept for ``MetaPerturbCallback.restore``.
        marker: whether a plain strict load shall fail.
    """

    def __init__(self, module: nn.Module, inference: dict[str, Any], marker: bool) -> None:
        self._module = module
        self._inference = inference
        self._marker = marker
        self._replaced: dict[str, Callable[[dict[str, Any]], None]] = {}

    @classmethod
    def install(cls, module: nn.Module, inference: dict[str, Any], marker: bool) -> "CheckpointHooks":
        """Take the place of the module's hooks; where that was done before, only take over the settings."""
        installed = cls.of(module)
        if installed is not None:
            installed._inference, installed._marker = inference, marker
            return installed
        hooks = cls(module, inference, marker)
        for name in _HOOKS:
            if name in module.__dict__:
                hooks._replaced[name] = module.__dict__[name]
            setattr(module, name, getattr(hooks, name))
        return hooks

    @classmethod
    def of(cls, module: nn.Module) -> "CheckpointHooks | None":
        """Those of a module, if there are any."""
        owner = getattr(module.__dict__.get(_HOOKS[0]), "__self__", None)
        return owner if isinstance(owner, cls) else None

    def remove(self) -> None:
        """Give the place back."""
        for name in _HOOKS:
            if getattr(self._module.__dict__.get(name), "__self__", None) is self:
                del self._module.__dict__[name]
                if name in self._replaced:
                    setattr(self._module, name, self._replaced[name])

    def remove_with(self, attachment: Attachment) -> None:
        """Give the place back when ``attachment`` is detached."""
        if self.remove not in attachment.on_detach:
            attachment.on_detach.append(self.remove)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._own("on_save_checkpoint", checkpoint)
        attachment = attachment_of(self._module)
        if attachment is None:
            return
        checkpoint[KEY] = {
            **attachment.state(),
            "inference": self._inference,
            "module": _importable(self._module),
            "part": _path(self._module, attachment.model),
        }
        if self._marker and "state_dict" in checkpoint:
            # A copy, but one that keeps the versions of modules, which are an attribute of the dict.
            checkpoint["state_dict"] = copy.copy(checkpoint["state_dict"])
            checkpoint["state_dict"][MARKER] = torch.zeros(())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint.get("state_dict", {}).pop(MARKER, None)
        state = checkpoint.get(KEY)
        if state is not None:
            self.remove_with(attach_state(self._module, state))
            declared = {key: value for key, value in self._module.state_dict().items() if NAME in key.split(".")}
            if "state_dict" in checkpoint:  # of a module that did not declare it
                checkpoint["state_dict"] = {**declared, **checkpoint["state_dict"]}
        self._own("on_load_checkpoint", checkpoint)

    def _own(self, name: str, checkpoint: dict[str, Any]) -> None:
        if name in self._replaced:
            self._replaced[name](checkpoint)
        elif hasattr(type(self._module), name):  # a plain nn.Module has none
            getattr(type(self._module), name)(self._module, checkpoint)


def _path(module: nn.Module, part: nn.Module) -> str:
    """Name of a part, as it is without ``torch.compile``; '' for the module itself, and where it is no part of it."""
    name = next((name for name, each in module.named_modules() if each is part), "")
    return ".".join(piece for piece in name.split(".") if piece != "_orig_mod")


def _importable(module: nn.Module) -> str | None:
    """'package.module:Class' of a module, unless its class can only be found where it was trained."""
    cls = type(module)
    if cls.__module__ == "__main__" or "<locals>" in cls.__qualname__:
        return None
    return f"{cls.__module__}:{cls.__qualname__}"


def attach_state(model: nn.Module, state: dict[str, Any]) -> Attachment:
    """Attach, if need be, what a checkpoint holds, with its phi, plan and statistics.

    Args:
        model: that was trained.
        state: of :meth:`~mp_lightning.sites.attachment.Attachment.state`.

    Raises:
        ConfigurationError: it is no whole state, or of a perturbation that it does not hold and the model has not.
        SiteError: the model does not have its sites.
    """
    check_state(state)
    detach_changed(model)
    attachment = attachment_to_train(model)
    if attachment is None:
        if "phi" not in state or "perturbation" in state:  # that of a subclass may compute something else
            raise ConfigurationError(
                f"the checkpoint was made with perturbation '{state['phi_name']}', which it does not hold; attach it "
                "with attach(model, perturbation=...) first"
            )
        phi = NamedPhi(
            Phi(**state["phi"]),
            state["phi_name"],
            strength=state["strength"],
            noise_per=state["noise_per"],
            full_strength_at=state["fitting"]["full_strength_at"],
            acts_below=state["fitting"]["acts_below"],
        )
        part = model.get_submodule(state.get("part", ""))  # that was attached by hand
        attachment = _attach_at(part, phi, SitePlan.from_dict(state["plan"]), int(state["input_size"]))
        attachment.managed = True
    attachment.load_state(state)
    return attachment


def _attach_at(part: nn.Module, phi: NamedPhi, plan: SitePlan, input_size: int) -> Attachment:
    """At the sites of a plan, which were looked for in images of a usual height or of that of the training."""
    try:
        return attach(part, phi, sites=plan)
    except SiteError as error:
        try:
            with images_of(input_size):
                attachment = attach(part, phi, sites=plan)
        except SiteError:
            raise error from None
        attachment.found_at = input_size
        return attachment


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint file, read without unpickling code.

    Raises:
        CheckpointError: it is missing, damaged, or holds no state of MetaPerturb.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"checkpoint '{path}' does not exist; give the path of a file that a Trainer wrote"
        ) from error
    except Exception as error:  # torch raises many kinds for a damaged or foreign file
        blocked = re.search(r"Unsupported (?:global|class|operand)[^\n]*?([\w.]+\.[\w.]+)", str(error))
        if blocked:
            raise CheckpointError(
                f"checkpoint '{path}' holds a Python object ({blocked.group(1)}), which is not unpickled; keep it out "
                "of save_hyperparameters(), or allow it with torch.serialization.add_safe_globals"
            ) from error
        raise CheckpointError(
            f"checkpoint '{path}' cannot be read with weights_only=True; give an undamaged file that a Trainer wrote"
        ) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(KEY), dict) or "state_dict" not in checkpoint:
        raise CheckpointError(
            f"checkpoint '{path}' was made without MetaPerturb; load it as usual, without MetaPerturbCallback.restore"
        )
    return checkpoint
