"""What a dataset on disk holds: images or the files of images, with labels, in two parts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """Training or test images.

    Attributes:
        images: in a form that :func:`mp_lightning.data.image_set` takes, or the paths of image files.
        labels: the number of the class of each, from 0.
    """

    images: np.ndarray | Tensor | Sequence[Path]
    labels: np.ndarray | Tensor | Sequence[int]


@dataclass(frozen=True)
class Contents:
    """Both parts of a dataset and the names of its classes, in the order of their numbers."""

    train: Part
    test: Part
    classes: Sequence[str]
