"""Images of the user: a numpy archive or a folder of image files."""

import os
from pathlib import Path
from typing import Any

from mp_lightning.data.archives import read_archive
from mp_lightning.data.arrays import image_set
from mp_lightning.data.folders import load_folder
from mp_lightning.data.images import ImageSet
from mp_lightning.data.progress import Progress, no_progress
from mp_lightning.data.resize import TO_RESIZE
from mp_lightning.errors import DataError


def load_images(
    path: str | os.PathLike[str], size: int | None = None, on_progress: Progress | None = None
) -> tuple[ImageSet, ImageSet | None]:
    """Load a training set and, if there is one, a test set with the same classes.

    Args:
        path: either an ``.npz`` file with ``x_train``, ``y_train`` and optionally ``x_test``, ``y_test`` and
            ``classes`` (the names), in the forms that :func:`image_set` takes; or a folder with one folder of image
            files for each class (``root/cat/1.png``), or with such folders under ``root/train`` and, optionally,
            ``root/test`` (else ``root/val``), which may also be called training, testing, valid and validation. Image
            files are turned as their EXIF data say, and what is transparent in them becomes white.
        size: resize the shorter side of every image to so many pixels and crop the centre to a square. Needed where
            images differ in size or are not square.
        on_progress: while image files are read, called with what is read, and how many files are done and how many
            there are.

    Returns:
        (training set, test set or None).

    Raises:
        DataError: nothing there, damaged or incomplete files, fewer than two classes, images of unequal size, splits
            in place of classes.
        ConfigurationError: the size is no whole number from 1 on.
    """
    path = Path(os.path.expanduser(path))
    try:
        if path.is_dir():
            train, test = load_folder(path, size, on_progress or no_progress)
        elif path.is_file():
            train, test = _load_archive(path, size)
        else:
            raise DataError(f"no images at '{path}': give an .npz file or a folder of image folders")
    except OSError as error:
        raise DataError(f"'{path}' cannot be read ({error.strerror}): check its permissions") from error
    if test is not None and test.images.shape[1:] != train.images.shape[1:]:
        raise DataError(
            f"images of '{path}' differ in size, {train.image_size} pixels in train and {test.image_size} in test: "
            f"{TO_RESIZE}"
        )
    return train, test


def _as_text(name: Any) -> str:
    return name.decode(errors="replace") if isinstance(name, bytes) else str(name)


def _load_archive(path: Path, size: int | None) -> tuple[ImageSet, ImageSet | None]:
    arrays = read_archive(path)
    found = ", ".join(sorted(arrays)) or "nothing"
    wanted = ["x_train", "y_train"]
    if "x_test" in arrays or "y_test" in arrays:
        wanted += ["x_test", "y_test"]
    missing = [key for key in wanted if key not in arrays]
    if missing:
        raise DataError(f"'{path}' lacks {' and '.join(missing)} (found: {found}): save the arrays under those names")
    classes = [_as_text(name) for name in arrays["classes"].ravel()] if "classes" in arrays else None
    train = image_set(path.stem, arrays["x_train"], arrays["y_train"], classes, size)
    if "x_test" not in arrays:
        return train, None
    return train, image_set(f"{path.stem} (test)", arrays["x_test"], arrays["y_test"], train.classes, size)
