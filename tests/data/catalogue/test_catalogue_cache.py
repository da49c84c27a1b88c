"""Decoded images are kept, and made anew where what was kept cannot be used."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from published_copies import WRITERS, assert_is_copy

from mp_lightning.data import load_dataset


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The image files opened so far."""
    files: list[str] = []
    original = Image.open

    def count(path: Path, *arguments: object) -> Image.Image:
        files.append(str(path))
        return original(path, *arguments)

    monkeypatch.setattr(Image, "open", count)
    return files


# Image files, and the arrays whose checksums take long.
@pytest.mark.parametrize("name", ["dtd", "stanford_cars", "tiny_imagenet", "stl10"])
def test_the_second_time_nothing_is_decoded(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: list[str]
) -> None:
    copy = WRITERS[name](tmp_path / name, monkeypatch)
    load_dataset(name, tmp_path, 16)
    first = len(opened)
    assert first == (0 if name == "stl10" else len(copy.train) + len(copy.test))
    for entry in (tmp_path / name).iterdir():
        if entry.name != "cache":
            entry.rename(tmp_path / f"moved {entry.name}")
    assert_is_copy(load_dataset(name, tmp_path, 16), copy, name, 16)
    assert len(opened) == first


def test_each_size_is_kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: list[str]) -> None:
    copy = WRITERS["dtd"](tmp_path / "dtd", monkeypatch)
    for size in (16, 20, 16, 20):
        assert_is_copy(load_dataset("dtd", tmp_path, size), copy, "dtd", size)
    assert len(opened) == 12
    assert sorted(path.name for path in (tmp_path / "dtd" / "cache").iterdir()) == ["16-v2.npz", "20-v2.npz"]


@pytest.mark.parametrize("name", ["cifar10", "svhn", "fashion_mnist"])
def test_what_is_quick_to_read_is_not_kept(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    WRITERS[name](tmp_path / name, monkeypatch)
    load_dataset(name, tmp_path, 16)
    assert not (tmp_path / name / "cache").exists()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[600] ^= 255
    path.write_bytes(content)


def swap(path: Path, **arrays: np.ndarray) -> None:
    with np.load(path) as kept:
        np.savez(path, **{**kept, **arrays})


DAMAGES = {
    "cut": truncate,
    "one bit": flip,
    "empty": lambda path: path.write_bytes(b""),
    "no archive": lambda path: path.write_bytes(b"16 pixels"),
    "another size": lambda path: swap(path, x_test=np.zeros((2, 3, 8, 8), dtype=np.uint8)),
    "another type": lambda path: swap(path, x_train=np.zeros((4, 3, 16, 16), dtype=np.float32)),
    "too few labels": lambda path: swap(path, y_train=np.array([0, 1])),
    "an unknown class": lambda path: swap(path, y_test=np.array([0, 2])),
    "Python objects": lambda path: swap(path, classes=np.array([1, "b"], dtype=object)),
    "a single number": lambda path: swap(path, x_train=np.array(1)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_made_anew(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: list[str]
) -> None:
    copy = WRITERS["dtd"](tmp_path / "dtd", monkeypatch)
    load_dataset("dtd", tmp_path, 16)
    kept = tmp_path / "dtd" / "cache" / "16-v2.npz"
    whole = kept.read_bytes()
    DAMAGES[damage](kept)
    opened.clear()
    assert_is_copy(load_dataset("dtd", tmp_path, 16), copy, "dtd", 16)
    assert len(opened) == 6
    with np.load(kept) as arrays:
        assert sorted(arrays) == ["classes", "x_test", "x_train", "y_test", "y_train"]
    assert len(kept.read_bytes()) == len(whole)


@contextmanager
def without_the_right_to_write(folder: Path) -> Iterator[None]:
    """All folders under ``folder`` are read-only, and so is this process even if it is root's."""
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    for path in folders:
        path.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        with pytest.raises(PermissionError):
            (folder / "file").touch()
        yield
    finally:
        if root:
            os.seteuid(0)
        for path in folders:
            path.chmod(0o755)


@pytest.mark.parametrize("name", ["dtd", "cifar10"])
def test_a_read_only_root_is_read_without_keeping_anything(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = WRITERS[name](tmp_path / "root" / name, monkeypatch)
    tmp_path.chmod(0o755)
    # The folders above are root's alone: from here a relative path does not pass through them.
    monkeypatch.chdir(tmp_path)
    with without_the_right_to_write(Path("root")):
        for _ in range(2):
            assert_is_copy(load_dataset(name, "root", 16), copy, name, 16)
    assert not list(tmp_path.rglob("cache"))


def test_a_full_disk_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = WRITERS["dtd"](tmp_path / "dtd", monkeypatch)

    def fail(file: object, **arrays: np.ndarray) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", fail)
    assert_is_copy(load_dataset("dtd", tmp_path, 16), copy, "dtd", 16)
    assert not list((tmp_path / "dtd" / "cache").iterdir())
