"""``fit``: meta-train phi, write it with its card and a picture, and judge it on images it has not seen."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape

from mp_lightning.cli.card import make_card
from mp_lightning.cli.options import check, check_keys, plain_section, settings
from mp_lightning.cli.training import device_options, meta_train
from mp_lightning.errors import ConfigurationError
from mp_lightning.meta.history import History
from mp_lightning.meta.module import JointMetaTraining, MetaSettings
from mp_lightning.meta.picture import draw_training
from mp_lightning.meta.progress import progress_display
from mp_lightning.meta.sources import Source, built_in, from_files
from mp_lightning.meta.tasks import Architecture, Task, make_tasks
from mp_lightning.meta.transfer import ArmResult, Target, TransferSettings, compare_transfer
from mp_lightning.perturbation import Phi, initial_phi, save_phi
from mp_lightning.runs import RunFolder, relevant_settings

PHI = "phi.safetensors"
_SMALLEST_IMAGES = 8
_MOST_SEED = 2**63 - 1
_TOP_LEVEL = ("meta", "tasks", "evaluation", "trainer", "run", "command", "seed", "data", "image_size", "flip")


@dataclass(frozen=True)
class FitSettings:
    """Everything that ``fit`` reads from its configuration, checked."""

    seed: int
    fresh: bool
    data: list[str] | None
    image_size: int
    flip: bool
    evaluation_data: str | None
    evaluation_per_class: int
    architectures: list[str]
    groups: int
    classes: int | None
    train_per_class: int | None
    valid_per_class: int | None
    meta: MetaSettings
    transfer: TransferSettings
    trainer: dict[str, Any]
    relevant: dict[str, Any]


def read(config: DictConfig) -> FitSettings:
    """The settings of a configuration.

    Raises:
        ConfigurationError: a key is unknown or missing, or a value of the wrong kind; the message names it.
    """
    check_keys([str(key) for key in config if key != "hydra"], _TOP_LEVEL)
    tasks, evaluation, folder = (plain_section(config, name) for name in ("tasks", "evaluation", "run"))
    check_keys(tasks, ("groups", "classes", "architectures", "train_per_class", "valid_per_class"), "tasks.")
    check_keys(folder, ("fresh",), "run.")
    image_size = check(config.image_size, int, "image_size")
    if image_size < _SMALLEST_IMAGES:
        raise ConfigurationError(f"image_size={image_size} is too small; give at least {_SMALLEST_IMAGES} pixels")
    architectures = tasks.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise ConfigurationError(
            f"tasks.architectures={architectures} is not a list of networks; write for example [conv4-16,resnet20-8]"
        )
    evaluation_data = check(evaluation.pop("data", None), str | None, "evaluation.data")
    per_class = check(evaluation.pop("train_per_class", None), int, "evaluation.train_per_class")
    transfer = settings(TransferSettings, evaluation, "evaluation")
    for text in (*architectures, transfer.architecture):
        Architecture.parse(text).check(image_size)
    whole = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
    assert isinstance(whole, dict)
    return FitSettings(
        seed=_seed(config.seed),
        fresh=check(folder.get("fresh"), bool, "run.fresh"),
        data=_paths(config.data),
        image_size=image_size,
        flip=check(config.flip, bool, "flip"),
        evaluation_data=evaluation_data,
        evaluation_per_class=per_class,
        architectures=[str(text) for text in architectures],
        groups=check(tasks.get("groups"), int, "tasks.groups"),
        classes=check(tasks.get("classes"), int | None, "tasks.classes"),
        train_per_class=check(tasks.get("train_per_class"), int | None, "tasks.train_per_class"),
        valid_per_class=check(tasks.get("valid_per_class"), int | None, "tasks.valid_per_class"),
        meta=settings(MetaSettings, plain_section(config, "meta"), "meta"),
        transfer=transfer,
        trainer=device_options(plain_section(config, "trainer")),
        relevant=relevant_settings({str(key): value for key, value in whole.items()}),
    )


def run(config: DictConfig, path: Path) -> float:
    """Meta-train in the run folder ``path``; returns the held-out NLL (nats) with the final phi."""
    given = read(config)
    console = Console(highlight=False, soft_wrap=True)
    folder = RunFolder(path, given.relevant, fresh=given.fresh)
    report = folder.report()
    if report is not None and (path / PHI).is_file():
        console.print(f"This run is finished; run.fresh=true starts it anew. It left in {_bold(path)}:")
        _print_report(console, report, path)
        return float(report["nll"])
    sources, target = _images(given)
    tasks = make_tasks(
        sources,
        given.architectures,
        groups=given.groups,
        classes=given.classes,
        train_per_class=given.train_per_class,
        valid_per_class=given.valid_per_class,
        seed=given.seed,
    )
    history = History(path / "metrics.csv")
    module = JointMetaTraining(tasks, given.meta, given.seed, history)
    _announce(console, tasks, given.meta, folder)
    device = meta_train(module, given.trainer, folder, console)
    draw_training(history, path / "training.png", {task.name: str(task.architecture) for task in tasks})
    final = module.perturbation.phi
    results = _judge(console, given, target, final, device)
    save_phi(path / PHI, final, make_card(given.seed, module, target, results, given.transfer))
    report = {
        "nll": sum(results[0].nll) / len(results[0].nll),
        "target": str(target),
        "results": [str(result) for result in results],
    }
    folder.finish(report)
    console.print(f"Written to {_bold(path)}: {PHI}, phi.json, metrics.csv, training.png")
    _print_report(console, report, path)
    return float(report["nll"])


def _seed(seed: Any) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= _MOST_SEED:
        raise ConfigurationError(f"seed={seed} cannot be used; give a whole number from 0 to 2**63 - 1")
    return seed


def _paths(data: Any) -> list[str] | None:
    if data is None:
        return None
    paths = OmegaConf.to_container(data) if OmegaConf.is_config(data) else [data]
    if not isinstance(paths, list) or not paths or not all(isinstance(path, str) and path for path in paths):
        raise ConfigurationError(f"data={data} is not a path or a list of paths; write for example data=[a.npz,b.npz]")
    return paths


def _images(given: FitSettings) -> tuple[list[Source], Target]:
    if given.data is None:
        return built_in(given.image_size, given.seed, given.evaluation_per_class, given.evaluation_data, given.flip)
    return from_files(
        given.data, given.evaluation_data, given.image_size, given.seed, given.evaluation_per_class, given.flip
    )


def _announce(console: Console, tasks: list[Task], meta: MetaSettings, folder: RunFolder) -> None:
    console.print(f"Meta-training phi (82 numbers) over {len(tasks)} tasks, {meta.steps} joint steps:")
    for task in tasks:
        console.print(
            f"  {task.name:<18} {task.architecture!s:<12} {task.train.num_classes} classes, "
            f"{len(task.train)} + {len(task.valid)} images"
        )
    if folder.checkpoint() is not None:
        console.print("Continuing from the last checkpoint of this run (run.fresh=true starts anew).")


def _judge(console: Console, given: FitSettings, target: Target, final: Phi, device: torch.device) -> list[ArmResult]:
    transfer = given.transfer
    arms = {"final phi": final, "initial phi": initial_phi(given.seed), "no phi": None}
    enabled = bool(given.trainer.get("enable_progress_bar"))
    with progress_display(console, enabled=enabled, transient=True) as progress:
        bar = progress.add_task("held-out images", total=len(arms) * transfer.seeds * transfer.steps)

        def advance(arm: str, number: int, step: int | None) -> None:
            doing = "testing" if step is None else "training"
            progress.update(
                bar, advance=step is not None, description=f"{doing} with {arm}, seed {number + 1}/{transfer.seeds}"
            )

        return compare_transfer(target, arms, transfer, given.seed, device, advance)


def _print_report(console: Console, report: dict[str, Any], path: Path) -> None:
    console.print(f"\nTrained afresh on held-out images ({report['target']}; mean +- standard deviation over seeds):")
    for line in report["results"]:
        console.print(f"  {line}")
    console.print("\nUse it:")
    use = f"trainer = L.Trainer(callbacks=[MetaPerturbCallback({str(path / PHI)!r})])"
    console.print(f"  {use}", markup=False)


def _bold(path: Path) -> str:
    return f"[bold]{escape(str(path))}[/bold]"
