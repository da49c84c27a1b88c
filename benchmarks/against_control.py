"""The default phi minus constant noise of the moments with Conv4, by target and in the mean of the targets.

python -m benchmarks.against_control                  # over all seeds
python -m benchmarks.against_control --from-seed 5    # over those that were not known when more were run
python -m benchmarks.against_control --arms metaperturb:tiny-imagenet-6 fixed_noise:tiny-imagenet-6 \\
    --rows benchmarks/results/positive_control/compare.csv
python -m benchmarks.against_control --targets imagenette --seeds 5 --arms \\
    metaperturb:tiny-imagenet-6+manifold_mixup fixed_noise:tiny-imagenet-6+manifold_mixup
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.prove import RESULTS, SAME_NUMBERS
from benchmarks.results_page import read
from mp_lightning.compare.results import Row
from mp_lightning.compare.statistics import paired
from mp_lightning.perturbation.files import DEFAULT_PHI

ARMS = (f"metaperturb:{DEFAULT_PHI}", f"fixed_noise:{SAME_NUMBERS}")
TARGETS = ("imagenette", "cifar10")
Values = tuple[list[float], list[float]]  # of the two arms, seed by seed


def of_target(rows: list[Row], arms: Sequence[str], seeds: range, score: Callable[[Row], float]) -> Values:
    """The scores of both arms on one target."""
    scores = {(row.arm, row.seed): score(row) for row in rows}
    return tuple([scores[arm, seed] for seed in seeds] for arm in arms)  # type: ignore[return-value]


def lines(comparisons: dict[str, list[Row]], arms: Sequence[str], seeds: range) -> list[str]:
    """One for each target, and one for their mean; the difference with its 95 % interval and p value."""
    found = []
    for unit, score in (("points", lambda row: 100 * row.accuracy), ("nats of NLL", lambda row: row.nll)):
        by_target = {name: of_target(rows, arms, seeds, score) for name, rows in comparisons.items()}
        both = zip(*by_target.values(), strict=True)
        if len(comparisons) > 1:
            by_target["mean"] = tuple([fmean(values) for values in zip(*arm, strict=True)] for arm in both)
        for name, values in by_target.items():
            of = paired(*values)
            found.append(
                f"{name:<14}{of.mean:+.2f} ({of.low:+.2f} to {of.high:+.2f}) {unit}, p = {of.p:.2g}, {of.n} seeds"
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=RESULTS)
    parser.add_argument("--from-seed", type=int, default=0, choices=range(14), metavar="0 to 13")
    parser.add_argument("--arms", nargs=2, default=ARMS, help="the first minus the second")
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    parser.add_argument("--seeds", type=int, default=15)
    given = parser.parse_args()
    if not given.rows.is_file():
        parser.error(f"--rows: '{given.rows}' does not exist")
    if given.seeds < given.from_seed + 2:
        parser.error(f"--seeds {given.seeds}: a difference needs two seeds from --from-seed {given.from_seed} on")
    comparisons = read(given.rows)
    training = "50 images a class of 32 pixels, conv4, 1200 steps of 64, Adam 0.003"
    try:
        chosen = {target: comparisons[f"{target}, {training}"] for target in given.targets}
        print("\n".join(lines(chosen, given.arms, range(given.from_seed, given.seeds))))
    except KeyError as error:
        parser.error(f"--rows: '{given.rows}' lacks {error}")


if __name__ == "__main__":
    main()
