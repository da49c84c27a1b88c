"""The DataModule of the command: few labelled images to train on, and test images that are read once."""

import hashlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mp_lightning.data import (
    ImageSet,
    Progress,
    batch_indices,
    load_source,
    may_mirror,
    normalize,
    standard_augment,
)
from mp_lightning.errors import DataError
from mp_lightning.randomness import derived_seed

VALIDATION_FRACTION = 0.2  # of the training images of each class, for tuning
_TEST_FRACTION = 0.5  # of a dataset that has no test images
_TEST_BATCH = 256
_KNOWN = 0.01  # of the test images: more of them among the training images are no chance


@dataclass(frozen=True, eq=False)
class Target:
    """Images to train on and to test with.

    Attributes:
        name: what tables call it.
        train: all training images there are.
        test: test images.
        n_per_class: so many training images of each class are drawn, other ones for each seed; None: all are used.
        flip: whether images may be mirrored.
    """

    name: str
    train: ImageSet
    test: ImageSet
    n_per_class: int | None
    flip: bool

    def __getstate__(self) -> dict[str, Any]:
        """As arrays: tensors would be sent to other processes through shared memory, of which there may be little."""
        parts = {key: getattr(self, key) for key in ("train", "test")}
        plain = {key: (one.name, one.images.numpy(), one.labels.numpy(), one.classes) for key, one in parts.items()}
        return {**vars(self), **plain}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for key in ("train", "test"):
            name, images, labels, classes = state[key]
            state = {**state, key: ImageSet(name, torch.from_numpy(images), torch.from_numpy(labels), classes)}
        vars(self).update(state)

    def __str__(self) -> str:
        each = "all" if self.n_per_class is None else f"{self.n_per_class} a class"
        return (
            f"{self.name}: {self.train.num_classes} classes, {each} of {len(self.train)} training images, "
            f"{len(self.test)} test images of {self.train.image_size} pixels"
        )

    @property
    def training_images(self) -> int:
        """How many images a run trains on."""
        return len(self.train) if self.n_per_class is None else self.n_per_class * self.train.num_classes

    def digest(self) -> str:
        """A few characters that tell these images and labels from others."""
        digest = hashlib.sha256()
        for images in (self.train, self.test):
            images.add_to(digest)
        return digest.hexdigest()[:12]

    def drawn(self, seed: int) -> ImageSet:
        """The training images of one seed."""
        if self.n_per_class is None:
            return self.train
        return self.train.few_per_class(self.n_per_class, derived_seed(seed, "images"))[0]


def read_target(
    source: str,
    root: Path,
    size: int,
    *,
    n_per_class: int | None,
    flip: bool | None,
    batch_size: int,
    on_progress: Progress | None = None,
) -> Target:
    """Images by name or by path. Where there are no test images, half of the images of each class are held out.

    Args:
        source, root, size, on_progress: as for :func:`~mp_lightning.data.load_source`.
        n_per_class: training images of each class that a run may see; None: all.
        flip: whether images may be mirrored; None: unless the dataset is one of digits.
        batch_size: images in a training batch, of which there must be as many.

    Raises:
        DataError: images cannot be read, are fewer than a batch or than asked for, or a class is missing.
    """
    train, test = load_source(source, root, size, on_progress)
    if test is None:
        train, test = _hold_out(train)
    counts = torch.bincount(train.labels, minlength=train.num_classes)
    fewest, name = int(counts.min()), train.classes[int(counts.argmin())]
    if fewest == 0:
        raise DataError(f"class '{name}' of target '{source}' has no training images; add some, or leave the class out")
    if len(test) == 0:
        raise DataError(f"target '{source}' has no test images; add some")
    if n_per_class is not None and fewest < n_per_class:
        raise DataError(
            f"class '{name}' of target '{source}' has {fewest} training images, fewer than n_per_class={n_per_class}; "
            "ask for fewer"
        )
    told = {*train.digests()}
    known = sum(digest in told for digest in test.digests())
    if known > _KNOWN * len(test):
        warnings.warn(
            f"{known} of the {len(test)} test images of target '{source}' are training images as well; a test on them "
            "rewards what a network has learned by heart",
            stacklevel=2,
        )
    target = Target(train.name, train, test, n_per_class, may_mirror(source, flip))
    if target.training_images < batch_size:
        raise DataError(
            f"target '{source}' has {target.training_images} training images, fewer than batch_size={batch_size}; "
            "lower batch_size, or give more images"
        )
    return target


