"""The targets that a phi is chosen on: none of their images is one of a target on which it is proven.

``clothing50`` is made of clothing.npz, the small clothing set, whose few test images are too few to choose by. The
others are made of the five files of Tiny ImageNet that phi are learned from, tiny_imagenet_000_039.npz to
tiny_imagenet_160_199.npz: ``tiny10_0`` to ``tiny10_14`` of ten classes each, of the thirty of each file that a source
with ``tasks.classes=10`` does not use, and ``tiny100`` of the last 30 training images of every second class, which a
small network does not fit in a short training, and a quarter of whose classes such sources use. In all but that one the
first images of each class are there to train on, and the others to test.
"""

import re
import zipfile
from pathlib import Path

import numpy as np

CLOTHING, TINY100 = "clothing50", "tiny100"
_TINY10 = re.compile(r"tiny10_(\d|1[0-4])")
_POOL = 80  # training images of a class, at most half of them
_CLASSES, _USED, _SETS = 40, 10, 15  # of each file; the first ones are classes of sources

Images = tuple[np.ndarray, np.ndarray]


def write_target(name: str, folder: Path) -> None:
    """Make NAME.npz in a folder of what it is made of, where it is one of these targets and not there yet.

    Raises:
        OSError: a file that it is made of cannot be read.
        ValueError: such a file is no npz file with x_train, y_train, x_test and y_test.
    """
    tiny10 = _TINY10.fullmatch(name)
    if (folder / f"{name}.npz").exists() or not (name in (CLOTHING, TINY100) or tiny10):
        return
    if tiny10:
        (x, y), (x_test, y_test) = _unused(folder, int(tiny10[1]))
    else:
        (x, y), (x_test, y_test) = _clothing(folder) if name == CLOTHING else _every_second(folder)
    partial = folder / f"{name}.partial.npz"
    np.savez(partial, x_train=x, y_train=y, x_test=x_test, y_test=y_test)
    partial.replace(folder / f"{name}.npz")  # it appears whole or not at all


def _clothing(folder: Path) -> tuple[Images, Images]:
    (x, y), (x_test, y_test) = _read(folder / "clothing.npz")
    train, rest = _pool(x, y)
    return train, (np.concatenate([x_test, rest[0]]), np.concatenate([y_test, rest[1]]))


def _unused(folder: Path, number: int) -> tuple[Images, Images]:
    unused = [label for label in range(5 * _CLASSES) if label % _CLASSES >= _USED]
    train, test = _classes_of_tiny_imagenet(folder, unused[number::_SETS])
    return _pool(np.concatenate([train[0], test[0]]), np.concatenate([train[1], test[1]]))


def _every_second(folder: Path) -> tuple[Images, Images]:
    (x, y), test = _classes_of_tiny_imagenet(folder, list(range(0, 5 * _CLASSES, 2)))
    last = np.concatenate([np.flatnonzero(y == label)[-30:] for label in np.unique(y)])
    return (x[last], y[last]), test


def _classes_of_tiny_imagenet(folder: Path, chosen: list[int]) -> tuple[Images, Images]:
    """The training and the test images of some classes, the k-th of which gets the label k."""
    parts: tuple[list[Images], list[Images]] = ([], [])
    for first in range(0, 5 * _CLASSES, _CLASSES):
        both = _read(folder / f"tiny_imagenet_{first:03}_{first + _CLASSES - 1:03}.npz")
        for part, (images, labels) in zip(parts, both, strict=True):
            for label in sorted(set(chosen) & set(labels.tolist())):
                own = images[labels == label]
                part.append((own, np.full(len(own), chosen.index(label))))
    train, test = ((np.concatenate([x for x, _ in part]), np.concatenate([y for _, y in part])) for part in parts)
    return train, test


def _pool(x: np.ndarray, y: np.ndarray) -> tuple[Images, Images]:
    """The first images of each class, and all others."""
    chosen = np.zeros(len(y), dtype=bool)
    for label in np.unique(y):
        own = np.flatnonzero(y == label)
        chosen[own[: min(_POOL, len(own) // 2)]] = True
    return (x[chosen], y[chosen]), (x[~chosen], y[~chosen])


def _read(path: Path) -> tuple[Images, Images]:
    try:
        with np.load(path) as content:
            return (content["x_train"], content["y_train"]), (content["x_test"], content["y_test"])
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"'{path}' is no npz file with x_train, y_train, x_test, y_test: {error}") from error
