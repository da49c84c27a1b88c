"""What can go wrong while a dataset is downloaded, and that it is then not taken for whole."""

import errno
import pickle
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from published_copies import WRITERS, Copy, assert_is_copy
from publisher import Publisher

from mp_lightning.data import load_dataset
from mp_lightning.data.catalogue import downloads
from mp_lightning.data.catalogue.table import DATASETS
from mp_lightning.errors import DataError

Publish = Callable[[str], Copy]


def refused(name: str, root: Path) -> str:
    with pytest.raises(DataError) as caught:
        load_dataset(name, root, 16)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_nothing_is_left(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} <= {".lock"}


def test_without_a_server_the_message_names_the_urls_and_the_folder(
    publish: Publish, publisher: Publisher, tmp_path: Path
) -> None:
    publish("stanford_dogs")
    publisher.stop()
    urls = " and ".join(publisher.url(file) for file in ("images.tar", "lists.tar"))
    assert refused("stanford_dogs", tmp_path / "data") == (
        f"'stanford_dogs' cannot be downloaded (Connection refused): put {urls} into '{tmp_path}/data/stanford_dogs'"
    )
    assert_nothing_is_left(tmp_path / "data" / "stanford_dogs")


def test_the_message_names_only_what_is_missing_still(publish: Publish, publisher: Publisher, tmp_path: Path) -> None:
    copy = publish("flowers102")
    content = publisher.files.pop("setid.mat")
    message = refused("flowers102", tmp_path / "data")
    url = publisher.url("setid.mat")
    assert message.endswith(f"(HTTP Error 404: Not Found): put {url} into '{tmp_path}/data/flowers102/flowers-102'")
    publisher.files["setid.mat"] = content
    publisher.asked.clear()
    assert_is_copy(load_dataset("flowers102", tmp_path / "data", 16), copy, "flowers102", 16)
    assert set(publisher.asked) == {"setid.mat"}


@pytest.mark.parametrize("fault", ["cut", "altered"])
def test_an_archive_that_does_not_arrive_whole_is_not_used(
    fault: str, publish: Publish, publisher: Publisher, tmp_path: Path
) -> None:
    copy = publish("cub200_2011")
    whole = publisher.files["CUB_200_2011.tgz"]
    if fault == "cut":
        publisher.cut.add("CUB_200_2011.tgz")
    else:
        publisher.files["CUB_200_2011.tgz"] = whole + b"0"
    message = refused("cub200_2011", tmp_path / "data")
    assert message == (
        "'cub200_2011' cannot be downloaded (what arrived is incomplete or altered): put "
        f"{publisher.url('CUB_200_2011.tgz')} into '{tmp_path}/data/cub200_2011'"
    )
    assert_nothing_is_left(tmp_path / "data" / "cub200_2011")
    publisher.cut.clear()
    publisher.files["CUB_200_2011.tgz"] = whole
    assert_is_copy(load_dataset("cub200_2011", tmp_path / "data", 16), copy, "cub200_2011", 16)


