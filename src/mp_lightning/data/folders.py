"""Image files in one folder for each class."""

from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from mp_lightning.data.arrays import labelled
from mp_lightning.data.image_files import read_image_files
from mp_lightning.data.images import ImageSet
from mp_lightning.data.progress import Progress
from mp_lightning.errors import ConfigurationError, DataError
from mp_lightning.walking import walk


def load_folder(root: Path, size: int | None, on_progress: Progress) -> tuple[ImageSet, ImageSet | None]:
    """Load ``root/CLASS/**/image``, or ``root/train/CLASS/...`` with ``root/test`` or ``root/val`` beside it.

    Classes are numbered in the order of their names. See :func:`mp_lightning.data.load_images` for the rest.
    """
    if size is not None and size < 1:
        raise ConfigurationError(f"size={size} for '{root}' is out of range: give at least 1 pixel")
    # A folder 'train' without folders inside is a class of that name.
    if not _subfolders(root / "train"):
        return _load_split(root, root.name, _training_files(root), size, on_progress), None
    files = _training_files(root / "train")
    train = _load_split(root / "train", root.name, files, size, on_progress)
    for held_out in (root / "test", root / "val"):
        if held_out.is_dir():
            unknown = sorted(set(_subfolders(held_out)) - set(files))
            if unknown:
                raise DataError(
                    f"class '{unknown[0]}' of '{held_out}' has no folder in '{root / 'train'}': add or remove it"
                )
            files = {name: _image_files(held_out / name) for name in files}
            return train, _load_split(held_out, f"{root.name} ({held_out.name})", files, size, on_progress)
    return train, None


def _subfolders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


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
    paths = (Path(place, name) for place, _, names in walk(folder) for name in names)
    return sorted(path for path in paths if path.suffix.lower() in IMG_EXTENSIONS and not path.name.startswith("."))


def _load_split(
    folder: Path, name: str, files: dict[str, list[Path]], size: int | None, on_progress: Progress
) -> ImageSet:
    labelled_files = [(path, label) for label, paths in enumerate(files.values()) for path in paths]
    if not labelled_files:
        raise DataError(f"'{folder}' holds no image files: add images of each class")
    paths, labels = zip(*labelled_files, strict=True)
    return labelled(name, read_image_files(paths, size, str(folder), on_progress), labels, list(files))
