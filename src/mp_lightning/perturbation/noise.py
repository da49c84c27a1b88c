"""Counter-based Gaussian noise: the same key gives the same numbers, on any device and in any order.

The generator is Philox4x32 with 7 rounds (Salmon et al., *Parallel random numbers: as easy as 1, 2, 3*, SC 2011), the
smallest number of rounds that passed their whole test battery. Nothing is stored and torch's global generator is
never touched: noise is a pure function of

    key      the seed (64 bits)
    counter  (lane of four elements within the sample, position of the sample in the global batch, stream, forward)

where *stream* tells sites and the calls of one site apart and *forward* counts the forwards of the model.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from mp_lightning.errors import ConfigurationError

NoisePer = Literal["element", "channel"]  # what each draw is for: an element, or all of a channel of a sample

ROUNDS = 7
_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32 with 7 rounds, of four counter words and two key words.

    Args:
        counter: four int64 tensors that broadcast together, each holding values below 2**32.
        key: two integers below 2**32.

    Returns:
        Four int64 tensors of uniformly distributed 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # int64 products wrap modulo 2**64, which keeps the bit pattern of the unsigned product.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = (p1 >> 32) & _MASK ^ c1 ^ k0, (p0 >> 32) & _MASK ^ c3 ^ k1
        c1, c3 = p1 & _MASK, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _box_muller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent N(0, 1) float32 tensors from two tensors of 32-bit words."""
    radius = a.float().add_(0.5).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
    angle = b.float().mul_(2.0 * math.pi * 2.0**-32)
    return radius * angle.cos(), radius * angle.sin()


def gaussian_noise(shape: torch.Size, positions: Tensor, *, seed: int, stream: int, forward: Tensor) -> Tensor:
    """N(0, 1) noise for a batch of feature maps.

    Args:
        shape: shape (B, ...) of the feature map.
        positions: int64 tensor (B,), position of each sample in the global batch.
        seed: seed of the run; its low 64 bits are the key.
        stream: number below 2**32 that tells the sites, and the calls of one site, apart.
        forward: int64 tensor without dimensions, count of the model's forwards.

    Returns:
        float32 tensor of the given shape, on the device of ``positions``.
    """
    elements = math.prod(shape[1:])
    lane = torch.arange((elements + 3) // 4, device=positions.device).unsqueeze(0)
    constant = torch.full((1, 1), stream, dtype=torch.int64, device=positions.device)
    words = philox4x32(
        (lane, positions.unsqueeze(1), constant, (forward & _MASK).view(1, 1)),
        (seed & _MASK, seed >> 32 & _MASK),
    )
    normals = torch.stack(_box_muller(words[0], words[1]) + _box_muller(words[2], words[3]), dim=-1)
    return normals.flatten(1)[:, :elements].reshape(shape)


def check_noise_per(noise_per: str, what: str = "noise_per") -> None:
    """Refuse a unit that noise is not drawn for.

    Raises:
        ConfigurationError: lists those there are.
    """
    if noise_per not in get_args(NoisePer):
        raise ConfigurationError(f"{what}={noise_per} is unknown; use one of {', '.join(get_args(NoisePer))}")


@dataclass(frozen=True)
class NoiseKey:
    """What a draw of noise for a batch depends on.

    Attributes:
        seed, stream, forward: as for :func:`gaussian_noise`.
        rank, world: sample b of the batch is number ``b * world + rank`` of the global batch.
    """

    seed: int
    stream: int
    forward: Tensor
    rank: int = 0
    world: int = 1

    def draw(self, x: Tensor, per: NoisePer = "element") -> Tensor:
        """The noise for ``x`` (B, C, H, W), of its dtype: of its shape, or (B, C, 1, 1) with one draw per channel."""
        positions = torch.arange(x.shape[0], device=x.device) * self.world + self.rank
        shape = x.shape if per == "element" else x.shape[:2]
        eps = gaussian_noise(shape, positions, seed=self.seed, stream=self.stream, forward=self.forward).to(x.dtype)
        return eps if per == "element" else eps[..., None, None]
