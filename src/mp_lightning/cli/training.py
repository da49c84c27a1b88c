"""From the section ``trainer`` to a Lightning Trainer that meta-trains in a run folder."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console
from torch.utils.data import DataLoader

from mp_lightning.cli.interruption import TERMINATED
from mp_lightning.cli.options import check, check_choice
from mp_lightning.cli.output import error_line
from mp_lightning.errors import ConfigurationError
from mp_lightning.meta import strategy
from mp_lightning.meta.checkpoint import KeepCheckpoint, WholeFiles, newest_readable
from mp_lightning.meta.history import rows_every
from mp_lightning.meta.module import JointMetaTraining
from mp_lightning.meta.progress import MetaTrainingBar
from mp_lightning.runs import RunFolder, RunFolderError

CHECKPOINTS = 20  # a run
_OWN = {
    "max_steps": "meta.steps sets the number of joint steps",
    "max_epochs": "meta.steps sets the number of joint steps",
    "fast_dev_run": "a run keeps checkpoints and is judged; for a trial give meta.steps=2 evaluation.steps=2",
    "overfit_batches": "each task draws its own batches; tasks.train_per_class limits its images",
    "callbacks": "fit adds its own",
    "barebones": "fit needs callbacks",
    "logger": "choose one with logger=",
    "plugins": "fit adds its own",
    "enable_checkpointing": "fit continues from its checkpoints",
    "gradient_clip_val": "a joint step is not clipped; lower meta.lr",
    "gradient_clip_algorithm": "a joint step is not clipped; lower meta.lr",
    "accumulate_grad_batches": "a joint step is one of all tasks; meta.batch_size sets theirs",
    "use_distributed_sampler": "tasks are shared out, not images",
    "sync_batchnorm": "batch norm belongs to a task, which never leaves its process",
}
_PRECISIONS = ("32-true", "32", 32, "bf16-mixed")
_STRATEGIES = ("auto", strategy.NAME, "ddp")


def device_options(section: dict[str, Any]) -> dict[str, Any]:
    """The Trainer's arguments, limited to what meta-training can do.

    Raises:
        ConfigurationError: an argument is out of that range.
    """
    for key, reason in _OWN.items():
        if key in section:
            raise ConfigurationError(f"trainer.{key} cannot be set: {reason}")
    if section.get("precision", "32-true") not in _PRECISIONS:
        raise ConfigurationError(
            f"trainer.precision={section['precision']} cannot be used; meta-training runs in 32-true or bf16-mixed"
        )
    check(section.get("log_every_n_steps") or None, int | None, "trainer.log_every_n_steps")
    given = str(section.get("strategy", "auto"))
    check_choice(given, _STRATEGIES, "trainer.strategy")
    accelerator, devices = section.get("accelerator", "auto"), section.get("devices", 1)
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    if accelerator == "cpu" and devices == "auto":
        devices = 1
    one = devices in (1, "1") and section.get("num_nodes", 1) == 1
    if given == "auto" and not (one and not isinstance(devices, bool)):
        given = strategy.NAME
    return {**section, "accelerator": accelerator, "devices": devices, "strategy": given}


def make_trainer(options: dict[str, Any], steps: int, path: Path, console: Console, logger: Any = None) -> L.Trainer:
    """A Trainer of ``steps`` joint steps in the run folder ``path``; it knows how many processes there will be.

    Raises:
        ConfigurationError: Lightning refuses the options.
    """
    rows = rows_every(steps)
    plugins: list[Any] = [WholeFiles()]
    if SLURMEnvironment.detect():
        # What Lightning saves when it requeues a job would take precedence over the run's own checkpoints.
        plugins.append(SLURMEnvironment(auto_requeue=False))
    callbacks: list[L.Callback] = [KeepCheckpoint(path / "checkpoints", every=max(1, steps // CHECKPOINTS), rows=rows)]
    if options.get("enable_progress_bar"):
        callbacks.append(MetaTrainingBar(console))
    try:
        return L.Trainer(
            **{"default_root_dir": path, **options},
            logger=logger or False,
            max_epochs=1,
            callbacks=callbacks,
            plugins=plugins,
            use_distributed_sampler=False,
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


def meta_train(trainer: L.Trainer, module: JointMetaTraining, folder: RunFolder, fresh: bool, console: Console) -> None:
    """Train ``module`` to its last step, from the folder's newest readable checkpoint if there is one.

    Args:
        trainer: of :func:`make_trainer`.
        module: what to train.
        folder: the run folder.
        fresh: whatever checkpoint there is belongs to an earlier run.
        console: where to say it.

    Raises:
        RunCheckpointError: no checkpoint can be read, or it is of another run.
        RunFolderError: training stopped before its last step.
        KeyboardInterrupt: the user stopped it.
    """
    steps = module.settings.steps
    found = None if fresh else newest_readable(folder.checkpoints, lambda line: console.print(line, markup=False))
    checkpoint, done = None, 0
    if found is not None:
        checkpoint, content = found
        module.check_checkpoint(content)
        done = content["meta_step"]
        console.print(f"Continuing after meta-step {done} of this run (run.fresh=true starts anew).")
        if done == steps:
            module.continue_from(content)
            return
        del content, found
    # Any data would do: each task draws its own by the number of the step.
    loader: DataLoader[Any] = DataLoader(range(done, steps), batch_size=None)  # type: ignore[arg-type]
    with _interruption(trainer):
        trainer.fit(module, loader, ckpt_path=checkpoint, weights_only=True)
    if module.terminated:
        raise _terminated(trainer)
    if module.meta_step < steps:
        error = RunFolderError(f"stopped after {module.meta_step} of {steps} meta-steps; the same command continues")
        error.on_every_rank = True
        raise error


@contextlib.contextmanager
def _interruption(trainer: L.Trainer) -> Iterator[None]:
    """Lightning turns Ctrl-C into an exit with 1, and SIGTERM into one with 0; here they stay what they were."""
    try:
        yield
    except SIGTERMException as error:
        raise _terminated(trainer) from error
    except SystemExit as error:
        if trainer.interrupted:
            raise KeyboardInterrupt from error
        raise


def _terminated(trainer: L.Trainer) -> SystemExit:
    if trainer.is_global_zero:
        print(error_line("terminated; the same command continues this run"), file=sys.stderr)
    return SystemExit(TERMINATED)