def _hold_out(images: ImageSet) -> tuple[ImageSet, ImageSet]:
    counts = torch.bincount(images.labels, minlength=images.num_classes)
    if int(counts.min()) < 2:
        name = images.classes[int(counts.argmin())]
        raise DataError(
            f"class '{name}' of '{images.name}' has {int(counts.min())} images, too few to train and to test on; add "
            "some, or give x_test and y_test"
        )
    return _split(images, 1 - _TEST_FRACTION, seed=0)


def _split(images: ImageSet, fraction: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """The fraction of the images of each class, at least one, and the rest, at least one."""
    first: list[Tensor] = []
    generator = torch.Generator().manual_seed(seed)
    for label in range(images.num_classes):
        members = (images.labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        first.append(members[: min(max(1, round(fraction * len(members))), len(members) - 1)])
    chosen = torch.zeros(len(images), dtype=torch.bool)
    chosen[torch.cat(first)] = True
    return images.subset(chosen), images.subset(~chosen)


class _Batches(Dataset[tuple[Tensor, Tensor]]):
    """The batch of each step, which the seed and the step alone decide."""

    def __init__(self, images: ImageSet, steps: int, batch_size: int, seed: int, flip: bool) -> None:
        self._images, self._steps, self._size, self._seed, self._flip = images, steps, batch_size, seed, flip

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        chosen = batch_indices(len(self._images), self._size, step, derived_seed(self._seed, "batches"))
        generator = torch.Generator().manual_seed(derived_seed(self._seed, "augmentation", step))
        chosen = chosen.to(self._images.labels.device)
        return standard_augment(self._images.images[chosen], generator, self._flip), self._images.labels[chosen]


class _Plain:
    """All images of a set in their order, in batches, without augmentation."""

    def __init__(self, images: ImageSet) -> None:
        self._images = images

    def __len__(self) -> int:
        return -(-len(self._images) // _TEST_BATCH)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in zip(self._images.images.split(_TEST_BATCH), self._images.labels.split(_TEST_BATCH), strict=True):
            yield normalize(x), y


class TargetData(L.LightningDataModule):
    """Batches of one seed of a target; the images sit on the trainer's device.

    Args:
        target: the images.
        seed: which images, batches and augmentation.
        steps: number of training batches, one epoch.
        batch_size: images in each.
        validation: train on a part of the training images, and test on the rest of them instead of on test images.
    """

    def __init__(self, target: Target, seed: int, steps: int, batch_size: int, validation: bool = False) -> None:
        super().__init__()
        train, test = target.drawn(seed), target.test
        if validation:
            train, test = _split(train, 1 - VALIDATION_FRACTION, derived_seed(seed, "validation"))
        self._train, self._test = train, test
        self._steps, self._batch_size, self._seed, self._flip = steps, batch_size, seed, target.flip

    def setup(self, stage: str) -> None:
        if self.trainer is not None:
            device = self.trainer.strategy.root_device
            self._train, self._test = self._train.on(device), self._test.on(device)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        batches = _Batches(self._train, self._steps, self._batch_size, self._seed, self._flip)
        return DataLoader(batches, batch_size=None)

    def train_evaluation_dataloader(self) -> _Plain:
        """The training images without augmentation."""
        return _Plain(self._train)

    def test_dataloader(self) -> _Plain:
        return _Plain(self._test)


@dataclass(frozen=True)
class TargetFactory:
    """Makes the DataModule of a seed."""

    target: Target
    steps: int
    batch_size: int

    def __call__(self, seed: int, validation: bool = False) -> TargetData:
        return TargetData(self.target, seed, self.steps, self.batch_size, validation)

    @property
    def can_validate(self) -> bool:
        """Whether every class has images for both parts."""
        fewest = self.target.n_per_class
        if fewest is None:
            fewest = int(torch.bincount(self.target.train.labels, minlength=self.target.train.num_classes).min())
        return fewest >= 2
