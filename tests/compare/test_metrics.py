"""Scores of probabilities, against a second implementation."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss

from mp_lightning.compare.metrics import BINS, reliability, scores


def drawn(images: int, classes: int, seed: int, sharpness: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images,), generator=generator)
    logits = sharpness * torch.randn(images, classes, generator=generator)
    logits[torch.arange(images), labels] += 1.0
    return logits.softmax(dim=1), labels


def calibration_error(p: np.ndarray, y: np.ndarray) -> float:
    """The definition, bin by bin."""
    confidence, answer = p.max(axis=1), p.argmax(axis=1)
    total = 0.0
    for number in range(BINS):
        inside = (confidence >= number / BINS) & (confidence < (number + 1) / BINS)
        if number == BINS - 1:
            inside |= confidence == 1.0
        if inside.any():
            total += inside.mean() * abs((answer == y)[inside].mean() - confidence[inside].mean())
    return total


@pytest.mark.parametrize(("images", "classes", "sharpness"), [(500, 10, 2.0), (37, 2, 0.5), (200, 200, 3.0)])
def test_scores_equal_those_of_scikit_learn(images: int, classes: int, sharpness: float) -> None:
    p, y = drawn(images, classes, classes, sharpness)
    found = scores(p, y)
    names = list(range(classes))
    exact = p.double().numpy()
    exact /= exact.sum(axis=1, keepdims=True)
    assert found.accuracy == pytest.approx(accuracy_score(y, p.argmax(dim=1)), abs=1e-6)
    assert found.nll == pytest.approx(log_loss(y, exact, labels=names), rel=1e-5)
    assert found.brier == pytest.approx(brier_score_loss(y, exact, labels=names, scale_by_half=False), rel=1e-5)
    assert found.ece == pytest.approx(calibration_error(p.numpy(), y.numpy()), abs=1e-5)


def test_certain_answers_have_finite_scores() -> None:
    p = torch.eye(3)[torch.tensor([0, 1, 2, 0])]
    right, wrong = scores(p, torch.tensor([0, 1, 2, 0])), scores(p, torch.tensor([1, 2, 0, 1]))
    assert right == pytest.approx((1.0, 0.0, 0.0, 0.0), abs=1e-6)
    assert wrong.accuracy == 0 and wrong.brier == 2 and wrong.ece == pytest.approx(1) and math.isfinite(wrong.nll)


@pytest.mark.parametrize("beyond", [1 + 1e-6, -1e-6])
def test_probabilities_that_rounding_left_beyond_0_and_1_are_calibrated_as_the_others(beyond: float) -> None:
    p = torch.eye(2)[torch.zeros(100, dtype=torch.long)]
    p[0, 0 if beyond > 1 else 1] = beyond
    assert scores(p, torch.zeros(100, dtype=torch.long)).ece == pytest.approx(0.0, abs=1e-5)


def test_a_confidence_of_1_is_in_the_last_bin() -> None:
    """That of 14/15 to 1: 0.95 and 1 of which one is right, confidence 0.975, accuracy 0.5."""
    p = torch.tensor([[0.95, 0.05], [1.0, 0.0]])
    assert scores(p, torch.tensor([0, 1])).ece == pytest.approx(0.475, abs=1e-5)


def test_what_diverged_counts_as_wrong() -> None:
    p, _ = drawn(10, 3, 0)
    answer = p.argmax(dim=1)
    p[:4] = math.nan
    found = scores(p, answer)
    assert found.accuracy == pytest.approx(0.6)
    assert math.isnan(found.nll) and math.isnan(found.brier) and math.isnan(found.ece)


def test_confidences_fall_into_15_bins_as_in_the_paper() -> None:
    p, y = drawn(10, 3, 0)
    assert len(reliability(p, y)) == BINS == 15


def test_reliability_adds_up_to_the_calibration_error() -> None:
    p, y = drawn(400, 5, 1)
    bins = reliability(p, y)
    assert len(bins) == BINS and sum(count for count, _, _ in bins) == 400
    ece = sum(count * abs(accuracy - confidence) for count, confidence, accuracy in bins) / 400
    assert ece == pytest.approx(scores(p, y).ece, abs=1e-5)
    for number, (count, confidence, _) in enumerate(bins):
        assert count == 0 or number / BINS <= confidence <= (number + 1) / BINS
