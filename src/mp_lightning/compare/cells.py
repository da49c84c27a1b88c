"""The tables of a report as text, before any of them is laid out: one line an arm, two short texts a cell."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from mp_lightning.compare.results import METRICS, Row
from mp_lightning.compare.statistics import Difference, Estimate
from mp_lightning.compare.summary import VERDICT_METRICS, ArmSummary, Summary
from mp_lightning.compare.texts import number_text, p_text
from mp_lightning.compare.verdict import Comparison

_SCORES = ("accuracy", "nll", "brier", "ece")
_COSTS = ("step_ms", "memory_mb")
_ABSENT = "–"


class Cell(NamedTuple):
    """A number, and what is said of it in smaller letters."""

    main: str
    detail: str = ""


class Grid(NamedTuple):
    """A table: what the columns are called, and a line for each arm: its name and its cells."""

    headings: list[str]
    lines: list[tuple[str, list[Cell]]]


def estimate_cell(metric: str, estimate: Estimate) -> Cell:
    """A mean with its 95 % interval."""
    return Cell(number_text(metric, estimate.mean), _interval(metric, estimate)) if estimate.n else Cell(_ABSENT)


def difference_cell(metric: str, comparison: Comparison | None) -> Cell:
    """A paired difference with its 95 % interval."""
    if comparison is None or comparison.difference.n == 0:
        return Cell(_ABSENT)
    return Cell(number_text(metric, comparison.difference.mean, "+"), _interval(metric, comparison.difference, "+"))


def heading(metric: str) -> str:
    """The metric's name with its unit, such as 'accuracy (%)'."""
    label, unit = METRICS[metric].label, METRICS[metric].unit
    return f"{label} ({unit})" if unit else label


def scores_grid(summary: Summary) -> Grid:
    """Every metric of every arm, its differences from the baseline, and what a step costs."""
    columns: list[tuple[str, Callable[[ArmSummary], Cell]]] = [("seeds", lambda arm: Cell(str(len(arm.seeds))))]
    for metric in _SCORES:
        columns.append((heading(metric), _estimated(metric)))
        if metric in VERDICT_METRICS:
            columns.append((f"{METRICS[metric].label} minus {summary.baseline}", _against_baseline(metric)))
    columns += [(heading(metric), _estimated(metric)) for metric in ("gap", *_COSTS)]
    return Grid(
        [name for name, _ in columns],
        [(name, [cell(arm) for _, cell in columns]) for name, arm in summary.arms.items()],
    )


def noisy_arms(rows: Sequence[Row]) -> list[str]:
    """The arms with noise in evaluation, whose scores by expected noise are told beside."""
    return list(dict.fromkeys(row.arm for row in rows if row.inference == "mc"))


def modes_grid(summary: Summary, rows: Sequence[Row]) -> Grid:
    """For arms with noise in evaluation: the scores as an average of noisy forwards, and of one by expected noise."""
    headings = [f"{heading(metric)}, {mode}" for metric in _SCORES for mode in ("mc", "mean")]
    lines = []
    for name in noisy_arms(rows):
        estimates = summary.arms[name].estimates
        pairs = [(metric, key) for metric in _SCORES for key in (metric, f"mean_{metric}")]
        lines.append((name, [estimate_cell(metric, estimates[key]) for metric, key in pairs]))
    return Grid(headings, lines)


def tests_grid(summary: Summary) -> Grid:
    """What leads to the verdicts: both differences of each arm and metric, and the smallest effect that can be seen."""
    headings = [
        *("metric", "verdict", f"minus {summary.baseline}", "corrected", "could be seen"),
        *("best control", "minus control", "corrected"),
    ]
    lines = []
    for name, arm in summary.arms.items():
        for metric, verdict in arm.verdicts.items():
            against, control = arm.against_baseline.get(metric), arm.against_control.get(metric)
            smallest = None if against is None else against.difference.smallest
            cells = [
                Cell(heading(metric)),
                Cell(verdict.word),
                difference_cell(metric, against),
                Cell(_corrected(against)),
                Cell(_ABSENT if smallest is None else number_text(metric, smallest)),
                Cell(_ABSENT if control is None else control.other),
                difference_cell(metric, control),
                Cell(_corrected(control)),
            ]
            lines.append((name, cells))
    return Grid(headings, lines)


def _estimated(metric: str) -> Callable[[ArmSummary], Cell]:
    return lambda arm: estimate_cell(metric, arm.estimates[metric])


def _against_baseline(metric: str) -> Callable[[ArmSummary], Cell]:
    def cell(arm: ArmSummary) -> Cell:
        comparison = arm.against_baseline.get(metric)
        main, interval = difference_cell(metric, comparison)
        return Cell(main, "; ".join(filter(None, (interval, _corrected(comparison)))))

    return cell


def _corrected(comparison: Comparison | None) -> str:
    return "" if comparison is None else p_text(comparison.p)


def _interval(metric: str, found: Estimate | Difference, sign: str = "") -> str:
    """Its ends, but where they are shown as the same number, which is the mean."""
    if found.low is None or found.high is None:
        return ""
    low, high = (number_text(metric, end, sign, signed_zero=bool(sign)) for end in (found.low, found.high))
    return "" if low == high else f"{low} to {high}"
