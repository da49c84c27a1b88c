"""One table of a meta-training run: what each task is, where its losses began and ended, and how strong phi became."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from mp_lightning.meta.history import History

_ABSENT = "-"


def training_table(
    history: History, tasks: Mapping[str, Mapping[str, Any]], left_out: Mapping[str, int] | None = None
) -> Table:
    """One row a task, for a terminal of 100 columns.

    Losses (nats) are means over the first and the last tenth of the history's rows; the multiplier is the mean of all
    sites over the last tenth. What the history does not hold is a dash.

    Args:
        history: the run's table.
        tasks: by name, what :meth:`Task.description` says of it.
        left_out: by name, the steps whose mean a task left; a column of its own where there are any.
    """
    counts = left_out if left_out and any(left_out.values()) else {}
    columns = history.read()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("task", overflow="fold")
    table.add_column("network", overflow="fold")
    for heading in ("pixels", "classes", "images", "train loss", "valid loss", "multi-\nplier"):
        table.add_column(heading, justify="right", no_wrap=True)
    if counts:
        table.add_column("left\nout", justify="right", no_wrap=True)
    for name, task in tasks.items():
        images, _, size = str(task["images"]).partition(" of ")
        sites = site_multipliers(columns, name)
        table.add_row(
            escape(name),
            escape(str(task["architecture"])),
            size.removesuffix(" pixels"),
            str(task["classes"]),
            images.replace(" ", ""),
            *(_course(columns.get(f"{name}/{half}_loss")) for half in ("train", "valid")),
            f"{fmean(_mean_of_last(site) for site in sites):.3f}" if sites else _ABSENT,
            *([str(counts[name])] if counts else []),
        )
    return table


def site_multipliers(columns: Mapping[str, list[float]], task: str) -> list[list[float]]:
    """The mean multiplier of each site of a task over the rows, from the first site to the last.

    Args:
        columns: what :meth:`History.read` gives.
        task: its name.
    """
    sites: list[list[float]] = []
    while (name := f"{task}/site{len(sites)}/multiplier") in columns and columns[name]:
        sites.append(columns[name])
    return sites


def _course(losses: Sequence[float] | None) -> str:
    losses = [loss for loss in losses or () if math.isfinite(loss)]  # not the rows in which a task was left out
    if not losses:
        return _ABSENT
    return f"{fmean(losses[: _tenth(losses)]):.2f} -> {_mean_of_last(losses):.2f}"


def _mean_of_last(values: Sequence[float]) -> float:
    return fmean(values[-_tenth(values) :])


def _tenth(values: Sequence[float]) -> int:
    return max(1, len(values) // 10)
