"""Differences with their intervals, as the pages tell them in sentences, are those of the kept rows."""

import csv
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from benchmarks.difference import Values, difference, mean, values
from benchmarks.headline import half
from benchmarks.prove import PROOFS
from benchmarks.results_page import read

from mp_lightning.perturbation.files import DEFAULT_PHI

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CARD = f"src/mp_lightning/perturbation/bundled/{DEFAULT_PHI}.json"
IN_MEAN = tuple(str(proof) for proof in PROOFS if proof.name in ("imagenette-conv4", "cifar10-conv4"))
SCORES = {
    "points": lambda row: 100 * row.accuracy,
    "nats": lambda row: row.nll,
    "ece": lambda row: row.ece,
}
NUMBER = r"[+-]?\d+\.\d+"
INTERVAL = rf"({NUMBER}) \(({NUMBER}) to ({NUMBER})\)"

Told = tuple[str, str, str]


def told(of: Values, digits: int) -> Told | None:
    found = difference(of)
    return found and tuple(unsigned(f"{value:.{digits}f}") for value in (found.mean, found.low, found.high))


def unsigned(number: str) -> str:
    """Without a plus, and without any sign before zero."""
    return number.lstrip("+-") if float(number) == 0 else number.lstrip("+")


def compared() -> Iterator[dict[str, Values]]:
    """The scores of all pairs of arms, in each comparison and in the mean of two, of all seeds and of later ones."""
    kept = read(RESULTS / "compare.csv")
    for name, row in tried():
        kept.get(name, []).append(row)
    others = (RESULTS / "positive_control" / "compare.csv", RESULTS / "own_module.csv")
    for comparisons in (kept, *map(read, others)):
        for first in (0, 5):
            pairs = {}
            for name, rows in comparisons.items():
                arms = sorted({row.arm for row in rows})
                for arm, other in itertools.permutations(arms, 2):
                    of = {unit: values(rows, arm, other, score, first) for unit, score in SCORES.items()}
                    if len(of["points"]) >= 2:
                        pairs[name, arm, other] = of
                        yield of
            for name, arm, other in pairs:
                both = [pairs.get((place, arm, other)) for place in IN_MEAN]
                if name == IN_MEAN[0] and all(both):
                    yield {unit: mean([of[unit] for of in both if of]) for unit in SCORES}


def tried() -> Iterator[tuple[str, SimpleNamespace]]:
    """Rows of other uses of a phi, whose times were not always kept."""
    with (RESULTS / "selection.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            scores = {name: float(row[name] or "nan") for name in ("accuracy", "nll", "ece")}
            yield row["comparison"], SimpleNamespace(arm=row["arm"], seed=int(row["seed"]), **scores)


@pytest.fixture(scope="module")
def known() -> tuple[set[Told], set[tuple[Told, Told]], set[tuple[str, str]]]:
    """Differences one by one, those in points beside those in nats, and those in points with half of the interval."""
    single, beside, halves = set(), set(), set()
    for of in compared():
        points, finer = (told(of["points"], digits) for digits in (1, 2))
        nats, finest = (told(of["nats"], digits) for digits in (2, 3))
        single |= {points, finer, nats, finest, told(of["ece"], 3)}
        beside.add((points, nats))
        halves.add((points[0], f"{half(difference(of['points'])):.1f}"))
    return single, beside, halves


def text_of(page: str) -> str:
    return " ".join((ROOT / page).read_text(encoding="utf-8").split())


def numbers(groups: tuple[str, ...]) -> Told:
    return tuple(map(unsigned, groups))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("page", "fewest"), [("README.md", 8), ("docs/phi.md", 40), ("docs/compare.md", 4), (CARD, 100)]
)
def test_an_interval_of_a_page_is_that_of_two_arms_in_the_kept_rows(page: str, fewest: int, known):
    single, *_ = known
    found = [(match[0], numbers(match.groups())) for match in re.finditer(INTERVAL, text_of(page))]
    assert len(found) >= fewest
    assert [text for text, of in found if of not in single] == []


@pytest.mark.parametrize(("page", "fewest"), [("docs/phi.md", 10), (CARD, 50)])
def test_points_and_nats_that_stand_together_are_of_the_same_two_arms(page: str, fewest: int, known):
    _, beside, _ = known
    found = list(re.finditer(f"{INTERVAL}, {INTERVAL}", text_of(page)))
    pairs = [(match[0], (numbers(match.groups()[:3]), numbers(match.groups()[3:]))) for match in found]
    pairs = [(text, of) for text, of in pairs if len(of[1][0].partition(".")[2]) == 2]
    assert len(pairs) >= fewest
    assert [text for text, of in pairs if of not in beside] == []


def test_half_of_an_interval_in_the_sentences_of_the_readme_is_that_of_two_arms(known):
    *_, halves = known
    found = re.findall(rf"({NUMBER}) ± ({NUMBER})", text_of("README.md").partition("<!-- end -->")[2])
    assert len(found) >= 5
    assert [of for of in found if (unsigned(of[0]), of[1]) not in halves] == []
