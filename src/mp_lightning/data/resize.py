"""One way of resizing for images from every source."""

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

# Resizing computes in float32; parts keep that copy small for a large set.
_IMAGES_AT_ONCE = 1024


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
