"""From unchecked arrays, as users have them, to an :class:`ImageSet`."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mp_lightning.data.images import ImageSet
from mp_lightning.data.resize import TO_RESIZE, check_size, resize
from mp_lightning.errors import DataError, one_line

_BARELY_ABOVE = 2  # up to it, floats above 1 are meant to end at 1, as after a resize that overshoots
_DARK = 64  # of 255: no set of real images has its brightest pixel below it


def image_set(
    name: str,
    images: np.ndarray | Tensor,
    labels: np.ndarray | Tensor | Sequence[int],
    classes: Sequence[str] | None = None,
    size: int | None = None,
) -> ImageSet:
    """Check images and labels and bring them to the form of an :class:`ImageSet`.

    Args:
        name: what messages call the set.
        images: (N, H, W), (N, H, W, C) or (N, C, H, W) with C 1 or 3; integers 0 to 255, or floats in [0, 1] or
            [0, 255] (in [0, 1] if none is larger than 1; refused if the largest is hardly so, or below 64). Grey is
            repeated to three channels.
        labels: integers (N,) or (N, 1), 0 to K - 1.
        classes: the K names; without them K is the largest label plus one, and the names are the numbers.
        size: resize the shorter side to so many pixels and crop the centre; without it images must be square.

    Raises:
        DataError: no images, fewer than two classes, a label out of range, a class without images where no names are
            given, two classes of one name, shapes that do not fit, values that are not finite, out of range, or almost
            black.
        ConfigurationError: the size is no whole number from 1 on.
    """
    check_size(size, name)
    pixels = _colour_images(name, _numpy(name, "images", images))
    if size is not None:
        pixels = resize(pixels, size)
    return labelled(name, pixels, labels, classes)


def labelled(
    name: str, pixels: Tensor, labels: np.ndarray | Tensor | Sequence[int], classes: Sequence[str] | None
) -> ImageSet:
    """Check labels and join them with pixels that are already uint8 (N, 3, H, W), which are not copied.

    The other arguments and the errors are those of :func:`image_set`.
    """
    numbers = _labels(name, _numpy(name, "labels", labels), len(pixels))
    names = _class_names(name, numbers, classes)
    height, width = pixels.shape[-2:]
    if height != width:
        raise DataError(f"images of '{name}' are {height} x {width}, not square: crop them, or {TO_RESIZE}")
    return ImageSet(name, pixels, torch.from_numpy(numbers), names)


def _numpy(name: str, what: str, values: np.ndarray | Tensor | Sequence[int]) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()  # which numpy does not know
    try:
        return np.asarray(values)
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{what} of '{name}' are no array ({one_line(error)}): give all of them the same shape"
        ) from error


def _colour_images(name: str, images: np.ndarray) -> Tensor:
    """uint8 (N, 3, H, W), contiguous."""
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[-1] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise DataError(f"images of '{name}' have shape {images.shape}: give (N, H, W), (N, H, W, 3) or (N, 3, H, W)")
    if images.size == 0:
        raise DataError(f"'{name}' holds no images: give at least one of each class")
    # A copy: the set must not change with the caller's array, which may also be read-only.
    pixels = torch.from_numpy(np.array(_to_uint8(name, images), order="C"))
    return pixels.expand(-1, 3, -1, -1).contiguous()


def _to_uint8(name: str, images: np.ndarray) -> np.ndarray:
    if images.dtype.kind not in "iuf":
        raise DataError(f"images of '{name}' are of type {images.dtype}: give uint8, or floats in [0, 1]")
    low, high = images.min(), images.max()
    # NaN wins in min and max, and an infinity is one of the two.
    if not (np.isfinite(low) and np.isfinite(high)):
        raise DataError(f"images of '{name}' hold values that are not finite (NaN or infinity): remove or repair them")
    if low < 0 or high > 255:
        raise DataError(f"images of '{name}' hold values from {low} to {high}: scale them to [0, 1] or [0, 255]")
    if images.dtype.kind != "f":
        if low < high == 1:
            raise DataError(f"images of '{name}' hold integers of 0 and 1 alone, almost black: multiply them by 255")
        _refuse_dark(name, "integers", low, high)
        return images.astype(np.uint8, copy=False)
    if 1 < high <= _BARELY_ABOVE:
        raise DataError(
            f"images of '{name}' hold floats up to {high:.6g}: clip them to [0, 1], or scale them to [0, 255]"
        )
    _refuse_dark(name, "floats", low, high)
    scale = 255.0 if high <= 1 else 1.0
    rounded: np.ndarray = np.rint(images.astype(np.float32) * scale).astype(np.uint8)
    if low < high and rounded.max() <= 1:
        raise DataError(
            f"images of '{name}' hold floats up to {high:.6g}, almost black: scale them to [0, 1], and once only"
        )
    return rounded


def _refuse_dark(name: str, what: str, low: float, high: float) -> None:
    """Refuse values that count to less than 255, such as the 16 of scikit-learn's digits; images of one value are fine.

    Raises:
        DataError: the brightest of all is dark.
    """
    if low < high and 1 < high < _DARK:
        raise DataError(
            f"images of '{name}' hold {what} up to {high:.6g}, almost black: multiply them by 255 / {high:.6g}, or by "
            "what makes the brightest possible value 255"
        )


def _labels(name: str, labels: np.ndarray, count: int) -> np.ndarray:
    """int64 (N,)."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.shape != (count,):
        raise DataError(f"'{name}' has {count} images but labels of shape {labels.shape}: give one label per image")
    if labels.dtype.kind not in "iu":
        raise DataError(
            f"labels of '{name}' are of type {labels.dtype}: give integers that count from 0; names go into 'classes'"
        )
    if labels.max() > np.iinfo(np.int64).max:
        raise DataError(f"label {labels.max()} of '{name}' is out of range: number the classes from 0 without gaps")
    return labels.astype(np.int64)


def _class_names(name: str, labels: np.ndarray, classes: Sequence[str] | None) -> tuple[str, ...]:
    low, high = int(labels.min()), int(labels.max())
    # Every class needs an image, so without names a label beyond the number of images cannot be a class number.
    limit = len(labels) if classes is None else len(classes)
    if low < 0 or high >= limit:
        culprit = low if low < 0 else high
        if low >= 0 and classes is not None:
            raise DataError(
                f"label {culprit} of '{name}' is none of the {len(classes)} classes that have a name, or images to "
                "train on: number the classes from 0 without gaps, and give each of them such"
            )
        raise DataError(f"label {culprit} of '{name}' is out of range: number the classes from 0 without gaps")
    if low == high:
        raise DataError(f"all images of '{name}' have the label {low}: give at least two classes")
    if classes is None and len(np.unique(labels)) <= high:
        empty = int(np.flatnonzero(np.bincount(labels) == 0)[0])
        raise DataError(f"no image of '{name}' has the label {empty}: number the classes from 0 without gaps")
    names = tuple(map(str, range(high + 1) if classes is None else classes))
    if len(set(names)) < len(names):
        double = Counter(names).most_common(1)[0][0]
        raise DataError(f"two classes of '{name}' are called '{double}': give each a name of its own, or join them")
    return names
