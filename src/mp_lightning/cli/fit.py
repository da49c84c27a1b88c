"""``fit``: meta-train phi, write it with its card and a picture, and judge it on images it has not seen."""

import platform
import shlex
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import Progress
from torch.utils.data import DataLoader

from mp_lightning.cli.options import check, settings
from mp_lightning.errors import ConfigurationError
from mp_lightning.meta.checkpoint import KeepCheckpoint
from mp_lightning.meta.history import History
from mp_lightning.meta.module import JointMetaTraining, MetaSettings
from mp_lightning.meta.picture import draw_training
from mp_lightning.meta.sources import Source, built_in, from_files
from mp_lightning.meta.tasks import Task, make_tasks
from mp_lightning.meta.transfer import ArmResult, Target, TransferSettings, compare_transfer
from mp_lightning.perturbation import initial_phi, save_phi
from mp_lightning.runs import RunFolder, RunFolderError

CHECKPOINTS = 20  # a run


def run(config: DictConfig, path: Path) -> float:
    """Meta-train in the run folder ``path``; returns the held-out NLL (nats) with the final phi."""
    console = Console()
    seed = _seed(config)
    meta = settings(MetaSettings, config.meta, "meta")
    transfer = settings(TransferSettings, config.evaluation, "evaluation")
    folder = RunFolder(path, fresh=check(config.run.fresh, bool, "run.fresh"))
    report = folder.report()
    if report is not None:
        console.print(f"This run is finished; run.fresh=true starts it anew. It left in [bold]{path}[/bold]:", soft_wrap=True)
        _print_report(console, report)
        return float(report["nll"])
    sources, target = _images(config, seed)
    tasks = make_tasks(
        sources,
        OmegaConf.to_container(config.tasks.architectures),  # type: ignore[arg-type]
        groups=check(config.tasks.groups, int, "tasks.groups"),
        train_per_class=check(config.tasks.train_per_class, int | None, "tasks.train_per_class"),
        valid_per_class=check(config.tasks.valid_per_class, int | None, "tasks.valid_per_class"),
        seed=seed,
    )
    _announce(console, tasks, meta, folder)
    history = History(path / "metrics.csv")
    module = JointMetaTraining(tasks, meta, seed, history)
    _train(module, config, folder)
    draw_training(history, path / "training.png")
    final = module.perturbation.phi
    arms = {"final phi": final, "initial phi": initial_phi(seed), "no phi": None}
    with Progress(console=console, disable=not config.trainer.enable_progress_bar, transient=True) as progress:
        bar = progress.add_task("held-out images", total=len(arms) * transfer.seeds * transfer.steps)

        def advance(arm: str, number: int) -> None:
            progress.update(bar, advance=1, description=f"held-out images: {arm}, seed {number + 1} of {transfer.seeds}")

        results = compare_transfer(target, arms, transfer, seed, module.device, advance)
    save_phi(path / "phi.safetensors", final, _card(config, tasks, target, results, transfer))
    report = _report(path, target, results)
    folder.finish(report)
    console.print(f"Written to [bold]{path}[/bold]: phi.safetensors, phi.json, metrics.csv, training.png", soft_wrap=True)
    _print_report(console, report)
    return float(report["nll"])


def _seed(config: DictConfig) -> int:
    seed = config.seed
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ConfigurationError(f"seed={seed} is not a whole number from 0")
    return seed


def _images(config: DictConfig, seed: int) -> tuple[list[Source], Target]:
    size = check(config.image_size, int, "image_size")
    per_class = check(config.evaluation.train_per_class, int, "evaluation.train_per_class")
    if config.data is None and config.evaluation.data is None:
        return built_in(size, seed, per_class)
    data = OmegaConf.to_container(config.data) if OmegaConf.is_config(config.data) else [config.data]
    if not isinstance(data, list) or not data or not all(isinstance(path, str) for path in data):
        raise ConfigurationError(f"data={config.data} is not a path or a list of paths, such as data=[a.npz,b.npz]")
    flip = check(config.flip, bool, "flip")
    return from_files(data, check(config.evaluation.data, str | None, "evaluation.data"), size, seed, per_class, flip)


