"""A user's DataModule for the runs of a comparison: each gets a copy, whose batches follow from the seed."""

import copy
from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.pytorch.utilities.model_helpers import is_overridden

from mp_lightning.compare.pairing import paired
from mp_lightning.errors import ConfigurationError
from mp_lightning.randomness import derived_seed


class UserData:
    """Makes the datamodule of a seed, out of one that is copied, or by a function of the seed.

    Tuning tests on the validation images of the datamodule, where it has some.

    Raises:
        ConfigurationError: it is neither, or has no training or no test images.
    """

    def __init__(self, given: L.LightningDataModule | Callable[[int], L.LightningDataModule]) -> None:
        self._given = given
        example = self._fresh(0)
        for hook in ("train_dataloader", "test_dataloader"):
            if not is_overridden(hook, example):
                raise ConfigurationError(f"{type(example).__name__} has no {hook}; give it one")
        self.can_validate = bool(is_overridden("val_dataloader", example))

    def __call__(self, seed: int, validation: bool = False) -> L.LightningDataModule:
        data = self._fresh(seed)
        make = data.train_dataloader

        def train_dataloader() -> Any:
            return paired(make(), derived_seed(seed, "batches"))

        data.train_dataloader = train_dataloader  # type: ignore[method-assign]
        if validation:
            data.test_dataloader = data.val_dataloader  # type: ignore[method-assign]
        return data

    def _fresh(self, seed: int) -> L.LightningDataModule:
        given = self._given
        data = copy.copy(given) if isinstance(given, L.LightningDataModule) else given(seed)
        if not isinstance(data, L.LightningDataModule):
            raise ConfigurationError(
                f"datamodule is a {type(data).__name__}, not a LightningDataModule; give one, or a function of "
                "the seed that makes one"
            )
        return data
