"""Tasks of meta-training: data, an architecture, and the split of the images into a training and a validation half."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mp_lightning.backbones import build_backbone
from mp_lightning.data import ImageSet, batch_indices, standard_augment
from mp_lightning.errors import ConfigurationError, DataError


@dataclass(frozen=True)
class Architecture:
    """A backbone by name, with its width (None: the backbone's own)."""

    name: str
    width: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Architecture":
        """From 'resnet20' or, with a width, 'resnet20-8'."""
        name, dash, width = str(text).partition("-")
        if dash and not (width.isdecimal() and int(width) > 0):
            raise ConfigurationError(f"architecture '{text}': '{width}' is not a width; write for example 'conv4-16'")
        return cls(name, int(width) if width else None)

    def __str__(self) -> str:
        return self.name if self.width is None else f"{self.name}-{self.width}"

    def check(self, image_size: int) -> None:
        """Refuse an unknown network, or one that images of so many pixels are too small for.

        Raises:
            ConfigurationError: names the network and what to do.
        """
        try:
            with torch.device("meta"):
                build_backbone(self.name, 2, image_size=image_size, width=self.width)
        except ConfigurationError as error:
            raise ConfigurationError(f"architecture '{self}': {error}") from error

    def build(self, images: ImageSet, seed: int) -> nn.Module:
        """A freshly initialised network for ``images``; the global random state is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build_backbone(self.name, images.num_classes, image_size=images.image_size, width=self.width)


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
            digest.update(images.images.numpy().tobytes() + images.labels.numpy().tobytes())
        return {
            "architecture": str(self.architecture),
            "classes": self.train.num_classes,
            "images": f"{len(self.train)} + {len(self.valid)} of {self.train.image_size} pixels",
            "flip": self.flip,
            "digest": digest.hexdigest()[:16],
        }

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


def derived_seed(*parts: object) -> int:
    """A seed that depends on all parts and on nothing else (Python's own hash changes from run to run)."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "little")


@dataclass(frozen=True)
class Source:
    """Images that tasks are made of, and whether they may be mirrored."""

    images: ImageSet
    flip: bool


def make_tasks(
    sources: Sequence[Source],
    architectures: Sequence[str],
    *,
    groups: int,
    classes: int | None = None,
    train_per_class: int | None,
    valid_per_class: int | None,
    seed: int,
) -> list[Task]:
    """Split every source into groups of consecutive classes, halve each, and use each half for training once.

    As in the paper, the two tasks of a group share their classes with train and validation swapped. Architectures are
    dealt out so that both tasks of a group, and the same half of neighbouring groups, differ where there are several.

    Raises:
        DataError: a source has too few classes or images for this split, or the name of another.
        ConfigurationError: an architecture cannot be read, or there is none.
    """
    parsed = [Architecture.parse(text) for text in architectures]
    if not parsed:
        raise ConfigurationError("tasks.architectures is empty; name at least one, for example [conv4-16,resnet20-8]")
    names = [source.images.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"two sources are called '{name}'; give the files or folders different names")
    tasks: list[Task] = []
    for source in sources:
        images = source.images
        counts = torch.bincount(images.labels, minlength=images.num_classes)
        if int(counts.min()) < 2:
            raise DataError(
                f"class '{images.classes[int(counts.argmin())]}' of '{images.name}' has {int(counts.min())} images, "
                "too few for two halves; add images or leave the class out"
            )
        if classes is not None and classes < 2:
            raise ConfigurationError(f"tasks.classes={classes} is too few for a task; give at least 2, or null for all")
        if images.num_classes < 2 * groups:
            raise DataError(
                f"'{images.name}' has {images.num_classes} classes, too few for tasks.groups={groups} groups of two or "
                "more; lower tasks.groups"
            )
        for group, members in enumerate(torch.arange(images.num_classes).tensor_split(groups)):
            part = images.select_classes(members.tolist()[:classes])
            name = images.name if groups == 1 else f"{images.name}-{group}"
            first, second = part.halves(derived_seed(seed, name, "halves"))
            for letter, train, valid in (("a", first, second), ("b", second, first)):
                tasks.append(
                    Task(
                        name=f"{name}-{letter}",
                        architecture=parsed[_deal(len(tasks), len(parsed))],
                        train=_limit(train, train_per_class, seed),
                        valid=_limit(valid, valid_per_class, seed),
                        flip=source.flip,
                    )
                )
    return tasks


def _deal(task: int, architectures: int) -> int:
    """The architecture of a task, by their numbers: in turn, and with an even number of them shifted in each round."""
    return (task + (0 if architectures % 2 else task // architectures)) % architectures


def _limit(images: ImageSet, per_class: int | None, seed: int) -> ImageSet:
    return images if per_class is None else images.few_per_class(per_class, seed)[0]
