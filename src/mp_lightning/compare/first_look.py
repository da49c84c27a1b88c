"""A first look at what every run will meet, so that what none could use is refused before anything is trained."""

from contextlib import suppress
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils._pytree import tree_leaves

from mp_lightning.compare.examine import batches, check_labels, check_scores, predict_pair
from mp_lightning.compare.run import Experiment, setup_seed
from mp_lightning.errors import ConfigurationError, UserError
from mp_lightning.randomness import seed_all

_FEW = 2
_TRANSFER = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class FirstBatches(NamedTuple):
    """The first batch of each loader, and the datamodule; a list is empty where it cannot be had without a trainer."""

    train: list[Any]
    test: list[Any]
    data: L.LightningDataModule | None


def first_batches(experiment: Experiment) -> FirstBatches:
    """The first batches of seed 0.

    Raises:
        ConfigurationError: there are several loaders where one is needed.
    """
    seed_all(setup_seed(0))
    try:
        data = experiment.data(0)
        data.prepare_data()
        data.setup("fit")
        train = data.train_dataloader()
        first = [next(iter(loader)) for loader in tree_leaves(train)]
        data.setup("test")
        test = data.test_dataloader()
        found = FirstBatches(first, [next(iter(loader)) for loader in tree_leaves(test)], data)
    except Exception:  # as a run will say, or because the trainer is asked
        return FirstBatches([], [], None)
    batches(test, "test_dataloader")
    if not hasattr(data, "train_evaluation_dataloader"):
        batches(train, "train_dataloader")
    return found


def gives_validation(found: FirstBatches) -> bool:
    """Whether the datamodule's val_dataloader gives something, as far as it can be called without a trainer."""
    if found.data is None:
        return True
    try:
        loaders = found.data.val_dataloader()
    except Exception:  # as a run will say, or because the trainer is asked
        return True
    return loaders is not None and not (isinstance(loaders, list | tuple | dict) and not loaders)


def look_at(experiment: Experiment, module: L.LightningModule, found: FirstBatches) -> None:
    """Refuse scores and labels that a run would refuse after its training.

    Looked at is what can be computed without a trainer, on the CPU, of two images where a batch is a pair.

    Raises:
        UserError: they are no scores of classes, or no class numbers.
    """
    owners = (module, found.data)
    if found.data is None or any(is_overridden(hook, owner) for hook in _TRANSFER for owner in owners):
        return
    module.eval()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), suppress(_RunSaysIt):
        for batch in (found.test[0], *found.train[:1]):
            _look_at_batch(experiment, module, batch)


class _RunSaysIt(Exception):
    """What cannot be computed here may still be by a run."""


def _look_at_batch(experiment: Experiment, module: L.LightningModule, batch: Any) -> None:
    name, is_pair = type(module).__name__, experiment.predict is predict_pair and isinstance(batch, list | tuple)
    few = [part[:_FEW] if isinstance(part, Tensor) else part for part in batch] if is_pair else batch
    try:
        values, labels = experiment.predict(module, few)
    except UserError:
        raise
    except Exception as error:
        raise _RunSaysIt from error
    check_scores(values, name)
    if is_pair:
        check_labels(batch[1], len(batch[0]), values.shape[1], name)
    else:
        check_labels(labels, len(values), values.shape[1], name)


def check_length(experiment: Experiment, module: L.LightningModule, found: FirstBatches) -> None:
    """Refuse training data without a length where nothing else says how long a run is, and steps that say nothing.

    Raises:
        ConfigurationError: names what to give.
    """
    if experiment.steps is not None and not module.automatic_optimization:
        raise ConfigurationError(
            f"trainer= has max_steps={experiment.steps}, which counts steps of optimizers, and {type(module).__name__} "
            "optimizes by hand, any number of times in a batch, so that arms whose strength grows cannot know how long "
            "a run is; give trainer={'max_epochs': ...} in its place"
        )
    if experiment.steps is not None or found.data is None:
        return
    for loader in tree_leaves(found.data.train_dataloader()):
        try:
            len(loader)
        except TypeError as error:
            raise ConfigurationError(
                "train_dataloader has no length, so that arms whose strength grows cannot know how long a run is; "
                "give trainer={'max_steps': ...}"
            ) from error
