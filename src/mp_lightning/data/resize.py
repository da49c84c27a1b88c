"""One way of resizing for images from every source."""

from numbers import Integral

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from mp_lightning.errors import ConfigurationError

# The end of messages about images that are not square, or not of one size.
TO_RESIZE = "set size=32 (image_size=32 in a configuration), or another side in pixels"
# Resizing computes in float32; parts keep that copy small for a large set.
_IMAGES_AT_ONCE = 1024


def check_size(size: int | None, name: str) -> None:
    """Refuse a side that images cannot be resized to.

    Raises:
        ConfigurationError: it is no whole number from 1 on; names the set.
    """
    if size is not None and (isinstance(size, bool) or not isinstance(size, Integral) or size < 1):
        raise ConfigurationError(f"size={size!r} for '{name}' is out of range: give a whole number, at least 1 pixel")


def resize(images: Tensor, size: int) -> Tensor:
    """Resize the shorter side to ``size`` pixels (bilinear, antialiased), then crop the centre to a square.

    Args:
        images: uint8 (N, 3, H, W).
        size: side in pixels.

    Returns:
        uint8 (N, 3, size, size).
    """
    height, width = images.shape[-2:]
    if height == width == size:
        return images
    short = min(height, width)
    shape = [round(height * size / short), round(width * size / short)]
    parts = [
        transforms.center_crop(
            transforms.resize(part, shape, interpolation=transforms.InterpolationMode.BILINEAR, antialias=True),
            [size, size],
        )
        for part in torch.split(images, _IMAGES_AT_ONCE)
    ]
    return torch.cat(parts)
