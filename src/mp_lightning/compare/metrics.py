"""How good class probabilities are: accuracy, likelihood, Brier score and calibration, by torchmetrics."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

BINS = 15  # of confidence, equally wide (Guo et al. 2017, arXiv 1706.04599)


class Scores(NamedTuple):
    """Accuracy (fraction), NLL (nats), Brier score (0 to 2) and expected calibration error (fraction)."""

    accuracy: float
    nll: float
    brier: float
    ece: float


def scores(probabilities: Tensor, labels: Tensor) -> Scores:
    """Scores of class probabilities.

    Probabilities that are not finite, of a network that diverged, count as wrong answers and give NaN elsewhere.

    Args:
        probabilities: float (N, K), rows that add up to 1.
        labels: int64 (N,), 0 to K - 1.
    """
    p, classes = probabilities.float(), probabilities.shape[1]
    finite = p.isfinite().all(dim=1)
    if not finite.all():
        right = (p[finite].argmax(dim=1) == labels[finite]).sum()
        return Scores(float(right) / len(labels), float("nan"), float("nan"), float("nan"))
    truth = F.one_hot(labels, classes)
    # Beyond 0 and 1, as rounding leaves some, torchmetrics takes all for logits; and what is 1 has a bin of its own.
    confidences = p.clamp(min=0.0, max=1 - torch.finfo(torch.float32).eps / 2)
    return Scores(
        accuracy=float(multiclass_accuracy(p, labels, classes, average="micro")),
        nll=float(F.nll_loss(p.double().clamp(min=torch.finfo(torch.float32).tiny).log(), labels)),
        brier=float((p.double() - truth).square().sum(dim=1).mean()),
        ece=float(multiclass_calibration_error(confidences, labels, classes, n_bins=BINS, norm="l1")),
    )


def reliability(probabilities: Tensor, labels: Tensor) -> list[tuple[int, float, float]]:
    """For each of 15 bins of confidence: number of images, their mean confidence and accuracy; zeros if empty.

    Args:
        probabilities, labels: as for :func:`scores`; rows that are not finite are left out.
    """
    kept = probabilities.isfinite().all(dim=1)
    confidence, answer = probabilities[kept].double().max(dim=1)
    right = (answer == labels[kept]).double()
    bins = (confidence * BINS).floor().clamp(max=BINS - 1).long()
    counts = torch.bincount(bins, minlength=BINS)
    totals = counts.clamp(min=1)
    confidences = torch.bincount(bins, confidence, minlength=BINS) / totals
    accuracies = torch.bincount(bins, right, minlength=BINS) / totals
    return list(zip(counts.tolist(), confidences.tolist(), accuracies.tolist(), strict=True))
