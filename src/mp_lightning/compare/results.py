"""What one run of a comparison leaves: a row of numbers, and details that only pictures need."""

from dataclasses import dataclass, field
from typing import NamedTuple


class Metric(NamedTuple):
    """How a metric is called and shown. What is stored is shown multiplied by ``scale``."""

    label: str
    unit: str
    scale: float
    digits: int
    higher_is_better: bool


METRICS = {
    "accuracy": Metric("accuracy", "%", 100.0, 1, True),
    "nll": Metric("NLL", "nats", 1.0, 3, False),
    "brier": Metric("Brier", "", 1.0, 3, False),
    "ece": Metric("ECE", "", 1.0, 3, False),
    "gap": Metric("train-test gap", "points", 100.0, 1, False),
    "mean_accuracy": Metric("accuracy, `mean`", "%", 100.0, 1, True),
    "mean_nll": Metric("NLL, `mean`", "nats", 1.0, 3, False),
    "mean_brier": Metric("Brier, `mean`", "", 1.0, 3, False),
    "mean_ece": Metric("ECE, `mean`", "", 1.0, 3, False),
    "step_ms": Metric("step", "ms", 1.0, 1, False),
    "memory_mb": Metric("memory", "MB", 1.0, 1, False),
}


@dataclass(frozen=True)
class Row:
    """One finished run: how it was made, and how it did on the test images.

    Attributes:
        target, model, arm, seed: which run.
        settings: digest of everything else that decides its result.
        parameters: hyperparameters of the arm, such as 'p=0.3'; empty if it has none.
        inference: how the test images were classified: 'plain', 'mc' or 'mean'.
        accuracy: fraction of test images classified correctly.
        nll: mean negative log-likelihood of the right class (nats).
        brier: mean over the images of the squared distance between probabilities and truth, 0 to 2.
        ece: expected calibration error, 15 bins of equal width, L1.
        train_accuracy, train_nll: the same of the training images, without augmentation where they are known so.
        mean_accuracy, mean_nll, mean_brier, mean_ece: of the test images with one forward by expected noise; equal to
            those above for arms without noise in evaluation.
        step_ms: median wall time of one training step (ms).
        memory_mb: 10^6 bytes: the peak allocated on a GPU; on a CPU, what a step keeps for its backward.
        seconds: wall time of the whole run.
        device: where it ran, such as 'cpu' or the name of the GPU.
    """

    target: str
    model: str
    arm: str
    seed: int
    settings: str
    parameters: str
    inference: str
    accuracy: float
    nll: float
    brier: float
    ece: float
    train_accuracy: float
    train_nll: float
    mean_accuracy: float
    mean_nll: float
    mean_brier: float
    mean_ece: float
    step_ms: float
    memory_mb: float
    seconds: float
    device: str

    @property
    def gap(self) -> float:
        """Train accuracy minus test accuracy."""
        return self.train_accuracy - self.accuracy


@dataclass(frozen=True)
class SiteMultiplier:
    """Mean and standard deviation of what feature maps are multiplied by at one site after training."""

    site: str
    mean: float
    std: float


@dataclass(frozen=True)
class Details:
    """What pictures show of one run.

    Attributes:
        curve: (training batch, training loss averaged since the point before) over the run.
        reliability: for 15 bins of confidence of equal width: (images, mean confidence, accuracy); zeros if empty.
        multiplier: by site, in order of depth; empty for an arm without multiplier.
        acted: share of its strength that a multiplier acted at when training ended; None for an arm without.
    """

    curve: list[tuple[int, float]] = field(default_factory=list)
    reliability: list[tuple[int, float, float]] = field(default_factory=list)
    multiplier: list[SiteMultiplier] = field(default_factory=list)
    acted: float | None = None
