"""Image files in one folder for each class."""

from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from mp_lightning.data.arrays import labelled
from mp_lightning.data.image_files import read_image_files
from mp_lightning.data.images import ImageSet
from mp_lightning.data.progress import Progress
from mp_lightning.errors import ConfigurationError, DataError


def load_folder(root: Path, size: int | None, on_progress: Progress) -> tuple[ImageSet, ImageSet | None]:
    """Load ``root/CLASS/**/image``, or ``root/train/CLASS/...`` with ``root/test`` or ``root/val`` beside it.

    Classes are numbered in the order of their names. See :func:`mp_lightning.data.load_images` for the rest.
    """
    if size is not None and size < 1:
        raise ConfigurationError(f"size={size} for '{root}' is out of range: give at least 1 pixel")
    # A folder 'train' without folders inside is a class of that name.
    if not _subfolders(root / "train"):
        return _load_split(root, root.name, _class_names(root), size, on_progress), None
    classes = _class_names(root / "train")
    train = _load_split(root / "train", root.name, classes, size, on_progress)
    for held_out in (root / "test", root / "val"):
        if held_out.is_dir():
            unknown = sorted(set(_subfolders(held_out)) - set(classes))
            if unknown:
                raise DataError(
                    f"class '{unknown[0]}' of '{held_out}' has no folder in '{root / 'train'}': add or remove it"
                )
            return train, _load_split(held_out, f"{root.name} ({held_out.name})", classes, size, on_progress)
    return train, None


def _subfolders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _class_names(folder: Path) -> list[str]:
    classes = _subfolders(folder)
    if len(classes) < 2:
        found = f"only the folder '{classes[0]}'" if classes else "no folders"
        raise DataError(f"'{folder}' holds {found}: give one folder of images for each of at least two classes")
    empty = [name for name in classes if not _image_files(folder / name)]
    if empty:
        raise DataError(f"'{folder / empty[0]}' holds no image files: add images of that class or remove the folder")
    return classes


def _image_files(folder: Path) -> list[Path]:
    """All image files at any depth, in the order of their paths, without hidden ones."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMG_EXTENSIONS and not path.name.startswith(".") and path.is_file()
    )


def _load_split(folder: Path, name: str, classes: list[str], size: int | None, on_progress: Progress) -> ImageSet:
    files = [(path, label) for label, entry in enumerate(classes) for path in _image_files(folder / entry)]
    if not files:
        raise DataError(f"'{folder}' holds no image files: add images of each class")
    paths, labels = zip(*files, strict=True)
    return labelled(name, read_image_files(paths, size, str(folder), on_progress), labels, classes)
