"""Images from the user's files, and one clear line for each thing that can be wrong with them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mp_lightning.data import load_images
from mp_lightning.errors import ConfigurationError, DataError

RNG = np.random.default_rng(0)


def pixels(count: int = 4, height: int = 6, width: int = 6) -> np.ndarray:
    return RNG.integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def write_archive(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def write_folder(root: Path, *classes: str, count: int = 2, size: int = 6) -> Path:
    for name in classes:
        (root / name).mkdir(parents=True)
        for number, image in enumerate(pixels(count, size, size)):
            Image.fromarray(image).save(root / name / f"{number}.png")
    return root


def refused(path: Path, message: str) -> str:
    with pytest.raises(DataError, match=message) as caught:
        load_images(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_archive_with_test_set_and_names(tmp_path: Path) -> None:
    images = pixels()
    path = write_archive(
        tmp_path / "birds.npz",
        x_train=images,
        y_train=np.array([0, 1, 0, 1]),
        x_test=images[:2],
        y_test=np.array([1, 0]),
        classes=np.array(["owl", "wren"]),
    )
    train, test = load_images(path)
    assert (train.name, train.classes) == ("birds", ("owl", "wren"))
    assert torch.equal(train.images, torch.from_numpy(images).permute(0, 3, 1, 2))
    assert test is not None
    assert test.classes == train.classes
    assert test.labels.tolist() == [1, 0]


def test_archive_without_test_set(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "birds.npz", x_train=pixels(), y_train=np.array([0, 1, 0, 1]))
    assert load_images(path)[1] is None
    assert load_images(path, size=9)[0].image_size == 9


def test_archive_whose_test_set_has_a_class_more_is_refused(tmp_path: Path) -> None:
    arrays = {"x_train": pixels(), "y_train": np.array([0, 1, 0, 1]), "x_test": pixels(), "y_test": np.arange(4)}
    refused(write_archive(tmp_path / "birds.npz", **arrays), r"label 3 of 'birds \(test\)'")


def test_archive_lacking_arrays_names_them_and_those_found(tmp_path: Path) -> None:
    refused(
        write_archive(tmp_path / "a.npz", images=pixels(), y_train=[0]), r"lacks x_train \(found: images, y_train\)"
    )
    half = {"x_train": pixels(), "y_train": np.array([0, 1, 0, 1]), "x_test": pixels()}
    refused(write_archive(tmp_path / "b.npz", **half), "lacks y_test")


def test_archive_with_sizes_that_differ_between_train_and_test_asks_for_one(tmp_path: Path) -> None:
    labels = np.array([0, 1, 0, 1])
    arrays = {"x_train": pixels(), "y_train": labels, "x_test": pixels(height=8, width=8), "y_test": labels}
    path = write_archive(tmp_path / "a.npz", **arrays)
    refused(path, "6 pixels in train and 8 in test: set size=32 .image_size=32 in")
    assert [part.image_size for part in load_images(path, size=7) if part] == [7, 7]


def test_pickled_arrays_are_refused_not_run(tmp_path: Path) -> None:
    class Canary:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    labels = np.array([Canary()] * 4, dtype=object)
    refused(write_archive(tmp_path / "a.npz", x_train=pixels(), y_train=labels), "array 'y_train'.*Python objects")
    assert not (tmp_path / "ran").exists()


def test_damaged_archives_are_refused(tmp_path: Path) -> None:
    whole = write_archive(tmp_path / "whole.npz", x_train=pixels(), y_train=np.array([0, 1, 0, 1])).read_bytes()
    flipped = bytearray(whole)
    flipped[300] ^= 255
    contents = {"cut": whole[: len(whole) // 2], "empty": b"", "text": b"x_train, y_train\n"}
    for name, content in contents.items():
        (tmp_path / f"{name}.npz").write_bytes(content)
        refused(tmp_path / f"{name}.npz", f"{name}.npz' is not a readable .npz archive")
    (tmp_path / "flipped.npz").write_bytes(flipped)
    refused(tmp_path / "flipped.npz", "array 'x_train'.*is damaged")


def test_a_single_array_is_no_archive(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", pixels())
    refused(tmp_path / "a.npy", "single array")


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere")


def test_folder_classes_are_numbered_by_name_and_pixels_kept(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "birds", "wren", "owl", ".hidden")
    (root / "owl" / "notes.txt").write_text("no image")
    train, test = load_images(root)
    assert test is None
    assert (train.name, train.classes, train.labels.tolist()) == ("birds", ("owl", "wren"), [0, 0, 1, 1])
    expected = np.array(Image.open(root / "wren" / "1.png"))
    assert torch.equal(train.images[3], torch.from_numpy(expected).permute(2, 0, 1))


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_folder_with_splits(tmp_path: Path, held_out: str) -> None:
    write_folder(tmp_path / "train", "a", "b", "c")
    write_folder(tmp_path / held_out, "a", "c", count=1)
    train, test = load_images(tmp_path)
    assert len(train) == 6
    assert test is not None
    # The test set lacks class b, and c keeps its number.
    assert (test.classes, test.labels.tolist()) == (("a", "b", "c"), [0, 2])


@pytest.mark.parametrize(
    ("training", "held_out"), [("training", "validation"), ("Train", "Test"), ("train", "valid"), ("TRAIN", "testing")]
)
def test_splits_go_by_several_names(tmp_path: Path, training: str, held_out: str) -> None:
    write_folder(tmp_path / training, "a", "b", "c")
    write_folder(tmp_path / held_out, "a", "b", count=1)
    train, test = load_images(tmp_path)
    assert train.classes == ("a", "b", "c") and len(train) == 6
    assert test is not None and test.labels.tolist() == [0, 1] and test.name.endswith(f"({held_out})")


def test_an_empty_test_set_leaves_its_place_to_the_validation_set(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", "a", "b")
    write_folder(tmp_path / "val", "a", "b", count=1)
    for _ in range(2):
        (_, test) = load_images(tmp_path)
        assert test is not None and test.name.endswith("(val)")
        (tmp_path / "test" / "a").mkdir(parents=True, exist_ok=True)
    (tmp_path / "test" / "a").rmdir()
    write_folder(tmp_path / "test", "a", "b")
    (_, test) = load_images(tmp_path)
    assert test is not None and test.name.endswith("(test)")


def test_splits_are_not_taken_for_classes(tmp_path: Path) -> None:
    write_folder(tmp_path / "flat", "train", "Test")
    assert "(Test, train): put one folder for each class into 'train'" in refused(tmp_path / "flat", "holds splits")
    for name in ("test", "valid"):
        write_folder(tmp_path / "untrained" / name, "a", "b")
    refused(tmp_path / "untrained", r"holds splits .*\(test, valid\)")
    for name in ("fold1", "fold2"):
        write_folder(tmp_path / "folds" / name, "a", "b")
    refused(tmp_path / "folds", r"'fold1' and all other folders of .*/folds' hold the same folders \(a, b\), as splits")
    for name in ("train", "training"):
        write_folder(tmp_path / "both" / name, "a", "b")
    refused(tmp_path / "both", "holds both 'train' and 'training'")


def test_classes_may_hold_folders(tmp_path: Path) -> None:
    """One of the same name in each, as in Tiny ImageNet, or several that differ."""
    for name in ("owl", "wren"):
        write_folder(tmp_path / "one" / name, "images")
    assert load_images(tmp_path / "one")[0].classes == ("owl", "wren")
    write_folder(tmp_path / "two" / "owl", "day", "night")
    write_folder(tmp_path / "two" / "wren", "day")
    assert load_images(tmp_path / "two")[0].classes == ("owl", "wren")


def test_what_macos_packs_beside_the_folders_is_no_class(tmp_path: Path) -> None:
    write_folder(tmp_path, "owl", "wren", "__MACOSX")
    assert load_images(tmp_path)[0].classes == ("owl", "wren")


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    assert load_images(write_folder(tmp_path, "car", "train"))[0].classes == ("car", "train")


def test_a_test_class_unknown_to_train_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", "a", "b")
    write_folder(tmp_path / "test", "a", "z")
    refused(tmp_path, "class 'z'")


def test_images_of_other_formats_are_told_of(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "birds", "a", "b")
    for path in ("a/2.gif", "a/3.GIF", "b/2.jfif", "b/.2.gif"):
        Image.fromarray(pixels(1)[0]).save(root / path, "GIF")
    (root / "a" / "notes.txt").touch()
    with pytest.warns(UserWarning, match=r"3 files of '.*/birds' were passed over.* \(\.gif, \.jfif\)") as told:
        train, _ = load_images(root)
    assert len(train) == 4 and len(told) == 1


def test_folders_without_two_classes_of_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no folders")
    refused(write_folder(tmp_path / "single", "a"), "only the folder 'a'")
    root = write_folder(tmp_path / "hole", "a", "b")
    (root / "c").mkdir()
    refused(root, "hole/c' holds no image files")


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "birds", "a", "b")
    for broken in (b"", b"not an image", (root / "a" / "0.png").read_bytes()[:60]):
        (root / "b" / "1.png").write_bytes(broken)
        refused(root, "birds/b/1.png' is not a readable image")


def test_images_of_16_bits_are_refused_rather_than_cut_off(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "birds", "a", "b")
    Image.fromarray(np.full((6, 6), 40_000, dtype=np.uint16)).save(root / "b" / "1.png")
    refused(root, "b/1.png' has more than 8 bits")


def test_mixed_sizes_ask_for_a_size_and_load_with_one(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "birds", "a", "b")
    Image.fromarray(pixels(1, 10, 7)[0]).save(root / "b" / "1.png")
    assert "10 x 7" in refused(root, r"b/1.png'.*set size=32 .image_size=32 in")
    assert load_images(root, size=5)[0].images.shape == (4, 3, 5, 5)


def test_a_size_of_zero_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="size=0"):
        load_images(write_folder(tmp_path, "a", "b"), size=0)


def test_a_path_may_start_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_archive(tmp_path / "birds.npz", x_train=pixels(), y_train=np.array([0, 1, 0, 1]))
    assert len(load_images("~/birds.npz")[0]) == 4
