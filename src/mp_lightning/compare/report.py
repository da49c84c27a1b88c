"""What a comparison leaves to be read: summary.json, summary.md, report.html, and the pictures as files."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from mp_lightning.compare.cells import Cell, Grid, modes_grid, scores_grid, tests_grid
from mp_lightning.compare.page import page
from mp_lightning.compare.pictures import pictures, write_png
from mp_lightning.compare.results import Details, Row
from mp_lightning.compare.summary import Summary
from mp_lightning.compare.texts import acted_texts
from mp_lightning.compare.tuning import Budget, Tuned
from mp_lightning.runs import unusable
from mp_lightning.versions import versions
from mp_lightning.whole import write_json, write_text, write_whole


def _today() -> str:
    return datetime.now(UTC).date().isoformat()


@dataclass(frozen=True)
class Repeat:
    """What it takes to make the same comparison again, beside its rows.

    Attributes:
        command: the command line, or the call in Python.
        settings: plain values, nested or not.
        budget: of tuning.
        tuned: what was found with it.
        versions: of Python and of the libraries that decide the results.
        date: of the report, ISO 8601, UTC.
    """

    command: str
    settings: Mapping[str, Any]
    budget: Budget
    tuned: Sequence[Tuned] = ()
    versions: Mapping[str, str] = field(default_factory=versions)
    date: str = field(default_factory=_today)


def write_report(
    folder: Path, summary: Summary, rows: Sequence[Row], details: Mapping[tuple[str, int], Details], how: Repeat
) -> None:
    """Write summary.json, summary.md, report.html and a PNG file for each picture; each is replaced as a whole.

    Args:
        folder: where; it must exist.
        summary: of the rows.
        rows: all finished runs.
        details: by arm and seed.
        how: how to make the comparison again.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    facts = repeat_facts(rows, how)
    drawn = pictures(summary, rows, details)
    notes = acted_texts(details)
    plain = json.dumps({**summary.to_dict(), "repeat": facts}, default=str)
    try:
        # JSON knows no NaN, which a tuning that diverged leaves.
        write_json(folder / "summary.json", json.loads(plain, parse_constant=lambda name: None))
        write_text(folder / "summary.md", markdown(summary, rows, facts, notes))
        for picture in drawn:
            write_whole(folder / f"{picture.name}.png", partial(write_png, picture))
        write_text(folder / "report.html", page(summary, rows, drawn, facts, notes))
    except OSError as error:
        raise unusable(folder, error) from error


def repeat_facts(rows: Sequence[Row], how: Repeat) -> dict[str, Any]:
    """How to repeat a comparison, as plain values in the order in which they are shown."""
    return {
        "command": how.command,
        "target": ", ".join(dict.fromkeys(row.target for row in rows)),
        "model": ", ".join(dict.fromkeys(row.model for row in rows)),
        "runs": len(rows),
        "seeds": sorted({row.seed for row in rows}),
        "device": ", ".join(dict.fromkeys(row.device for row in rows)),
        "date": how.date,
        "versions": dict(how.versions),
        "tuning": {
            "budget": _budget(how),
            **{one.arm: _tuned(one) for one in how.tuned},
        },
        "settings": dict(how.settings),
    }


def markdown(summary: Summary, rows: Sequence[Row], facts: Mapping[str, Any], notes: Sequence[str]) -> str:
    """The report as Markdown: verdict, tables, how to repeat it.

    Args:
        summary: of the rows.
        rows: all finished runs.
        facts: of :func:`repeat_facts`.
        notes: what is to be said beside the verdict.
    """
    parts = [
        f"# {_literal(facts['target'])} with {_literal(facts['model'])}",
        *(f"**{_literal(sentence)}**" for sentence in summary.headline),
        *map(_literal, [*summary.also, *notes]),
        "## Scores\n\nMeans over the seeds with 95 % intervals; differences are paired by seed, p values corrected.",
        table(scores_grid(summary)),
    ]
    modes = modes_grid(summary, rows)
    if modes.lines:
        parts += ["## Noise in evaluation: `mc` and `mean`", table(modes)]
    parts += ["## Tests", table(tests_grid(summary))]
    repeat = json.dumps({key: value for key, value in facts.items() if key != "command"}, indent=2, default=str)
    # Longer than any fence within.
    parts += ["## How to repeat it", f"`````sh\n{facts['command']}\n`````", f"`````json\n{repeat}\n`````"]
    parts.append("One row a run is in `results.csv`; `report.html` shows this with pictures.")
    return "\n\n".join(parts) + "\n"


def _budget(how: Repeat) -> str:
    if not how.tuned or not any(one.tried for one in how.tuned):
        return "nothing was tuned"
    values, seeds = how.budget.values, how.budget.seeds
    return (
        f"{values} values of each hyperparameter, {seeds} run{'' if seeds == 1 else 's'} each, judged on a part of the "
        "training images"
    )


def _tuned(one: Tuned) -> str:
    found = f"{one.parameter}={one.chosen:g}"
    tried = ", ".join(f"{value:g}: {score:.4g}" for value, score in one.tried)
    return f"{found} ({tried})" if tried else found


def table(grid: Grid) -> str:
    """A table of a report in Markdown."""
    lines = [["arm", *map(_literal, grid.headings)], ["---"] * (1 + len(grid.headings))]
    lines += [[_literal(name), *map(_text, cells)] for name, cells in grid.lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(cell: Cell) -> str:
    return _literal(f"{cell.main} ({cell.detail})" if cell.detail else cell.main)


def _literal(text: str) -> str:
    """Text in which nothing is markup."""
    line = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{letter}" if letter in "\\`*_[]|#" else letter for letter in line)
