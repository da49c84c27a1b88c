"""From a plan to its report: make the runs, judge them, write what a comparison leaves, and say it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from mp_lightning.compare.arms import AnyArm, NamedArm, follows_the_loss
from mp_lightning.compare.comparison import Plan, carry_out, check_plan
from mp_lightning.compare.console import for_tables
from mp_lightning.compare.display import Bars
from mp_lightning.compare.report import Repeat, write_report
from mp_lightning.compare.results import METRICS, Row
from mp_lightning.compare.summary import Summary, summarize
from mp_lightning.compare.table import terminal_table
from mp_lightning.compare.texts import acted_texts
from mp_lightning.compare.tuning import Tuned
from mp_lightning.quiet import quiet
from mp_lightning.sites.strength import SHORTEST_RUN

_WIDTH = 110  # of the table, where the output is not a terminal


@dataclass(frozen=True)
class Comparison:
    """What a comparison found, and where it is written.

    Attributes:
        folder: with results.csv, summary.json, summary.md, report.html and the pictures.
        rows: one for each run, arm by arm.
        summary: estimates, differences and verdicts.
        tuned: what was chosen for the hyperparameters of baselines.
    """

    folder: Path
    rows: list[Row]
    summary: Summary
    tuned: list[Tuned]

    def __str__(self) -> str:
        return "\n".join(self.summary.headline)


def conclude(plan: Plan, folder: Path, console: Console, command: str, settings: dict[str, Any]) -> Comparison:
    """Make the runs that are missing in a folder, and write and print what they show.

    Args:
        plan: what to compare.
        folder: the run folder; nobody else may work in it.
        console: where progress, the table and the verdict are printed.
        command: what repeats the comparison.
        settings: what the report lists as such, plain values.

    Raises:
        UserError: something that was given cannot be used, or the folder not be written.
    """
    _say_what_acts(console, plan)
    with quiet():
        check_plan(plan)
        outcome = carry_out(plan, folder, Bars(console, plan.experiment.steps))
    summary = summarize(
        outcome.rows,
        metric=plan.metric,
        focus=_focus(outcome.arms),
        controls=[arm.name for arm in outcome.arms if arm.control],
    )
    shown = {**settings, "arms": [arm.name for arm in outcome.arms], "seeds": len(plan.seeds)}
    how = Repeat(command, shown, plan.budget, outcome.tuned)
    write_report(folder, summary, outcome.rows, outcome.details, how)
    comparison = Comparison(folder, outcome.rows, summary, outcome.tuned)
    _say(console, comparison, acted_texts(outcome.details))
    return comparison


def _say_what_acts(console: Console, plan: Plan) -> None:
    """Say where the runs are too short for all of the strength."""
    steps = plan.experiment.steps
    arms = [arm.name for arm in plan.arms if follows_the_loss(arm)]
    if arms and plan.experiment.ramp and steps is not None and steps < SHORTEST_RUN:
        console.print(
            f"{', '.join(arms)}: in {steps} steps at most {steps / SHORTEST_RUN:.0%} of the strength acts; "
            f"{SHORTEST_RUN} reach all of it.\n",
            markup=False,
        )


def _focus(arms: Sequence[AnyArm]) -> list[str]:
    """What the headline is about: what was learned first, then other regularizers; no controls."""
    learned = [arm.name for arm in arms if isinstance(arm, NamedArm) and _is_learned(arm)]
    return [*learned, *(arm.name for arm in arms if arm.name not in learned and not arm.control)]


def _is_learned(arm: NamedArm) -> bool:
    return any(part.kind.role == "learned" for part in arm.parts)


def _say(console: Console, comparison: Comparison, acted: Sequence[str]) -> None:
    for_tables(console, _WIDTH).print(terminal_table(comparison.summary))
    for sentence in acted:
        console.print(sentence, markup=False)
    place = escape(str(comparison.folder))
    console.print(f"\nWritten to [bold]{place}[/bold]: report.html, results.csv, summary.md, summary.json, pictures")
    summary, target = comparison.summary, escape(comparison.rows[0].target)
    for metric, sentences in ((summary.other_metric, summary.also), (summary.metric, summary.headline)):
        if sentences:
            console.print(f"\nVerdict in {METRICS[metric].label}, on the test images of {target}:")
        for sentence in sentences:
            console.print(f"  {sentence}", markup=False)
