"""The digits of scikit-learn."""

import torch
from sklearn import datasets

from mp_lightning.data import load_digits


def test_digits_in_their_own_size_keep_every_count_from_0_to_16() -> None:
    digits = load_digits(size=8)
    raw = torch.from_numpy(datasets.load_digits().images)
    assert digits.images.shape == (1797, 3, 8, 8)
    assert torch.equal((digits.images[:, 0].double() * 16 / 255).round(), raw)
    assert torch.equal(digits.images[:, 0], digits.images[:, 2])
    assert (digits.images.min(), digits.images.max()) == (0, 255)


def test_digits_are_enlarged_to_32_pixels_unless_told() -> None:
    digits = load_digits()
    assert (digits.image_size, digits.num_classes) == (32, 10)
    assert digits.labels.tolist() == datasets.load_digits().target.tolist()
