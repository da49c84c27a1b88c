"""Tasks of meta-training: data, an architecture, and the split of the images into a training and a validation half."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

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
        name, _, width = str(text).partition("-")
        if width and not (width.isdecimal() and int(width) > 0):
            raise ConfigurationError(f"architecture '{text}': '{width}' is not a width; write for example 'conv4-16'")
        return cls(name, int(width) if width else None)

    def __str__(self) -> str:
        return self.name if self.width is None else f"{self.name}-{self.width}"

    def build(self, images: ImageSet, seed: int) -> nn.Module:
        """A freshly initialised network for ``images``; the global random state is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build_backbone(self.name, images.num_classes, image_size=images.image_size, width=self.width)


@dataclass(frozen=True)
class Task:
    """One task. Its batches depend on the step alone, so that a run that was interrupted continues with the same ones."""

    name: str
    architecture: Architecture
    train: ImageSet
    valid: ImageSet
    flip: bool

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
    train_per_class: int | None,
    valid_per_class: int | None,
    seed: int,
) -> list[Task]:
    """Split every source into groups of consecutive classes, halve each, and use each half for training once.

    As in the paper, the two tasks of a group share their classes with train and validation swapped. Architectures are
    dealt out so that both tasks of a group, and the same half of neighbouring groups, differ where there are several.

    Raises:
        DataError: a source has too few classes or images for this split.
    """
    parsed = [Architecture.parse(text) for text in architectures]
    if not parsed:
        raise ConfigurationError("tasks.architectures is empty; name at least one, for example [conv4-16,resnet20-8]")
    tasks: list[Task] = []
    for source in sources:
        images = source.images
        if images.num_classes < 2 * groups:
            raise DataError(
                f"'{images.name}' has {images.num_classes} classes, too few for tasks.groups={groups} groups of two or "
                "more; lower tasks.groups"
            )
        for group, classes in enumerate(torch.arange(images.num_classes).tensor_split(groups)):
            part = images.select_classes(classes.tolist())
            name = images.name if groups == 1 else f"{images.name}-{group}"
            first, second = part.halves(derived_seed(seed, name, "halves"))
            for letter, train, valid in (("a", first, second), ("b", second, first)):
                index = len(tasks) + len(tasks) // 2
                tasks.append(
                    Task(
                        name=f"{name}-{letter}",
                        architecture=parsed[index % len(parsed)],
                        train=_limit(train, train_per_class, seed),
                        valid=_limit(valid, valid_per_class, seed),
                        flip=source.flip,
                    )
                )
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise DataError(f"two sources have the same name ({', '.join(names)}); give the files different names")
    return tasks


def _limit(images: ImageSet, per_class: int | None, seed: int) -> ImageSet:
    return images if per_class is None else images.few_per_class(per_class, seed)[0]
