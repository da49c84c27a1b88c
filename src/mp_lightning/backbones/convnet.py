"""Plain convolutional networks: 3x3 convolution, batch norm, ReLU, sometimes a pooling, again and again."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from mp_lightning.backbones.weights import draw_convolutions
from mp_lightning.errors import ConfigurationError


class ConvLayer(nn.Module):
    """Convolution (3x3, with bias, same size), batch norm, ReLU, and a 2x2 max pooling when ``pool``."""

    def __init__(self, in_channels: int, out_channels: int, pool: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.bn = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        self.pool: nn.Module = nn.MaxPool2d(2) if pool else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H, W), or to half that size (rounded down) with pooling."""
        out: Tensor = self.pool(self.relu(self.bn(self.conv(x))))
        return out


class ConvNet(nn.Module):
    """A stack of convolution layers and one linear head on the flattened last map.

    Args:
        widths: output channels of each convolution layer.
        pool_after: layers, counted from 1, that end with a 2x2 max pooling.
        num_classes: outputs of the head.
        in_channels: channels of the images.
        image_size: side of the square images, in pixels; it fixes the size of the head.

    Raises:
        ConfigurationError: the image is too small for the poolings.
    """

    def __init__(
        self,
        widths: Sequence[int],
        pool_after: Collection[int],
        num_classes: int,
        in_channels: int = 3,
        image_size: int = 32,
    ) -> None:
        super().__init__()
        shrink = 2 ** len(set(pool_after))
        if image_size < shrink:
            raise ConfigurationError(
                f"images of {image_size} pixels are too small for a network that halves them {len(set(pool_after))} "
                f"times: enlarge them to at least {shrink} pixels (image_size={shrink} or more)"
            )
        layers: list[nn.Module] = []
        channels = in_channels
        for number, width in enumerate(widths, start=1):
            layers.append(ConvLayer(channels, width, pool=number in pool_after))
            channels = width
        self.conv_layers = nn.Sequential(*layers)
        self.fc = nn.Linear(channels * (image_size // shrink) ** 2, num_classes)
        draw_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, in_channels, image_size, image_size)."""
        logits: Tensor = self.fc(torch.flatten(self.conv_layers(x), 1))
        return logits
