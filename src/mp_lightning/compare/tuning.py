"""Hyperparameters of baselines, chosen on a validation part of the training images, with an equal budget for each."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from mp_lightning.compare.arms import KINDS, AnyArm, NamedArm, Part
from mp_lightning.compare.results import METRICS, Row

MOST_VALUES = min(len(kind.values) for kind in KINDS.values() if kind.parameter)
FIRST_SEED = 10**9  # of tuning, and up from there: none of the comparison's


@dataclass(frozen=True)
class Budget:
    """How much is tried for each hyperparameter.

    Attributes:
        values: of those that an arm knows so many are tried, in their order; with 1 the first is taken as it is.
        seeds: runs for each value.
    """

    values: int
    seeds: int


@dataclass(frozen=True)
class Tuned:
    """What was found for one regularizer.

    Attributes:
        arm: name of the regularizer.
        parameter: name of its hyperparameter.
        chosen: its value.
        tried: (value, mean of the metric on the validation part); empty if nothing was tried.
    """

    arm: str
    parameter: str
    chosen: float
    tried: tuple[tuple[float, float], ...] = ()


def untuned(arms: Iterable[AnyArm]) -> list[str]:
    """Regularizers that have a hyperparameter of which no value was given, each once."""
    parts = [part for arm in arms if isinstance(arm, NamedArm) for part in arm.parts]
    return list(dict.fromkeys(part.name for part in parts if part.kind.parameter and part.value is None))


def trials(name: str, budget: Budget) -> list[tuple[NamedArm, int]]:
    """The arms, with their seeds, that are run to tune a regularizer; it is tuned alone, also for a combination."""
    if budget.values < 2:
        return []
    values = KINDS[name].values[: budget.values]
    return [
        (NamedArm(f"{name}:{value:g}", (Part(name, value),)), FIRST_SEED + number)
        for value in values
        for number in range(budget.seeds)
    ]


def choose(name: str, rows: Sequence[Row], metric: str) -> Tuned:
    """The value with the best mean of the metric, of equal ones that with the best NLL, of these the first.

    Args:
        name: of the regularizer.
        rows: of its trials; with none the first value is taken.
        metric: one of :data:`~mp_lightning.compare.results.METRICS`.
    """
    kind = KINDS[name]
    assert kind.parameter is not None
    sign = -1.0 if METRICS[metric].higher_is_better else 1.0
    tried: dict[float, list[Row]] = {}
    for value in kind.values:
        own = [row for row in rows if row.arm == f"{name}:{value:g}"]
        if own:
            tried[value] = own

    def badness(value: float) -> tuple[float, float]:
        means = sign * fmean(getattr(row, metric) for row in tried[value]), fmean(row.nll for row in tried[value])
        # What diverged is worst; NaN compares with nothing.
        first, second = (mean if mean == mean else float("inf") for mean in means)
        return first, second

    if not tried:
        return Tuned(name, kind.parameter, kind.values[0])
    best = min(tried, key=badness)
    means = tuple((value, fmean(getattr(row, metric) for row in own)) for value, own in tried.items())
    return Tuned(name, kind.parameter, best, means)


def with_values(arm: AnyArm, tuned: Sequence[Tuned]) -> AnyArm:
    """The arm with what was found."""
    if not isinstance(arm, NamedArm):
        return arm
    values = {one.arm: one.chosen for one in tuned}
    parts = tuple(
        replace(part, value=values[part.name]) if part.value is None and part.name in values else part
        for part in arm.parts
    )
    return replace(arm, parts=parts)
