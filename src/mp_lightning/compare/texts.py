"""Numbers of a comparison as text."""

from mp_lightning.compare.results import METRICS
from mp_lightning.compare.statistics import is_finite


def number_text(metric: str, value: float, sign: str = "") -> str:
    """A value as it is shown, in the metric's unit; with ``sign='+'`` a difference."""
    if not is_finite(value):
        return "not finite"
    shown = METRICS[metric]
    # Adding zero makes +0.0 of what is rounded to -0.0.
    return f"{round(value * shown.scale, shown.digits) + 0.0:{sign}.{shown.digits}f}"


def p_text(p: float | None) -> str:
    """A corrected p value as 'p = 0.012'; empty for None."""
    if p is None:
        return ""
    if p < 0.001:
        return "p < 0.001"
    return f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"
