"""One HTML page of a comparison that needs no other file: verdict, tables, pictures, how to repeat it."""

import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from mp_lightning.compare.cells import Cell, Grid, modes_grid, scores_grid, tests_grid
from mp_lightning.compare.page_style import STYLE
from mp_lightning.compare.panels import Style, styles
from mp_lightning.compare.pictures import Picture, svg
from mp_lightning.compare.results import METRICS, Row
from mp_lightning.compare.statistics import POWER
from mp_lightning.compare.summary import Summary
from mp_lightning.compare.verdict import LEVEL, OVERFITTED, SEEDS_NEEDED
from mp_lightning.nested import flat

_NARROW = 2.5  # inches
_READING = (
    (
        "Runs in pairs",
        "The arms of one seed start from the same weights and see the same images in the same order with the same "
        "augmentation. So they are compared seed by seed, and what makes one seed easier than another drops out.",
    ),
    (
        "Intervals",
        "A 95 % interval, by Student's t, says where the mean over many more seeds would probably lie. It knows of "
        "other seeds only, not of other data.",
    ),
    (
        "Corrected p values",
        "Among many arms one looks good by chance. The p values are raised for the number of arms and metrics that are "
        f"tested (Holm's method); one of {LEVEL} or less leads to a verdict, given {SEEDS_NEEDED} seeds or more.",
    ),
    (
        "What could be seen",
        f"The smallest difference that so many seeds would have found with {POWER * 100:.0f} % probability. "
        "'No evidence' does not say that there is no effect: a smaller one could have been missed. More seeds see "
        "smaller effects.",
    ),
    (
        "Controls",
        "They have the same form as the learned perturbation, without what was learned. Of what is no better than the "
        "best control, nothing shows that learning is the reason of its gain.",
    ),
    (
        "Underfitted",
        f"Where the arm without regularizer does not reach {OVERFITTED * 100:.0f} % of its training images there is "
        "nothing to regularize, and nothing was tested.",
    ),
)


