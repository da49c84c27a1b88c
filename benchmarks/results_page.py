"""docs/results.md and its picture, from the kept rows of benchmarks.prove.

python -m benchmarks.results_page
"""

import argparse
import csv
from pathlib import Path
from typing import get_type_hints

from benchmarks import results_picture
from benchmarks.prove import PUBLISHED, RESULTS
from mp_lightning.compare.cells import difference_cell, scores_grid, tests_grid
from mp_lightning.compare.report import table
from mp_lightning.compare.results import Row
from mp_lightning.compare.summary import CONTROLS, VERDICT_METRICS, Summary, summarize

PAGE = Path(__file__).parents[1] / "docs" / "results.md"
_INTRODUCTION = """# Does it help?

Made by `python -m benchmarks.results_page` from [compare.csv](../benchmarks/results/compare.csv), one row a run, which
`python -m benchmarks.prove` makes by the command `compare`. `metaperturb:NAME` is a phi that comes with the package,
`metaperturb:published.safetensors` the one that the authors of the paper published, at full strength. The controls
`fixed_noise:NAME` and `shrink_only:NAME` have constant noise, or none, with the moments that the multiplier of that phi
has at each site at the end of one more run, and its strength, noise and sites; it is these that any other phi is
compared with as well, and a combination with the control that is combined alike, where it was run. These moments are in
[moments](../benchmarks/results/moments), but for those on DTD and CUB with Conv4 and on imagenette with ResNet20, which
were not kept; another such run would give others, which intervals leave out. Where the strength of a phi follows the
training loss, that of its controls does too, each by the loss of its own run. Scores are of one forward by expected
noise, with batch norm re-estimated for it. What is fine-tuned starts from weights by `python -m benchmarks.pretrain
--model resnet20 --steps 6000 --lr 0.003` on all of Tiny ImageNet at 32 pixels, which get 22.7 % of its test images
right and are not kept. All arms, `none` too, have random crops and flips, a weight decay of 5e-4, and a learning rate
that is multiplied by 0.3 at 60 and at 85 % of the steps. Intervals are 95 % t intervals over seeds; p values of paired
t tests are corrected by Holm's method over the arms and over accuracy and NLL. The csv file says what each run was made
on; times were taken beside other work, and are not to be compared.
"""
_CAPTION = "Differences from no regularizer in accuracy and NLL, with 95 % intervals over seeds, of each comparison"


def read(path: Path) -> dict[str, list[Row]]:
    """The rows of each comparison, in the order in which they were made."""
    kinds, found = get_type_hints(Row), {}
    try:
        with path.open(newline="") as file:
            for values in csv.DictReader(file):
                row = Row(**{name: kinds[name](values[name]) for name in kinds})
                found.setdefault(values["comparison"], []).append(row)
    except (KeyError, ValueError, TypeError) as error:
        raise SystemExit(f"'{path}' is no table of benchmarks.prove ({error!r}); name another with --rows") from error
    return found


def judged(rows: list[Row]) -> Summary:
    """The verdict on the bundled phi, whose controls carry its name."""
    arms = list(dict.fromkeys(row.arm for row in rows))
    ours = [arm for arm in arms if arm.startswith("metaperturb:") and PUBLISHED not in arm]
    controls = [arm for arm in arms if any(part.partition(":")[0] in CONTROLS for part in arm.split("+"))]
    return summarize(rows, focus=ours, controls=controls)


def overview(summaries: dict[str, Summary]) -> str:
    """One line a comparison and arm: differences from no regularizer, and verdicts. A comparison is named once."""
    headings = ("comparison", "arm", "accuracy minus none, points", "verdict", "NLL minus none", "verdict")
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for name, summary in summaries.items():
        judged_arms = {arm: of_arm for arm, of_arm in summary.arms.items() if of_arm.verdicts}
        for place, (arm, of_arm) in enumerate(judged_arms.items()):
            cells = []
            for metric in VERDICT_METRICS:
                cell = difference_cell(metric, of_arm.against_baseline.get(metric))
                cells += [f"{cell.main} ({cell.detail})" if cell.detail else cell.main, of_arm.verdicts[metric].word]
            lines.append(f"| {name if place == 0 else ''} | `{arm}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def page(comparisons: dict[str, list[Row]], summaries: dict[str, Summary], picture: str | None) -> str:
    parts = [_INTRODUCTION.strip(), *([f"![{_CAPTION}]({picture})"] if picture else []), overview(summaries)]
    for name, summary in summaries.items():
        seconds = sum(row.seconds for row in comparisons[name]) / 60
        devices = ", ".join(sorted({row.device for row in comparisons[name]}))
        parts += [
            f"## {name}",
            *(f"**{sentence}**" for sentence in summary.headline),
            *summary.also,
            table(scores_grid(summary)),
            table(tests_grid(summary)),
            f"{len(comparisons[name])} runs, {seconds:.0f} minutes on {devices} in all.",
        ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=PAGE)
    given = parser.parse_args()
    if not given.rows.is_file():
        parser.error(f"--rows: '{given.rows}' does not exist; make it with python -m benchmarks.prove")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    comparisons = read(given.rows)
    summaries = {name: judged(rows) for name, rows in comparisons.items()}
    picture = given.out.with_suffix(".png")
    drawn = results_picture.write(summaries, picture)
    given.out.write_text(page(comparisons, summaries, picture.name if drawn else None), encoding="utf-8")
    print(f"Written: {given.out.name}, of {given.rows.name}")


if __name__ == "__main__":
    main()
