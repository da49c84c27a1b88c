"""A picture of the kept rows: what the default phi, its controls and others gain in each comparison, with intervals."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.prove import PUBLISHED, SAME_NUMBERS
from mp_lightning.compare.results import METRICS
from mp_lightning.compare.summary import VERDICT_METRICS, Summary
from mp_lightning.compare.verdict import SEEDS_NEEDED
from mp_lightning.perturbation.files import DEFAULT_PHI

# Arms, what they are called, and how they look: the colours of Okabe and Ito. Of two that look alike one is shown, the
# first.
_MEAN = "no noise, its mean multiplier", "#e69f00", "s"
_CONSTANT = "constant noise of its moments", "#009e73", "^"
_ARMS = {
    f"metaperturb:{DEFAULT_PHI}": (DEFAULT_PHI, "#0072b2", "o"),
    f"metaperturb:{SAME_NUMBERS}": (f"{SAME_NUMBERS}, the same numbers", "#7fb2d9", "o"),
    f"shrink_only:{SAME_NUMBERS}": _MEAN,
    f"shrink_only:{DEFAULT_PHI}": _MEAN,
    f"fixed_noise:{SAME_NUMBERS}": _CONSTANT,
    f"fixed_noise:{DEFAULT_PHI}": _CONSTANT,
    f"metaperturb:{PUBLISHED}": ("the published phi", "#cc79a7", "D"),
    "dropblock": ("DropBlock, tuned", "#d55e00", "v"),
    "dropout": ("Dropout, tuned", "#56b4e9", "P"),
    "manifold_mixup": ("Manifold Mixup, tuned", "#222222", "X"),
    f"metaperturb:{DEFAULT_PHI}+manifold_mixup": (f"{DEFAULT_PHI} and Manifold Mixup", "#999999", "*"),
    f"fixed_noise:{SAME_NUMBERS}+manifold_mixup": ("constant noise and Manifold Mixup", "#8c6d31", "p"),
}
_WIDEST = {"accuracy": 20.0, "nll": 2.0}  # wider intervals are cut at the edge, or nothing else could be told apart
_LINE, _BETWEEN = 0.115, 1.2  # inches an arm; arms between two comparisons
_LEAST = 1.7  # arms of the height of a comparison, or the names of two touch
_TICKS = 7  # at most, or their labels touch
_LOOK = {"font.size": 7, "axes.titlesize": 8, "axes.spines.top": False, "axes.spines.right": False}


def shown(summaries: Mapping[str, Summary]) -> dict[str, Summary]:
    """The comparisons that have a verdict on the default phi, or on the one with the same numbers."""
    ours = list(_ARMS)[:2]
    return {
        name: summary
        for name, summary in summaries.items()
        if any(arm in summary.arms and len(summary.arms[arm].seeds) >= SEEDS_NEEDED for arm in ours)
    }


def write(summaries: Mapping[str, Summary], path: Path) -> bool:
    """Draw the comparisons into a PNG file; False, and no file, where there is nothing to show."""
    found = shown(summaries)
    if not found:
        path.unlink(missing_ok=True)
        return False
    heights: dict[tuple[str, str], float] = {}
    ticks: dict[str, float] = {}
    top = 0.0
    for name, summary in found.items():
        tested = [arm for arm in _ARMS if arm in summary.arms and len(summary.arms[arm].seeds) >= SEEDS_NEEDED]
        own = list({_ARMS[arm]: arm for arm in reversed(tested)}.values())[::-1]
        heights |= {(name, arm): top + number for number, arm in enumerate(own)}
        ticks[name] = top + (len(own) - 1) / 2
        top += max(len(own), _LEAST) + _BETWEEN
    with rc_context(_LOOK):
        figure = Figure((8, top * _LINE + 1.1), dpi=130, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, len(VERDICT_METRICS), sharey=True)
        for axes, metric in zip(panels, VERDICT_METRICS, strict=True):
            _draw(axes, metric, found, heights)
            axes.set_ylim(top - _BETWEEN, -1)
            axes.set_yticks(list(ticks.values()), [_two_lines(name, found[name].underfitted) for name in ticks])
            axes.tick_params(axis="y", length=0)
        handles = {
            label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=3, frameon=False)
        figure.savefig(path, metadata={"Software": None})
    return True


def _draw(axes: Axes, metric: str, summaries: Mapping[str, Summary], heights: Mapping[tuple[str, str], float]) -> None:
    kind = METRICS[metric]
    ends: list[float] = []
    axes.axvline(0, color="#808080", linewidth=1, zorder=0)
    for (name, arm), height in heights.items():
        label, colour, mark = _ARMS[arm]
        found = summaries[name].arms[arm].against_baseline[metric].difference
        if found.low is None or found.high is None:  # a run diverged
            continue
        mean, low, high = (kind.scale * value for value in (found.mean, found.low, found.high))
        axes.plot([low, high], [height, height], color=colour, linewidth=1.2)
        axes.plot(mean, height, mark, color=colour, markersize=4, label=label)
        ends += [mean] if high - low > _WIDEST[metric] else [mean, low, high]
    left, right = min(ends, default=0.0), max(ends, default=1.0)
    margin = 0.05 * (right - left) or 1.0  # all at one place
    axes.set_xlim(left - margin, right + margin)
    unit = "points" if metric == "accuracy" else kind.unit
    better = "right" if kind.higher_is_better else "left"
    axes.set_xlabel(f"{kind.label} minus that of no regularizer ({unit})\nbetter to the {better}")
    axes.xaxis.set_major_locator(MaxNLocator(_TICKS))
    axes.grid(axis="x", linewidth=0.4, alpha=0.5)


def _two_lines(name: str, underfitted: bool) -> str:
    """'target, images, network, training' as a name of two lines."""
    target, _, rest = name.partition(", ")
    images, network, *training = rest.split(", ")
    first = f"{target.replace('_', ' ')}, {network}, {images.removesuffix(' of 32 pixels')}"
    return "\n".join([first, ", ".join([*training, *(["underfitted"] if underfitted else [])])])
