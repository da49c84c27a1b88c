"""What the rows of a comparison show: estimates, differences with corrected p values, verdicts."""

import dataclasses
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from mp_lightning.compare.arms import BASELINE, KINDS
from mp_lightning.compare.results import METRICS, Row
from mp_lightning.compare.statistics import Estimate, can_be_tested, estimate, holm, is_finite, paired
from mp_lightning.compare.verdict import (
    LEVEL,
    OVERFITTED,
    Comparison,
    Verdict,
    diverged,
    nothing_to_compare,
    underfitted,
    verdict,
)
from mp_lightning.errors import ConfigurationError

VERDICT_METRICS = ("accuracy", "nll")
CONTROLS = tuple(name for name, kind in KINDS.items() if kind.role == "control")

# By arm and seed.
_Runs = dict[str, dict[int, Row]]
# By arm and metric.
_Comparisons = dict[tuple[str, str], Comparison]


@dataclass(frozen=True)
class ArmSummary:
    """What the runs of one arm show; all by metric, in the units in which results are stored.

    Attributes:
        seeds: of its finished runs.
        control: whether it is one of the controls.
        estimates: over all its seeds.
        against_baseline: its differences from the baseline; empty for the baseline.
        against_control: its differences from the control that has the best mean of the metric, of a combination from
            controls that are combined alike; empty where there is none, for the baseline and for controls.
        verdicts: for the metrics that lead to a verdict; empty for the baseline.
    """

    seeds: list[int]
    control: bool
    estimates: dict[str, Estimate]
    against_baseline: dict[str, Comparison]
    against_control: dict[str, Comparison]
    verdicts: dict[str, Verdict]


