"""From the name of a dataset to its images."""

import difflib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from mp_lightning.data.arrays import image_set, labelled
from mp_lightning.data.catalogue.cache import cache_file, read_cache, write_cache
from mp_lightning.data.catalogue.contents import Contents, Part
from mp_lightning.data.catalogue.downloads import fetch
from mp_lightning.data.catalogue.lock import locked
from mp_lightning.data.catalogue.table import DATASETS, Dataset
from mp_lightning.data.files import load_images
from mp_lightning.data.image_files import read_image_files
from mp_lightning.data.images import ImageSet
from mp_lightning.data.progress import Progress, no_progress
from mp_lightning.data.resize import TO_RESIZE
from mp_lightning.errors import ConfigurationError, DataError


def list_datasets() -> list[str]:
    """The names that :func:`load_dataset` knows."""
    return list(DATASETS)


def may_mirror(source: str, flip: bool | None) -> bool:
    """Whether images are mirrored: as asked for, and where nothing is asked for, unless it changes their class."""
    return flip if flip is not None else source not in DATASETS or DATASETS[source].mirrors


def load_dataset(
    name: str, root: str | os.PathLike[str], size: int, on_progress: Progress | None = None
) -> tuple[ImageSet, ImageSet]:
    """Load a dataset by name; download it first where that is needed and possible.

    Args:
        name: one of :func:`list_datasets`.
        root: the folder of all data, in which the dataset has the subfolder ``name``. What is in that subfolder is
            used and not changed; what is missing is downloaded with torchvision, checksums included, which shows its
            own progress. Where nothing can be written, a dataset that is there is read all the same.
        size: resize the shorter side of every image to so many pixels and crop the centre to a square. Where reading
            is slow the result is kept in ``root/name/cache``, for the next time.
        on_progress: while archives are unpacked and images read, called with what is done, and how many parts of it
            are done and how many there are.

    Returns:
        (training set, test set) in the dataset's usual split, called ``name`` and ``name (test)``.

    Raises:
        DataError: the dataset cannot be downloaded, or its files are incomplete or damaged; the message says which
            files belong where.
        ConfigurationError: the name is not known, or the size below 1.
    """
    dataset = _known(name)
    if size < 1:
        raise ConfigurationError(f"size={size} for '{name}' is out of range: give at least 1 pixel")
    report = on_progress or no_progress
    folder = Path(root).expanduser() / name
    if not dataset.cached:
        _complete(name, dataset, folder, report)
        return _read(name, dataset, folder, size, report)
    kept, names = cache_file(folder, size), (name, f"{name} (test)")
    found = read_cache(kept, names, size)
    if found is not None:
        return found
    _complete(name, dataset, folder, report)
    with locked(folder):
        # Another process may have made it while this one waited.
        found = read_cache(kept, names, size)
        if found is None:
            found = _read(name, dataset, folder, size, report)
            write_cache(kept, *found)
    return found


def load_source(
    source: str, root: str | os.PathLike[str], size: int | None, on_progress: Progress | None = None
) -> tuple[ImageSet, ImageSet | None]:
    """Load a dataset by name (:func:`load_dataset`), or else images by path (:func:`load_images`).

    Args:
        source: the name or the path. A name goes first: write ``./digits`` for a folder of that name.
        root: the folder of all datasets that have names.
        size: as there; None, for images that are square and of one size, with paths only.
        on_progress: as there.

    Returns:
        (training set, test set or None).

    Raises:
        DataError: neither a name nor a path, or what :func:`load_dataset` and :func:`load_images` raise.
        ConfigurationError: a name without a size, or a size below 1.
    """
    if source in DATASETS:
        if size is None:
            raise ConfigurationError(f"dataset '{source}' needs a size: {TO_RESIZE}")
        return load_dataset(source, root, size, on_progress)
    path = os.path.expanduser(source)
    if not os.path.exists(path):  # of a Path it raises for names that are too long
        names = ", ".join(DATASETS)
        near = difflib.get_close_matches(source.lower(), DATASETS, n=1, cutoff=0.7)
        meant = f", did you mean '{near[0]}'" if near else ""
        raise DataError(
            f"no images at '{source}'{meant}: give one of the datasets {names}, an .npz file or a folder of image "
            "folders"
        )
    return load_images(path, size, on_progress)


def _known(name: str) -> Dataset:
    if name not in DATASETS:
        raise ConfigurationError(f"dataset '{name}' is not known: choose one of {', '.join(DATASETS)}")
    return DATASETS[name]


def _complete(name: str, dataset: Dataset, folder: Path, report: Progress) -> None:
    """Download what is missing."""
    place = folder / dataset.inside
    missing = [entry for entry in dataset.by_hand if not (place / entry).exists()]
    if missing:
        raise DataError(f"'{name}' cannot be downloaded any more: put {', '.join(missing)} into '{place}'")
    if not all(download.is_in(place) for download in dataset.downloads):
        with locked(folder):
            fetch(name, dataset.downloads, place, report)


def _read(name: str, dataset: Dataset, folder: Path, size: int, report: Progress) -> tuple[ImageSet, ImageSet]:
    contents = _contents(name, dataset, folder)
    return (
        _image_set(name, contents.train, contents.classes, size, report),
        _image_set(f"{name} (test)", contents.test, contents.classes, size, report),
    )


def _contents(name: str, dataset: Dataset, folder: Path) -> Contents:
    try:
        return dataset.read(folder)
    except MemoryError:
        raise
    # A file that is missing, cut off or another makes torchvision and SciPy raise whatever their readers raise.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition(". You can use download=True")[0]
        remedy = "replace them" if dataset.by_hand else "remove what was unpacked there, and it is downloaded again"
        place = folder / dataset.inside
        raise DataError(f"files of '{name}' in '{place}' are incomplete or damaged ({reason}): {remedy}") from error


def _image_set(name: str, part: Part, classes: Sequence[str], size: int, report: Progress) -> ImageSet:
    if isinstance(part.images, np.ndarray | Tensor):
        return image_set(name, part.images, part.labels, classes, size)
    pixels = read_image_files(part.images, size, name, report)
    return labelled(name, pixels, part.labels, classes)
