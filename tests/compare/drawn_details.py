"""Rows with details as a comparison leaves them, drawn for pictures and reports."""

import numpy as np
from simulated import row

from mp_lightning.compare.results import Details, Row, SiteMultiplier

FIVE = ("none", "dropout", "dropblock", "fixed_noise", "metaperturb")
THIRTEEN = (
    *("none", "dropout", "dropblock", "gaussian", "mixup", "manifold_mixup", "information_dropout", "label_smoothing"),
    *("fixed_noise", "shrink_only", "random_phi", "metaperturb", "metaperturb+label_smoothing"),
)
WITH_MULTIPLIER = ("fixed_noise", "shrink_only", "random_phi", "metaperturb")

Comparison = tuple[list[Row], dict[tuple[str, int], Details]]


def drawn_comparison(arms: tuple[str, ...] = FIVE, seeds: int = 5, sites: int = 4) -> Comparison:
    """`metaperturb` is three points better than the others, which differ by chance."""
    generator = np.random.default_rng(3)
    shared = generator.normal(size=seeds)
    rows, details = [], {}
    for arm in arms:
        noisy = arm.partition("+")[0] in WITH_MULTIPLIER
        for seed in range(seeds):
            accuracy = 0.80 + 0.03 * ("metaperturb" in arm) + 0.006 * shared[seed] + 0.003 * generator.normal()
            nll = 0.7 - 0.12 * ("metaperturb" in arm) + 0.02 * generator.normal()
            others = {"inference": "mc", "mean_accuracy": accuracy - 0.01} if noisy else {}
            rows.append(row(arm, seed, float(accuracy), float(nll), **others))
            details[arm, seed] = _details(generator, sites if noisy else 0)
    return rows, details


def _details(generator: np.random.Generator, sites: int) -> Details:
    steps = np.arange(8, 401, 8)
    losses = 2.3 * np.exp(-steps / 90) + 0.004 * np.exp(0.2 * generator.normal(size=len(steps)))
    confidence = (np.arange(15) + 0.5) / 15
    accuracy = np.clip(confidence + 0.06 * generator.normal(size=15), 0, 1)
    bins = [
        (int(n), float(c), float(a))
        for n, c, a in zip(generator.integers(1, 60, 15), confidence, accuracy, strict=True)
    ]
    return Details(
        curve=[(int(step), float(loss)) for step, loss in zip(steps, losses, strict=True)],
        reliability=[(0, 0.0, 0.0), *bins[1:]],
        multiplier=[SiteMultiplier(f"blocks.{site}.relu", 0.4 + 0.05 * site, 0.3) for site in range(sites)],
    )
