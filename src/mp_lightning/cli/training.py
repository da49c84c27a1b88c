"""From the section ``trainer`` to a Lightning Trainer that meta-trains in a run folder."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console
from torch.utils.data import DataLoader

from mp_lightning.errors import ConfigurationError
from mp_lightning.meta.checkpoint import KeepCheckpoint, read_checkpoint
from mp_lightning.meta.module import JointMetaTraining
from mp_lightning.meta.progress import MetaTrainingBar
from mp_lightning.runs import RunFolder, RunFolderError

CHECKPOINTS = 20  # a run
TERMINATED = 143  # 128 + SIGTERM
_OWN = {
    "max_steps": "meta.steps sets the number of joint steps",
    "max_epochs": "meta.steps sets the number of joint steps",
    "callbacks": "fit adds its own",
    "barebones": "fit needs callbacks",
}
_PRECISIONS = ("32-true", "32", 32, "bf16-mixed")


def device_options(section: dict[str, Any]) -> dict[str, Any]:
    """The Trainer's arguments, limited to what meta-training on one device can do.

    Raises:
        ConfigurationError: an argument is out of that range.
    """
    for key, reason in _OWN.items():
        if key in section:
            raise ConfigurationError(f"trainer.{key} cannot be set: {reason}")
    devices = section.get("devices")
    one = devices in (1, "1", "auto") or (isinstance(devices, list) and len(devices) == 1)
    if isinstance(devices, bool) or not one or section.get("num_nodes", 1) != 1:
        key = "devices" if not one else "num_nodes"
        raise ConfigurationError(f"trainer.{key}={section[key]}: fit runs on one device; use trainer.{key}=1")
    if section.get("precision", "32-true") not in _PRECISIONS:
        raise ConfigurationError(
            f"trainer.precision={section['precision']} cannot be used; meta-training runs in 32-true or bf16-mixed"
        )
    return {**section, "devices": 1 if devices == "auto" else devices}


def meta_train(module: JointMetaTraining, options: dict[str, Any], folder: RunFolder, console: Console) -> torch.device:
    """Train ``module`` to its last step, from the folder's checkpoint if there is one; returns the device used.

    Raises:
        ConfigurationError: Lightning refuses the options.
        RunCheckpointError: the checkpoint is damaged or of another run.
        RunFolderError: training stopped before its last step.
        KeyboardInterrupt: the user stopped it.
    """
    steps = module.settings.steps
    callbacks: list[L.Callback] = [KeepCheckpoint(folder.checkpoints, every=max(1, steps // CHECKPOINTS))]
    if options.get("enable_progress_bar"):
        callbacks.append(MetaTrainingBar(console))
    try:
        trainer = L.Trainer(
            **{"default_root_dir": folder.path, "logger": False, **options},
            max_steps=steps,
            max_epochs=1,
            callbacks=callbacks,
        )
    # Lightning refuses with TypeError, ValueError, RuntimeError, ImportError and its own.
    except Exception as error:
        message = (
            str(error)
            .partition("\n")[0]
            .replace("Trainer.__init__() got an unexpected keyword argument", "no argument")
        )
        raise ConfigurationError(
            f"trainer: {message}; its keys are the arguments of lightning.pytorch.Trainer"
        ) from error
    checkpoint = folder.checkpoint()
    if checkpoint is not None:
        module.check_checkpoint(read_checkpoint(checkpoint))
    loader: DataLoader[Any] = DataLoader(range(steps), batch_size=None)  # type: ignore[arg-type]
    with _interruption(trainer):
        trainer.fit(module, loader, ckpt_path=checkpoint, weights_only=True)
    if module.meta_step < steps:
        raise RunFolderError(f"stopped after {module.meta_step} of {steps} meta-steps; the same command continues")
    return trainer.strategy.root_device


@contextlib.contextmanager
def _interruption(trainer: L.Trainer) -> Iterator[None]:
    """Lightning turns Ctrl-C into an exit with 1, and SIGTERM into one with 0; here they stay what they were."""
    try:
        yield
    except SIGTERMException as error:
        print("mp_lightning: terminated; the same command continues this run", file=sys.stderr)
        raise SystemExit(TERMINATED) from error
    except SystemExit as error:
        if trainer.interrupted:
            raise KeyboardInterrupt from error
        raise
