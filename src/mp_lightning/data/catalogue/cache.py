"""Decoded and resized images of a dataset, kept beside its files, since decoding takes minutes and reading seconds."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from mp_lightning.data.archives import read_archive
from mp_lightning.data.arrays import labelled
from mp_lightning.data.images import ImageSet
from mp_lightning.errors import DataError
from mp_lightning.whole import write_whole

# Counts what changes the pixels: another number makes all kept images anew.
_VERSION = 2


def cache_file(folder: Path, size: int) -> Path:
    """Where the images of one size are kept. Remove the file after a change of the dataset's own files."""
    return folder / "cache" / f"{size}-v{_VERSION}.npz"


def read_cache(path: Path, names: Sequence[str], size: int) -> tuple[ImageSet, ImageSet] | None:
    """The training and the test set under the given names; None where the file is missing or damaged."""
    try:
        arrays = read_archive(path)
        classes = [str(entry) for entry in arrays["classes"]]
        train, test = (
            labelled(name, torch.from_numpy(arrays[f"x_{part}"]), arrays[f"y_{part}"], classes)
            for name, part in zip(names, ("train", "test"), strict=True)
        )
    except (OSError, DataError, KeyError, TypeError, ValueError):
        return None
    whole = all(part.images.dtype == torch.uint8 and part.images.shape[1:] == (3, size, size) for part in (train, test))
    return (train, test) if whole else None


def write_cache(path: Path, train: ImageSet, test: ImageSet) -> None:
    """Keep both sets, if there is a right to write and room."""

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            np.savez(
                file,
                x_train=train.images.numpy(),
                y_train=train.labels.numpy(),
                x_test=test.images.numpy(),
                y_test=test.labels.numpy(),
                classes=np.array(train.classes),
            )

    with suppress(OSError):
        path.parent.mkdir(exist_ok=True)
        write_whole(path, write)
