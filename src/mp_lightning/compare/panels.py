"""What the pictures of a comparison draw, each on one pair of axes."""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, quantiles
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from mp_lightning.compare.cells import heading
from mp_lightning.compare.results import METRICS, Details, Row
from mp_lightning.compare.statistics import Estimate, is_finite

# Okabe and Ito's colours for all kinds of colour vision, without the yellow that cannot be seen on white; all of them
# can be seen on dark ground as well.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7")
_BASELINE = "#808080"
_LINES = ("-", (0, (4, 1.5)), (0, (1, 1.2)))
_MARKERS = ("o", "s", "^")
_LONGEST_NAME = 26  # characters that fit beside a panel
_FAR = 6  # interquartile ranges beyond which a dot is drawn at the edge, or nothing else could be told apart
_FAINT = 0.18
_MOST_BANDS = 4  # more would mix to a colour of none


class Style(NamedTuple):
    """How an arm looks in every picture."""

    colour: str
    line: str | tuple[int, tuple[float, ...]]
    marker: str


def styles(arms: Sequence[str], baseline: str) -> dict[str, Style]:
    """A look for each arm, told apart by the colour, and where these are used up by the lines and marks as well."""
    others = [arm for arm in arms if arm != baseline]
    looks = {baseline: Style(_BASELINE, "-", "o")}
    for number, arm in enumerate(others):
        again, colour = divmod(number, len(_COLOURS))
        looks[arm] = Style(_COLOURS[colour], _LINES[again % len(_LINES)], _MARKERS[again % len(_MARKERS)])
    return {arm: looks[arm] for arm in arms}


def short(names: Iterable[str], longest: int = _LONGEST_NAME) -> dict[str, str]:
    """Names that fit beside a panel, or into so many characters; longer ones where they would be alike."""
    whole = list(names)
    found = {name: _cut(name, longest) for name in whole}
    alike = [name for name in whole if list(found.values()).count(found[name]) > 1]
    while alike and longest < max(map(len, alike)):
        longest += 2
        found |= {name: _cut(name, longest) for name in alike}
        alike = [name for name in alike if list(found.values()).count(found[name]) > 1]
    return found


def _cut(name: str, longest: int) -> str:
    return name if len(name) <= longest else f"{name[: longest // 2 - 2]}...{name[1 - longest // 2 :]}"