@dataclass(frozen=True)
class Summary:
    """What a comparison on one target with one model shows.

    Attributes:
        metric: what the headline is about.
        baseline: the arm that all others are compared with.
        underfitted: whether the baseline reaches fewer than 99 % of its training images, so that nothing was tested.
        headline: the verdicts that were asked for, a text each.
        also: the verdicts on the same arms in the other metric that leads to one; empty where they say the same.
        arms: in order of first appearance.
    """

    metric: str
    baseline: str
    underfitted: bool
    headline: list[str]
    also: list[str]
    arms: dict[str, ArmSummary]

    @property
    def other_metric(self) -> str:
        """What ``also`` is about."""
        return next(name for name in VERDICT_METRICS if name != self.metric)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; None for numbers that are not finite."""
        plain: dict[str, Any] = _plain(dataclasses.asdict(self))
        return plain


def summarize(
    rows: Sequence[Row],
    *,
    metric: str = "accuracy",
    focus: Sequence[str] = (),
    controls: Collection[str] = CONTROLS,
) -> Summary:
    """What the rows show.

    The tests of all arms in accuracy and NLL against the baseline are corrected together, and so are those against the
    best control; the other metrics, which lead to no verdict, each over the arms.

    Args:
        rows: of one target and one model; arms may have different seeds.
        metric: what the headline is about, 'accuracy' or 'nll'.
        focus: arms of the headline; all that are neither the baseline nor a control if empty.
        controls: arms that show whether learning is the reason of a gain, combinations included.

    Raises:
        ConfigurationError: no verdict is made of this metric, or the rows belong to several comparisons.
    """
    if metric not in VERDICT_METRICS:
        raise ConfigurationError(f"metric '{metric}' leads to no verdict; use one of {', '.join(VERDICT_METRICS)}")
    runs = _by_arm_and_seed(rows)
    others = [arm for arm in runs if arm != BASELINE]
    judged = [arm for arm in others if arm not in controls]
    from_baseline: dict[tuple[str, str], str] = {}
    from_control: dict[tuple[str, str], str] = {}
    for name in METRICS:
        if BASELINE in runs:
            from_baseline |= {(arm, name): BASELINE for arm in others}
        for arm in judged:
            best = _best(arm, _controls_of(arm, [other for other in others if other in controls]), runs, name)
            if best is not None:
                from_control[arm, name] = best
    against_baseline, against_control = _compared(runs, from_baseline), _compared(runs, from_control)
    reached = fmean(row.train_accuracy for row in runs[BASELINE].values()) if BASELINE in runs else math.nan

    def judge(arm: str, name: str) -> Verdict:
        if BASELINE not in runs:
            return nothing_to_compare(f"no run of {BASELINE} is finished, which it is compared with", arm)
        comparison = against_baseline[arm, name]
        if not reached >= OVERFITTED and is_finite(comparison.difference.mean):
            lost = sum(math.isnan(nll) for nll in _values(runs[BASELINE], "nll"))  # their accuracy is a number
            return diverged(arm, "nll", BASELINE, lost, len(runs[BASELINE])) if lost else underfitted(BASELINE, reached)
        for whose in (arm, BASELINE):
            bad = sum(not is_finite(value) for value in _values(runs[whose], name))
            if bad and (whose == arm or not is_finite(comparison.difference.mean)):
                return diverged(arm, name, whose, bad, len(runs[whose]))
        return verdict(arm, comparison, against_control.get((arm, name)))

    def summary_of(arm: str) -> ArmSummary:
        return ArmSummary(
            seeds=sorted(runs[arm]),
            control=arm in controls,
            estimates={name: estimate(_values(runs[arm], name)) for name in METRICS},
            against_baseline={name: found for (of, name), found in against_baseline.items() if of == arm},
            against_control={name: found for (of, name), found in against_control.items() if of == arm},
            verdicts={name: judge(arm, name) for name in VERDICT_METRICS} if arm != BASELINE else {},
        )

    arms = {arm: summary_of(arm) for arm in runs}
    wanted = [arm for arm in focus if arm != BASELINE] or judged or others
    headline = _headline(arms, wanted, metric)
    also = _headline(arms, wanted, next(name for name in VERDICT_METRICS if name != metric))
    return Summary(
        metric=metric,
        baseline=BASELINE,
        underfitted=BASELINE in runs and not reached >= OVERFITTED,
        headline=headline,
        also=[] if also == headline else also,
        arms=arms,
    )


def _by_arm_and_seed(rows: Sequence[Row]) -> _Runs:
    runs: _Runs = {}
    for row in rows:
        if (row.target, row.model) != (rows[0].target, rows[0].model):
            raise ConfigurationError(
                f"rows of '{row.target}' with '{row.model}' stand beside rows of '{rows[0].target}' with "
                f"'{rows[0].model}'; summarize each target and model for itself"
            )
        if row.seed in runs.setdefault(row.arm, {}):
            raise ConfigurationError(
                f"arm '{row.arm}' has two rows of seed {row.seed}; pass the rows of one set of settings"
            )
        runs[row.arm][row.seed] = row
    return runs


def _values(runs: dict[int, Row], metric: str) -> list[float]:
    return [getattr(row, metric) for row in runs.values()]


def _controls_of(arm: str, controls: Collection[str]) -> list[str]:
    """Those that tell whether learning is the reason: of a combination, the controls beside the rest of it.

    'metaperturb+mixup' stands beside 'fixed_noise+mixup'; beside 'fixed_noise' it would be credited with mixup.
    """
    parts = _parts(arm)
    if len(parts) == 1:
        return [control for control in controls if len(_parts(control)) == 1]
    return [control for control in controls if len(_parts(control)) == len(parts) == len(_parts(control) & parts) + 1]


def _parts(arm: str) -> set[str]:
    return {part.strip() for part in arm.split("+")}


def _best(arm: str, others: Sequence[str], runs: _Runs, metric: str) -> str | None:
    """Of those that have most seeds in common with the arm, the one with the best mean over these.

    None if none has a finite one.
    """
    common = {other: [seed for seed in runs[other] if seed in runs[arm]] for other in others}
    most = max(map(len, common.values()), default=0)
    means = {
        other: estimate([getattr(runs[other][seed], metric) for seed in seeds]).mean
        for other, seeds in common.items()
        if len(seeds) == most > 0
    }
    sign = 1 if METRICS[metric].higher_is_better else -1
    return max((other for other in means if is_finite(means[other])), key=lambda one: sign * means[one], default=None)


def _compared(runs: _Runs, pairs: dict[tuple[str, str], str]) -> _Comparisons:
    """Compare each arm in each metric with the arm given; what leads to a verdict is corrected together."""
    found: _Comparisons = {}
    for family in (VERDICT_METRICS, *((name,) for name in METRICS if name not in VERDICT_METRICS)):
        found |= _corrected(runs, {key: other for key, other in pairs.items() if key[1] in family})
    return found


def _corrected(runs: _Runs, pairs: dict[tuple[str, str], str]) -> _Comparisons:
    values = {}
    for (arm, metric), other in pairs.items():
        seeds = [seed for seed in runs[arm] if seed in runs[other]]
        values[arm, metric] = [[getattr(runs[of][seed], metric) for seed in seeds] for of in (arm, other)]
    tested = [key for key, (own, others) in values.items() if can_be_tested(own, others)]
    counts = {"arms": len({arm for arm, _ in tested}), "metrics": len({metric for _, metric in tested})}
    level = LEVEL / max(1, len(tested))
    differences = {key: paired(own, others, level) for key, (own, others) in values.items()}
    corrected = holm([difference.p for difference in differences.values()])
    return {
        key: Comparison(key[1], pairs[key], difference, p, **counts)
        for (key, difference), p in zip(differences.items(), corrected, strict=True)
    }


def _headline(arms: dict[str, ArmSummary], wanted: Sequence[str], metric: str) -> list[str]:
    if not arms:
        return [nothing_to_compare("no run is finished").sentence]
    if not wanted:
        return [nothing_to_compare(f"only {BASELINE} has finished runs, and there is no arm to compare").sentence]
    sentences = [
        arms[arm].verdicts[metric].sentence
        if arm in arms
        else nothing_to_compare("none of its runs is finished", arm).sentence
        for arm in wanted
    ]
    return list(dict.fromkeys(sentences))  # that nothing was tested is said once


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
