"""What the README and the card of the default phi say of it, from the kept rows of benchmarks.prove.

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

README = Path(__file__).parents[1] / "README.md"
CARD = Path(__file__).parents[1] / "src" / "mp_lightning" / "perturbation" / "bundled" / f"{DEFAULT_PHI}.json"
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


def cell(rows: list[Row], arms: list[str]) -> str:
    """Accuracy and NLL minus those of no regularizer, with half of their intervals."""
    found = both(rows, max(arms, key=lambda arm: sum(row.arm == arm for row in rows)), "none")
    if found is None:
        return "not run"
    accuracy, nll = (f"{of.mean:+.{digits}f} ± {half(of):.{digits}f}" for of, digits in zip(found, (1, 2), strict=True))
    seeds = "" if found[0].n >= 5 else f"<br>({found[0].n} seeds)"
    return f"{accuracy}<br>{nll}{seeds}"


def half(of: Difference) -> float:
    """Half the width of an interval, which is symmetric."""
    assert of.low is not None and of.high is not None
    return (of.high - of.low) / 2


def readme_table(comparisons: dict[str, list[Row]]) -> str:
    """One line an arm, one column a target."""
    lines = [f"| | {' | '.join(TARGETS)} |", "|---" * (len(TARGETS) + 1) + "|"]
    names = {proof.name: str(proof) for proof in PROOFS}
    chosen = [comparisons[names[name]] for name in TARGETS.values()]
    lines += [f"| {label} | {' | '.join(cell(rows, arms) for rows in chosen)} |" for label, arms in ARMS.items()]
    return "\n".join(lines)


def words(comparison: str, arm: str, other: str, rows: list[Row]) -> str | None:
    """One line of the card."""
    found = both(rows, arm, other)
    if found is None:
        return None
    accuracy, nll = found
    target, _, *training = comparison.split(", ")
    told = f"{', '.join([target, *training])}: accuracy {accuracy.mean:+.1f} ({accuracy.low:+.1f} to "
    told += f"{accuracy.high:+.1f}), NLL {nll.mean:+.2f} ({nll.low:+.2f} to {nll.high:+.2f})"
    return told if accuracy.n in (5, 15) else f"{told} ({accuracy.n} seeds)"


def card_results(comparisons: dict[str, list[Row]]) -> dict[str, list[str]]:
    """What the card lists under 'results'."""
    told = {label: [words(name, *pair, rows) for name, rows in comparisons.items()] for label, pair in PAIRS.items()}
    return {label: [line for line in lines if line is not None] for label, lines in told.items()}


def replaced(text: str, table: str) -> str:
    """A text with another table between its marks."""
    before, begin, rest = text.partition("<!-- python -m benchmarks.headline -->\n")
    _, end, after = rest.partition("\n<!-- end -->")
    if not begin or not end:
        raise SystemExit("README.md lacks the marks between which its table stands")
    return f"{before}{begin}{table}{end}{after}"


def write(comparisons: dict[str, list[Row]], readme: Path = README, card: Path = CARD) -> None:
    """Write the table and the card's results anew."""
    readme.write_text(replaced(readme.read_text(encoding="utf-8"), readme_table(comparisons)), encoding="utf-8")
    content = json.loads(card.read_text(encoding="utf-8"))
    content["results"] = {"how": content["results"]["how"], **card_results(comparisons)}
    card.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    write(read(RESULTS))


if __name__ == "__main__":
    main()
