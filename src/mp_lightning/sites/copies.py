"""Copies of a model, such as averages of its weights, whose strength does not move along with that of the original."""

import warnings
import weakref
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from mp_lightning.sites.attachment import Attachment

_ALIKE = 1e-3  # difference of two strengths


class Origin:
    """Which attachment another one is a copy of.

    Args:
        attachment: the one that holds this; after ``copy.deepcopy`` of both, the copy still knows the original.

    Attributes:
        copied: it is held by a copy for which no training batch was counted.
    """

    def __init__(self, attachment: "Attachment | None" = None, copied: bool = False) -> None:
        self._attachment = None if attachment is None else weakref.ref(attachment)
        self.copied = copied
        self._told = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "Origin":
        return Origin(self.original(), copied=True)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Origin, ())

    def original(self) -> "Attachment | None":
        """The attachment that this one is a copy of, if it is still there; or it itself."""
        return None if self._attachment is None else self._attachment()

    def warn(self, copy: "Attachment") -> None:
        """Say once, when a copy is evaluated, that its strength is another than that of the original by now."""
        if not self.copied or self._told or torch.compiler.is_compiling() or (original := self.original()) is None:
            return
        here, there = float(copy.coeff), float(original.coeff)
        if int(original.steps) == int(copy.steps) or abs(here - there) < _ALIKE:
            return
        self._told = True
        name = type(copy.model).__name__
        warnings.warn(
            f"MetaPerturb: strength {here:.2g} acts in this copy of {name}, and {there:.2g} in the {name} that was "
            "trained since; let attachment_of(copy).load_state(attachment_of(original).state()) bring it there before "
            "the copy is evaluated, or leave averages of weights to Lightning's WeightAveraging",
            stacklevel=2,
        )