def _announce(console: Console, tasks: list[Task], meta: MetaSettings, folder: RunFolder) -> None:
    console.print(f"Meta-training phi (82 numbers) over {len(tasks)} tasks, {meta.steps} joint steps:")
    for task in tasks:
        console.print(
            f"  {task.name:<18} {str(task.architecture):<12} {task.train.num_classes} classes, "
            f"{len(task.train)} + {len(task.valid)} images",
            highlight=False,
        )
    if folder.checkpoint() is not None:
        console.print("Continuing from the last checkpoint of this run (run.fresh=true starts anew).")


def _train(module: JointMetaTraining, config: DictConfig, folder: RunFolder) -> None:
    options: dict[str, Any] = OmegaConf.to_container(config.trainer, resolve=True)  # type: ignore[assignment]
    if options.get("devices") not in (1, "1", "auto"):
        raise ConfigurationError(f"trainer.devices={options.get('devices')}: fit runs on one device; use trainer.devices=1")
    steps = module.settings.steps
    callbacks: list[L.Callback] = [KeepCheckpoint(folder.checkpoints, every=max(1, steps // CHECKPOINTS))]
    if options.get("enable_progress_bar"):
        callbacks.append(TQDMProgressBar())
    try:
        trainer = L.Trainer(
            **{"default_root_dir": folder.path, "logger": False, **options},
            max_steps=steps,
            max_epochs=1,
            callbacks=callbacks,
        )
    except (TypeError, ValueError) as error:
        message = str(error).replace("Trainer.__init__() got an unexpected", "unknown")
        raise ConfigurationError(f"trainer: {message}; these are the arguments of lightning.pytorch.Trainer") from error
    checkpoint = folder.checkpoint()
    loader: DataLoader[Any] = DataLoader(range(steps), batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, loader, ckpt_path=checkpoint, weights_only=True)
    if module.meta_step < steps:
        raise RunFolderError(f"stopped after {module.meta_step} of {steps} meta-steps; the same command continues")


def _card(
    config: DictConfig, tasks: list[Task], target: Target, results: list[ArmResult], transfer: TransferSettings
) -> dict[str, Any]:
    return {
        "kind": "MetaPerturb phi, 82 numbers (arXiv 2006.07540)",
        "sources": sorted({f"{task.name.rpartition('-')[0]} ({task.train.num_classes} classes)" for task in tasks}),
        "architectures": sorted({str(task.architecture) for task in tasks}),
        "tasks": [
            {
                "name": task.name,
                "architecture": str(task.architecture),
                "classes": task.train.num_classes,
                "image_size": task.train.image_size,
                "training_images": len(task.train),
                "validation_images": len(task.valid),
            }
            for task in tasks
        ],
        "seed": config.seed,
        "steps": config.meta.steps,
        "settings": OmegaConf.to_container(config.meta, resolve=True),
        "held_out": {"target": str(target), "settings": asdict(transfer), "results": [asdict(r) for r in results]},
        "command": f"python -m mp_lightning.meta {shlex.join(_words())}",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("mp_lightning", "torch", "lightning", "torchvision")},
        },
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _words() -> list[str]:
    """The command line, with the verb as the user writes it; of paths the last part only."""
    words = [word.removeprefix("command=") for word in sys.argv[1:]]
    return [word if "/" not in word else "/".join(word.split("/")[-1:]) for word in words]


def _report(path: Path, target: Target, results: list[ArmResult]) -> dict[str, Any]:
    phi = path / "phi.safetensors"
    return {
        "nll": sum(results[0].nll) / len(results[0].nll),
        "target": str(target),
        "results": [str(result) for result in results],
        "use": f'trainer = L.Trainer(callbacks=[MetaPerturbCallback("{phi}")])',
    }


def _print_report(console: Console, report: dict[str, Any]) -> None:
    console.print(f"\nTrained afresh on held-out images ({report['target']}; mean +- standard deviation over seeds):")
    for line in report["results"]:
        console.print(f"  {line}", highlight=False)
    console.print("\nUse it:")
    console.print(f"  {report['use']}", highlight=False, markup=False, soft_wrap=True)
