"""Rows as a comparison leaves them, of numbers that are given or drawn."""

import numpy as np

from mp_lightning.compare.results import Row


def row(arm: str, seed: int, accuracy: float = 0.8, nll: float = 0.7, **others: float | str) -> Row:
    values: dict[str, float | str] = {
        **{"target": "digits", "model": "conv4", "settings": "1", "parameters": "", "inference": "plain"},
        **{"brier": 0.3, "ece": 0.05, "train_accuracy": 1.0, "train_nll": 0.01, "mean_accuracy": accuracy},
        **{"mean_nll": nll, "mean_brier": 0.3, "mean_ece": 0.05, "step_ms": 5.0, "memory_mb": 20.0, "seconds": 9.0},
        **{"device": "cpu", **others},
    }
    return Row(arm=arm, seed=seed, accuracy=accuracy, nll=nll, **values)  # type: ignore[arg-type]


def drawn(
    generator: np.random.Generator,
    arms: int,
    effects: dict[str, tuple[float, float]] | None = None,
    *,
    seeds: int = 5,
    images: int | None = None,
) -> list[Row]:
    """Rows of `none` and of arms that do not differ from it, but for effects on (accuracy, NLL).

    The arms of a seed share a part with a standard deviation of 0.5 points and 0.025 nats; what each run has of its own
    has 0.35 points and 0.018 nats, so a run has 0.6 points in all. Accuracy and NLL are correlated by -0.7, and the NLL
    is log-normal, for it is skewed where it varies much. With `images` the accuracy is that of so many test images.
    """
    correlation = np.linalg.cholesky([[1, -0.7], [-0.7, 1]])
    shared = generator.normal(size=(seeds, 2)) @ correlation.T
    rows = []
    for arm in ["none", *(f"arm{number}" for number in range(arms))]:
        own = generator.normal(size=(seeds, 2)) @ correlation.T
        effect = (effects or {}).get(arm, (0.0, 0.0))
        for seed in range(seeds):
            accuracy = 0.8 + effect[0] + 0.005 * shared[seed, 0] + 0.0035 * own[seed, 0]
            if images is not None:
                accuracy = round(accuracy * images) / images
            nll = 0.7 * np.exp(0.036 * shared[seed, 1] + 0.025 * own[seed, 1]) + effect[1]
            rows.append(row(arm, seed, float(accuracy), float(nll)))
    return rows
