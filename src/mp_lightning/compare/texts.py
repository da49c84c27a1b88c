"""Numbers of a comparison as text."""

from collections.abc import Mapping
from statistics import fmean

from mp_lightning.compare.results import METRICS, Details
from mp_lightning.compare.statistics import is_finite

_ALL = 0.995  # of the strength, which is shown as 100 %


def number_text(metric: str, value: float, sign: str = "", signed_zero: bool = False) -> str:
    """A value as it is shown, in the metric's unit; with ``sign='+'`` a difference.

    ``signed_zero`` keeps the side of zero of what is rounded to it, as of the end of an interval.
    """
    if not is_finite(value):
        return "not finite"
    shown = METRICS[metric]
    rounded = round(value * shown.scale, shown.digits)
    if not signed_zero:
        rounded += 0.0  # makes +0.0 of -0.0
    return f"{rounded:{sign}.{shown.digits}f}"


def p_text(p: float | None) -> str:
    """A corrected p value as 'p = 0.012'; empty for None."""
    if p is None:
        return ""
    if p < 0.001:
        return "p < 0.001"
    return f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def acted_texts(details: Mapping[tuple[str, int], Details]) -> list[str]:
    """For each arm of which not all of the strength acted when training ended, a sentence; ``details`` by arm, seed."""
    shares: dict[str, list[float]] = {}
    for (arm, _), one in details.items():
        if one.acted is not None:
            shares.setdefault(arm, []).append(one.acted)
    means = {arm: fmean(own) for arm, own in shares.items()}
    return [
        f"{arm} acted at {mean:.0%} of its strength when training ended"
        f"{f' (mean of {len(shares[arm])} seeds)' if len(shares[arm]) > 1 else ''}; longer runs, and a training loss "
        "that falls further, reach more."
        for arm, mean in means.items()
        if mean < _ALL
    ]