def page(
    summary: Summary, rows: Sequence[Row], drawn: Sequence[Picture], facts: Mapping[str, Any], notes: Sequence[str]
) -> str:
    """The page as text.

    Args:
        summary: of the rows.
        rows: all finished runs.
        drawn: the pictures.
        facts: how to repeat it, plain values; 'command', 'target', 'model', 'runs', 'seeds' and 'date' among them.
        notes: what is to be said beside the verdict.
    """
    title = f"Comparison on {facts['target']} with {facts['model']}"
    counts = {"arm": len(summary.arms), "seed": len(facts["seeds"]), "run": facts["runs"]}
    runs = ", ".join([*(f"{n} {what}{'' if n == 1 else 's'}" for what, n in counts.items()), facts["date"]])
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header><h1>{escape(title)}</h1><p>{escape(runs)}</p></header>
{_verdict(summary, notes)}
{_tables(summary, rows)}
<section id="pictures"><h2>Pictures</h2>
<div class="pictures">{"".join(map(_picture, drawn))}</div>
</section>
<section id="reading"><h2>How to read this</h2>
<dl>{"".join(f"<div><dt>{escape(what)}</dt><dd>{escape(text)}</dd></div>" for what, text in _READING)}</dl>
</section>
{_repeat(facts)}
</main>
</body>
</html>
"""


def _verdict(summary: Summary, notes: Sequence[str]) -> str:
    words = {verdict.sentence: verdict.word for arm in summary.arms.values() for verdict in arm.verdicts.values()}

    def shown(sentences: Sequence[str]) -> str:
        return "".join(f"<p>{_badge(words.get(one, 'no evidence'))} {_prose(one)}</p>" for one in sentences)

    others = [one for one in dict.fromkeys([*summary.also, *words]) if one not in summary.headline]
    more = f"<details><summary>Other verdicts, in {METRICS[summary.other_metric].label} and on controls</summary>"
    return (
        f'<section id="verdict"><h2>Verdict in {METRICS[summary.metric].label}</h2>{shown(summary.headline)}'
        f"{''.join(f'<p>{_prose(note)}</p>' for note in notes)}"
        f"{f'{more}{shown(others)}</details>' if others else ''}</section>"
    )


def _prose(sentence: str) -> str:
    """Text in which no line ends inside 'p = 0.02' or before a unit."""
    tied = re.sub(r"\bp ([=<]) (?=\d)", "p\u00a0\\1\u00a0", sentence)
    return escape(re.sub(r"(?<=\d) (?=(%|points|nats)\b|%)", "\u00a0", tied))


def _tables(summary: Summary, rows: Sequence[Row]) -> str:
    looks = styles(list(summary.arms), summary.baseline)
    parameters = {row.arm: row.parameters for row in rows}
    modes = modes_grid(summary, rows)
    parts = [
        '<section id="table"><h2>Scores on the test images</h2>',
        "<p>Means over the seeds with 95 % intervals. Differences are paired by seed, with corrected p values.</p>",
        _table(scores_grid(summary), looks, parameters),
    ]
    if modes.lines:
        parts += [
            "<h3>Arms with noise in evaluation</h3>",
            "<p><code>mc</code> averages the class probabilities of several noisy forwards, <code>mean</code> is one "
            "forward by the expected noise, as fast as a network without noise. The table above shows "
            "<code>mc</code>.</p>",
            _table(modes, looks, {}),
        ]
    parts += [
        "<h3>Tests behind the verdicts</h3>",
        "<p>'Could be seen' is the smallest difference that so many seeds would have found.</p>",
        _table(tests_grid(summary), looks, {}),
        "</section>",
    ]
    return "\n".join(parts)


def _table(grid: Grid, looks: Mapping[str, Style], parameters: Mapping[str, str]) -> str:
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in ("arm", *grid.headings))
    body = []
    for name, cells in grid.lines:
        detail = f"<small>{escape(parameters[name])}</small>" if parameters.get(name) else ""
        label = re.sub("([+_])", r"\1<wbr>", escape(name))
        row = "".join(map(_cell, cells))
        mark = f"--colour:{looks[name].colour};--corner:{'50%' if looks[name].marker == 'o' else 0}"
        body.append(f'<tr><th scope="row"><div class="arm" style="{mark}">{label}{detail}</div></th>{row}</tr>')
    return (
        f'<div class="wide" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _cell(cell: Cell) -> str:
    details = "".join(f"<small>{escape(part)}</small>" for part in cell.detail.split("; ") if part)
    main = _badge(cell.main) if cell.main in _BADGES else escape(cell.main)
    return f"<td>{main}{details}</td>"


_BADGES = {"helps": "good", "harms": "bad", "no evidence": "open", "underfitted": "open", "diverged": "bad"}


def _badge(word: str) -> str:
    return f'<b class="badge {_BADGES[word]}">{escape(word)}</b>'


def _picture(picture: Picture) -> str:
    small = " small" if picture.panels[0].width < _NARROW else ""
    whole = "" if len(picture.panels) == 1 and not small else ' class="whole"'
    panels = "".join(f"<div>{svg(panel)}</div>" for panel in picture.panels)
    return (
        f'<figure id="{picture.name}"{whole}><h3>{escape(picture.title)}</h3>'
        f'<div class="panels{small}" role="img" aria-label="{escape(picture.title)}">{panels}</div>'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


def _repeat(facts: Mapping[str, Any]) -> str:
    lines = []
    for key, value in _as_text({key: value for key, value in facts.items() if key not in ("command", "settings")}):
        lines.append(f'<tr><th scope="row"><div>{escape(key)}</div></th><td>{escape(value)}</td></tr>')
    settings = "\n".join(f"{key}: {value}" for key, value in _as_text(facts["settings"]))
    return (
        '<section id="repeat"><h2>How to repeat it</h2>'
        f"<pre>{escape(str(facts['command']))}</pre>"
        "<p>The same command in the same folder finds what is there and continues; with more seeds it adds them. One "
        "row a run is in <code>results.csv</code> beside this file, all numbers of this page in "
        "<code>summary.json</code>.</p>"
        f'<div class="wide" tabindex="0"><table class="facts"><tbody>{"".join(lines)}</tbody></table></div>'
        f"<h3>Settings</h3><pre>{escape(settings)}</pre></section>"
    )


def _as_text(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names with dots, and values."""
    return [
        (key, value if isinstance(value, str) else json.dumps(value, default=str))
        for key, value in flat(values).items()
    ]
