"""``fit``: meta-train phi, write it with its card and a picture, and judge it on images it has not seen."""

import math
import shlex
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import hydra
import torch
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mp_lightning.cli import interruption
from mp_lightning.cli.card import make_card, task_entries
from mp_lightning.cli.fit_settings import FitSettings, read
from mp_lightning.cli.record import record
from mp_lightning.cli.run_scores import PHI
from mp_lightning.cli.training import make_trainer, meta_train
from mp_lightning.cli.words import PROGRAM
from mp_lightning.compare.console import for_tables, make_console
from mp_lightning.compare.progress import progress_display, reading_display
from mp_lightning.data.stamps import Stamp, stamps
from mp_lightning.errors import ConfigurationError, PhiError
from mp_lightning.meta.history import History
from mp_lightning.meta.module import JointMetaTraining
from mp_lightning.meta.phi_picture import draw_phi
from mp_lightning.meta.picture import draw_training
from mp_lightning.meta.placement import place
from mp_lightning.meta.sources import ImageSource, built_in, from_settings
from mp_lightning.meta.table import training_table
from mp_lightning.meta.tasks import Task, make_tasks
from mp_lightning.meta.transfer import ArmResult, KeptRuns, Target, compare_transfer
from mp_lightning.perturbation import NamedPhi, initial_phi, load_phi, save_phi
from mp_lightning.runs import RunFolder, run_name, times_anew, unusable
from mp_lightning.sites.strength import share_reached

__all__ = ["read", "run"]

_WIDTH = 100  # of the table, where the output is not a terminal


def run(config: DictConfig, path: Path) -> float:
    """Meta-train in the run folder ``path``; returns the selection score: held-out NLL (nats) with the final phi.

    Of several processes the first alone judges phi and returns its score; the others return NaN.
    """
    given = read(config)
    console = make_console()
    logger = make_logger(given.logger, path, run_name(given.relevant), given.fresh)
    trainer = make_trainer(given.trainer, given.meta.steps, path, console, logger)
    first = trainer.is_global_zero
    console.quiet = not first
    folder = RunFolder(path, {**given.relevant, **given.code}, fresh=given.fresh, owner=first)
    report = None if given.fresh and not first else folder.report()
    if first and report is None:
        record(config, path)
    data = [*(source.dataset for source in given.sources), *filter(None, [given.evaluation.dataset])]
    if report is not None and _is_phi(path / PHI):
        console.print("This run is finished, and its images were not read again; run.fresh=true starts it anew.")
        for changed in _changed(report.get("data", {})):
            console.print(f"'{changed}' was changed since, so that another phi might be learned.", markup=False)
        console.print(f"It left in {_bold(path)}:")
        _print_report(console, report, path)
        return math.nan if report["nll"] is None else float(report["nll"])
    if trainer.world_size == 1:
        interruption.listen_to_sigterm("run")
    read_from = stamps(data)
    with reading_display(console) as on_progress:
        images = ImageSource(given.data_root, on_progress)
        if given.sources:
            sources, target = from_settings(given.sources, given.evaluation, images)
        else:
            sources, target = built_in(given.split, given.evaluation, given.seed, images)
    tasks = make_tasks(sources, given.seed)
    del sources
    placed = _place(tasks, trainer.world_size)
    _announce(console, tasks, placed, given.meta.steps)
    history = History(path / "metrics.csv") if first else None
    mine = [number for number, rank in enumerate(placed) if rank == trainer.global_rank]
    module = JointMetaTraining(tasks, given.meta, given.seed, history, mine, console.print)
    entries = task_entries(tasks)
    del tasks  # the module keeps the images of its own
    meta_train(trainer, module, folder, given.fresh and not first, console)
    if history is None:
        return math.nan
    _tell_left_out(console, module)
    interruption.listen_to_sigterm("run")  # from now on there is nothing to agree on with other processes
    final = NamedPhi(
        module.perturbation.phi,
        "final phi",
        strength=given.meta.strength,
        noise_per=given.meta.noise_per,
        share_of_sites=given.meta.share_of_sites,
        full_strength_at=given.transfer.full_strength_at,
        acts_below=given.transfer.acts_below,
    )
    descriptions = module.description["tasks"]

    def keep(results: list[ArmResult]) -> None:
        card = make_card(entries, module, trainer.world_size, target, results, given.transfer, given.evaluation.seed)
        save_phi(path / PHI, final, card)

    try:
        keep([])  # what was learned is kept, whatever becomes of its judgement
        draw_training(history, path / "training.png", descriptions)
        draw_phi(final, path / "phi.png")
        results = _judge(console, given, target, final, trainer.strategy.root_device, path / "evaluation.json")
        keep(results)
    except OSError as error:
        raise unusable(path, error) from error
    table = training_table(history, descriptions, module.left_out)
    reached = share_reached(given.transfer.steps) if given.transfer.full_strength_at < 1 else 1.0
    report = {
        "target": str(target),
        "results": [str(result) for result in results],
        "reached": reached,
        "data": read_from,
    }
    return _finish(console, folder, report, results, table)


