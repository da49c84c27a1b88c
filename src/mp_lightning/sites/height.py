"""The height of the network's input, which the scale at a site depends on."""

from typing import Any

import torch
from torch import Tensor, nn

from mp_lightning.errors import SiteError
from mp_lightning.perturbation.precision import KeepsPrecision

_UNKNOWN, _PROVISIONAL, _FINAL = 0, 1, 2  # images of an evaluation, or images of training or the user


class InputHeight(KeepsPrecision):
    """Told by the user, or taken from the first images.

    The first training images decide; images that are evaluated before (a sanity check) may be of another size. A
    compiled graph decides by tensors: an attribute of Python that changes would compile everything again.

    Args:
        pixels: the height; None takes it from images.
        persistent: keep it in the ``state_dict``.

    Attributes:
        pixels: a float32 tensor without dimensions; 0 while it is not known.
    """

    pixels: Tensor
    source: Tensor

    def __init__(self, pixels: int | None, persistent: bool) -> None:
        super().__init__()
        self.register_buffer("pixels", torch.tensor(float(pixels or 0), dtype=torch.float32), persistent=persistent)
        self.register_buffer("source", torch.zeros((), dtype=torch.int64), persistent=False)
        self._source = _UNKNOWN
        self.register_load_state_dict_post_hook(_loaded)
        self.loaded()

    def loaded(self) -> None:
        """``pixels`` was taken over from elsewhere; it stands if it is known there."""
        self._decided(_FINAL if bool(self.pixels > 0) else _UNKNOWN)

    def note(self, pixels: float, training: bool) -> None:
        """Images of this height came."""
        source = _FINAL if training else _PROVISIONAL
        if torch.compiler.is_compiling():
            self.pixels.copy_(torch.where(self.source < source, torch.full_like(self.pixels, pixels), self.pixels))
            self.source.clamp_(min=source)
        elif self._source < source:
            self._source = int(self.source)  # a compiled graph may have decided
            if self._source < source:
                self.pixels.fill_(pixels)
                self._decided(source)

    def known(self) -> Tensor:
        """``pixels``.

        Raises:
            SiteError: it is not known.
        """
        if not torch.compiler.is_compiling() and self._source == _UNKNOWN and int(self.source) == _UNKNOWN:
            raise SiteError(
                "the height of the model's input is unknown, since its forward was not called with a (B, C, H, W) "
                "tensor (or (B, C, L), (B, C, D, H, W)); call the model as a whole, or pass input_size="
            )
        return self.pixels

    def _decided(self, source: int) -> None:
        self._source = source
        self.source.fill_(source)


def _loaded(module: nn.Module, incompatible: Any) -> None:
    assert isinstance(module, InputHeight)
    module.loaded()
