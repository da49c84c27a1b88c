"""The table that a terminal shows at the end of a comparison."""

from rich import box
from rich.markup import escape
from rich.table import Table

from mp_lightning.compare.cells import difference_cell, heading
from mp_lightning.compare.statistics import Estimate
from mp_lightning.compare.summary import Summary
from mp_lightning.compare.texts import number_text, p_text

_SCORES = ("accuracy", "nll", "ece")


def terminal_table(summary: Summary) -> Table:
    """One line an arm, for a terminal of 100 columns: scores with the half width of their 95 % interval, and verdicts.

    The difference from the baseline is that of the metric which the headline is about, with its corrected p value.
    """
    metric = summary.metric
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("arm", overflow="fold")
    for name in _SCORES:
        table.add_column(heading(name), justify="right", no_wrap=True)
    table.add_column(f"minus {escape(summary.baseline)}", justify="right", no_wrap=True)
    table.add_column("corrected", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for name, arm in summary.arms.items():
        comparison = arm.against_baseline.get(metric)
        table.add_row(
            escape(name),
            *(_with_half_width(score, arm.estimates[score]) for score in _SCORES),
            difference_cell(metric, comparison).main,
            "" if comparison is None else p_text(comparison.p),
            arm.verdicts[metric].word if metric in arm.verdicts else "",
        )
    return table


def _with_half_width(metric: str, estimate: Estimate) -> str:
    mean = number_text(metric, estimate.mean)
    if estimate.low is None or estimate.high is None:
        return mean
    return f"{mean} ±{number_text(metric, (estimate.high - estimate.low) / 2)}"
