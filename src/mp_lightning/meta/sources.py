"""Where the images of a meta-training run come from, and which are held out to judge the result."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mp_lightning.data import ImageSet, generate_textures, load_digits, load_images
from mp_lightning.errors import DataError
from mp_lightning.meta.tasks import Source
from mp_lightning.meta.transfer import Target

HELD_OUT_FRACTION = 0.2
_LEAST_IMAGES = 4  # of a class: two held out to train and test on, two for the halves
_LEAST_CLASSES = 4  # with fewer, holding classes out leaves nothing to learn from


def built_in(
    size: int, seed: int, train_per_class: int, evaluation: str | None, flip: bool
) -> tuple[list[Source], Target]:
    """Real digits 0 to 4 and generated textures to learn from; digits 5 to 9, with few labels, held out.

    Where a path ``evaluation`` is given, its images are the target instead, mirrored if ``flip`` is set.
    """
    digits = load_digits(size)
    textures = generate_textures(num_classes=8, per_class=120, size=size, seed=seed)
    sources = [
        Source(digits.select_classes(range(5), name="digits04"), flip=False),
        Source(textures, flip=True),
    ]
    if evaluation is not None:
        train, test = _load(evaluation, size)
        return sources, _target(train, test, train_per_class, seed, flip)
    held_out = digits.select_classes(range(5, 10), name="digits59")
    return sources, _target(held_out, None, train_per_class, seed, flip=False)


def from_files(
    paths: Sequence[str], evaluation: str | None, size: int | None, seed: int, train_per_class: int, flip: bool
) -> tuple[list[Source], Target]:
    """Sources from files or folders of images, and a target.

    The target is ``evaluation`` where given; otherwise a fifth of the classes of the last source, which is not used as
    a source; or, where that has fewer than four classes, a fifth of its images of every class.

    Raises:
        DataError: a path is missing, damaged, empty, or has one class only.
    """
    loaded = [_load(path, size) for path in paths]
    sources = [Source(train, flip) for train, _ in loaded]
    if evaluation is not None:
        train, test = _load(evaluation, size)
        return sources, _target(train, test, train_per_class, seed, flip)
    last, last_test = loaded[-1]
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
        held_out, remaining = last.few_per_class(count, seed)
        held_out, remaining = replace(held_out, name=f"{last.name}-held-out"), replace(remaining, name=last.name)
    sources[-1] = Source(remaining, flip)
    return sources, _target(held_out, held_out_test, train_per_class, seed, flip)


def _load(path: str, size: int | None) -> tuple[ImageSet, ImageSet | None]:
    train, test = load_images(Path(path), size=size)
    # Task names become names of submodules, in which torch allows no dots.
    name = re.sub(r"[^0-9A-Za-z_-]+", "-", train.name)
    return replace(train, name=name), test


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
