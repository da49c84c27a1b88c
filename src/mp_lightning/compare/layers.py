"""Regularizing layers for feature maps: what to put at the sites of a network beside the layers of torch."""

import torch
from torch import Tensor, nn
from torchvision.ops import drop_block2d

from mp_lightning.errors import ConfigurationError


class DropBlock(nn.Module):
    """torchvision's DropBlock (Ghiasi et al. 2018, arXiv 1810.12890), for feature maps of any size.

    On maps smaller than a block, for which torchvision refuses some sizes, single elements are dropped.

    Args:
        p: fraction of the elements to drop, in [0, 1).
        block: side of a block in elements, odd.

    Raises:
        ConfigurationError: one of them is out of range.
    """

    def __init__(self, p: float = 0.1, block: int = 3) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ConfigurationError(f"dropblock: p={p} is no fraction; give a number from 0 up to 1")
        if block < 1 or block % 2 == 0:
            raise ConfigurationError(f"dropblock: block={block} is no side of a block; give an odd number")
        self.p = p
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        block = self.block if min(x.shape[2:]) >= self.block else 1
        dropped: Tensor = drop_block2d(x, self.p, block, training=self.training)
        return dropped

    def extra_repr(self) -> str:
        return f"p={self.p}, block={self.block}"


class GaussianDropout(nn.Module):
    """Multiplication by N(1, std²), independently for every element (Srivastava et al. 2014, Section 10).

    Args:
        std: standard deviation; dropout by p has that of sqrt(p / (1 - p)).

    Raises:
        ConfigurationError: it is negative.
    """

    def __init__(self, std: float) -> None:
        super().__init__()
        if not std >= 0:
            raise ConfigurationError(f"gaussian: std={std} is no standard deviation; give a number from 0 up")
        self.std = std

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same shape; noise from torch's global generator."""
        return x * (1 + self.std * torch.randn_like(x)) if self.training else x

    def extra_repr(self) -> str:
        return f"std={self.std}"


class InformationDropout(nn.Module):
    """Information Dropout (Achille & Soatto 2018, arXiv 1611.01353, Section 5) for networks of ReLUs.

    Multiplies by log-normal noise, ``x * exp(alpha(x) * N(0, 1))``, whose size ``alpha(x) = 0.001 + max_alpha *
    sigmoid(conv(x))`` is learned. Under the log-uniform prior the cost of what passes is, up to a constant, ``-log
    alpha``; as in the authors' code it is shifted to be 0 at the largest alpha. In evaluation it is the identity.

    The paper multiplies what comes out of a ReLU. Noise that is positive commutes with a ReLU, ``relu(x * e) = relu(x)
    * e``, so before the activation it is the same noise. Here alpha is computed from x by a convolution of 1 by 1; the
    paper computes it from the input of the layer that gives x, by one of that layer's own size.

    Args:
        channels: C of the feature maps.
        max_alpha: the largest standard deviation of the noise's logarithm; 0.7 in the paper.

    Attributes:
        kl: mean over the elements of ``-log(alpha / (max_alpha + 0.001))`` in the last forward of training (a tensor
            without dimensions, in nats); None before.

    Raises:
        ConfigurationError: ``max_alpha`` is not positive.
    """

    def __init__(self, channels: int, max_alpha: float = 0.7) -> None:
        super().__init__()
        if not max_alpha > 0:
            raise ConfigurationError(f"information_dropout: max_alpha={max_alpha} is not positive; the paper has 0.7")
        self.max_alpha = max_alpha
        self.size = nn.Conv2d(channels, channels, 1)
        self.kl: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape; noise from torch's global generator."""
        if not self.training:
            return x
        alpha = _FLOOR + self.max_alpha * self.size(x).sigmoid()
        self.kl = -(alpha.float() / (self.max_alpha + _FLOOR)).log().mean()
        return x * (alpha * torch.randn_like(alpha)).exp().to(x.dtype)

    def extra_repr(self) -> str:
        return f"max_alpha={self.max_alpha}"


_FLOOR = 0.001  # keeps the logarithm finite
