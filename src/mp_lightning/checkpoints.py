"""What remains in a checkpoint: phi, the plan, the statistics, and a marker against loading the weights without them."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from mp_lightning.errors import UserError
from mp_lightning.perturbation import NamedPhi, Phi
from mp_lightning.sites import Attachment, SitePlan, attach, attachment_of

KEY = "mp_lightning"
# A strict load of the plain weights fails and quotes this key, so the key is the message.
MARKER = (
    "this checkpoint was trained with MetaPerturb attached and needs it: load it with "
    "mp_lightning.MetaPerturbCallback.restore(model, checkpoint)"
)


class CheckpointError(UserError):
    """A checkpoint cannot be read, or was not made with MetaPerturb."""


class CheckpointHooks:
    """Puts the state of the perturbation into every checkpoint of a LightningModule and takes it out again.

    It stands before the module's own ``on_save_checkpoint`` and ``on_load_checkpoint``, because Lightning calls those
    for weights-only files too, while it leaves out the callbacks.

    Args:
        module: the LightningModule.
        inference: the declared inference, kept for :func:`restore`.
        marker: whether a plain strict load shall fail.
    """

    def __init__(self, module: nn.Module, inference: dict[str, Any], marker: bool) -> None:
        self._module = module
        self._inference = inference
        self._marker = marker

    def install(self) -> None:
        """Take the place of the module's hooks."""
        self._module.on_save_checkpoint = self.on_save_checkpoint
        self._module.on_load_checkpoint = self.on_load_checkpoint

    def remove(self) -> None:
        """Give the place back."""
        for name in ("on_save_checkpoint", "on_load_checkpoint"):
            self._module.__dict__.pop(name, None)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        type(self._module).on_save_checkpoint(self._module, checkpoint)  # type: ignore[operator]
        attachment = attachment_of(self._module)
        if attachment is None:
            return
        checkpoint[KEY] = {**attachment.state(), "inference": self._inference}
        if self._marker and "state_dict" in checkpoint:
            checkpoint["state_dict"] = {**checkpoint["state_dict"], MARKER: torch.zeros(())}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint.get("state_dict", {}).pop(MARKER, None)
        state = checkpoint.get(KEY)
        if state is not None:
            attach_state(self._module, state)
        type(self._module).on_load_checkpoint(self._module, checkpoint)  # type: ignore[operator]


def attach_state(model: nn.Module, state: dict[str, Any]) -> Attachment:
    """Attach, if need be, what a checkpoint holds, with its phi, plan and statistics."""
    attachment = attachment_of(model)
    if attachment is None:
        phi = NamedPhi(Phi(**state["phi"]), state["phi_name"])
        attachment = attach(model, phi, sites=SitePlan.from_dict(state["plan"]))
    attachment.load_state(state)
    return attachment


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint file, read without unpickling code.

    Raises:
        CheckpointError: it is missing, damaged, or holds no state of MetaPerturb.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint '{path}' does not exist; give the path of a file that a Trainer wrote") from error
    except Exception as error:  # torch raises many kinds for a damaged or foreign file
        raise CheckpointError(
            f"checkpoint '{path}' cannot be read with weights_only=True; give an undamaged file that a Trainer wrote"
        ) from error
    if not isinstance(checkpoint, dict) or KEY not in checkpoint:
        raise CheckpointError(
            f"checkpoint '{path}' was made without MetaPerturb; load it as usual, without MetaPerturbCallback.restore"
        )
    return checkpoint
