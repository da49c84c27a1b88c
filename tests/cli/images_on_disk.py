"""Images as users have them, in files."""

from pathlib import Path

import numpy as np
from PIL import Image


def save_archive(path: Path, classes: int = 5, per_class: int = 8, **more: np.ndarray) -> Path:
    """An npz of random images, 16 pixels a side."""
    labels = np.arange(classes * per_class) % classes
    images = np.random.default_rng(classes).integers(0, 255, (len(labels), 16, 16, 3), dtype=np.uint8)
    np.savez(path, **{"x_train": images, "y_train": labels, **more})
    return path


def save_folder(path: Path, classes: int = 5, per_class: int = 6) -> Path:
    """A folder of random PNG files, one folder a class, of two sizes."""
    generator = np.random.default_rng(0)
    for label in range(classes):
        (path / f"class{label}").mkdir(parents=True)
        for number in range(per_class):
            pixels = generator.integers(0, 255, (20 + number % 2, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path / f"class{label}" / f"{number}.png")
    return path
