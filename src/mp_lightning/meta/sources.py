"""Where the images of a meta-training run come from, and which are held out to judge the result."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mp_lightning.data import ImageSet, Progress, generate_textures, load_digits, load_source, may_mirror
from mp_lightning.errors import DataError
from mp_lightning.meta.tasks import Source, Split
from mp_lightning.meta.transfer import Target

HELD_OUT_FRACTION = 0.2
_LEAST_IMAGES = 4  # of a class: two held out to train and test on, two for the halves
_LEAST_CLASSES = 4  # with fewer, holding classes out leaves nothing to learn from


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

    def target(self, evaluation: Evaluation) -> Target:
        """The images that phi is judged on."""
        assert evaluation.dataset is not None
        train, test = self.load(evaluation.dataset, evaluation.image_size)
        flip = may_mirror(evaluation.dataset, evaluation.flip)
        return _target(train, test, evaluation.train_per_class, evaluation.seed, flip)


def plain_name(name: str) -> str:
    """A name without what cannot stand in that of a submodule, such as dots, or of a file."""
    return re.sub(r"[^0-9A-Za-z_-]+", "-", name)


def built_in(split: Split, evaluation: Evaluation, seed: int, images: ImageSource) -> tuple[list[Source], Target]:
    """Real digits 0 to 4 and generated textures to learn from; digits 5 to 9, with few labels, held out.

    Where a dataset is given for the evaluation, its images are the target instead.
    """
    digits = load_digits(evaluation.image_size)
    textures = generate_textures(num_classes=8, per_class=120, size=evaluation.image_size, seed=seed)
    sources = [
        Source(digits.select_classes(range(5), name="digits04"), False, split),
        Source(textures, True, split),
    ]
    if evaluation.dataset is not None:
        return sources, images.target(evaluation)
    held_out = digits.select_classes(range(5, 10), name="digits59")
    return sources, _target(held_out, None, evaluation.train_per_class, evaluation.seed, flip=False)


def from_settings(
    settings: Sequence[SourceSettings], evaluation: Evaluation, images: ImageSource
) -> tuple[list[Source], Target]:
    """Sources as configured, and a target.

    The target is the dataset of ``evaluation`` where given; otherwise a fifth of the classes of the last source, which
    is not used as a source; or, where that has fewer than four classes, a fifth of its images of every class.

    Raises:
        DataError: a dataset is unknown or missing, damaged, empty, or has one class only.
    """
    loaded = [images.source(one) for one in settings]
    sources = [source for source, _ in loaded]
    if evaluation.dataset is not None:
        return sources, images.target(evaluation)
    last, last_test = sources[-1].images, loaded[-1][1]
    held_out_test = None
    if last.num_classes >= _LEAST_CLASSES:
        kept = last.num_classes - max(2, round(HELD_OUT_FRACTION * last.num_classes))
        held_out = last.select_classes(range(kept, last.num_classes), name=f"{last.name}-held-out")
        if last_test is not None:
            held_out_test = last_test.select_classes(range(kept, last.num_classes), name=held_out.name)
        remaining = last.select_classes(range(kept), name=last.name)
    else:
        fewest = min(int((last.labels == label).sum()) for label in range(last.num_classes))
        if fewest < _LEAST_IMAGES:
            raise DataError(
                f"'{last.name}' has {last.num_classes} classes and one of them {fewest} images: too few to hold "
                "classes or images out; give evaluation.data="
            )
        count = max(2, round(HELD_OUT_FRACTION * fewest))
        held_out, remaining = last.few_per_class(count, evaluation.seed)
        held_out, remaining = replace(held_out, name=f"{last.name}-held-out"), replace(remaining, name=last.name)
    sources[-1] = replace(sources[-1], images=remaining)
    return sources, _target(held_out, held_out_test, evaluation.train_per_class, evaluation.seed, sources[-1].flip)


def _target(train: ImageSet, test: ImageSet | None, train_per_class: int, seed: int, flip: bool) -> Target:
    fewest = min(int((train.labels == label).sum()) for label in range(train.num_classes))
    if test is None:
        # Half of a small class at most, so that enough remains to be tested on.
        if fewest < 2:
            raise DataError(
                f"'{train.name}' has a class with {fewest} images, too few to train and to test on; add some, or give "
                "evaluation.data="
            )
        few, rest = train.few_per_class(min(train_per_class, fewest // 2), seed)
        return Target(few, rest, flip)
    if fewest < 1:
        raise DataError(f"'{train.name}' has a class without training images; add some, or give other evaluation.data=")
    return Target(train.few_per_class(min(train_per_class, fewest), seed)[0], test, flip)