def test_a_server_that_falls_silent_is_given_up(
    publish: Publish, publisher: Publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish("cub200_2011")
    monkeypatch.setattr(downloads, "_PATIENCE", 0.2)
    ended = threading.Event()
    publisher.before_body = lambda: ended.wait(30)
    assert "(timed out)" in refused("cub200_2011", tmp_path / "data")
    ended.set()


def test_an_archive_of_the_user_with_another_checksum_is_named_and_kept(
    publish: Publish, publisher: Publisher, tmp_path: Path
) -> None:
    publish("cub200_2011")
    archive = tmp_path / "data" / "cub200_2011" / "CUB_200_2011.tgz"
    archive.parent.mkdir(parents=True)
    archive.write_bytes(b"half")
    assert refused("cub200_2011", tmp_path / "data") == (
        f"'{archive}' is damaged or not that of {publisher.url('CUB_200_2011.tgz')}: replace it, or remove it"
    )
    assert archive.read_bytes() == b"half"


def test_a_full_disk_leaves_no_half_dataset(
    publish: Publish, publisher: Publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = publish("tiny_imagenet")
    unpack = downloads.extract_archive

    def unpack_until_full(archive: Path, content: Path) -> Any:
        unpack(archive, content)
        shutil.rmtree(content / "tiny-imagenet-200" / "val")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(downloads, "extract_archive", unpack_until_full)
    assert refused("tiny_imagenet", tmp_path / "data") == (
        f"'tiny_imagenet' cannot be written to '{tmp_path}/data/tiny_imagenet' (No space left on device): free some "
        "space or allow writing there, or choose another data root"
    )
    assert not (tmp_path / "data" / "tiny_imagenet" / "tiny-imagenet-200").exists()
    # The archive has come whole: it is not downloaded twice.
    monkeypatch.setattr(downloads, "extract_archive", unpack)
    publisher.stop()
    assert_is_copy(load_dataset("tiny_imagenet", tmp_path / "data", 16), copy, "tiny_imagenet", 16)


def test_a_root_that_is_a_file_is_named(publish: Publish, tmp_path: Path) -> None:
    publish("cub200_2011")
    (tmp_path / "data").write_text("")
    assert "cannot be written to" in refused("cub200_2011", tmp_path / "data")


def test_cars_are_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "stanford_cars"
    assert refused("stanford_cars", tmp_path) == (
        "'stanford_cars' cannot be downloaded any more: put cars_train, cars_test, cars_test_annos_withlabels.mat, "
        f"devkit/cars_train_annos.mat, devkit/cars_meta.mat into '{folder}'"
    )
    WRITERS["stanford_cars"](folder, monkeypatch)
    (folder / "devkit" / "cars_meta.mat").unlink()
    assert refused("stanford_cars", tmp_path).endswith(f": put devkit/cars_meta.mat into '{folder}'")


DAMAGE = {
    "cifar10": ("cifar-10-batches-py/data_batch_3", "Dataset not found or corrupted"),
    "cifar100": ("cifar-100-python/meta", "Dataset metadata file not found or corrupted"),
    "svhn": ("test_32x32.mat", "Dataset not found or corrupted"),
    "stl10": ("stl10_binary/test_X.bin", "Dataset not found or corrupted"),
    "fashion_mnist": ("FashionMNIST/raw/train-images-idx3-ubyte", "RuntimeError: "),
    "stanford_cars": ("devkit/cars_meta.mat", ""),
    "food101": ("food-101/meta/test.json", "JSONDecodeError: "),
    "stanford_dogs": ("train_list.mat", ""),
    "cub200_2011": ("CUB_200_2011/images.txt", "list different images"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_refused_with_the_folder_they_are_in(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    WRITERS[name](tmp_path / name, monkeypatch)
    file, reason = DAMAGE[name]
    path = tmp_path / name / file
    path.write_bytes(path.read_bytes()[:21])
    message = refused(name, tmp_path)
    place = tmp_path / name / DATASETS[name].inside
    assert message.startswith(f"files of '{name}' in '{place}' are incomplete or damaged (")
    assert reason in message
    assert "download=True" not in message


def test_a_list_or_an_image_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tiny_imagenet" / "tiny-imagenet-200"
    WRITERS["tiny_imagenet"](folder.parent, monkeypatch)
    image = folder / "train" / "n01443537" / "images" / "n01443537_110.JPEG"
    image.rename(image.with_suffix(".moved"))
    assert refused("tiny_imagenet", tmp_path).startswith(f"image '{image}' is missing: ")
    image.with_suffix(".moved").rename(image)
    (folder / "val" / "val_annotations.txt").unlink()
    assert f"'{folder}/val/val_annotations.txt'" in refused("tiny_imagenet", tmp_path)


def test_a_pickle_of_another_checksum_is_not_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Canary:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    WRITERS["cifar10"](tmp_path / "cifar10", monkeypatch)
    for file in ("data_batch_1", "test_batch", "batches.meta"):
        (tmp_path / "cifar10" / "cifar-10-batches-py" / file).write_bytes(pickle.dumps(Canary()))
        refused("cifar10", tmp_path)
    assert not (tmp_path / "ran").exists()
    # Without the check it would have run.
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *arguments: True)
    refused("cifar10", tmp_path)
    assert (tmp_path / "ran").exists()


def test_a_download_without_a_checksum_is_not_in_the_table() -> None:
    checksums = [download.md5 for dataset in DATASETS.values() for download in dataset.downloads]
    assert all(len(md5) == 32 and int(md5, 16) for md5 in checksums)
    assert replace(DATASETS["dtd"].downloads[0], url="http://a/b/c.tar").file == "c.tar"
