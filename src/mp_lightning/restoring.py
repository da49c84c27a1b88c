"""A trained module comes back from a checkpoint, in evaluation mode; a fit that follows finds it in its own modes."""

from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
from torch import nn

from mp_lightning.checkpoints import KEY, MARKER, CheckpointError, attach_state, read_checkpoint
from mp_lightning.errors import one_line
from mp_lightning.late_layers import overrides
from mp_lightning.sites import Attachment, attachment_of
from mp_lightning.sites.attachment import NAME

# Of modules that were put into evaluation mode, and not by their user.
_MODES_BEFORE: "WeakKeyDictionary[nn.Module, dict[str, bool]]" = WeakKeyDictionary()


def load_trained(model: pl.LightningModule, checkpoint: str | Path) -> tuple[Attachment, dict[str, Any]]:
    """Load the weights of a checkpoint, and attach the perturbation as it was saved.

    Returns:
        The attachment, and the inference that was declared, as arguments of ``MetaPerturbCallback``.

    Raises:
        CheckpointError: the file cannot be read, was made without MetaPerturb, or holds another model's weights.
        SiteError: the model does not have the sites of the checkpoint.
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "configure_model"):  # of Lightning's under either name
        what = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise CheckpointError(
            f"checkpoint '{checkpoint}' cannot be restored into {what}; give a LightningModule, freshly made"
        )
    content = read_checkpoint(checkpoint)
    state = content[KEY]
    content["state_dict"].pop(MARKER, None)
    if overrides(model, "configure_model"):
        model.configure_model()
    if attachment_of(model) is None:  # a module of its own at the sites, which the state holds as well
        weights = content["state_dict"]
        for name in [name for name in weights if NAME in name.split(".")]:
            del weights[name]
    model.on_load_checkpoint(content)  # which may choose other weights, such as averaged ones
    try:
        model.load_state_dict(content["state_dict"], strict=model.strict_loading)
    except RuntimeError as error:
        late = ", after its setup() where that makes its layers" if overrides(model, "setup") else ""
        raise CheckpointError(
            f"the weights of checkpoint '{checkpoint}' are not those of a {type(model).__name__}: "
            f"{one_line(error)}; give a module of the class that was trained{late}"
        ) from error
    return attach_state(model, state), state.get("inference", {})


def set_to_evaluation(model: nn.Module) -> None:
    """Into evaluation mode until :func:`set_back`."""
    _MODES_BEFORE[model] = {name: module.training for name, module in model.named_modules()}
    model.eval()


def set_back(model: nn.Module) -> None:
    """Each of its modules into the mode that it had, once, unless its user has called ``train()`` since."""
    modes = _MODES_BEFORE.pop(model, {})
    if model.training:
        return
    for name, module in model.named_modules():  # some may be gone, and others new
        module.training = modes.get(name, module.training)
