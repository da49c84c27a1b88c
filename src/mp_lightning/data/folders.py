"""Image files in one folder for each class."""

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from mp_lightning.data.arrays import labelled
from mp_lightning.data.image_files import read_image_files
from mp_lightning.data.images import ImageSet
from mp_lightning.data.progress import Progress
from mp_lightning.data.resize import check_size
from mp_lightning.errors import DataError
from mp_lightning.walking import walk

_TRAIN, _TEST, _VALID = ("train", "training"), ("test", "testing"), ("val", "valid", "validation")
_NO_CLASSES = ("__MACOSX",)  # what macOS packs beside the folders of a zip


def load_folder(root: Path, size: int | None, on_progress: Progress) -> tuple[ImageSet, ImageSet | None]:
    """Load ``root/CLASS/**/image``, or ``root/train/CLASS/...`` with ``root/test`` or ``root/val`` beside it.

    The splits may also be called training, testing, valid and validation, in letters of either case. Classes are
    numbered in the order of their names. See :func:`mp_lightning.data.load_images` for the rest.
    """
    check_size(size, str(root))
    called = os.path.basename(os.path.abspath(root))  # also where it is '.'
    # A folder 'train' without folders inside is a class of that name.
    splits = [folder for folder in _called(root, _TRAIN) if _subfolders(folder)]
    if not splits:
        _refuse_splits(root)
        return _load_split(root, called, _training_files(root), size, on_progress), None
    if len(splits) > 1:
        raise DataError(f"'{root}' holds both '{splits[0].name}' and '{splits[1].name}': merge or remove one of them")
    (place,) = splits
    files = _training_files(place)
    train = _load_split(place, called, files, size, on_progress)
    held_out = _held_out(root)
    if held_out is None:
        return train, None
    unknown = sorted(set(_subfolders(held_out)) - set(files))
    if unknown:
        raise DataError(f"class '{unknown[0]}' of '{held_out}' has no folder in '{place}': add or remove it")
    files = {name: _image_files(held_out / name) for name in files}
    return train, _load_split(held_out, f"{called} ({held_out.name})", files, size, on_progress)


def _called(root: Path, names: tuple[str, ...]) -> list[Path]:
    """The folders in ``root`` of one of these names, in their order."""
    folders = _subfolders(root)
    return [root / folder for name in names for folder in folders if folder.lower() == name]


def _held_out(root: Path) -> Path | None:
    """The first split to test on that has images in folders of classes; where none has, the first."""
    found = [*_called(root, _TEST), *_called(root, _VALID)]
    full = (folder for folder in found if any(_image_files(folder / name) for name in _subfolders(folder)))
    return next(full, found[0] if found else None)


def _refuse_splits(root: Path) -> None:
    """Refuse a folder whose folders are splits rather than classes, as far as that shows.

    Raises:
        DataError: all of them have the names of splits, or hold the same folders, two or more.
    """
    folders = _subfolders(root)
    remedy = "put one folder for each class into 'train', and into 'test' what is to test on"
    if folders and all(name.lower() in (*_TRAIN, *_TEST, *_VALID) for name in folders):
        raise DataError(f"'{root}' holds splits without a training set of classes ({', '.join(folders)}): {remedy}")
    inside = {tuple(_subfolders(root / name)) for name in folders}
    if len(folders) > 1 and len(inside) == 1 and len(alike := inside.pop()) > 1:
        raise DataError(
            f"'{folders[0]}' and all other folders of '{root}' hold the same folders ({', '.join(alike[:3])}"
            f"{', ...' if len(alike) > 3 else ''}), as splits do and classes do not: {remedy}"
        )


def _subfolders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    names = (entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    return sorted(name for name in names if name not in _NO_CLASSES)


def _training_files(folder: Path) -> dict[str, list[Path]]:
    """By class; each has some."""
    classes = _subfolders(folder)
    if len(classes) < 2:
        found = f"only the folder '{classes[0]}'" if classes else "no folders"
        raise DataError(f"'{folder}' holds {found}: give one folder of images for each of at least two classes")
    files = {name: _image_files(folder / name) for name in classes}
    empty = [name for name in classes if not files[name]]
    if empty:
        raise DataError(f"'{folder / empty[0]}' holds no image files: add images of that class or remove the folder")
    return files


def _image_files(folder: Path) -> list[Path]:
    """All image files at any depth, in the order of their paths, without hidden ones."""
    return sorted(path for path in _files(folder) if path.suffix.lower() in IMG_EXTENSIONS)


def _files(folder: Path) -> Iterator[Path]:
    paths = (Path(place, name) for place, _, names in walk(folder) for name in names)
    return (path for path in paths if not path.name.startswith("."))


def _tell_passed_over(folder: Path, classes: Iterable[str]) -> None:
    """Warn of files in the folders of these classes that Pillow would read, and that are not."""
    Image.init()  # all of Pillow's formats
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    suffixes = Counter(path.suffix.lower() for name in classes for path in _files(folder / name))
    over = {suffix: count for suffix, count in sorted(suffixes.items()) if suffix in known.difference(IMG_EXTENSIONS)}
    if over:
        warnings.warn(
            f"{sum(over.values())} files of '{folder}' were passed over, as files of their kind are not read "
            f"({', '.join(over)}); save them as PNG if they are images",
            stacklevel=2,
        )


def _load_split(
    folder: Path, name: str, files: dict[str, list[Path]], size: int | None, on_progress: Progress
) -> ImageSet:
    _tell_passed_over(folder, files)
    labelled_files = [(path, label) for label, paths in enumerate(files.values()) for path in paths]
    if not labelled_files:
        raise DataError(f"'{folder}' holds no image files: add images of each class")
    paths, labels = zip(*labelled_files, strict=True)
    return labelled(name, read_image_files(paths, size, str(folder), on_progress), labels, list(files))
