"""Image sets and the smaller sets cut out of them."""

import pytest
import torch

from mp_lightning.data import ImageSet, image_set
from mp_lightning.errors import ConfigurationError, DataError


def numbered(counts: list[int]) -> ImageSet:
    """A set with so many images of each class, shuffled; every pixel of an image holds its index."""
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    images = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    return ImageSet("numbered", images, labels, tuple("abcdefgh"[: len(counts)]))


def indices(images: ImageSet) -> list[int]:
    return [int(value) for value in images.images[:, 0, 0, 0]]


def test_subset_keeps_order_classes_and_the_pairing_with_labels() -> None:
    whole = numbered([5, 5])
    part = whole.subset([7, 2], name="two")
    assert (part.name, len(part), part.num_classes, part.image_size) == ("two", 2, 2, 4)
    assert indices(part) == [7, 2]
    assert part.labels.tolist() == whole.labels[[7, 2]].tolist()


def test_select_classes_relabels_in_the_order_asked_for() -> None:
    whole = numbered([3, 4, 5])
    part = whole.select_classes([2, 0])
    assert part.classes == ("c", "a")
    assert part.labels.bincount().tolist() == [5, 3]
    assert all(whole.labels[i] == (2, 0)[label] for i, label in zip(indices(part), part.labels, strict=True))


@pytest.mark.parametrize("classes", [[0], [0, 0], [0, 3], [0, -1]])
def test_select_classes_refuses_too_few_repeated_or_unknown_ones(classes: list[int]) -> None:
    with pytest.raises(ConfigurationError, match="numbered"):
        numbered([3, 3, 3]).select_classes(classes)


def test_few_per_class_draws_n_of_each_and_returns_all_others() -> None:
    few, rest = numbered([6, 3, 9]).few_per_class(3, seed=1)
    assert few.labels.bincount(minlength=3).tolist() == [3, 3, 3]
    assert rest.labels.bincount(minlength=3).tolist() == [3, 0, 6]
    assert sorted(indices(few) + indices(rest)) == list(range(18))


def test_few_per_class_follows_the_seed() -> None:
    whole = numbered([20, 20])
    assert indices(whole.few_per_class(5, 1)[0]) == indices(whole.few_per_class(5, 1)[0])
    assert indices(whole.few_per_class(5, 1)[0]) != indices(whole.few_per_class(5, 2)[0])


def test_few_per_class_names_the_class_that_is_too_small() -> None:
    with pytest.raises(DataError, match="class 'b' of 'numbered' has 2 images, not 3"):
        numbered([5, 2]).few_per_class(3, 0)


@pytest.mark.parametrize("seed", range(5))
def test_halves_are_disjoint_complete_and_balanced_in_every_class(seed: int) -> None:
    first, second = numbered([5, 7, 8, 1]).halves(seed)
    assert sorted(indices(first) + indices(second)) == list(range(21))
    assert abs(len(first) - len(second)) <= 1
    difference = first.labels.bincount(minlength=4) - second.labels.bincount(minlength=4)
    assert difference.abs().max() <= 1


def test_halves_follow_the_seed() -> None:
    whole = numbered([20, 20])
    assert indices(whole.halves(1)[0]) == indices(whole.halves(1)[0])
    assert indices(whole.halves(1)[0]) != indices(whole.halves(2)[0])


def test_a_smaller_image_averages() -> None:
    # One white column in four: without antialiasing only the two in the middle of four would count, both black.
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    images[..., ::4] = 255
    small = image_set("lines", images, torch.tensor([0, 1]), ("a", "b"), size=8)
    assert small.images.shape == (2, 3, 8, 8)
    assert small.images.dtype == torch.uint8
    assert (small.images[..., 1:-1].float() - 255 / 4).abs().max() < 16


def test_a_mask_takes_the_images_of_which_it_says_so():
    data = ImageSet("s", torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1), torch.tensor([0, 1, 0, 1, 2, 2]), "abc")
    chosen = data.subset(data.labels == 2)
    assert chosen.images.flatten().tolist() == [4, 5] and chosen.labels.tolist() == [2, 2]
    with pytest.raises(ConfigurationError, match="one value for each image"):
        data.subset(torch.tensor([True, False]))


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([100], "'numbered' has no image 100"),
        ([0, -11], "'numbered' has no image -11"),
        ([0.9], "of type torch.float32"),
    ],
)
def test_indices_of_no_image_are_refused(indices: list[int], message: str) -> None:
    whole = numbered([5, 5])
    with pytest.raises(ConfigurationError, match=message):
        whole.subset(indices)
    assert len(whole.subset([-10, 9])) == 2 and len(whole.subset([])) == 0


@pytest.mark.parametrize("n", [0, 1.5, True])
def test_few_per_class_takes_a_whole_number(n: int) -> None:
    with pytest.raises(ConfigurationError, match=f"{n} images per class of 'numbered' is out of range"):
        numbered([5, 5]).few_per_class(n, 0)
