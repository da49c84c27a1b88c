"""The card of a phi that was meta-trained: where its numbers come from and how it did on held-out images."""

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from mp_lightning.meta.module import JointMetaTraining
from mp_lightning.meta.tasks import Task
from mp_lightning.meta.transfer import ArmResult, Target, TransferSettings
from mp_lightning.versions import versions


def task_entries(tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """What the card says of each task."""
    return [
        {
            "name": task.name,
            "architecture": str(task.architecture),
            "classes": task.train.num_classes,
            "image_size": task.train.image_size,
            "training_images": len(task.train),
            "validation_images": len(task.valid),
        }
        for task in tasks
    ]


def make_card(
    tasks: list[dict[str, Any]],
    module: JointMetaTraining,
    processes: int,
    target: Target,
    results: list[ArmResult],
    transfer: TransferSettings,
    evaluation_seed: int,
) -> dict[str, Any]:
    """Plain values for :func:`mp_lightning.perturbation.save_phi`.

    Args:
        tasks: of :func:`task_entries`.
        module: what was trained.
        processes: how many trained it.
        target, results, transfer, evaluation_seed: how phi was judged.
    """
    return {
        "kind": "MetaPerturb phi, 82 numbers, a strength and a share of the sites (arXiv 2006.07540)",
        "sources": sorted({f"{task['name'].rpartition('-')[0]} ({task['classes']} classes)" for task in tasks}),
        "architectures": sorted({task["architecture"] for task in tasks}),
        "tasks": [{**task, "steps_left_out": module.left_out[task["name"]]} for task in tasks],
        "seed": module.seed,
        "steps": module.settings.steps,
        "processes": processes,
        "settings": asdict(module.settings),
        "held_out": {
            "target": str(target),
            "images": target.digest(),
            "seed": evaluation_seed,
            "settings": asdict(transfer),
            "results": [asdict(result) for result in results],
        },
        "command": f"python -m mp_lightning.meta {shlex.join(map(without_folders, sys.argv[1:]))}",
        "versions": versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def without_folders(word: str) -> str:
    """A word of the command line as it may stand in a card: the verb as the user writes it, of paths the last part."""
    key, equals, value = word.removeprefix("command=").partition("=")
    return f"{key}{equals}{re.sub(r'[^,[=]*/(?=[^/])', '', value)}"
