"""Where the images of a meta-training run come from, and which are held out to judge the result."""

import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mp_lightning.data import (
    ImageSet,
    Progress,
    generate_textures,
    list_datasets,
    load_digits,
    load_source,
    may_mirror,
)
from mp_lightning.errors import DataError
from mp_lightning.meta.tasks import Source, Split
from mp_lightning.meta.transfer import Target

HELD_OUT_FRACTION = 0.2
_LEAST_IMAGES = 4  # of a class: two held out to train and test on, two for the halves
_LEAST_CLASSES = 4  # with fewer, holding classes out leaves nothing to learn from
_MOST_BY_CHANCE = 0.01  # of the target's images: blank ones and doubles that two data sets may share


@dataclass(frozen=True)
class SourceSettings:
    """One source as configured.

    Attributes:
        dataset: a name of :func:`~mp_lightning.data.list_datasets`, or the path of an npz or an ImageFolder.
        name: what tasks are called after; None: what the data call themselves.
        image_size: side in pixels.
        flip: whether images may be mirrored; None: unless the dataset is one of digits.
        split: how it is cut into tasks.
    """

    dataset: str
    name: str | None
    image_size: int
    flip: bool | None
    split: Split


@dataclass(frozen=True)
class Evaluation:
    """The target as configured: a dataset as in :class:`SourceSettings` or None, and training images a class.

    The seed decides which images are drawn. It is not the run's: runs of a sweep are judged on the same images.
    """

    dataset: str | None
    train_per_class: int
    image_size: int
    flip: bool | None
    seed: int = 0


class ImageSource:
    """Reads images by name or path.

    Args:
        root: the folder in which named datasets lie, or are downloaded to.
        on_progress: told how far long reading has come.
    """

    def __init__(self, root: Path, on_progress: Progress | None = None) -> None:
        self._root = root
        self._on_progress = on_progress

    def load(self, dataset: str, size: int) -> tuple[ImageSet, ImageSet | None]:
        """Training and test images, under a name that can be a part of a task's name."""
        train, test = load_source(dataset, self._root, size, self._on_progress)
        return replace(train, name=plain_name(train.name)), test

    def source(self, settings: SourceSettings) -> tuple[Source, ImageSet | None]:
        """The training images as a source, and the test images."""
        train, test = self.load(settings.dataset, settings.image_size)
        train = replace(train, name=settings.name or train.name)
        return Source(train, may_mirror(settings.dataset, settings.flip), settings.split), test

    def at_size(self, size: int, source: Source, settings: SourceSettings) -> ImageSet:
        """The images of a source at another size."""
        return source.images if source.images.image_size == size else self.load(settings.dataset, size)[0]

    def target(self, evaluation: Evaluation) -> Target:
        """The images that phi is judged on."""
        assert evaluation.dataset is not None
        train, test = self.load(evaluation.dataset, evaluation.image_size)
        flip = may_mirror(evaluation.dataset, evaluation.flip)
        return _target(train, test, evaluation.train_per_class, evaluation.seed, flip)


def plain_name(name: str) -> str:
    """A name without what cannot stand in that of a submodule, such as dots, or of a file."""
    return re.sub(r"[^0-9A-Za-z_-]+", "-", name)


def same_data(one: str, other: str) -> bool:
    """Whether two names or paths, as in :class:`SourceSettings`, are those of one data set."""
    names = list_datasets()
    if one in names or other in names:
        return one == other
    return os.path.realpath(os.path.expanduser(one)) == os.path.realpath(os.path.expanduser(other))


def built_in(split: Split, evaluation: Evaluation, seed: int, images: ImageSource) -> tuple[list[Source], Target]:
    """Real digits 0 to 4 and generated textures to learn from; digits 5 to 9, with few labels, held out.

    Where a dataset is given for the evaluation, its images are the target instead.

    Raises:
        DataError: the target holds images of a source, or what :func:`from_settings` raises for a target.
    """
    digits = load_digits(evaluation.image_size)
    textures = generate_textures(num_classes=8, per_class=120, size=evaluation.image_size, seed=seed)
    flips = [default if evaluation.flip is None else evaluation.flip for default in (False, True)]
    sources = [
        Source(digits.select_classes(range(5), name="digits04"), flips[0], split),
        Source(textures, flips[1], split),
    ]
    if evaluation.dataset is not None:
        target = images.target(evaluation)
        return [_without(source, source.images, target) for source in sources], target
    held_out = digits.select_classes(range(5, 10), name="digits59")
    return sources, _target(held_out, None, evaluation.train_per_class, evaluation.seed, flips[0])


