"""Augmentation of a batch."""

import pytest
import torch
import torch.nn.functional as F

from mp_lightning.data import normalize, standard_augment
from mp_lightning.errors import DataError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unique_pixels(batch: int, size: int) -> torch.Tensor:
    return torch.randint(1, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator(9))


def test_normalize_maps_0_and_255_to_minus_one_and_one() -> None:
    out = normalize(torch.tensor([0, 255], dtype=torch.uint8))
    assert out.dtype == torch.float32
    assert out.tolist() == [-1.0, 1.0]


@pytest.mark.parametrize(("size", "pad"), [(16, 4), (32, 4), (33, 8)])
@pytest.mark.parametrize("flip", [True, False])
def test_every_result_is_a_crop_of_the_padded_image_mirrored_or_not(size: int, pad: int, flip: bool) -> None:
    images = unique_pixels(200, size)
    out = standard_augment(images, generator(), flip=flip)
    padded = normalize(F.pad(images, (pad,) * 4))
    seen = set()
    for image, source in zip(out, padded, strict=True):
        # All crops of this source at once: (3, 2 * pad + 1, 2 * pad + 1, size, size).
        crops = source.unfold(1, size, 1).unfold(2, size, 1)
        for mirrored in (False, True):
            same = (crops == (image.flip(-1) if mirrored else image)[:, None, None]).all(dim=(0, 3, 4))
            if same.any():
                seen.add((*same.nonzero()[0].tolist(), mirrored))
                break
        else:
            pytest.fail("an image is no crop of its source")
    rows, columns, mirrored_ones = (set(column) for column in zip(*seen, strict=True))
    assert rows == columns == set(range(2 * pad + 1))
    assert mirrored_ones == ({False, True} if flip else {False})


def test_half_of_the_images_are_mirrored() -> None:
    images = torch.zeros(2000, 3, 16, 16, dtype=torch.uint8)
    images[..., :8] = 255
    left_is_white = standard_augment(images, generator())[:, 0, 8, 4] > 0
    assert left_is_white.float().mean().item() == pytest.approx(0.5, abs=0.05)


def test_only_the_given_generator_is_used() -> None:
    images = unique_pixels(8, 16)
    state = torch.get_rng_state()
    first = standard_augment(images, generator())
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(standard_augment(images, generator()), first)
    assert not torch.equal(standard_augment(images, generator(1)), first)


def test_no_image_is_augmented_to_none() -> None:
    assert standard_augment(unique_pixels(2, 16)[:0], generator()).shape == (0, 3, 16, 16)


def test_pixels_that_are_scaled_already_are_refused() -> None:
    images = unique_pixels(2, 16) / 255
    for call in (lambda: normalize(images), lambda: standard_augment(images, generator())):
        with pytest.raises(
            DataError, match=r"pixels of type torch\.float32 cannot be normalized: give uint8, 0 to 255"
        ):
            call()
