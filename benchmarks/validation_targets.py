"""The targets that a phi is chosen on: none of their images is one of a target on which it is proven, or of a source.

``clothing50`` is made of clothing.npz, the small clothing set, whose few test images are too few to choose by.
``tiny10_0`` to ``tiny10_14`` are made of the five files of Tiny ImageNet that phi are learned from,
tiny_imagenet_000_039.npz to tiny_imagenet_160_199.npz: ten classes each, of the thirty of each file of which
``tasks.classes=10`` uses none. Of all, the first images of each class are there to train on, and the others to test.
"""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

CLOTHING = "clothing50"
_TINY = re.compile(r"tiny10_(\d|1[0-4])")
_POOL = 80  # training images of a class, at most half of them
_CLASSES, _USED, _SETS = 40, 10, 15  # of each file; the first ones are classes of sources

Images = tuple[np.ndarray, np.ndarray]


def write_target(name: str, folder: Path) -> None:
    """Make NAME.npz in a folder of what it is made of, where it is one of these targets and not there yet.

    Raises:
        OSError: a file that it is made of cannot be read.
        ValueError: such a file is no npz file with x_train, y_train, x_test and y_test.
    """
    make: Callable[[], tuple[Images, Images]]
    if name == CLOTHING:
        make = lambda: _clothing(folder)  # noqa: E731
    elif (match := _TINY.fullmatch(name)) is not None:
        make = lambda: _unused(folder, int(match[1]))  # noqa: E731
    else:
        return
    if (folder / f"{name}.npz").exists():
        return
    (x, y), (x_test, y_test) = make()
    partial = folder / f"{name}.partial.npz"
    np.savez(partial, x_train=x, y_train=y, x_test=x_test, y_test=y_test)
    partial.replace(folder / f"{name}.npz")  # it appears whole or not at all


def _clothing(folder: Path) -> tuple[Images, Images]:
    (x, y), (x_test, y_test) = _read(folder / "clothing.npz")
    train, rest = _pool(x, y)
    return train, (np.concatenate([x_test, rest[0]]), np.concatenate([y_test, rest[1]]))


def _unused(folder: Path, number: int) -> tuple[Images, Images]:
    unused = [label for label in range(5 * _CLASSES) if label % _CLASSES >= _USED]
    chosen = unused[number::_SETS]
    x, y = [], []
    for first in range(0, 5 * _CLASSES, _CLASSES):
        for images, labels in _read(folder / f"tiny_imagenet_{first:03}_{first + _CLASSES - 1:03}.npz"):
            for label in sorted(set(chosen) & set(labels.tolist())):
                x.append(images[labels == label])
                y.append(np.full(len(x[-1]), chosen.index(label)))
    return _pool(np.concatenate(x), np.concatenate(y))


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
    except (KeyError, ValueError) as error:
        raise ValueError(f"'{path}' is no npz file with x_train, y_train, x_test, y_test: {error}") from error
