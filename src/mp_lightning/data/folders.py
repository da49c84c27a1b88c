"""Image files in one folder for each class."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from mp_lightning.data.arrays import image_set
from mp_lightning.data.images import ImageSet
from mp_lightning.data.resize import resize
from mp_lightning.errors import ConfigurationError, DataError


def load_folder(root: Path, size: int | None) -> tuple[ImageSet, ImageSet | None]:
    """Load ``root/CLASS/**/image``, or ``root/train/CLASS/...`` with ``root/test`` or ``root/val`` beside it.

    Classes are numbered in the order of their names. See :func:`mp_lightning.data.load_images` for the rest.
    """
    if size is not None and size < 1:
        raise ConfigurationError(f"size={size} for '{root}' is out of range: give at least 1 pixel")
    # A folder 'train' without folders inside is a class of that name.
    if not _subfolders(root / "train"):
        return _load_split(root, root.name, _class_names(root), size), None
    classes = _class_names(root / "train")
    train = _load_split(root / "train", root.name, classes, size)
    for held_out in (root / "test", root / "val"):
        if held_out.is_dir():
            unknown = sorted(set(_subfolders(held_out)) - set(classes))
            if unknown:
                raise DataError(
                    f"class '{unknown[0]}' of '{held_out}' has no folder in '{root / 'train'}': add or remove it"
                )
            return train, _load_split(held_out, f"{root.name} ({held_out.name})", classes, size)
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


def _load_split(folder: Path, name: str, classes: list[str], size: int | None) -> ImageSet:
    images: list[Tensor] = []
    labels: list[int] = []
    for label, class_name in enumerate(classes):
        for path in _image_files(folder / class_name):
            image = _read_image(path)
            if size is not None:
                image = resize(image, size)
            if images and image.shape != images[0].shape:
                raise DataError(
                    f"'{path}' is {_shape(image)}, other images of '{folder}' are {_shape(images[0])}: "
                    "set image_size=32, or another side in pixels, to resize all"
                )
            images.append(image)
            labels.append(label)
    if not images:
        raise DataError(f"'{folder}' holds no image files: add images of each class")
    return image_set(name, torch.cat(images), labels, classes)


def _read_image(path: Path) -> Tensor:
    """uint8 (1, 3, H, W)."""
    try:
        with Image.open(path) as image:
            # Pillow would cut deeper pixels off at 255 instead of scaling them.
            deep = image.mode.startswith(("I", "F"))
            pixels = np.array(image.convert("RGB"))
    # Broken files make Pillow's decoders raise almost anything, SyntaxError included.
    except Exception as error:
        raise DataError(f"'{path}' is not a readable image: repair or remove it") from error
    if deep:
        raise DataError(f"'{path}' has more than 8 bits a channel: convert it to 8 bits")
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()


def _shape(image: Tensor) -> str:
    height, width = image.shape[-2:]
    return f"{height} x {width} pixels"
