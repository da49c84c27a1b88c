"""Made-up histories of meta-training runs, and descriptions of their tasks."""

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mp_lightning.meta.history import History


def history_of(columns: Mapping[str, list[float]], folder: Path) -> History:
    """A history whose table holds these columns."""
    path = folder / "metrics.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return History(path)


def description(
    architecture: str = "conv4-16", classes: int = 5, images: str = "100 + 200 of 32 pixels"
) -> dict[str, Any]:
    """What a task says of itself."""
    return {"architecture": architecture, "classes": classes, "images": images, "flip": True, "digest": "0"}


def course(tasks: Mapping[str, Mapping[str, Any]], sites: int = 3, rows: int = 30) -> dict[str, list[float]]:
    """Columns of a run in which each training loss falls, each validation loss rises in the end, and phi changes."""
    steps = range(1, rows + 1)
    columns: dict[str, list[float]] = {"step": [8.0 * step for step in steps]}
    for name, task in tasks.items():
        guess = math.log(task["classes"])
        columns[f"{name}/train_loss"] = [guess * math.exp(-step / rows) for step in steps]
        columns[f"{name}/valid_loss"] = [
            guess * (1 - math.sin(2.5 * step / rows) / 2 + step / rows / 2) for step in steps
        ]
        for site in range(sites):
            columns[f"{name}/site{site}/multiplier"] = [0.4 + 0.1 * site * step / rows for step in steps]
    columns["phi/gradient_norm"] = [0.1 * math.exp(-step / rows) for step in steps]
    return columns
