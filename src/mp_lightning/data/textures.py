"""Generated images whose classes are kinds of texture: enough to learn from, nothing to download."""

from collections.abc import Callable

import numpy as np
import torch

from mp_lightning.data.arrays import image_set
from mp_lightning.data.images import ImageSet
from mp_lightning.errors import ConfigurationError

# A texture maps coordinates to values of about -1 to 1. u and v are angles (2 pi is one period), float32 (n, H, W),
# already rotated, shifted and stretched at random for each image.
Texture = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]


def _blobs(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Gratings of one period in random directions: spots of one size without any order."""
    total: np.ndarray = np.zeros_like(u)
    for _ in range(6):
        angle, phase = (rng.uniform(0, 2 * np.pi, (len(u), 1, 1)).astype(np.float32) for _ in range(2))
        total = total + np.sin(np.cos(angle) * u + np.sin(angle) * v + phase)
    return 0.5 * total


_TEXTURES: dict[str, Texture] = {
    "stripes": lambda u, v, rng: np.sin(u),
    "checkerboard": lambda u, v, rng: np.sign(np.sin(u) * np.sin(v)),
    "rings": lambda u, v, rng: np.sin(np.hypot(u, v)),
    "squares": lambda u, v, rng: np.sin(np.maximum(np.abs(u), np.abs(v))),
    "triangles": lambda u, v, rng: np.sin(np.maximum(np.maximum(u, 0.866 * v - 0.5 * u), -0.866 * v - 0.5 * u)),
    "waves": lambda u, v, rng: np.sin(u + 1.5 * np.sin(0.7 * v)),
    "dots": lambda u, v, rng: np.where(np.cos(u) + np.cos(v) > 0.8, 1.0, -0.4),
    "mesh": lambda u, v, rng: np.where(np.maximum(np.cos(u), np.cos(v)) > 0.7, 1.0, -0.6),
    "honeycomb": lambda u, v, rng: (np.cos(u) + np.cos(0.866 * v - 0.5 * u) + np.cos(-0.866 * v - 0.5 * u)) / 1.5,
    "blobs": _blobs,
}
# Periods across the image; no period shorter than so many pixels, or the structure drowns in noise.
_FEWEST_PERIODS, _MOST_PERIODS = 2.0, 5.0
_PIXELS_PER_PERIOD = 6


def generate_textures(num_classes: int, per_class: int, size: int, seed: int, name: str = "textures") -> ImageSet:
    """Draw images of textures that differ by structure and period, not by colour, position or contrast.

    Made so that a small network learns them, but not from few images: Conv4 with 16 channels trained on 30 images of
    each of 10 classes fits them all, and is right on about 7 in 10 others.

    The seed chooses the classes as well as the images: split one set (:meth:`ImageSet.few_per_class`) to have other
    images of the same classes. Ten structures; beyond ten classes they come back with other periods.

    Args:
        num_classes: classes, at least 2. More are harder to tell apart.
        per_class: images in each class, in which colours, contrast, direction, position, period and noise vary.
        size: side in pixels, at least 8.
        seed: any integer; the same arguments give the same images.
        name: name of the set.

    Returns:
        A set of ``num_classes * per_class`` images, class after class.

    Raises:
        ConfigurationError: a number is out of range.
    """
    if num_classes < 2 or per_class < 1 or size < 8:
        raise ConfigurationError(
            f"textures of {num_classes} classes, {per_class} images each, {size} pixels are out of range: "
            "give at least 2, 1 and 8"
        )
    rng = np.random.default_rng(seed % 2**64)
    kinds = rng.permutation(sorted(_TEXTURES))
    levels = -(-num_classes // len(kinds))
    most = min(_MOST_PERIODS, size / _PIXELS_PER_PERIOD)
    images, classes = [], []
    for number in range(num_classes):
        kind, level = str(kinds[number % len(kinds)]), number // len(kinds)
        # Periods across the image: any within the range, or, where a structure comes back, each in its own part.
        part = (level + rng.uniform(0.3, 0.7)) / levels
        periods = most * (_FEWEST_PERIODS / _MOST_PERIODS) ** (1 - part)
        images.append(_draw(_TEXTURES[kind], per_class, size, periods, rng))
        classes.append(kind if levels == 1 else f"{kind}_{level}")
    labels = torch.arange(num_classes).repeat_interleave(per_class)
    return image_set(name, np.concatenate(images), labels, classes)


def _draw(texture: Texture, count: int, size: int, periods: float, rng: np.random.Generator) -> np.ndarray:
    """uint8 (count, 3, size, size)."""

    def each(low: float, high: float, *shape: int) -> np.ndarray:
        return rng.uniform(low, high, (count, *(shape or (1, 1)))).astype(np.float32)

    axis = np.linspace(-np.pi, np.pi, size, dtype=np.float32)
    x, y = axis[None, None, :] - each(-1.5, 1.5), axis[None, :, None] - each(-1.5, 1.5)
    angle = each(-0.4, 0.4)
    stretch = periods * np.exp(each(-0.25, 0.25))
    u = stretch * (np.cos(angle) * x + np.sin(angle) * y)
    v = stretch * (np.cos(angle) * y - np.sin(angle) * x)
    value = texture(u, v, rng).astype(np.float32)[:, None]
    # Colours: a mean, and a direction in which the texture pushes it, always lighter where its value is high. (With
    # either sign, 30 images of a class are too few to learn from.)
    mean, push = each(0.3, 0.7, 3, 1, 1), each(0.4, 1.6, 3, 1, 1)
    contrast = each(0.15, 0.4, 1, 1, 1)
    noise = rng.standard_normal((count, 3, size, size), dtype=np.float32)
    pixels = mean + contrast * push * value + each(0.02, 0.15, 1, 1, 1) * noise
    rounded: np.ndarray = np.rint(255 * pixels.clip(0, 1)).astype(np.uint8)
    return rounded