def from_settings(
    settings: Sequence[SourceSettings], evaluation: Evaluation, images: ImageSource
) -> tuple[list[Source], Target]:
    """Sources as configured, and a target.

    The target is the dataset of ``evaluation`` where given; otherwise a fifth of the classes of the last source, which
    is not used as a source; or, where that has fewer than four classes, a fifth of its images of every class. They are
    held out of every source of the same data set, whatever its size, with what is there twice. A few images that
    another source happens to have in common with the target are left out of that source.

    Raises:
        DataError: a dataset is unknown or missing, damaged, empty, or has one class only; the target holds images of a
            source.
    """
    loaded = [images.source(one) for one in settings]
    sources = [source for source, _ in loaded]
    if evaluation.dataset is not None:
        judged_on, target = evaluation.dataset, images.target(evaluation)
    else:
        judged_on, target = settings[-1].dataset, _held_out(sources[-1], loaded[-1][1], evaluation)
    found = []
    for source, one in zip(sources, settings, strict=True):
        if evaluation.dataset is None and same_data(one.dataset, judged_on):
            at_size = images.at_size(target.train.image_size, source, one)
            remains = [_cut(of_all, evaluation.seed)[1] for of_all in (source.images, at_size)]
            found.append(_without(replace(source, images=remains[0]), remains[1], target, refuse=False))
        elif {one.dataset, judged_on} <= {*list_datasets()}:  # two of them, known apart and slow to read
            found.append(source)
        else:
            found.append(_without(source, images.at_size(target.train.image_size, source, one), target))
    return found, target


def _held_out(last: Source, test: ImageSet | None, evaluation: Evaluation) -> Target:
    """The target out of a source with these test images."""
    held_out = replace(_cut(last.images, evaluation.seed)[0], name=f"{last.images.name}-held-out")
    first = last.images.num_classes - held_out.num_classes
    held_out_test = None
    if test is not None and first > 0:
        held_out_test = test.select_classes(range(first, last.images.num_classes), name=held_out.name)
    return _target(held_out, held_out_test, evaluation.train_per_class, evaluation.seed, last.flip)


def _cut(images: ImageSet, seed: int) -> tuple[ImageSet, ImageSet]:
    """What is held out, the last classes or images of all, and what remains; alike for one data set at any size."""
    if images.num_classes >= _LEAST_CLASSES:
        kept = images.num_classes - max(2, round(HELD_OUT_FRACTION * images.num_classes))
        return images.select_classes(range(kept, images.num_classes)), images.select_classes(range(kept))
    fewest = min(int((images.labels == label).sum()) for label in range(images.num_classes))
    if fewest < _LEAST_IMAGES:
        raise DataError(
            f"'{images.name}' has {images.num_classes} classes and one of them {fewest} images: too few to hold "
            "classes or images out; give evaluation.data="
        )
    return images.few_per_class(max(2, round(HELD_OUT_FRACTION * fewest)), seed)


def _without(source: Source, images: ImageSet, target: Target, refuse: bool = True) -> Source:
    """A source without the few images that are in the target as well.

    Args:
        source: what is cut.
        images: those of the source, at the target's size.
        target: what phi is judged on.
        refuse: them, where they are more than a few.

    Raises:
        DataError: they are more than a few, or all images of a class.
    """
    of_source, of_target = images.digests(), target.train.digests() + target.test.digests()
    common = set(of_source).intersection(of_target)
    if not common:
        return source
    seen = sum(digest in common for digest in of_target)
    if refuse and seen > _MOST_BY_CHANCE * len(of_target):
        raise DataError(
            f"{seen} of the {len(of_target)} images of '{target.train.name}', which phi is to be judged on, are in the "
            f"source '{source.images.name}' as well; leave that source out, or give other evaluation.data="
        )
    kept = [number for number, digest in enumerate(of_source) if digest not in common]
    remains = source.images.subset(kept)
    count = f"{len(source.images) - len(kept)} of the {len(source.images)} images of source '{source.images.name}'"
    for label in set(source.images.labels.tolist()) - set(remains.labels.tolist()):
        raise DataError(
            f"class '{remains.classes[label]}' has no images left without those that are among the held-out ones too, "
            f"{count}; remove what is there twice, or give evaluation.data="
        )
    warnings.warn(f"among the held-out ones too, and left out: {count}", stacklevel=2)
    return replace(source, images=remains)


def _target(train: ImageSet, test: ImageSet | None, train_per_class: int, seed: int, flip: bool) -> Target:
    fewest = min(int((train.labels == label).sum()) for label in range(train.num_classes))
    if test is None or len(test) == 0:
        # Half of a small class at most, so that enough remains to be tested on.
        if fewest < 2:
            raise DataError(
                f"'{train.name}' has a class with {fewest} images, too few to train and to test on; add some, or give "
                "evaluation.data="
            )
        few, rest = train.few_per_class(min(train_per_class, fewest // 2), seed)
        return _checked(Target(few, rest, flip))
    if fewest < 1:
        raise DataError(f"'{train.name}' has a class without training images; add some, or give other evaluation.data=")
    return _checked(Target(train.few_per_class(min(train_per_class, fewest), seed)[0], test, flip))


def _checked(target: Target) -> Target:
    """The same, and a warning where images to train on are among those to test on."""
    seen = set(target.train.digests())
    common = sum(digest in seen for digest in target.test.digests())
    if common:
        warnings.warn(
            f"{common} of the {len(target.test)} test images of '{target.train.name}', which phi is judged on, are "
            "copies of training images there, which flatters all scores; remove them",
            stacklevel=3,
        )
    return target
