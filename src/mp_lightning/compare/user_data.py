"""A user's DataModule for the runs of a comparison: each gets a copy, whose batches follow from seed and epoch."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
from lightning.pytorch.utilities.model_helpers import is_overridden

from mp_lightning.compare.pairing import paired
from mp_lightning.errors import ConfigurationError, UserError, one_line
from mp_lightning.randomness import derived_seed


class UserData:
    """Makes the datamodule of a seed, out of one that is copied, or by a function of the seed.

    The copy is a deep one, as it is in a process of its own: a generator that the datamodule or a dataset holds begins
    each run as it was given. Images that are held in memory are there twice while a run lasts; a datamodule that loads
    them in ``setup``, or a function of the seed, spares that. Where the trainer reloads the training batches, those of
    each epoch are seeded by its number; all other calls give the batches that the first one gives.

    Tuning tests on the validation images of the datamodule, where it has some.

    Raises:
        ConfigurationError: it is neither, cannot be copied, or has no training or no test images.
    """

    def __init__(self, given: L.LightningDataModule | Callable[[int], L.LightningDataModule]) -> None:
        self._given = given
        example = self._fresh(0)
        for hook in ("train_dataloader", "test_dataloader"):
            if not is_overridden(hook, example):
                raise ConfigurationError(f"{type(example).__name__} has no {hook}; give it one")
        self.can_validate = bool(is_overridden("val_dataloader", example))
        self.kind = type(example).__name__
        self.num_classes: int | None = getattr(example, "num_classes", None)

    def __call__(self, seed: int, validation: bool = False) -> L.LightningDataModule:
        data = self._fresh(seed)
        make = data.train_dataloader

        def train_dataloader() -> Any:
            trainer = getattr(data, "trainer", None)
            epoch = trainer.current_epoch if trainer is not None and trainer.reload_dataloaders_every_n_epochs else 0
            return paired(make(), derived_seed(seed, "batches", *([epoch] if epoch else [])))

        data.train_dataloader = train_dataloader  # type: ignore[method-assign]
        if validation:
            data.test_dataloader = data.val_dataloader  # type: ignore[method-assign]
        return data

    def check_seeds(self, uses: Mapping[int, str]) -> None:
        """Call a function of the seed once with seeds that are none of the comparison's.

        Args:
            uses: what is done with each seed.

        Raises:
            ConfigurationError: it fails with one of them.
        """
        for seed, use in {} if isinstance(self._given, L.LightningDataModule) else uses.items():
            try:
                self._fresh(seed)
            except UserError:
                raise
            except Exception as error:  # it is the user's code
                why = f"{type(error).__name__}: {one_line(error)}"
                raise ConfigurationError(
                    f"the function that makes the datamodule failed with seed {seed}, by which {use} ({why}); let it "
                    "take any whole number, as in lambda seed: folds[seed % len(folds)]"
                ) from error

    def _fresh(self, seed: int) -> L.LightningDataModule:
        given = self._given
        if not callable(given) and not isinstance(given, L.LightningDataModule):
            raise ConfigurationError(
                f"datamodule is a {type(given).__name__}; give a LightningDataModule (lightning's "
                "LightningDataModule.from_datasets makes one of datasets), or a function of the seed that makes one"
            )
        data = _copied(given) if isinstance(given, L.LightningDataModule) else given(seed)
        if not isinstance(data, L.LightningDataModule):
            raise ConfigurationError(
                f"datamodule is a {type(data).__name__}, not a LightningDataModule; give one, or a function of "
                "the seed that makes one"
            )
        return data


def _copied(given: L.LightningDataModule) -> L.LightningDataModule:
    try:
        return copy.deepcopy(given, {id(getattr(given, "trainer", None)): None})  # not the trainer that used it before
    except Exception as error:  # whatever it holds decides how that fails
        why = f"{type(error).__name__}: {one_line(error)}"
        raise ConfigurationError(
            f"{type(given).__name__} cannot be copied for each run ({why}); give a function of the seed that makes a "
            "new one, or open files in its setup"
        ) from error
