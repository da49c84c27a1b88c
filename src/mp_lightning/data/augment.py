"""From stored images to the input of a network, with the augmentation of the paper."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mp_lightning.errors import DataError


def normalize(images: Tensor) -> Tensor:
    """Map pixels 0..255 (uint8, any shape) to [-1, 1] (float32): mean and deviation 0.5 of the range [0, 1].

    Raises:
        DataError: they are of another type, such as floats that are scaled already.
    """
    if images.dtype != torch.uint8:
        raise DataError(f"pixels of type {images.dtype} cannot be normalized: give uint8, 0 to 255")
    return (images.float() / 255 - 0.5) / 0.5


def standard_augment(images: Tensor, generator: torch.Generator, flip: bool = True) -> Tensor:
    """Crop each image at random after black padding, flip it with probability one half, normalize.

    The padding is 4 pixels on each side for images up to 32 pixels, 8 for larger ones.

    Args:
        images: uint8 (B, 3, H, W), on any device.
        generator: CPU generator, the only source of randomness.
        flip: False where a mirrored image is another class or none, as with digits.

    Returns:
        float32 (B, 3, H, W) in [-1, 1], on the device of the images.
    """
    batch, channels, height, width = images.shape
    pad = 4 if height <= 32 else 8
    shift = torch.randint(2 * pad + 1, (2, batch, 1), generator=generator)
    columns = torch.arange(width).expand(batch, width)
    if flip:
        flipped = torch.rand((batch, 1), generator=generator) < 0.5
        columns = torch.where(flipped, width - 1 - columns, columns)
    rows = torch.arange(height) + shift[0]
    columns = columns + shift[1]
    # One flat index per pixel (B, H * W) into the padded image makes crop and flip a single gather.
    index = (rows[:, :, None] * (width + 2 * pad) + columns[:, None, :]).flatten(1).unsqueeze(1).to(images.device)
    padded = F.pad(images, (pad, pad, pad, pad)).flatten(2)
    cropped = padded.gather(2, index.expand(-1, channels, -1)).view(batch, channels, height, width)
    return normalize(cropped)
