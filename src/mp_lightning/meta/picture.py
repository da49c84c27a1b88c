"""One picture of a meta-training run: the losses of each task, the multiplier of each site, and phi's gradient."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from mp_lightning.meta.history import History
from mp_lightning.meta.table import site_multipliers

_GRADIENT = "phi/gradient_norm"
_MOST_IN_A_ROW = 5
_WIDTH, _HEIGHT = 2.8, 2.0  # of a panel, inches
_NARROWEST = 7.0  # picture, inches
_LONGEST_TITLE = 36  # characters that fit above a panel
_USUAL = 0.98  # of the losses: the few that shot up past twice these are cut off, or nothing else could be seen
# The last tenth of the colours is too pale for lines on white.
_DEPTH = ListedColormap(colormaps["viridis"](range(230)))


def draw_training(history: History, path: Path, descriptions: Mapping[str, Mapping[str, Any]]) -> None:
    """Write ``path`` (.png): the losses of each task; below, the multiplier of each site and phi's gradient norm.

    All over the meta-steps. Tasks of one architecture share a panel of multipliers, which shows their mean. What the
    history does not hold is left out.

    Args:
        history: the run's table.
        path: the picture.
        descriptions: by the name of each task, what :meth:`Task.description` says of it.
    """
    columns = history.read()
    multipliers = _by_architecture(columns, descriptions)
    grids = [_grid(len(descriptions)), _grid(len(multipliers) + (_GRADIENT in columns))]
    heights = [rows * _HEIGHT + 0.4 for rows, _ in grids if rows]
    figure = Figure(
        figsize=(max(_NARROWEST, _WIDTH * max(in_a_row for _, in_a_row in grids)), sum(heights)),
        layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06),
    )
    FigureCanvasAgg(figure)
    parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    _draw_losses(parts[0], columns, descriptions)
    if len(parts) > 1:
        _draw_perturbation(parts[1], columns, multipliers)
    figure.savefig(path, dpi=110)


def _draw_losses(
    part: SubFigure, columns: Mapping[str, list[float]], descriptions: Mapping[str, Mapping[str, Any]]
) -> None:
    panels = _panels(part, len(descriptions))
    for axis, (task, description) in zip(panels, descriptions.items(), strict=True):
        _name(axis, task, str(description["architecture"]))
        halves = {half: columns.get(f"{task}/{half}_loss", []) for half in ("train", "valid")}
        for (half, losses), colour in zip(halves.items(), ("tab:blue", "tab:orange"), strict=True):
            _plot(axis, columns, losses, color=colour, label=f"{half} loss")
        guess = math.log(description["classes"])
        axis.axhline(guess, color="0.4", linewidth=0.9, linestyle=":", label="every class equally likely")
        finite = sorted(loss for losses in halves.values() for loss in losses if math.isfinite(loss))
        usual = max([guess, *finite[: round(_USUAL * len(finite))]])
        axis.set_ylim(0, 1.1 * min(2 * usual, max([guess, *finite])))
    part.supylabel("loss (nats)", fontsize="medium")
    part.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)


def _draw_perturbation(
    part: SubFigure, columns: Mapping[str, list[float]], multipliers: Mapping[str, Sequence[list[float]]]
) -> None:
    panels = _panels(part, len(multipliers) + (_GRADIENT in columns))
    for axis, (architecture, sites) in zip(panels, multipliers.items(), strict=False):
        _name(axis, "mean multiplier", architecture)
        for number, site in enumerate(sites):
            _plot(axis, columns, site, color=_DEPTH(number / max(1, len(sites) - 1)))
    for axis in panels[1 : len(multipliers)]:
        axis.sharey(panels[0])
    if multipliers:
        depths = {"first site": 0.0, "middle": 0.5, "last site": 1.0}
        lines = [Line2D([], [], color=_DEPTH(depth), label=label) for label, depth in depths.items()]
        part.legend(handles=lines, loc="outside upper center", ncols=3, frameon=False)
    if _GRADIENT in columns:
        _name(panels[-1], "norm of the gradient of phi")
        _plot(panels[-1], columns, columns[_GRADIENT], color="0.3")
        panels[-1].set_yscale("log")


def _by_architecture(
    columns: Mapping[str, list[float]], descriptions: Mapping[str, Mapping[str, Any]]
) -> dict[str, list[list[float]]]:
    """The multiplier of each site over the rows, a mean over the tasks of an architecture."""
    grouped: dict[str, list[list[list[float]]]] = {}
    for task, description in descriptions.items():
        sites = site_multipliers(columns, task)
        if sites:
            grouped.setdefault(str(description["architecture"]), []).append(sites)
    return {
        architecture: [[fmean(row) for row in zip(*site, strict=True)] for site in zip(*tasks, strict=True)]
        for architecture, tasks in grouped.items()
    }


def _grid(count: int) -> tuple[int, int]:
    """Rows and columns, as even as they can be."""
    rows = -(-count // _MOST_IN_A_ROW)
    return rows, -(-count // max(1, rows))


def _panels(part: SubFigure, count: int) -> list[Axes]:
    rows, in_a_row = _grid(count)
    panels = list(part.subplots(rows, in_a_row, squeeze=False).flat)
    for axis in panels[count:]:
        axis.remove()
    for number, axis in enumerate(panels[:count]):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize="small")
        axis.margins(x=0.02)
        axis.xaxis.get_major_locator().set_params(integer=True)
        if number + in_a_row >= count:
            axis.set_xlabel("meta-step", fontsize="small")
    return panels[:count]


def _plot(axis: Axes, columns: Mapping[str, list[float]], values: list[float], **options: Any) -> None:
    # A line through one point cannot be seen.
    marker = "." if len(values) == 1 else None
    axis.plot(columns["step"] if values else [], values, linewidth=1.1, marker=marker, **options)


def _name(axis: Axes, *lines: str) -> None:
    short = [
        line if len(line) <= _LONGEST_TITLE else f"{line[: _LONGEST_TITLE // 2 - 3]}...{line[-_LONGEST_TITLE // 2 :]}"
        for line in lines
    ]
    axis.set_title("\n".join(short), fontsize=8.5, parse_math=False)
