"""What the README, docs/phi.md and the card of the default phi say of it, from the kept rows of benchmarks.prove.

python -m benchmarks.headline
"""

import argparse
import json
from pathlib import Path

from benchmarks.difference import METRICS, difference, values
from benchmarks.prove import PROOFS, PUBLISHED, RESULTS, SAME_NUMBERS
from benchmarks.results_page import read
from mp_lightning.compare.results import Row
from mp_lightning.compare.statistics import Difference
from mp_lightning.perturbation.files import DEFAULT_PHI

ROOT = Path(__file__).parents[1]
README, PAGE = ROOT / "README.md", ROOT / "docs" / "phi.md"
CARD = ROOT / "src" / "mp_lightning" / "perturbation" / "bundled" / f"{DEFAULT_PHI}.json"
FEWEST = 3  # seeds of which a difference is told
OURS = f"metaperturb:{DEFAULT_PHI}"
CONSTANT, SHRINK = (f"{kind}:{SAME_NUMBERS}" for kind in ("fixed_noise", "shrink_only"))
MIXUP = "manifold_mixup"
TARGETS = {  # of the README's table: the comparisons with Conv4 in which it is trained long enough
    "imagenette": "imagenette-conv4",
    "CIFAR-10": "cifar10-conv4",
    "Fashion-MNIST": "fashion_mnist-conv4",
    "DTD": "dtd10-conv4-3000x64",
    "CUB": "cub-conv4-6000x64",
}
ARMS = {  # of the README's table; of several that say the same, that of which most was run
    f"**`{DEFAULT_PHI}`**": [OURS],
    "constant noise of the moments": [CONSTANT, f"fixed_noise:{DEFAULT_PHI}"],
    "the mean alone": [SHRINK, f"shrink_only:{DEFAULT_PHI}"],
    "the published phi": [f"metaperturb:{PUBLISHED}"],
    "Dropout, tuned": ["dropout"],
    "DropBlock, tuned": ["dropblock"],
    "Manifold Mixup, tuned": [MIXUP],
    f"**`{DEFAULT_PHI}` and Manifold Mixup**": [f"{OURS}+{MIXUP}"],
}
OTHERS = {  # of the table of docs/phi.md, likewise
    "no regularizer": ["none"],
    "the published phi": [f"metaperturb:{PUBLISHED}"],
    "DropBlock, tuned": ["dropblock"],
    "constant noise of the moments": [CONSTANT, f"fixed_noise:{DEFAULT_PHI}"],
    "the mean alone": [SHRINK, f"shrink_only:{DEFAULT_PHI}"],
    f"`{SAME_NUMBERS}`": [f"metaperturb:{SAME_NUMBERS}"],
}
PAIRS = {
    "against no phi": (OURS, "none"),
    f"against {SAME_NUMBERS}": (OURS, f"metaperturb:{SAME_NUMBERS}"),
    f"against constant noise of the moments of {SAME_NUMBERS}": (OURS, CONSTANT),
    "against constant noise of its own moments": (OURS, f"fixed_noise:{DEFAULT_PHI}"),
    f"against the mean of {SAME_NUMBERS} alone": (OURS, SHRINK),
    "against its own mean alone": (OURS, f"shrink_only:{DEFAULT_PHI}"),
    "against the published phi": (OURS, f"metaperturb:{PUBLISHED}"),
    "against tuned Dropout": (OURS, "dropout"),
    "against tuned DropBlock": (OURS, "dropblock"),
    "against tuned Manifold Mixup": (OURS, MIXUP),
    "with tuned Manifold Mixup at once, against no phi": (f"{OURS}+{MIXUP}", "none"),
    "with tuned Manifold Mixup at once, against Manifold Mixup alone": (f"{OURS}+{MIXUP}", MIXUP),
    "with tuned Manifold Mixup at once, against constant noise with it": (f"{OURS}+{MIXUP}", f"{CONSTANT}+{MIXUP}"),
}


def both(rows: list[Row], arm: str, other: str) -> tuple[Difference, Difference] | None:
    """In accuracy (points) and in NLL (nats); None where too few seeds have both arms."""
    accuracy, nll = (difference(values(rows, arm, other, score), FEWEST) for score in METRICS.values())
    return None if accuracy is None or nll is None else (accuracy, nll)


