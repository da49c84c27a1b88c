"""Tasks of meta-training: data, an architecture, and the split of the images into a training and a validation half."""

import hashlib
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mp_lightning.compare.architecture import Architecture
from mp_lightning.data import ImageSet, batch_indices, standard_augment
from mp_lightning.errors import ConfigurationError, DataError
from mp_lightning.randomness import derived_seed


@dataclass(frozen=True)
class Task:
    """One task. Its batches depend on the step alone, so that an interrupted run continues with the same ones."""

    name: str
    architecture: Architecture
    train: ImageSet
    valid: ImageSet
    flip: bool

    def description(self) -> dict[str, Any]:
        """What a checkpoint keeps to know the task again: plain values, the images as a digest."""
        digest = hashlib.sha256()
        for images in (self.train, self.valid):
            images.add_to(digest)
        return {
            "architecture": str(self.architecture),
            "classes": self.train.num_classes,
            "images": f"{len(self.train)} + {len(self.valid)} of {self.train.image_size} pixels",
            "flip": self.flip,
            "digest": digest.hexdigest()[:16],
        }

    def on(self, device: torch.device) -> "Task":
        """The same task with its images on a device, so that no step waits for them to be copied."""
        return replace(self, train=self.train.on(device), valid=self.valid.on(device))

    def batch(self, split: str, step: int, size: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The batch of one step: augmented images float32 (B, 3, H, W) and labels int64 (B,).

        Args:
            split: 'train' or 'valid'.
            step: number of the meta-step.
            size: B.
            seed: seed of the run.
            device: where the batch is wanted.
        """
        images = self.train if split == "train" else self.valid
        stream = derived_seed(seed, self.name, split)
        chosen = batch_indices(len(images), size, step, stream)
        generator = torch.Generator().manual_seed(derived_seed(stream, "augmentation", step))
        x = standard_augment(images.images[chosen], generator, flip=self.flip)
        return x.to(device), images.labels[chosen].to(device)


@dataclass(frozen=True)
class Split:
    """How a source is cut into tasks.

    Attributes:
        groups: of consecutive classes, two tasks each.
        classes: so many of each group are kept; None: all.
        architectures: dealt out over the tasks in turn.
        train_per_class, valid_per_class: so many images of a class are kept in a task; None: all.
    """

    groups: int
    classes: int | None
    architectures: list[str]
    train_per_class: int | None
    valid_per_class: int | None


@dataclass(frozen=True)
class Source:
    """Images that tasks are made of, whether they may be mirrored, and how they are cut."""

    images: ImageSet
    flip: bool
    split: Split


def make_tasks(sources: Sequence[Source], seed: int) -> list[Task]:
    """Split every source into groups of consecutive classes, halve each, and use each half for training once.

    As in the paper, the two tasks of a group share their classes with train and validation swapped. Architectures are
    dealt out so that both tasks of a group, and the same half of neighbouring groups, differ where there are several.

    Raises:
        DataError: a source has too few classes or images for this split, or the name of another, or of its group.
        ConfigurationError: an architecture cannot be read, or there is none.
    """
    names = [source.images.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"two sources are called '{name}'; give the files or folders different names")
    tasks: list[Task] = []
    for source in sources:
        split = source.split
        parsed = [Architecture.parse(text) for text in split.architectures]
        if not parsed:
            raise ConfigurationError(
                "tasks.architectures is empty; name at least one, for example [conv4-16,resnet20-8]"
            )
        for name, part in _groups(source):
            first, second = part.halves(derived_seed(seed, name, "halves"))
            for letter, train, valid in (("a", first, second), ("b", second, first)):
                tasks.append(
                    Task(
                        name=f"{name}-{letter}",
                        architecture=parsed[_deal(len(tasks), len(parsed))],
                        train=_limit(train, split.train_per_class, seed, "train_per_class"),
                        valid=_limit(valid, split.valid_per_class, seed, "valid_per_class"),
                        flip=source.flip,
                    )
                )
    for name, count in Counter(task.name for task in tasks).items():
        if count > 1:
            raise DataError(
                f"{count} tasks are called '{name}', as the groups of a source are called after it; give the sources "
                "names of which none is another's with a number"
            )
    for source in sources:
        _tell_doubles(source.images)
    return tasks


def _tell_doubles(images: ImageSet) -> None:
    doubles = images.doubles()
    if doubles:
        warnings.warn(
            f"{doubles} of the {len(images)} images of '{images.name}' are copies of others there, so that a network "
            "may be validated on images that it learns from; remove them",
            stacklevel=3,
        )


def _groups(source: Source) -> Iterator[tuple[str, ImageSet]]:
    """The groups of classes of a source, with their names."""
    images, split = source.images, source.split
    counts = torch.bincount(images.labels, minlength=images.num_classes)
    if int(counts.min()) < 2:
        raise DataError(
            f"class '{images.classes[int(counts.argmin())]}' of '{images.name}' has {int(counts.min())} images, "
            "too few for two halves; add images or leave the class out"
        )
    if split.classes is not None and split.classes < 2:
        raise ConfigurationError(
            f"tasks.classes={split.classes} is too few for a task; give at least 2, or null for all"
        )
    if images.num_classes < 2 * split.groups:
        raise DataError(
            f"'{images.name}' has {images.num_classes} classes to learn from, without any that are held out, too few "
            f"for tasks.groups={split.groups} groups of two or more; lower tasks.groups, or give evaluation.data="
        )
    for group, members in enumerate(torch.arange(images.num_classes).tensor_split(split.groups)):
        name = images.name if split.groups == 1 else f"{images.name}-{group}"
        yield name, images.select_classes(members.tolist()[: split.classes])


def _deal(task: int, architectures: int) -> int:
    """The architecture of a task, by their numbers: in turn, and with an even number of them shifted in each round."""
    return (task + (0 if architectures % 2 else task // architectures)) % architectures


def _limit(half: ImageSet, per_class: int | None, seed: int, key: str) -> ImageSet:
    if per_class is None:
        return half
    counts = torch.bincount(half.labels, minlength=half.num_classes)
    short = int(counts.argmin())
    if counts[short] < per_class:
        raise DataError(
            f"class '{half.classes[short]}' of '{half.name}' has {int(counts[short])} images in one of its two halves, "
            f"not tasks.{key}={per_class}; lower tasks.{key}"
        )
    return half.few_per_class(per_class, seed)[0]
