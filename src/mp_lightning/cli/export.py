"""``export``: write a trained model to a file that runs elsewhere."""

import inspect
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from omegaconf import DictConfig
from rich.markup import escape

from mp_lightning.backbones.anyone import find_object, make
from mp_lightning.callback import MetaPerturbCallback
from mp_lightning.checkpoints import KEY, read_checkpoint
from mp_lightning.cli.model_options import read_image, required
from mp_lightning.cli.options import check, check_choice, check_top_level
from mp_lightning.compare.console import make_console
from mp_lightning.errors import ConfigurationError
from mp_lightning.inference.exporting import SUFFIXES, ExportMode, export
from mp_lightning.sites import attachment_of
from mp_lightning.sites.recording import in_channels

_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_KEYS = ("command", "ckpt", "to", "mode", "model", "input")


@dataclass(frozen=True)
class Request:
    """What ``export`` reads from its configuration, checked."""

    checkpoint: Path
    to: Path
    mode: str | None
    model: str | None
    image: tuple[int, ...] | None


def read(config: DictConfig) -> Request:
    """The settings of a configuration.

    Raises:
        ConfigurationError: a key is unknown, or a value is missing or cannot be used; the message names it.
    """
    check_top_level(config, _KEYS)
    to = Path(os.path.expanduser(required(config, "to", "model.onnx")))
    if to.suffix not in SUFFIXES:
        raise ConfigurationError(f"to={to} cannot be used; give a file name that ends in {' or '.join(SUFFIXES)}")
    mode = check(config.mode, str | None, "mode")
    if mode == "mc":
        raise ConfigurationError("mode=mc cannot be exported, as it draws noise in every forward; use mean or fold")
    return Request(
        checkpoint=Path(os.path.expanduser(required(config, "ckpt", "trained.ckpt"))),
        to=to,
        mode=None if mode is None else check_choice(mode, ("mean", "fold"), "mode"),
        model=check(config.model, str | None, "model"),
        image=read_image(config.input),
    )


def run(config: DictConfig, path: Path) -> None:
    """Restore the model, write the file, and say how far its output is from the model's.

    Raises:
        CheckpointError: the checkpoint cannot be read, or is not that of this model.
        ConfigurationError: the model cannot be made or exported.
    """
    given = read(config)
    content = read_checkpoint(given.checkpoint)
    mode = given.mode or content[KEY]["inference"]["inference"]
    if mode == "mc":
        raise ConfigurationError(
            f"checkpoint '{given.checkpoint}' was trained with inference='mc', which draws noise in every forward and "
            "cannot be exported; train with inference='mean' or 'fold'"
        )
    model = MetaPerturbCallback.restore(_make(given.model, content), given.checkpoint)
    attachment = attachment_of(model)
    assert attachment is not None
    side = int(attachment.input_size)
    image = given.image or (in_channels(model), side, side)
    difference = export(model, given.to, torch.rand(2, *image), cast(ExportMode, mode))
    console = make_console()
    size = "x".join(map(str, image))
    checked = "not compared, as onnxruntime is not installed" if difference is None else f"{difference:.1e}"
    console.print(
        f"Written to [bold]{escape(str(given.to))}[/bold]: {escape(type(model).__name__)}, mode {mode}, any number "
        f"of images of {size}. Largest difference from the model's own output: {checked}"
    )


def _make(name: str | None, content: dict[str, Any]) -> L.LightningModule:
    """A fresh module of the class that was trained."""
    given = name is not None
    name = name or content[KEY].get("module")
    if name is None or (not given and not _is_dotted(name)):
        raise ConfigurationError(
            "the checkpoint does not say of which class the model is; name it with model=package.module:Class or "
            "model=file.py:Class"
        )
    try:
        found = find_object(name)
    except ConfigurationError as error:
        if given:
            raise
        what = str(error).rpartition("; ")[0]
        raise ConfigurationError(
            f"{what}; it is the class that was trained: name where it is now, with model=package.module:Class or "
            "model=file.py:Class"
        ) from error
    hyperparameters = dict(content.get("hyper_parameters") or {})
    if isinstance(found, type) and issubclass(found, L.LightningModule):
        hyperparameters = _accepted(found, hyperparameters)
    elif given and callable(found):
        hyperparameters = {}
    else:
        raise ConfigurationError(f"model={name} is no LightningModule; name the class that was trained")
    remedy = "call save_hyperparameters() in it, or name a function without arguments that makes it"
    return cast(L.LightningModule, make(name, found, hyperparameters, remedy))


def _is_dotted(name: object) -> bool:
    """A checkpoint may come from anywhere: a class by its dotted name is all that it may ask for, and no file."""
    return isinstance(name, str) and bool(_DOTTED.fullmatch(name)) and not name.partition(":")[0].endswith(".py")


def _accepted(cls: type, hyperparameters: dict[str, Any]) -> dict[str, Any]:
    """Those that the class takes."""
    parameters = inspect.signature(cls).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return hyperparameters
    return {key: value for key, value in hyperparameters.items() if key in parameters}