def _is_phi(path: Path) -> bool:
    """Whether there is a whole one; another is written again from the run's checkpoint."""
    try:
        load_phi(path)
    except PhiError:
        return False
    return True


def _changed(before: dict[str, Stamp]) -> list[str]:
    """The paths whose images are not those of that time; what is gone is not told."""
    return [path for path, stamp in stamps(before).items() if stamp != before[path]]


def _finish(
    console: Console, folder: RunFolder, report: dict[str, Any], results: list[ArmResult], table: Table
) -> float:
    """Mark the run as finished and say what it left; returns the score."""
    path = folder.path
    nll, initial, without = (fmean(result.nll) for result in results)
    report |= {
        "nll": nll if math.isfinite(nll) else None,
        "nll_initial_phi": initial if math.isfinite(initial) else None,
        "nll_without_phi": without if math.isfinite(without) else None,
    }
    folder.finish(report)
    for_tables(console, _WIDTH).print(table)
    console.print(f"Written to {_bold(path)}: {PHI}, phi.json, phi.png, metrics.csv, training.png")
    _print_report(console, report, path)
    return nll


def make_logger(section: dict[str, Any], path: Path, name: str, fresh: bool) -> Any:
    """The logger that the section describes, with its files in the run folder ``path``.

    Where its ``id`` is the ``name`` of the run, one that starts anew has another: W&B would drop what it logs for steps
    that the run before it has behind it.
    """
    if not section:
        return None
    if section.get("id") == name and (anew := times_anew(path, fresh)):
        section = {**section, "id": f"{name}-{anew + 1}"}
    try:
        logger = hydra.utils.instantiate({"save_dir": str(path), **section})
    # Whatever a logger raises in its constructor, such as for a package that is not installed.
    except Exception as error:
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise ConfigurationError(
            f"logger: {section.get('_target_')} cannot be made ({reason}); install what it needs, or choose another: "
            "logger=tensorboard, logger=wandb, logger=csv"
        ) from error
    if not isinstance(logger, Logger):
        raise ConfigurationError(
            f"logger: {section.get('_target_')} is no logger of Lightning; choose logger=tensorboard, logger=wandb or "
            "logger=csv"
        )
    return logger


def _place(tasks: list[Task], ranks: int) -> list[int]:
    keys = [(task.architecture, task.train.num_classes, task.train.image_size) for task in tasks]
    costs = {key: float(key[0].forward_flops(*key[1:])) if ranks > 1 else 1.0 for key in dict.fromkeys(keys)}
    return place([costs[key] for key in keys], ranks)


