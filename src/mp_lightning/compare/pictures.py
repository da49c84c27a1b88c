"""The pictures of a comparison, as files and as drawings inside a page.

Each is made of panels that can be read at the width of a telephone, so that a page can put them side by side or one
below the other.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from mp_lightning.compare.panels import (
    draw_curves,
    draw_multipliers,
    draw_reliability,
    draw_scores,
    short,
    sites_by_depth,
    styles,
)
from mp_lightning.compare.results import METRICS, Details, Row
from mp_lightning.compare.summary import VERDICT_METRICS, Summary
from mp_lightning.compare.texts import number_text

_WIDTH, _NARROW = 3.75, 1.75  # of a panel, inches
_HEIGHT = 2.6
_LONGEST_TITLE = 20  # characters that fit above a narrow panel
_LEGEND_LINE = 0.16  # inches
_MOST_IN_A_ROW = 5
_DPI = 160
_INK = "#222222"
_INK_OF_THE_PAGE = "#010203"  # a colour that nothing else has, in the place of which the page puts that of its text
_LOOK: dict[Any, Any] = {
    **{"font.size": 7.5, "axes.titlesize": 8.5, "axes.labelsize": 7.5, "legend.fontsize": 7.5},
    **{"xtick.labelsize": 7, "ytick.labelsize": 7.5, "axes.linewidth": 0.7, "axes.axisbelow": True},
    **{"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False},
    **{"svg.hashsalt": "mp_lightning", "svg.fonttype": "path"},
}
_INKED: tuple[Any, ...] = (
    "text.color",
    "axes.edgecolor",
    "axes.labelcolor",
    "xtick.color",
    "ytick.color",
    "grid.color",
)


@dataclass(frozen=True)
class Panel:
    """One drawing: its title, what draws it, and its size in inches."""

    title: str
    draw: Callable[[Axes], None]
    width: float
    height: float
    legend: bool = False


@dataclass(frozen=True)
class Picture:
    """Panels that belong together.

    Attributes:
        name: of its file, without the ending.
        title: a few words.
        caption: what it shows and how to read it, in plain words.
        panels: at least one.
    """

    name: str
    title: str
    caption: str
    panels: list[Panel]


def pictures(summary: Summary, rows: Sequence[Row], details: Mapping[tuple[str, int], Details]) -> list[Picture]:
    """The pictures that can be drawn: scores, learning curves, reliability, and multipliers where an arm has one.

    Args:
        summary: of the rows.
        rows: all finished runs.
        details: by arm and seed; runs whose details were not kept are left out.
    """
    made = [_scores(summary, rows)]
    if any(one.curve for one in details.values()):
        made.append(_curves(summary, details))
    if any(one.multiplier for one in details.values()):
        made.append(_multipliers(summary, details))
    if any(one.reliability for one in details.values()):
        made.append(_reliability(summary, details))
    return made


def write_png(picture: Picture, path: Path) -> None:
    """Write all panels into one picture on white ground."""
    in_a_row = min(len(picture.panels), _MOST_IN_A_ROW)
    rows = -(-len(picture.panels) // in_a_row)
    with _look(_INK):
        first = picture.panels[0]
        figure = Figure(figsize=(in_a_row * first.width, rows * first.height), layout=_layout())
        FigureCanvasAgg(figure)
        parts = figure.subfigures(rows, in_a_row, squeeze=False).flat
        for part, panel in zip(parts, picture.panels, strict=False):
            _fill(part, panel)
        figure.savefig(path, dpi=_DPI, format="png")


def svg(panel: Panel) -> str:
    """A panel as an element of an HTML page; lines and letters without a colour of their own have that of its text."""
    with _look(_INK_OF_THE_PAGE):
        figure = Figure(figsize=(panel.width, panel.height), layout=_layout())
        FigureCanvasSVG(figure)
        _fill(figure, panel)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'<g id="[^"]*">', "<g>", text)  # several panels in a page would have the same
    text = re.sub(r'^<svg width="[^"]*" height="[^"]*"', '<svg aria-hidden="true"', text)
    return re.sub(r"\n\s*", "\n", text.replace(_INK_OF_THE_PAGE, "currentColor"))


def _scores(summary: Summary, rows: Sequence[Row]) -> Picture:
    looks = styles(list(summary.arms), summary.baseline)
    height = 0.75 + 0.27 * max(3, len(looks))
    panels = []
    for metric in VERDICT_METRICS:
        estimates = {name: arm.estimates[metric] for name, arm in summary.arms.items()}
        draw = partial(
            draw_scores, metric=metric, rows=rows, estimates=estimates, looks=looks, baseline=summary.baseline
        )
        better = "higher" if METRICS[metric].higher_is_better else "lower"
        panels.append(Panel(f"{METRICS[metric].label} ({better} is better)", draw, _WIDTH, height))
    return Picture(
        "scores",
        "Accuracy and likelihood on the test images",
        "One line an arm. Each small dot is one seed; the large mark is their mean, the bar its 95 % interval, and the "
        f"dashed line the mean of {summary.baseline}. Intervals of two arms may overlap and the arms still differ: the "
        "runs of one seed belong together, and the table compares them in pairs. An arrow at the edge is a seed that "
        "lies far outside.",
        panels,
    )


def _curves(summary: Summary, details: Mapping[tuple[str, int], Details]) -> Picture:
    looks = styles(list(summary.arms), summary.baseline)
    return Picture(
        "curves",
        "Learning curves",
        "The loss that each arm trains on: the mean over its seeds, of up to four arms in a band from the lowest to "
        "the highest seed. Every arm has its own loss: noise, mixed images and smoothed labels raise it, so a higher "
        "curve is no worse network. Look for curves that are still falling at the end, which ask for more steps.",
        [
            Panel(
                "training loss",
                partial(draw_curves, details=details, looks=looks),
                _WIDTH,
                _HEIGHT + _LEGEND_LINE * -(-len(looks) // 2),
                legend=True,
            )
        ],
    )


def _multipliers(summary: Summary, details: Mapping[tuple[str, int], Details]) -> Picture:
    looks = styles(list(summary.arms), summary.baseline)
    count = len({arm for (arm, _), one in details.items() if one.multiplier})
    sites = sites_by_depth(details)
    return Picture(
        "multiplier",
        "The multiplier by depth",
        "What the activations are multiplied by, for arms that multiply them: its mean at each site, and as a bar the "
        "standard deviation of its noise, after training, averaged over the seeds. At the dashed line, 1, nothing is "
        f"changed. Site 1 is {sites[0]}{f', site {len(sites)} is {sites[-1]}' if len(sites) > 1 else ''}.",
        [
            Panel(
                "multiplier at each site",
                partial(draw_multipliers, details=details, looks=looks, sites=sites),
                _WIDTH,
                _HEIGHT + _LEGEND_LINE * -(-count // 2),
                legend=True,
            )
        ],
    )


def _reliability(summary: Summary, details: Mapping[tuple[str, int], Details]) -> Picture:
    looks = styles(list(summary.arms), summary.baseline)
    panels = []
    titles = short(summary.arms, _LONGEST_TITLE)
    for name, arm in summary.arms.items():
        own = [one for (of, _), one in details.items() if of == name]
        draw = partial(draw_reliability, details=own, look=looks[name])
        error = number_text("ece", arm.estimates["ece"].mean)
        panels.append(Panel(f"{titles[name]}\nECE {error}", draw, _NARROW, _NARROW + 0.3))
    return Picture(
        "reliability",
        "Reliability",
        "How often an arm is right (upwards) where it is so confident (to the right); the images of all seeds "
        "together, larger dots for more images. On the dashed line confidence can be taken at its word; below it the "
        "network is too confident, above it too modest. ECE is the mean distance from the line, averaged over the "
        "seeds: lower is better.",
        panels,
    )


def _look(ink: str) -> Any:
    return rc_context({**_LOOK, **dict.fromkeys(_INKED, ink)})


def _layout() -> ConstrainedLayoutEngine:
    return ConstrainedLayoutEngine(w_pad=0.04, h_pad=0.04)


def _fill(part: Figure | SubFigure, panel: Panel) -> None:
    axes = part.subplots()
    axes.set_title(panel.title, loc="left", parse_math=False)
    panel.draw(axes)
    handles, labels = axes.get_legend_handles_labels()
    if panel.legend and handles:
        legend = part.legend(handles, labels, loc="outside lower center", ncols=2)
        for text in legend.get_texts():
            text.set_parse_math(False)
