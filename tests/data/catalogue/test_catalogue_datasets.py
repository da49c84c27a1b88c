"""Every dataset of the catalogue, from a tiny copy of its published files."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from published_copies import WRITERS, Copy, assert_is_copy, write_image
from publisher import Publisher
from torchvision import datasets

from mp_lightning.data import list_datasets, load_dataset, load_digits, load_source, may_mirror
from mp_lightning.data.catalogue.table import DATASETS
from mp_lightning.errors import ConfigurationError, DataError


def test_the_catalogue_lists_every_dataset() -> None:
    assert list_datasets() == [
        *("cifar10", "cifar100", "svhn", "stl10", "fashion_mnist", "fgvc_aircraft", "stanford_cars", "dtd"),
        *("flowers102", "food101", "tiny_imagenet", "cub200_2011", "stanford_dogs", "digits"),
    ]


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("name", WRITERS)
def test_a_dataset_that_is_there_is_read(name: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = WRITERS[name](tmp_path / name, monkeypatch)
    assert_is_copy(load_dataset(name, tmp_path, size), copy, name, size)


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "stanford_cars"])
def test_a_dataset_that_is_not_there_is_downloaded_once(
    name: str, publish: Callable[[str], Copy], publisher: Publisher, tmp_path: Path
) -> None:
    copy, root = publish(name), tmp_path / "root"
    assert_is_copy(load_dataset(name, root, 16), copy, name, 16)
    asked = len(publisher.asked)
    assert set(publisher.asked) == set(publisher.files)
    assert_is_copy(load_dataset(name, root, 32), copy, name, 32)
    assert len(publisher.asked) == asked
    # Neither archives nor what is under way is left.
    left = {path.name for path in root.rglob("*")}
    assert left.isdisjoint([".partial", *(path for path in publisher.files if not path.endswith(".mat"))])


@pytest.mark.parametrize("name", ["dtd", "flowers102", "stanford_dogs", "fashion_mnist"])
def test_published_files_that_the_user_brings_are_used_without_a_network_and_kept(
    name: str, publish: Callable[[str], Copy], publisher: Publisher, tmp_path: Path
) -> None:
    copy, root = publish(name), tmp_path / "root"
    publisher.stop()
    place = root / name / DATASETS[name].inside
    place.mkdir(parents=True)
    for file, content in publisher.files.items():
        (place / file).write_bytes(content)
    assert_is_copy(load_dataset(name, root, 16), copy, name, 16)
    assert all((place / file).read_bytes() == content for file, content in publisher.files.items())


def test_digits_need_no_file_and_hold_a_fifth_of_each_out(tmp_path: Path) -> None:
    train, test = load_dataset("digits", tmp_path / "none", 8)
    assert (train.name, test.name) == ("digits", "digits (test)")
    assert (len(train), len(test)) == (1437, 360)
    assert test.labels.bincount().tolist() == [36] * 10
    every = {image.numpy().tobytes() for image in load_digits(8).images}
    assert {image.numpy().tobytes() for part in (train, test) for image in part.images} == every
    assert torch.equal(load_dataset("digits", tmp_path / "none", 8)[1].images, test.images)
    assert not (tmp_path / "none").exists()


def test_numbers_and_letters_are_not_mirrored() -> None:
    assert [name for name in list_datasets() if not may_mirror(name, None)] == ["svhn", "digits"]


def test_the_urls_and_checksums_are_those_of_torchvision() -> None:
    cifar10, cifar100, stl10 = datasets.CIFAR10, datasets.CIFAR100, datasets.STL10
    flowers = datasets.Flowers102._download_url_prefix
    expected = {
        "cifar10": [(cifar10.url, cifar10.tgz_md5)],
        "cifar100": [(cifar100.url, cifar100.tgz_md5)],
        "svhn": [(datasets.SVHN.split_list[part][0], datasets.SVHN.split_list[part][2]) for part in ("train", "test")],
        "stl10": [(stl10.url, stl10.tgz_md5)],
        "fashion_mnist": [
            (datasets.FashionMNIST.mirrors[0] + file, md5) for file, md5 in datasets.FashionMNIST.resources
        ],
        "dtd": [(datasets.DTD._URL, datasets.DTD._MD5)],
        "flowers102": [(flowers + file, md5) for file, md5 in datasets.Flowers102._file_dict.values()],
        "food101": [(datasets.Food101._URL, datasets.Food101._MD5)],
    }
    for name, published in expected.items():
        assert [(download.url, download.md5) for download in DATASETS[name].downloads] == published
    # torchvision states no checksum for this one.
    assert DATASETS["fgvc_aircraft"].downloads[0].url == datasets.FGVCAircraft._URL


def test_unknown_names_and_sizes_out_of_range_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"'cifar1000' is not known: choose one of cifar10, .*, digits$"):
        load_dataset("cifar1000", tmp_path, 32)
    with pytest.raises(ConfigurationError, match="size=0 for 'dtd' is out of range"):
        load_dataset("dtd", tmp_path, 0)


def test_a_source_is_a_name_or_else_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = WRITERS["cub200_2011"](tmp_path / "root" / "cub200_2011", monkeypatch)
    train, test = load_source("cub200_2011", tmp_path / "root", 16)
    assert test is not None
    assert_is_copy((train, test), copy, "cub200_2011", 16)
    for name in ("owl", "wren"):
        write_image(tmp_path / "birds" / name / "1.jpg", 100, 20, 20)
    train, test = load_source(str(tmp_path / "birds"), tmp_path / "none", None)
    assert (train.name, train.classes, train.image_size, test) == ("birds", ("owl", "wren"), 20, None)
    assert load_source(str(tmp_path / "birds"), tmp_path / "none", 8)[0].image_size == 8


def test_a_source_that_is_neither_lists_the_names(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"no images at 'cifar1000', did you mean 'cifar100': give one of the datasets cifar10, .*, digits, an",
    ):
        load_source("cifar1000", tmp_path, 32)
    with pytest.raises(ConfigurationError, match=r"dataset 'digits' needs a size: set size=32 .image_size=32 in"):
        load_source("digits", tmp_path, None)


def test_a_name_goes_before_a_folder_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("digits").mkdir()
    assert load_source("digits", tmp_path, 8)[0].num_classes == 10
    with pytest.raises(DataError, match="holds no folders"):
        load_source("./digits", tmp_path, 8)


def test_progress_counts_the_images_of_each_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    WRITERS["tiny_imagenet"](tmp_path / "tiny_imagenet", monkeypatch)
    seen: list[tuple[str, int, int]] = []
    load_dataset("tiny_imagenet", tmp_path, 16, lambda *progress: seen.append(progress))
    train, test = "reading tiny_imagenet", "reading tiny_imagenet (test)"
    assert seen == [(train, 0, 3), (train, 3, 3), (test, 0, 2), (test, 2, 2)]
