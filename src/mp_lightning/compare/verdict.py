"""The verdict on an arm in one metric: a word, and a sentence with its numbers."""

import math
from dataclasses import dataclass
from typing import Literal

from mp_lightning.compare.results import METRICS
from mp_lightning.compare.statistics import Difference
from mp_lightning.compare.texts import number_text, p_text

LEVEL = 0.05
SEEDS_NEEDED = 5
OVERFITTED = 0.99 - 1e-6  # train accuracy, of rows that hold it as float32

Word = Literal["helps", "harms", "no evidence", "underfitted", "diverged"]


@dataclass(frozen=True)
class Comparison:
    """An arm against another in one metric.

    Attributes:
        metric: one of METRICS.
        other: the arm that is compared with.
        difference: of the arm minus the other, over the seeds that both have, in the unit in which the metric is
            stored; its smallest effect is at the level that one of the tests has which are corrected together.
        p: of the difference, corrected; None where there is none.
        arms, metrics: how many arms and metrics it is corrected for.
    """

    metric: str
    other: str
    difference: Difference
    p: float | None
    arms: int
    metrics: int

    @property
    def better(self) -> bool:
        """Whether the arm is better than the other, corrected for all that is tested, over five seeds or more."""
        higher = METRICS[self.metric].higher_is_better
        return self.decided and (self.difference.mean > 0) == higher

    @property
    def decided(self) -> bool:
        """Whether the arm differs from the other, corrected for all that is tested, over five seeds or more."""
        return self.difference.n >= SEEDS_NEEDED and self.p is not None and self.p <= LEVEL


@dataclass(frozen=True)
class Verdict:
    """What is said of an arm in one metric."""

    word: Word
    sentence: str


def verdict(arm: str, against_baseline: Comparison, against_control: Comparison | None) -> Verdict:
    """What the seeds show of an arm.

    Args:
        arm: its name.
        against_baseline: its comparison with the baseline.
        against_control: its comparison with the best control, if there is one.
    """
    shown, n = _numbers(against_baseline), against_baseline.difference.n
    if n == 0:
        return nothing_to_compare(f"{arm} has no finished seed in common with {against_baseline.other}", arm)
    if against_baseline.better:
        control = "" if against_control is None else f" {_against_control(against_control)}"
        return Verdict("helps", f"{arm} helps: {shown}.{control}")
    if against_baseline.decided:
        return Verdict("harms", f"{arm} harms: {shown}.")
    if n == 1:
        remark = "; nothing can be said of one seed, five are needed for a verdict"
    elif n < SEEDS_NEEDED:
        remark = "; five seeds are needed for a verdict"
    elif against_baseline.difference.smallest is not None:
        smallest = _size(against_baseline.metric, against_baseline.difference.smallest)
        remark = f"; {n} seeds could have seen a difference of {smallest}"
    else:
        remark = ""
    return Verdict("no evidence", f"{arm}: no evidence: {shown}{remark}.")


def underfitted(baseline: str, train_accuracy: float) -> Verdict:
    """The verdict on every arm where the baseline does not overfit.

    Args:
        baseline: its name.
        train_accuracy: its mean over the seeds, 0 to 1.
    """
    # Rounded down: 98.96 % is not 99 %.
    percent = math.floor(train_accuracy * 1000 + 1e-3) / 10
    return Verdict(
        "underfitted",
        f"underfitted: a regularizer was not tested ({baseline} reaches {percent:.1f} % of its training images; "
        f"{OVERFITTED * 100:.0f} % is needed): train longer, or on fewer images.",
    )


def diverged(arm: str, metric: str, whose: str, bad: int, runs: int) -> Verdict:
    """The verdict on an arm if it or the baseline has values that are not finite.

    Args:
        arm: its name.
        metric: which values.
        whose: the arm or the baseline.
        bad, runs: in how many of its runs.
    """
    where = "its only run" if runs == 1 else f"{bad} of its {runs} runs"
    return Verdict("diverged", f"{arm}: diverged: {METRICS[metric].label} of {whose} is not finite in {where}.")


def nothing_to_compare(why: str, arm: str | None = None) -> Verdict:
    """The verdict where runs are missing."""
    return Verdict("no evidence", f"{'' if arm is None else f'{arm}: '}no evidence: {why}.")


def _against_control(comparison: Comparison) -> str:
    n = comparison.difference.n
    if n < 2:
        return f"It has {_count(n, 'seed')} in common with the best control, {comparison.other}: too few to compare."
    word = "better" if comparison.better else "not better"  # nor worse: it was the best of several on these seeds
    few = "; five seeds are needed" if n < SEEDS_NEEDED else ""
    return f"It is {word} than the best control: {_numbers(comparison)}{few}."


def _numbers(comparison: Comparison) -> str:
    """Such as 'accuracy +2.1 points against none (95 % interval +1.2 to +3.0, p = 0.002 corrected for ...)'."""
    metric, difference = comparison.metric, comparison.difference
    text = f"{METRICS[metric].label} {_size(metric, difference.mean, '+')} against {comparison.other}"
    if difference.low is None or difference.high is None or comparison.p is None:
        return text
    low, high = (number_text(metric, end, "+", signed_zero=True) for end in (difference.low, difference.high))
    corrected = f"corrected for {_count(comparison.arms, 'arm')} and {_count(comparison.metrics, 'metric')}"
    return f"{text} (95 % interval {low} to {high}, {p_text(comparison.p)} {corrected}, {_count(difference.n, 'seed')})"


def _size(metric: str, value: float, sign: str = "") -> str:
    unit = METRICS[metric].unit
    return f"{number_text(metric, value, sign)} {'points' if unit == '%' else unit}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
