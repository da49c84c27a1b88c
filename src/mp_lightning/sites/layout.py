"""Which dimension of a tensor holds its channels, and how any tensor with channels is read as maps (B, C, H, W).

The perturbation needs three things of a tensor: samples, channels, and neighbours in space for its 3x3 kernels. Maps
have all three. Of the others

- maps with the channels last, (B, H, W, C), are the same maps, written in another order;
- a sequence, (B, C, L) or, of tokens, (B, N, C) or (L, B, C), is a map of one column: the kernels see the elements
  before and after. The grid that tokens may have come from is not used, since it cannot be read off the tensor, and
  since some tokens, such as that of the class, have no place in it;
- a volume or clip, (B, C, D, H, W), is its slices, one below the other.
"""

import math

from torch import Tensor

FIRST = "channels first"
LAST = "channels last"
SEQUENCE = "sequence first"  # tokens as torch.nn.MultiheadAttention takes them where nothing is said
LAYOUTS = (FIRST, LAST, SEQUENCE)


def shape_words(layout: str, channels: int) -> str:
    """The shapes that a layout allows, for messages."""
    if layout == SEQUENCE:
        return f"(L, B, {channels})"
    if layout == LAST:
        return f"(B, N, {channels}) or (B, H, W, {channels})"
    return f"(B, {channels}, H, W), (B, {channels}, L) or (B, {channels}, D, H, W)"


def channels_of(x: Tensor, layout: str) -> int | None:
    """C, or None where ``x`` has no dimension in space."""
    if not 3 <= x.dim() <= (3 if layout == SEQUENCE else 5):
        return None
    return x.shape[1] if layout == FIRST else x.shape[-1]


def as_maps(x: Tensor, layout: str) -> Tensor:
    """(B, C, H, W) with the elements of ``x``, without a copy where its strides allow."""
    if x.dim() == 4 and layout == FIRST:
        return x
    if layout == SEQUENCE:
        return x.permute(1, 2, 0).unsqueeze(-1)
    if layout == LAST:
        x = x.movedim(-1, 1)
    return x.flatten(2, -2) if x.dim() > 3 else x.unsqueeze(-1)


def from_maps(y: Tensor, like: Tensor, layout: str) -> Tensor:
    """The shape of ``like`` back from maps; contiguous where the channels are last, as a linear layer would give it."""
    if like.dim() == 4 and layout == FIRST:
        return y
    if layout == SEQUENCE:
        return y.squeeze(-1).permute(2, 0, 1).contiguous()
    if layout == LAST:
        shape = (*like.shape[:1], *like.shape[-1:], *like.shape[1:-1])
        return y.reshape(shape).movedim(1, -1).contiguous()
    return y.reshape(like.shape)


def stretch(x: Tensor, layout: str) -> float:
    """How many times higher the maps are than what they show: slices of a volume, rows of a square of tokens."""
    if x.dim() == 5:
        return float(x.shape[1] if layout == LAST else x.shape[2])
    if x.dim() == 3 and layout != FIRST:
        return math.sqrt(x.shape[0] if layout == SEQUENCE else x.shape[1])
    return 1.0


def height_of(image: Tensor) -> int:
    """The height in pixels of (B, C, H, W) or (B, C, D, H, W); the length of (B, C, L)."""
    return image.shape[-1] if image.dim() == 3 else image.shape[-2]
