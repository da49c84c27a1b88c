"""An architecture of a task: a network by name, refused before training where it cannot serve."""

import functools
import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mp_lightning.backbones import build_backbone
from mp_lightning.backbones.anyone import find_object, make, source_digest
from mp_lightning.backbones.libraries import LIBRARIES
from mp_lightning.compare.plain_values import layers_of
from mp_lightning.compare.user_code import code_of
from mp_lightning.data import ImageSet
from mp_lightning.errors import ConfigurationError, SiteError
from mp_lightning.randomness import random_state
from mp_lightning.sites import find_sites

# Sides of images, in pixels, that published networks are made for.
_USUAL_SIZES = (32, 64, 96, 128, 160, 192, 224, 256, 299, 384)


@dataclass(frozen=True)
class Architecture:
    """A network by name, with its width (None: its own, as always but for the reference networks)."""

    name: str
    width: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Architecture":
        """From 'resnet20' or, with a width, 'resnet20-8'; without one from 'torchvision:NAME' or 'timm:NAME'.

        Or from 'package.module:factory' or 'file.py:factory', where ``factory(num_classes=N)`` makes the network.

        Raises:
            ConfigurationError: what follows the dash is not a width.
        """
        text = str(text)
        if ":" in text:  # names of timm and of files may hold dashes
            return cls(text)
        name, dash, width = text.partition("-")
        if dash and not (width.isdecimal() and int(width) > 0):
            raise ConfigurationError(f"architecture '{text}': '{width}' is not a width; write for example 'conv4-16'")
        return cls(name, int(width) if width else None)

    def __str__(self) -> str:
        return self.name if self.width is None else f"{self.name}-{self.width}"

    @property
    def is_of_the_user(self) -> bool:
        """Whether the user's own code makes it."""
        library, colon, _ = self.name.partition(":")
        return bool(colon) and library not in LIBRARIES

    @functools.cached_property
    def code(self) -> str | None:
        """A digest of the file with the user's own code and of the layers that it makes; None for other networks.

        It is of the first reading. The layers tell what changes in other files; the network is one that :meth:`check`
        has accepted.
        """
        if not self.is_of_the_user:
            return None
        net = self._outline(2, 0)
        classes = [type(part) for part in net.modules()]
        told = [source_digest(self.name), layers_of(net), code_of(classes)]
        return hashlib.sha256(repr(told).encode()).hexdigest()[:16]

    @functools.cache  # noqa: B019 - of a few values that live as long as the process
    def check(self, image_size: int) -> None:
        """Refuse a network that cannot be meta-trained on images of so many pixels; no weight is computed for it.

        Raises:
            ConfigurationError: the network is unknown, has no site, takes no images of this size, gives no logits, or
                has nothing to train; the message names it and what to do.
        """
        classes = 2
        try:
            net = self._outline(classes, image_size)
        except ConfigurationError as error:
            raise ConfigurationError(f"architecture '{self}': {error}") from error
        # The constructors of a library raise anything.
        except Exception as error:
            raise ConfigurationError(
                f"architecture '{self}': it cannot be built ({_reason(error)}); choose another network"
            ) from error
        try:
            find_sites(net)
        except SiteError as error:
            # The remedy that this error ends with, sites of one's own, cannot be had for a network that is only named.
            what = str(error).rpartition("; ")[0]
            raise ConfigurationError(f"architecture '{self}': {what}; choose another network") from error
        try:
            output = _forward(net, image_size)
        # What meets a map that is too small, or of another size than it was made for, raises anything.
        except Exception as error:
            raise ConfigurationError(
                f"architecture '{self}': it takes no images of {image_size} pixels ({_reason(error)}); "
                f"{_remedy(net, image_size)}"
            ) from error
        if not isinstance(output, Tensor) or output.dim() != 2 or output.shape[1] != classes:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ConfigurationError(
                f"architecture '{self}': its output in training ({shape}) is not one row of logits for each image; "
                "choose another network"
            )
        if not output.requires_grad:
            raise ConfigurationError(
                f"architecture '{self}': its output depends on no weight that has a gradient; let some of its layers "
                "learn, or choose another network"
            )

    def build(self, images: ImageSet, seed: int) -> nn.Module:
        """A freshly initialised network for ``images``; the global random state is left as it was."""
        with random_state(seed, torch.device("cpu")):
            return self.construct(images.num_classes, images.image_size)

    def forward_flops(self, num_classes: int, image_size: int) -> int:
        """Floating point operations of one forward of one image, without the perturbation.

        Counted are convolutions and matrix products, a multiplication and an addition as two operations.

        Args:
            num_classes: outputs of the head.
            image_size: side of the image in pixels, of a size that :meth:`check` accepts.

        Raises:
            ConfigurationError: as :func:`~mp_lightning.backbones.build_backbone`.
        """
        net = self._outline(num_classes, image_size).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            _forward(net, image_size, batch_size=1)
        return int(counter.get_total_flops())

    def _outline(self, num_classes: int, image_size: int) -> nn.Module:
        """The network with shapes but no values, on torch's meta device; the global random state is left as it was."""
        with random_state(0, torch.device("cpu")):
            try:
                with torch.device("meta"):
                    return self.construct(num_classes, image_size)
            except (RuntimeError, ConfigurationError):  # the second of the user's own
                # A constructor that computes with tensors, as torchvision's RegNet does, needs their values.
                return self.construct(num_classes, image_size).to("meta")

    def construct(self, num_classes: int, image_size: int) -> nn.Module:
        """A network with weights drawn from torch's global generator."""
        if self.is_of_the_user:
            arguments, remedy = {"num_classes": num_classes}, f"it is called with num_classes={num_classes} alone"
            return make(self.name, find_object(self.name), arguments, remedy)
        return build_backbone(self.name, num_classes, image_size=image_size, width=self.width)


def _forward(net: nn.Module, image_size: int, batch_size: int = 2) -> object:
    with torch.device("meta"):
        return net(torch.empty(batch_size, 3, image_size, image_size))


def _remedy(net: nn.Module, image_size: int) -> str:
    """The usual size next above that works, or, where none does, next below."""
    larger = [size for size in _USUAL_SIZES if size > image_size]
    smaller = [size for size in reversed(_USUAL_SIZES) if size < image_size]
    for size in (*larger, *smaller):
        try:
            _forward(net, size)
        # As in the check.
        except Exception:
            continue
        return f"give image_size={size}, or choose another network"
    return "choose another network"


def _reason(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".! ") or type(error).__name__