def _announce(console: Console, tasks: list[Task], placed: list[int], steps: int) -> None:
    ranks = max(placed) + 1
    shared = f", shared by {ranks} processes" if ranks > 1 else ""
    console.print(f"Meta-training phi (82 numbers) over {len(tasks)} tasks{shared}, {steps} joint steps:")
    for task, rank in zip(tasks, placed, strict=True):
        console.print(
            f"  {task.name:<18} {task.architecture!s:<12} {task.train.num_classes} classes, "
            f"{len(task.train)} + {len(task.valid)} images of {task.train.image_size} pixels"
            + (f", process {rank}" if ranks > 1 else "")
        )


def _tell_left_out(console: Console, module: JointMetaTraining) -> None:
    """Of tasks that diverged: how often, and whether phi learned nothing from them."""
    steps, counts = module.settings.steps, {name: count for name, count in module.left_out.items() if count}
    if counts:
        told = ", ".join(f"'{name}' {count}" for name, count in counts.items())
        console.print(f"Left out of the mean as they diverged, in so many of {steps} steps: {told}.", markup=False)
    for name, count in counts.items():
        if count == steps:
            console.print(
                f"Task '{name}' never counted, so phi learned nothing from it; lower meta.theta_lr or leave it out.",
                markup=False,
            )


def _judge(
    console: Console, given: FitSettings, target: Target, final: NamedPhi, device: torch.device, kept: Path
) -> list[ArmResult]:
    transfer = given.transfer
    initial = replace(final, phi=initial_phi(given.seed), name="initial phi")
    arms = {final.name: final, initial.name: initial, "no phi": None}
    enabled = bool(given.trainer.get("enable_progress_bar"))
    with progress_display(console, enabled=enabled, transient=True) as progress:
        bar = progress.add_task("held-out images", total=len(arms) * transfer.seeds * transfer.steps)

        def advance(arm: str, number: int, steps: int) -> None:
            doing = "training" if steps else "testing"
            progress.update(bar, advance=steps, description=f"{doing} with {arm}, seed {number + 1}/{transfer.seeds}")

        try:
            return compare_transfer(target, arms, transfer, given.evaluation.seed, device, advance, KeptRuns(kept))
        except (RuntimeError, ValueError) as error:  # of torch, such as too little memory, or batch norm of one value
            reason = str(error).partition("\n")[0]
            raise ConfigurationError(
                f"phi was learned, and is in '{kept.parent / PHI}', but could not be judged ({reason}); judge it by "
                f"'{PROGRAM} compare', or start anew with other settings of evaluation."
            ) from error


def _print_report(console: Console, report: dict[str, Any], path: Path) -> None:
    console.print(f"\nTrained afresh on held-out images ({report['target']}; mean +- standard deviation over seeds):")
    for line in report["results"]:
        console.print(f"  {line}")
    if report.get("reached", 1) < 1:
        console.print(f"In so short a training at most {report['reached']:.0%} of the strength acts.")
    if report["nll"] is None and report.get("nll_without_phi") is not None:
        console.print(
            "Training with phi diverged on these images, and without it did not: there is no score; lower meta.lr, or "
            "evaluation.lr."
        )
        return
    if report["nll"] is not None and report["nll"] >= (report.get("nll_initial_phi") or math.inf):
        console.print("It is not better than the initial phi: what was learned does not help on these images.")
    if report["nll"] is None:
        console.print("Training diverged on these images: there is no score; lower evaluation.lr.")
    elif report["nll"] > (report.get("nll_without_phi") or math.inf):
        console.print("It does not help so short a training. Whether it helps a longer one on images of yours:")
        arms = shlex.quote(f"arms=[none,metaperturb:{path / PHI}]")
        console.print(f"  {PROGRAM} compare target=images.npz {arms}", markup=False)
    console.print("\nUse it:")
    use = f"trainer = L.Trainer(callbacks=[MetaPerturbCallback({str(path / PHI)!r})])"
    console.print(f"  {use}", markup=False)


def _bold(path: Path) -> str:
    return f"[bold]{escape(str(path))}[/bold]"