def draw_scores(
    axes: Axes,
    metric: str,
    rows: Sequence[Row],
    estimates: Mapping[str, Estimate],
    looks: Mapping[str, Style],
    baseline: str,
) -> None:
    """One line an arm: a dot for each seed, the mean with its 95 % interval, and where the baseline's mean is.

    Args:
        axes: where.
        metric: one of METRICS.
        rows: of all arms.
        estimates: of the metric by arm.
        looks: of :func:`styles`.
        baseline: its mean is a line over all arms.
    """
    scale = METRICS[metric].scale
    values = {arm: [scale * getattr(row, metric) for row in rows if row.arm == arm] for arm in estimates}
    ends = [scale * end for found in estimates.values() for end in (found.low, found.high) if end is not None]
    low, high = _limits([value for own in values.values() for value in own], ends)
    if baseline in estimates and is_finite(estimates[baseline].mean):
        axes.axvline(scale * estimates[baseline].mean, color=_BASELINE, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    for height, (arm, own) in enumerate(values.items()):
        look, found = looks[arm], estimates[arm]
        finite = [value for value in own if is_finite(value)]
        for value in finite:
            beyond = "<" if value < low else ">" if value > high else None
            axes.plot(
                min(max(value, low), high), height + 0.2, beyond or look.marker, color=look.colour, alpha=0.55,
                markersize=4, markeredgewidth=0, clip_on=False,
            )  # fmt: skip
        if low <= scale * found.mean <= high:
            half = 0.0 if found.low is None or found.high is None else scale * (found.high - found.low) / 2
            axes.errorbar(
                scale * found.mean, height - 0.12, xerr=half or None, fmt=look.marker, color=look.colour,
                markersize=6.5, linewidth=1.6, capsize=3,
            )  # fmt: skip
        if len(finite) < len(own):
            axes.text(high, height - 0.12, f"{len(own) - len(finite)} not finite", ha="right", va="center", fontsize=7)
    margin = 0.05 * (high - low)
    axes.set_xlim(low - margin, high + margin)
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.set_yticks(range(len(values)), list(short(values).values()), parse_math=False)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(heading(metric))
    axes.grid(axis="x", alpha=_FAINT)
    axes.tick_params(axis="y", length=0)


def draw_curves(axes: Axes, details: Mapping[tuple[str, int], Details], looks: Mapping[str, Style]) -> None:
    """The training loss of each arm: the mean over its seeds, of few arms in a band from the least to the largest."""
    names = short(looks)
    for arm, look in looks.items():
        points = _by_step([one.curve for (of, _), one in details.items() if of == arm])
        if not points:
            continue
        steps, losses = list(points), list(points.values())
        marker = look.marker if len(points) == 1 else None
        axes.plot(
            steps, [fmean(own) for own in losses], color=look.colour, linestyle=look.line, linewidth=1.5,
            marker=marker, label=names[arm],
        )  # fmt: skip
        if len(looks) <= _MOST_BANDS:
            axes.fill_between(
                steps, [min(own) for own in losses], [max(own) for own in losses], color=look.colour, alpha=_FAINT,
                linewidth=0,
            )  # fmt: skip
    if axes.lines:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("training batches")
    axes.set_ylabel("training loss (logarithmic)")
    axes.grid(alpha=_FAINT)
    axes.margins(x=0.01)


def draw_reliability(axes: Axes, details: Sequence[Details], look: Style) -> None:
    """Accuracy over confidence, bins pooled over the seeds, larger dots for more images; calibrated is the diagonal.

    Args:
        axes: where.
        details: of all seeds of one arm.
        look: of the arm.
    """
    axes.plot([0, 1], [0, 1], color=_BASELINE, linewidth=1, linestyle=(0, (4, 3)))
    bins = pooled([one.reliability for one in details])
    total = sum(images for images, _, _ in bins)
    confidence, accuracy = [confident for _, confident, _ in bins], [right for _, _, right in bins]
    axes.plot(confidence, accuracy, color=look.colour, linewidth=1.2)
    sizes = [5 + 120 * images / total for images, _, _ in bins]
    axes.scatter(confidence, accuracy, s=sizes, color=look.colour, linewidths=0, clip_on=False, zorder=3)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_aspect("equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks([0, 0.5, 1], ["0", "0.5", "1"])
    axes.set_xlabel("confidence")
    axes.set_ylabel("accuracy")
    axes.grid(alpha=_FAINT)


def draw_multipliers(
    axes: Axes, details: Mapping[tuple[str, int], Details], looks: Mapping[str, Style], sites: Sequence[str]
) -> None:
    """Mean and standard deviation of the multiplier at each site by depth, averaged over the seeds.

    Args:
        axes: where.
        details: by arm and seed.
        looks: of :func:`styles`.
        sites: of :func:`sites_by_depth`.
    """
    place = {site: number for number, site in enumerate(sites, start=1)}
    shown = [arm for arm in looks if any(one.multiplier for (of, _), one in details.items() if of == arm)]
    axes.axhline(1, color=_BASELINE, linewidth=1, linestyle=(0, (4, 3)))
    names = short(shown)
    for number, arm in enumerate(shown):
        found: dict[int, list[tuple[float, float]]] = {}
        for (of, _), one in details.items():
            for site in one.multiplier if of == arm else ():
                if is_finite(site.mean) and is_finite(site.std):
                    found.setdefault(place[site.site], []).append((site.mean, site.std))
        aside = 0.6 * ((number + 0.5) / len(shown) - 0.5)
        look, depths = looks[arm], sorted(found)
        axes.errorbar(
            [depth + aside for depth in depths],
            [fmean(mean for mean, _ in found[depth]) for depth in depths],
            yerr=[fmean(std for _, std in found[depth]) for depth in depths],
            color=look.colour, linestyle=look.line, marker=look.marker, markersize=4.5, linewidth=1.1, capsize=2,
            label=names[arm],
        )  # fmt: skip
    axes.set_xlim(0.5, max(1, len(sites)) + 0.5)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True, min_n_ticks=1))
    axes.set_xlabel("site, from the image to the output")
    axes.set_ylabel("multiplier, mean ± std")
    axes.grid(axis="y", alpha=_FAINT)


def pooled(seeds: Sequence[Sequence[tuple[int, float, float]]]) -> list[tuple[int, float, float]]:
    """Bins that hold images, as (images, mean confidence, accuracy), the images of all seeds together."""
    together = []
    for every in zip(*filter(None, seeds), strict=True):
        same = [one for one in every if all(map(is_finite, one))]
        total = sum(images for images, _, _ in same)
        if total:
            mean = [sum(one[0] * one[which] for one in same if one[0]) / total for which in (1, 2)]
            together.append((total, mean[0], mean[1]))
    return together


def sites_by_depth(details: Mapping[tuple[str, int], Details]) -> list[str]:
    """Names of all sites that any arm has, in order; an arm may act at some of them only."""
    lists = sorted(([site.site for site in one.multiplier] for one in details.values()), key=len, reverse=True)
    return list(dict.fromkeys(site for sites in lists for site in sites))


def _by_step(curves: Sequence[Sequence[tuple[int, float]]]) -> dict[int, list[float]]:
    """By training batch the losses of the seeds that can be shown on a logarithmic axis."""
    points: dict[int, list[float]] = {}
    for curve in curves:
        for step, loss in curve:
            if is_finite(loss) and loss > 0:
                points.setdefault(step, []).append(loss)
    return dict(sorted(points.items()))


def _limits(dots: Sequence[float], ends: Sequence[float]) -> tuple[float, float]:
    """What an axis shows: all dots and ends of intervals but those that lie too far from the usual dots."""
    finite = [value for value in dots if is_finite(value)]
    if len(set(finite)) < 2:
        middle = finite[0] if finite else 0.0
        return middle - 0.5, middle + 0.5
    first, _, third = quantiles(finite, n=4)
    reach = _FAR * (third - first) or math.inf
    return max(min(*finite, *ends), first - reach), min(max(*finite, *ends), third + reach)