def cell(rows: list[Row], arm: str, other: str) -> str:
    """Accuracy and NLL of an arm minus those of another, with half of their intervals."""
    found = both(rows, arm, other)
    if found is None:
        return "not run"
    accuracy, nll = (f"{of.mean:+.{digits}f} ± {half(of):.{digits}f}" for of, digits in zip(found, (1, 2), strict=True))
    seeds = "" if found[0].n >= 5 else f"<br>({found[0].n} seeds)"
    return f"{accuracy}<br>{nll}{seeds}"


def most_run(rows: list[Row], arms: list[str]) -> str:
    """Of several arms the one of which there are most rows."""
    return max(arms, key=lambda arm: sum(row.arm == arm for row in rows))


def half(of: Difference) -> float:
    """Half the width of an interval, which is symmetric."""
    assert of.low is not None and of.high is not None
    return (of.high - of.low) / 2


def table(headings: list[str], lines: dict[str, list[str]]) -> str:
    """In Markdown, each line under its name."""
    written = [f"| | {' | '.join(headings)} |", "|---" * (len(headings) + 1) + "|"]
    return "\n".join([*written, *(f"| {name} | {' | '.join(cells)} |" for name, cells in lines.items())])


def readme_table(comparisons: dict[str, list[Row]]) -> str:
    """One line an arm, one column a target: minus no regularizer."""
    names = {proof.name: str(proof) for proof in PROOFS}
    chosen = [comparisons[names[name]] for name in TARGETS.values()]
    lines = {label: [cell(rows, most_run(rows, arms), "none") for rows in chosen] for label, arms in ARMS.items()}
    return table(list(TARGETS), lines)


def page_table(comparisons: dict[str, list[Row]]) -> str:
    """One line a comparison, one column a rival: the default minus it."""
    chosen = {proof.short: comparisons.get(str(proof), []) for proof in PROOFS}
    chosen = {name: rows for name, rows in chosen.items() if both(rows, OURS, "none")}
    return table(
        list(OTHERS),
        {name: [cell(rows, OURS, most_run(rows, arms)) for arms in OTHERS.values()] for name, rows in chosen.items()},
    )


def words(name: str, arm: str, other: str, rows: list[Row]) -> str | None:
    """One line of the card."""
    found = both(rows, arm, other)
    if found is None:
        return None
    accuracy, nll = found
    told = f"{name}: {accuracy.mean:+.1f} ({accuracy.low:+.1f} to {accuracy.high:+.1f}), "
    told += f"{nll.mean:+.2f} ({nll.low:+.2f} to {nll.high:+.2f})"
    return told if accuracy.n == 5 else f"{told}, {accuracy.n} seeds"


def card_results(comparisons: dict[str, list[Row]]) -> dict[str, list[str]]:
    """What the card lists under 'results'."""
    chosen = {proof.short: comparisons.get(str(proof), []) for proof in PROOFS}
    told = {heading: [words(name, *pair, rows) for name, rows in chosen.items()] for heading, pair in PAIRS.items()}
    return {heading: [line for line in lines if line is not None] for heading, lines in told.items()}


def replaced(text: str, table: str, place: str) -> str:
    """A text with another table between its marks."""
    before, begin, rest = text.partition("<!-- python -m benchmarks.headline -->\n")
    _, end, after = rest.partition("\n<!-- end -->")
    if not begin or not end:
        raise SystemExit(f"{place} lacks the marks between which its table stands")
    return f"{before}{begin}{table}{end}{after}"


def write(comparisons: dict[str, list[Row]], readme: Path = README, page: Path = PAGE, card: Path = CARD) -> None:
    """Write the tables and the card's results anew."""
    for place, written in ((readme, readme_table(comparisons)), (page, page_table(comparisons))):
        place.write_text(replaced(place.read_text(encoding="utf-8"), written, place.name), encoding="utf-8")
    content = json.loads(card.read_text(encoding="utf-8"))
    content["results"] = {"how": content["results"]["how"], **card_results(comparisons)}
    card.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    write(read(RESULTS))


if __name__ == "__main__":
    main()
