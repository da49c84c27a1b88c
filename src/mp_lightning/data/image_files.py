"""From image files to pixels in memory."""

import contextlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mp_lightning.data.progress import Progress
from mp_lightning.data.resize import TO_RESIZE, resize
from mp_lightning.errors import DataError

# An interruption has to wait for so many at most.
_FILES_AT_ONCE = 256


def read_image_files(paths: Sequence[Path], size: int | None, what: str, on_progress: Progress) -> Tensor:
    """Decode image files in several threads: upright, and what is transparent on white.

    Args:
        paths: the files, at least one.
        size: resize the shorter side of each image to so many pixels and crop the centre; without it all images must
            have the same size.
        what: what messages and the progress call the images.
        on_progress: called with the numbers of images read and to be read.

    Returns:
        uint8 (N, 3, H, W), in the order of the paths.

    Raises:
        DataError: a file is missing, damaged, deeper than 8 bits, or of another size than the first.
    """

    def read(path: Path) -> Tensor:
        image = _read_image(path)
        return image if size is None else resize(image, size)

    doing = f"reading {what}"
    on_progress(doing, 0, len(paths))
    images = torch.empty(0)
    with ThreadPoolExecutor() as threads:
        for start in range(0, len(paths), _FILES_AT_ONCE):
            batch = paths[start : start + _FILES_AT_ONCE]
            for place, (path, image) in enumerate(zip(batch, threads.map(read, batch), strict=True), start):
                if place == 0:
                    images = torch.empty((len(paths), *image.shape[1:]), dtype=torch.uint8)
                if image.shape[1:] != images.shape[1:]:
                    raise DataError(
                        f"'{path}' is {_shape(image)}, other images of '{what}' are {_shape(images)}: "
                        f"{TO_RESIZE}, to resize all"
                    )
                images[place] = image[0]
            on_progress(doing, start + len(batch), len(paths))
    return images


def _read_image(path: Path) -> Tensor:
    """uint8 (1, 3, H, W)."""
    try:
        with Image.open(path) as image:
            # Pillow would cut deeper pixels off at 255 instead of scaling them.
            deep = image.mode.startswith(("I", "F"))
            pixels = np.array(_on_white(_upright(image)))
    except FileNotFoundError as error:
        raise DataError(f"image '{path}' is missing: restore it, or unpack the dataset's archive again") from error
    # Broken files make Pillow's decoders raise almost anything, SyntaxError included.
    except Exception as error:
        raise DataError(f"'{path}' is not a readable image: repair or remove it") from error
    if deep:
        raise DataError(f"'{path}' has more than 8 bits a channel: convert it to 8 bits")
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def _upright(image: Image.Image) -> Image.Image:
    """Turned as the camera noted (EXIF); a damaged note says nothing."""
    with contextlib.suppress(Exception):
        return ImageOps.exif_transpose(image)
    return image


def _on_white(image: Image.Image) -> Image.Image:
    """In RGB, what is transparent on white: below it lies any colour, often the black of what is drawn."""
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _shape(image: Tensor) -> str:
    height, width = image.shape[-2:]
    return f"{height} x {width} pixels"
