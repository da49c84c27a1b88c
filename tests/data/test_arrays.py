"""What arrays of images become, and which are refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mp_lightning.data import image_set, load_images
from mp_lightning.errors import ConfigurationError, DataError

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (4, 5, 5, 3), dtype=np.uint8)
LABELS = np.array([0, 1, 1, 0])


def test_all_colour_layouts_and_types_give_the_same_images() -> None:
    expected = torch.from_numpy(COLOUR).permute(0, 3, 1, 2)
    forms = [
        COLOUR,
        COLOUR.transpose(0, 3, 1, 2),
        torch.from_numpy(COLOUR),
        COLOUR.astype(np.int64),
        COLOUR.astype(np.float64),
        COLOUR.astype(np.float32) / 255,
    ]
    for form in forms:
        images = image_set("set", form, LABELS).images
        assert images.dtype == torch.uint8
        assert images.is_contiguous()
        assert torch.equal(images, expected)


@pytest.mark.parametrize("value", [127.6, 127.6 / 255])
def test_floats_are_rounded_to_the_nearest_integer(value: float) -> None:
    assert image_set("set", np.full(COLOUR.shape, value), LABELS).images.eq(128).all()


@pytest.mark.parametrize("value", [0, 1, 15])
def test_images_of_one_integer_are_taken(value: int) -> None:
    assert image_set("set", np.full_like(COLOUR, value), LABELS).images.eq(value).all()


@pytest.mark.parametrize("shape", [(4, 5, 5), (4, 5, 5, 1), (4, 1, 5, 5)])
def test_grey_is_repeated_to_three_channels(shape: tuple[int, ...]) -> None:
    grey = COLOUR[..., 0]
    images = image_set("set", grey.reshape(shape), LABELS).images
    assert torch.equal(images, torch.from_numpy(grey)[:, None].repeat(1, 3, 1, 1))


def test_labels_become_int64_and_names_default_to_numbers() -> None:
    made = image_set("set", COLOUR, np.array([[0], [2], [1], [0]], dtype=np.uint8))
    assert made.labels.dtype == torch.int64
    assert made.labels.tolist() == [0, 2, 1, 0]
    assert made.classes == ("0", "1", "2")


def test_size_resizes_the_shorter_side_and_keeps_the_centre() -> None:
    wide = np.zeros((4, 8, 24), dtype=np.uint8)
    wide[:, :, 8:16] = 200
    made = image_set("set", wide, LABELS, size=4)
    assert made.images.shape == (4, 3, 4, 4)
    # The middle third alone is left; its border mixes a little with the dark rest.
    assert (made.images[..., 1:3] == 200).all()
    assert made.images.min() > 100


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    images = COLOUR.astype(np.float32)
    images[1, 2, 3, 0] = bad
    with pytest.raises(DataError, match="'birds' hold values that are not finite"):
        image_set("birds", images, LABELS)


@pytest.mark.parametrize(
    ("images", "labels", "classes", "message"),
    [
        (COLOUR[:0], LABELS[:0], None, "no images"),
        (COLOUR[:, :0], LABELS, None, "no images"),
        (COLOUR[0, 0], LABELS, None, r"shape \(5, 3\)"),
        (np.zeros((4, 5, 5, 4), np.uint8), LABELS, None, r"shape \(4, 5, 5, 4\)"),
        (COLOUR[:, :4], LABELS, None, r"4 x 5, not square: crop them, or set size=32 \(image_size=32 in a conf"),
        (COLOUR, LABELS, ["a", "a"], "two classes of 'birds' are called 'a'"),
        ([COLOUR[0], COLOUR[0, :4]], LABELS[:2], None, "images of 'birds' are no array .*: give all of them the same"),
        (COLOUR, [[0], [0, 1], 1, 1], None, "labels of 'birds' are no array .*: give all of them the same shape"),
        (COLOUR, torch.tensor(LABELS).bfloat16(), None, "labels of 'birds' are of type float32"),
        (COLOUR.astype(np.float32) * -1, LABELS, None, "values from"),
        (COLOUR.astype(np.int32) + 1000, LABELS, None, "values from"),
        (COLOUR / 255 * 1.0001 / (COLOUR.max() / 255), LABELS, None, r"floats up to 1.0001: clip them to \[0, 1\]"),
        (COLOUR > 9, LABELS, None, "type bool"),
        ((COLOUR > 9).astype(np.uint8), LABELS, None, "integers of 0 and 1 alone.*multiply them by 255"),
        ((COLOUR > 9).astype(np.int64), LABELS, None, "integers of 0 and 1 alone.*multiply them by 255"),
        (COLOUR // 16, LABELS, None, "integers up to 15, almost black: multiply them by 255 / 15, or"),
        (COLOUR // 16 + 0.5, LABELS, None, "floats up to 15.5, almost black: multiply them by 255 / 15.5"),
        (COLOUR / COLOUR.max() * 3, LABELS, None, "floats up to 3, almost black"),
        (COLOUR / 255 / 255, LABELS, None, "floats up to 0.0039.*, almost black: scale them to .*once"),
        (COLOUR, np.array([0, 1, 2**63 + 5, 0], np.uint64), None, "label 9223372036854775813 .* out of range"),
        (COLOUR, LABELS[:3], None, r"4 images but labels of shape \(3,\)"),
        (COLOUR, LABELS.astype(float), None, "type float64"),
        (COLOUR, LABELS - 1, None, "label -1 of"),
        (COLOUR, LABELS + 1, ["a", "b"], "label 2 of .* is none of the 2 classes that have a name"),
        (COLOUR, LABELS + 1, None, "label 0: number the classes from 0 without gaps"),
        (COLOUR, LABELS * 2, None, "label 1: number the classes from 0 without gaps"),
        (COLOUR, LABELS * 10**9, None, "label 1000000000 of"),
        (COLOUR, LABELS * 0 + 1, ["a", "b"], "at least two classes"),
    ],
)
def test_unusable_arrays_are_refused_by_name(
    images: np.ndarray, labels: np.ndarray, classes: list[str] | None, message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        image_set("birds", images, labels, classes)
    assert "'birds'" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 4.5, True, "4"])
def test_a_size_that_is_no_side_is_refused(size: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"size={size!r} for 'birds' is out of range: give a whole number"):
        image_set("birds", COLOUR, LABELS, size=size)
    with pytest.raises(ConfigurationError, match=f"size={size!r} for '.*' is out of range: give a whole number"):
        load_images(tmp_path, size)


def test_sixteen_bits_of_both_kinds_are_taken() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        found = image_set("birds", torch.from_numpy(COLOUR).to(dtype), LABELS).images.float()
        assert (found - torch.from_numpy(COLOUR).permute(0, 3, 1, 2)).abs().max() <= 1  # which 8 bits round to


def test_the_set_does_not_change_with_the_array_it_was_made_from() -> None:
    images = np.ascontiguousarray(COLOUR.transpose(0, 3, 1, 2))
    labels = LABELS.astype(np.int64)
    made = image_set("set", images, labels)
    images[:], labels[:] = 0, 0
    assert torch.equal(made.images, torch.from_numpy(COLOUR).permute(0, 3, 1, 2))
    assert made.labels.tolist() == LABELS.tolist()
