"""The difference of two arms in each comparison that has both, with 95 % intervals and p values over seeds.

python -m benchmarks.difference metaperturb:tiny-imagenet-7 none
python -m benchmarks.difference metaperturb:tiny-imagenet-7 fixed_noise:tiny-imagenet-6 \\
    --only imagenette-conv4,cifar10-conv4 --mean --from-seed 5  # over seeds that were not known when more were run
python -m benchmarks.difference metaperturb:tiny-imagenet-6 fixed_noise:tiny-imagenet-6 \\
    --rows benchmarks/results/positive_control/compare.csv
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

from benchmarks.options import some_of
from benchmarks.prove import PROOFS, RESULTS
from benchmarks.results_page import read
from mp_lightning.compare.results import Row
from mp_lightning.compare.statistics import Difference, paired

Values = dict[int, tuple[float, float]]  # by seed, those of both arms
METRICS: dict[str, Callable[[Row], float]] = {"points": lambda row: 100 * row.accuracy, "nats": lambda row: row.nll}


def values(rows: list[Row], arm: str, other: str, score: Callable[[Row], float], from_seed: int = 0) -> Values:
    """The scores of two arms, of the seeds that both have."""
    of_arm, of_other = ({row.seed: score(row) for row in rows if row.arm == name} for name in (arm, other))
    seeds = sorted(seed for seed in of_arm.keys() & of_other.keys() if seed >= from_seed)
    return {seed: (of_arm[seed], of_other[seed]) for seed in seeds}


def difference(of: Values, fewest: int = 2) -> Difference | None:
    """The first arm minus the second; None where there are too few seeds."""
    return paired(*map(list, zip(*of.values(), strict=True))) if len(of) >= fewest else None


def mean(of_each: list[Values]) -> Values:
    """Of several comparisons, of the seeds that all of them have."""
    seeds = sorted(set.intersection(*map(set, of_each)))
    pairs = {seed: zip(*(of[seed] for of in of_each), strict=True) for seed in seeds}
    return {seed: tuple(map(fmean, both)) for seed, both in pairs.items()}  # type: ignore[misc]


def lines(
    comparisons: dict[str, list[Row]], arm: str, other: str, from_seed: int = 0, in_mean: bool = False
) -> list[str]:
    """Two for each comparison that has both arms, and two for their mean if it is wished for."""
    found = []
    for unit, score in METRICS.items():
        of_each = {name: values(rows, arm, other, score, from_seed) for name, rows in comparisons.items()}
        of_each = {name: of for name, of in of_each.items() if len(of) >= 2}
        if in_mean and of_each:
            of_each["mean"] = mean(list(of_each.values()))
        for name, of in of_each.items():
            told = difference(of)
            if told is not None:
                interval = f"{told.mean:+.2f} ({told.low:+.2f} to {told.high:+.2f}) {unit}"
                found.append(f"{name}: {interval}, p = {told.p:.2g}, {told.n} seeds")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = {proof.name: str(proof) for proof in PROOFS}
    parser.add_argument("arm")
    parser.add_argument("other")
    parser.add_argument("--only", help="some of the comparisons of benchmarks.prove, with commas; by default all")
    parser.add_argument("--mean", action="store_true", help="the mean of the comparisons as well")
    parser.add_argument("--from-seed", type=int, default=0)
    parser.add_argument("--rows", type=Path, default=RESULTS)
    given = parser.parse_args()
    if not given.rows.is_file():
        parser.error(f"--rows: '{given.rows}' is no file")
    comparisons = read(given.rows)
    if given.only is not None:
        chosen = [names[name] for name in some_of(parser, "only", given.only, list(names))]
        comparisons = {name: comparisons.get(name, []) for name in chosen}
    found = lines(comparisons, given.arm, given.other, given.from_seed, given.mean)
    if not found:
        known = sorted({row.arm for rows in comparisons.values() for row in rows})
        parser.error(f"no comparison has both in two seeds and more; its arms are {', '.join(known) or 'none at all'}")
    print("\n".join(found))


if __name__ == "__main__":
    main()
