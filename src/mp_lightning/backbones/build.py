"""Networks by name."""

from torch import nn

from mp_lightning.backbones.convnet import ConvNet
from mp_lightning.backbones.libraries import LIBRARIES, build_library_network
from mp_lightning.backbones.resnet import ResNet
from mp_lightning.backbones.wide_resnet import WideResNet
from mp_lightning.errors import ConfigurationError

# Per plain network: channels of each layer relative to the first, layers that pool, default width.
_CONVNETS = {
    "conv4": ((1,) * 4, (1, 2, 3, 4), 32),
    "conv6": ((1,) * 6, (1, 2, 4, 6), 32),
    "vgg9": ((1, 2, 4, 4, 8, 8, 8, 8), (1, 2, 4, 6, 8), 64),
}
# Per residual network: blocks in each stage.
_RESNETS = {"resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9}
# Per wide residual network: blocks in each stage, widening factor.
_WIDE_RESNETS = {"wrn28_2": (4, 2)}


def list_backbones() -> list[str]:
    """The names of the reference networks; :func:`build_backbone` also knows those of torchvision and timm."""
    return [*_CONVNETS, *_RESNETS, *_WIDE_RESNETS]


def build_backbone(
    name: str, num_classes: int, *, in_channels: int = 3, image_size: int = 32, width: int | None = None
) -> nn.Module:
    """Build a network with freshly drawn weights, from torch's global generator.

    Args:
        name: one of :func:`list_backbones`, or, after 'torchvision:' or 'timm:', a classification network of that
            library by its name there, such as 'torchvision:resnet18'.
        num_classes: outputs of the head, in the reference networks the linear layer ``fc``.
        in_channels: channels of the images.
        image_size: side of the square images in pixels; the residual networks work at any size, and what a network of
            a library needs shows in its first forward.
        width: channels of the first convolution, to which all others keep their ratio; default: 32 for conv4 and
            conv6, 64 for vgg9, 16 for the residual networks. Networks of a library have their own.

    Returns:
        A module that maps float images (B, in_channels, image_size, image_size) to logits (B, num_classes).

    Raises:
        ConfigurationError: unknown name, no whole number of at least 1, images too small for the poolings of the
            network, a width for a network of a library, or timm is not installed.
    """
    numbers = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size, "width": width}
    for key, value in numbers.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigurationError(f"{key}={value!r} of backbone '{name}': give a whole number of at least 1")
    library, colon, name_there = name.partition(":")
    if colon and library in LIBRARIES:
        if width is not None:
            raise ConfigurationError(f"width={width} cannot be set for '{name}', whose name decides its width")
        return build_library_network(library, name_there, num_classes, in_channels)
    if name in _CONVNETS:
        ratios, pool_after, default_width = _CONVNETS[name]
        widths = [ratio * (width or default_width) for ratio in ratios]
        return ConvNet(widths, pool_after, num_classes, in_channels, image_size)
    if name in _RESNETS:
        return ResNet(_RESNETS[name], num_classes, in_channels, width or 16)
    if name in _WIDE_RESNETS:
        return WideResNet(*_WIDE_RESNETS[name], num_classes, in_channels, width or 16)
    raise ConfigurationError(
        f"unknown backbone '{name}': choose one of {', '.join(list_backbones())}, torchvision:NAME or timm:NAME"
    )
