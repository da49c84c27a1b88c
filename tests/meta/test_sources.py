"""Where images come from: several sources with settings of their own, and the target that none of them holds."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mp_lightning.data import ImageSet, list_datasets, load_digits, may_mirror
from mp_lightning.errors import DataError
from mp_lightning.meta.sources import (
    Evaluation,
    ImageSource,
    SourceSettings,
    built_in,
    from_settings,
    plain_name,
)
from mp_lightning.meta.tasks import Split, make_tasks

SPLIT = Split(groups=1, classes=None, architectures=["conv4-2"], train_per_class=None, valid_per_class=None)
NO_TARGET = Evaluation(dataset=None, train_per_class=3, image_size=16, flip=None)


def save(path: Path, classes: int = 5, per_class: int = 8, test: bool = False, first: int = 0) -> str:
    """An npz in which every image but for a corner is of one shade, counted from ``first``; returns the path."""
    count = classes * per_class
    labels = np.arange(count) % classes
    numbers = np.arange(first, first + count, dtype=np.uint8)
    shades = np.broadcast_to(numbers[:, None, None, None], (count, 20, 20, 3)).copy()
    shades[:, -1, -1] = 255  # darker sets are refused
    more = {"x_test": 255 - shades[: 2 * classes], "y_test": labels[: 2 * classes]} if test else {}
    np.savez(path, x_train=shades, y_train=labels, **more)
    return str(path)


def source(dataset: str, name: str | None = None, **changes: object) -> SourceSettings:
    settings = SourceSettings(dataset=dataset, name=name, image_size=16, flip=None, split=SPLIT)
    return replace(settings, **changes)


@pytest.fixture
def images(tmp_path: Path) -> ImageSource:
    return ImageSource(tmp_path / "datasets")


def shades(*sets: ImageSet) -> set[int]:
    return {shade for one in sets for shade in one.images[:, 0, 0, 0].tolist()}


def halves(tasks: Iterable) -> list[ImageSet]:
    return [half for task in tasks for half in (task.train, task.valid)]


def test_every_source_is_cut_by_its_own_settings(tmp_path: Path, images: ImageSource) -> None:
    settings = [
        source(
            save(tmp_path / "a.npz", classes=4),
            "large",
            image_size=32,
            flip=False,
            split=replace(SPLIT, groups=2, architectures=["resnet20-2", "wrn28_2-2"], train_per_class=2),
        ),
        source(save(tmp_path / "b.npz", classes=6, first=100), split=replace(SPLIT, classes=3)),
    ]
    target = replace(NO_TARGET, dataset=save(tmp_path / "t.npz", classes=3, first=200), image_size=24)
    sources, held_out = from_settings(settings, target, images)
    tasks = make_tasks(sources, 0)
    assert [task.name for task in tasks] == ["large-0-a", "large-0-b", "large-1-a", "large-1-b", "b-a", "b-b"]
    assert [str(task.architecture) for task in tasks] == [
        *("resnet20-2", "wrn28_2-2", "wrn28_2-2", "resnet20-2"),
        *("conv4-2", "conv4-2"),
    ]
    assert [task.train.image_size for task in tasks] == [32] * 4 + [16] * 2
    assert [task.train.num_classes for task in tasks] == [2] * 4 + [3] * 2
    assert [len(task.train) for task in tasks] == [4] * 4 + [12] * 2
    assert [len(task.valid) for task in tasks] == [8] * 4 + [12] * 2
    assert [task.flip for task in tasks] == [False] * 4 + [True] * 2
    assert (held_out.train.image_size, held_out.train.name, held_out.flip) == (24, "t", True)


def test_the_target_is_a_fifth_of_the_classes_of_the_last_source(tmp_path: Path, images: ImageSource) -> None:
    settings = [source(save(tmp_path / "a.npz")), source(save(tmp_path / "b.npz", classes=10, first=100), "birds")]
    sources, target = from_settings(settings, NO_TARGET, images)
    assert [one.images.name for one in sources] == ["a", "birds"]
    assert sources[0].images.classes == ("0", "1", "2", "3", "4")
    assert sources[1].images.classes == ("0", "1", "2", "3", "4", "5", "6", "7")
    assert target.train.name == "birds-held-out"
    assert target.train.classes == target.test.classes == ("8", "9")
    assert torch.bincount(target.train.labels).tolist() == [3, 3]
    learned = halves(make_tasks(sources[1:], 0))
    assert shades(*learned).isdisjoint(shades(target.train, target.test))
    assert shades(target.train).isdisjoint(shades(target.test))


def test_of_few_classes_images_are_held_out(tmp_path: Path, images: ImageSource) -> None:
    sources, target = from_settings([source(save(tmp_path / "a.npz", classes=3))], NO_TARGET, images)
    assert target.train.num_classes == sources[0].images.num_classes == 3
    learned = shades(*halves(make_tasks(sources, 0)))
    assert len(learned) == 18 and learned.isdisjoint(shades(target.train, target.test))


def test_test_images_of_the_last_source_are_those_of_the_target(tmp_path: Path, images: ImageSource) -> None:
    sources, target = from_settings([source(save(tmp_path / "a.npz", test=True))], NO_TARGET, images)
    assert target.test.classes == ("3", "4") and sources[0].images.classes == ("0", "1", "2")
    assert shades(target.test) == {255 - shade for shade in (3, 4, 8, 9)}


def test_a_target_of_its_own_leaves_the_sources_whole(tmp_path: Path, images: ImageSource) -> None:
    target = replace(NO_TARGET, dataset=save(tmp_path / "t.npz", classes=3, test=True, first=100))
    sources, held_out = from_settings([source(save(tmp_path / "a.npz"))], target, images)
    assert len(sources[0].images) == 40
    assert len(held_out.train) == 9 and shades(held_out.test) == {255 - shade for shade in range(100, 106)}


def test_the_same_file_under_two_names_makes_two_sources(tmp_path: Path, images: ImageSource) -> None:
    path = save(tmp_path / "a.npz", classes=3)
    target = replace(NO_TARGET, dataset=save(tmp_path / "t.npz", first=100))
    sources, _ = from_settings([source(path, "small"), source(path, "large", image_size=32)], target, images)
    names = [task.name for task in make_tasks(sources, 0)]
    assert names == ["small-a", "small-b", "large-a", "large-b"]
    assert [len(one.images) for one in sources] == [24, 24]


@pytest.mark.parametrize("classes", [3, 5])
def test_what_is_held_out_is_held_out_of_every_size_of_the_same_data(
    tmp_path: Path, images: ImageSource, monkeypatch: pytest.MonkeyPatch, classes: int
) -> None:
    path = save(tmp_path / "a.npz", classes=classes)
    other = save(tmp_path / "b.npz", first=100)
    monkeypatch.chdir(tmp_path)
    settings = [source("a.npz", "small"), source(other), source(path, "large", image_size=32)]
    sources, target = from_settings(settings, NO_TARGET, images)
    assert target.train.image_size == 32
    small, _, large = sources
    assert small.images.classes == large.images.classes
    for one in (small, large):
        assert shades(one.images) == set(range(classes * 8)) - shades(target.train, target.test)
    assert len(sources[1].images) == 40


@pytest.mark.parametrize("size", [16, 32])
def test_a_target_with_the_images_of_a_source_is_refused(tmp_path: Path, images: ImageSource, size: int) -> None:
    """Also under another path, and at another size."""
    settings = [source(save(tmp_path / "a.npz"), image_size=size)]
    target = replace(NO_TARGET, dataset=save(tmp_path / "copy.npz", first=35))
    with pytest.raises(DataError, match=r"5 of the 40 images of 'copy'.* are in the source 'a' as well; leave"):
        from_settings(settings, target, images)


def test_a_copy_of_the_held_out_images_in_another_source_is_refused(tmp_path: Path, images: ImageSource) -> None:
    settings = [source(save(tmp_path / "a.npz")), source(save(tmp_path / "b.npz"))]
    with pytest.raises(DataError, match=r"of 'b-held-out'.* are in the source 'a' as well"):
        from_settings(settings, NO_TARGET, images)


def test_the_built_in_sources_are_no_target(images: ImageSource) -> None:
    with pytest.raises(DataError, match=r"280 of the 560 images of 'digits'.* are in the source 'digits04'"):
        built_in(SPLIT, replace(NO_TARGET, dataset="digits", train_per_class=20), 0, images)


def test_a_class_that_is_held_out_whole_is_told(tmp_path: Path, images: ImageSource) -> None:
    """Blank images are all alike."""
    blank = np.zeros((40, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "blank.npz", x_train=blank, y_train=np.arange(40) % 4)
    with pytest.raises(DataError, match=r"class '0' has no images left without those that are among .*, 20 of the "):
        from_settings([source(str(tmp_path / "blank.npz"))], NO_TARGET, images)


def test_a_double_by_chance_leaves_the_source(tmp_path: Path, images: ImageSource) -> None:
    """One image of 120 that the target has as well."""
    settings = [source(save(tmp_path / "a.npz"))]
    target = replace(NO_TARGET, dataset=save(tmp_path / "t.npz", classes=2, per_class=60, first=39))
    with pytest.warns(UserWarning, match="among the held-out ones too, and left out: 1 of the 40 images of source 'a'"):
        sources, held_out = from_settings(settings, target, images)
    assert len(held_out.train) + len(held_out.test) == 120
    assert shades(sources[0].images) == set(range(39)) and len(sources[0].images) == 39


@pytest.mark.parametrize("place", ["source", "target"])
def test_an_unknown_dataset_lists_the_known_ones(tmp_path: Path, images: ImageSource, place: str) -> None:
    path = save(tmp_path / "a.npz")
    settings = [source("cifar11" if place == "source" else path)]
    target = replace(NO_TARGET, dataset=path if place == "source" else "cifar11")
    with pytest.raises(
        DataError, match="no images at 'cifar11', did you mean 'cifar10': give one of the datasets"
    ) as caught:
        from_settings(settings, target, images)
    assert all(name in str(caught.value) for name in list_datasets())


def test_names_of_datasets_go_before_what_lies_in_the_working_folder(
    tmp_path: Path, images: ImageSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    sources, _ = from_settings([source("digits")], NO_TARGET, images)
    assert sources[0].images.num_classes == 8 and sources[0].flip is False


def test_digits_are_not_mirrored_unless_it_is_asked_for() -> None:
    assert not may_mirror("svhn", None) and not may_mirror("digits", None)
    assert may_mirror("cifar10", None) and may_mirror("pictures.npz", None)
    assert may_mirror("svhn", True) and not may_mirror("cifar10", False)


@pytest.mark.parametrize(
    ("name", "plain"), [("my.pictures", "my-pictures"), ("a b/c", "a-b-c"), ("CUB_200-2011", "CUB_200-2011")]
)
def test_names_can_be_parts_of_modules_and_files(name: str, plain: str) -> None:
    assert plain_name(name) == plain


@pytest.mark.parametrize("size", [16, 32])
def test_what_needs_no_download_holds_five_digits_out(images: ImageSource, size: int) -> None:
    sources, target = built_in(SPLIT, replace(NO_TARGET, image_size=size), 0, images)
    assert [(one.images.name, one.flip) for one in sources] == [("digits04", False), ("textures", True)]
    assert target.train.classes == ("5", "6", "7", "8", "9") and not target.flip
    assert {one.images.image_size for one in sources} == {target.train.image_size} == {size}


@pytest.mark.parametrize("size", [16, 24])
def test_a_dataset_by_name_is_compared_with_a_target_by_path(tmp_path: Path, images: ImageSource, size: int) -> None:
    digits = load_digits(16)
    np.savez(tmp_path / "mine.npz", x_train=digits.images.numpy(), y_train=digits.labels.numpy())
    judged = replace(NO_TARGET, dataset=str(tmp_path / "mine.npz"))
    with pytest.raises(DataError, match="images of 'mine', which phi is to be judged on, are in the source"):
        from_settings([source("digits", image_size=size)], judged, images)


@pytest.mark.parametrize("size", [16, 18])
@pytest.mark.parametrize("classes", [3, 10])
def test_what_is_twice_in_a_data_set_is_not_learned_from_and_judged_on(
    tmp_path: Path, images: ImageSource, classes: int, size: int
) -> None:
    """Of few classes images are held out, of many classes, whose images then have two labels."""
    pixels = np.random.default_rng(0).integers(0, 255, (120, 16, 16, 3), dtype=np.uint8)
    labels = np.arange(240) % classes
    np.savez(tmp_path / "twice.npz", x_train=np.concatenate([pixels, pixels]), y_train=labels)
    path = str(tmp_path / "twice.npz")
    sources, target = from_settings([source(path, "larger", image_size=size), source(path)], NO_TARGET, images)
    held_out = {image.numpy().tobytes() for part in (target.train, target.test) for image in part.images}
    assert not held_out & {image.numpy().tobytes() for image in sources[1].images.images}
    assert len(sources[0].images) == len(sources[1].images) > 100


def test_copies_among_the_images_to_train_and_to_test_on_are_told_of(tmp_path: Path, images: ImageSource) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 16, 16, 3), dtype=np.uint8)
    labels = np.arange(40) % 4
    np.savez(tmp_path / "t.npz", x_train=pixels, y_train=labels, x_test=pixels[:9], y_test=labels[:9])
    target = replace(NO_TARGET, dataset=str(tmp_path / "t.npz"), train_per_class=10)
    with pytest.warns(UserWarning, match="9 of the 9 test images of 't', which phi is judged on, are copies of"):
        from_settings([source(save(tmp_path / "a.npz"))], target, images)


def test_test_images_without_the_classes_that_are_held_out_are_not_tested_on(
    tmp_path: Path, images: ImageSource
) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 16, 16, 3), dtype=np.uint8)
    labels = np.arange(40) % 5
    np.savez(tmp_path / "a.npz", x_train=pixels, y_train=labels, x_test=pixels[:9] // 2, y_test=np.arange(9) % 3)
    _, target = from_settings([source(str(tmp_path / "a.npz"))], NO_TARGET, images)
    assert len(target.test) > 0 and target.test.num_classes == 2


@pytest.mark.parametrize("flip", [False, True])
def test_mirroring_can_be_asked_for_without_a_download(images: ImageSource, flip: bool) -> None:
    sources, target = built_in(SPLIT, replace(NO_TARGET, flip=flip), 0, images)
    assert [one.flip for one in sources] == [flip, flip] and target.flip == flip
    sources, target = built_in(SPLIT, NO_TARGET, 0, images)
    assert [one.flip for one in sources] == [False, True] and not target.flip
