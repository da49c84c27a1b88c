"""Tiny copies of the published datasets, each in exactly the format of the real one.

Every image has one colour, from which the tests know it again: the first of a part 70, the next 90 and so on, and those
of the test part 10 more.
"""

import json
import pickle
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torchvision import datasets
from torchvision.datasets.utils import calculate_md5

from mp_lightning.data import ImageSet


@dataclass(frozen=True)
class Copy:
    """The labels of both parts, in the order in which they must be loaded, and the names of the classes."""

    train: Sequence[int]
    test: Sequence[int]
    classes: Sequence[str]


def greys(labels: Sequence[int], test: bool = False) -> list[int]:
    """The colours of a part with these labels."""
    return [70 + 20 * place + 10 * test for place in range(len(labels))]


def write_image(path: Path, grey: int, height: int = 30, width: int = 40) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), grey, dtype=np.uint8)).save(path, "JPEG")


def write_lines(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def cells(values: Sequence[str]) -> np.ndarray:
    """Texts as MATLAB's cell array (N, 1)."""
    array = np.empty((len(values), 1), dtype=object)
    array[:, 0] = values
    return array


def write_pickle(path: Path, content: dict[str, Any]) -> list[str]:
    """The file's name and checksum."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=2))
    return [path.name, calculate_md5(path)]


def rows(values: Sequence[int]) -> np.ndarray:
    """Images of CIFAR: one row of 3 * 32 * 32 bytes each."""
    return np.repeat(np.array(values, dtype=np.uint8)[:, None], 3072, axis=1)


def cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> Copy:
    folder = root / "cifar-10-batches-py"
    copy = Copy([0, 1, 0, 2, 1], [1, 0, 2], ["airplane", "automobile", "bird"])
    batches = [
        write_pickle(folder / f"data_batch_{number}", {"data": rows([grey]), "labels": [label], "batch_label": "train"})
        for number, (label, grey) in enumerate(zip(copy.train, greys(copy.train), strict=True), 1)
    ]
    test = write_pickle(folder / "test_batch", {"data": rows(greys(copy.test, test=True)), "labels": copy.test})
    name, md5 = write_pickle(folder / "batches.meta", {"label_names": copy.classes, "num_vis": 3072})
    monkeypatch.setattr(datasets.CIFAR10, "train_list", batches)
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [test])
    monkeypatch.setattr(datasets.CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})
    return copy


def cifar100(root: Path, monkeypatch: pytest.MonkeyPatch) -> Copy:
    folder = root / "cifar-100-python"
    copy = Copy([2, 1, 0], [0, 1], ["apple", "aquarium_fish", "baby"])
    for part, labels in (("train", copy.train), ("test", copy.test)):
        content = {
            "data": rows(greys(labels, part == "test")),
            "fine_labels": labels,
            "coarse_labels": [0] * len(labels),
        }
        monkeypatch.setattr(datasets.CIFAR100, f"{part}_list", [write_pickle(folder / part, content)])
    name, md5 = write_pickle(folder / "meta", {"fine_label_names": copy.classes, "coarse_label_names": ["any"]})
    monkeypatch.setattr(datasets.CIFAR100, "meta", {"filename": name, "key": "fine_label_names", "md5": md5})
    return copy


def svhn(root: Path, monkeypatch: pytest.MonkeyPatch) -> Copy:
    copy = Copy([1, 0, 9], [0, 5], [str(digit) for digit in range(10)])
    root.mkdir(parents=True, exist_ok=True)
    table = dict(datasets.SVHN.split_list)
    for part, labels in (("train", copy.train), ("test", copy.test)):
        path = root / f"{part}_32x32.mat"
        images = np.broadcast_to(np.array(greys(labels, part == "test"), dtype=np.uint8), (32, 32, 3, len(labels)))
        # The published files call the digit 0 '10'.
        savemat(path, {"X": images, "y": np.array([[label or 10] for label in labels], dtype=np.uint8)})
        table[part] = [table[part][0], path.name, calculate_md5(path)]
    monkeypatch.setattr(datasets.SVHN, "split_list", table)
    return copy


def stl10(root: Path, monkeypatch: pytest.MonkeyPatch) -> Copy:
    folder = root / "stl10_binary"
    copy = Copy([1, 0, 1], [0, 2], ["airplane", "bird", "car"])
    write_lines(folder / "class_names.txt", copy.classes)
    write_lines(folder / "fold_indices.txt", ["0 1 "])
    listed: dict[str, list[list[str]]] = {"train": [], "test": []}
    for part, labels in (("train", copy.train), ("test", copy.test)):
        images = np.repeat(np.array(greys(labels, part == "test"), dtype=np.uint8), 3 * 96 * 96)
        (folder / f"{part}_X.bin").write_bytes(images.tobytes())
        (folder / f"{part}_y.bin").write_bytes(bytes(label + 1 for label in labels))
        listed[part] = [[file, calculate_md5(folder / file)] for file in (f"{part}_X.bin", f"{part}_y.bin")]
    (folder / "unlabeled_X.bin").write_bytes(bytes(3 * 96 * 96))
    listed["train"].append(["unlabeled_X.bin", calculate_md5(folder / "unlabeled_X.bin")])
    monkeypatch.setattr(datasets.STL10, "train_list", listed["train"])
    monkeypatch.setattr(datasets.STL10, "test_list", listed["test"])
    return copy


def fashion_mnist(root: Path, monkeypatch: pytest.MonkeyPatch) -> Copy:
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    copy = Copy([9, 0, 1], [3, 4], datasets.FashionMNIST.classes)
    for part, labels in (("train", copy.train), ("t10k", copy.test)):
        header = struct.pack(">IIII", 0x803, len(labels), 28, 28)
        images = np.repeat(np.array(greys(labels, part == "t10k"), dtype=np.uint8), 28 * 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, len(labels)) + bytes(labels))
    return copy


def fgvc_aircraft(root: Path, monkeypatch: pytest.MonkeyPatch) -> Copy:
    data = root / "fgvc-aircraft-2013b" / "data"
    copy = Copy([0, 2, 1], [2, 0], ["707-320", "Cessna 172", "F/A-18"])
    write_lines(data / "variants.txt", copy.classes)
    for part, labels in (("trainval", copy.train), ("test", copy.test)):
        lines = []
        for label, grey in zip(labels, greys(labels, part == "test"), strict=True):
            write_image(data / "images" / f"{grey:07d}.jpg", grey)
            lines.append(f"{grey:07d} {copy.classes[label]}")
        write_lines(data / f"images_variant_{part}.txt", lines)
    return copy


def stanford_cars(root: Path, monkeypatch: pytest.MonkeyPatch) -> Copy:
    copy = Copy([0, 1, 1], [1, 0], ["AM General Hummer SUV 2000", "Acura RL Sedan 2012"])
    (root / "devkit").mkdir(parents=True)
    savemat(root / "devkit" / "cars_meta.mat", {"class_names": cells(copy.classes).T})
    fields = [(name, object) for name in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")]
    for part, labels, file in (
        ("train", copy.train, "devkit/cars_train_annos.mat"),
        ("test", copy.test, "cars_test_annos_withlabels.mat"),
    ):
        entries = []
        for place, (label, grey) in enumerate(zip(labels, greys(labels, part == "test"), strict=True), 1):
            write_image(root / f"cars_{part}" / f"{place:05d}.jpg", grey)
            entries.append((1, 2, 30, 20, np.uint8(label + 1), f"{place:05d}.jpg"))
        savemat(root / file, {"annotations": np.array([entries], dtype=fields)})
    return copy


def dtd(root: Path, monkeypatch: pytest.MonkeyPatch) -> Copy:
    folder = root / "dtd"
    # Of the four to train, two come from the part to train and two from that to validate.
    copy = Copy([0, 1, 1, 0], [1, 0], ["banded", "zigzagged"])
    train, test = greys(copy.train), greys(copy.test, test=True)
    parts = {"train": train[:2], "val": train[2:], "test": test}
    label_of = dict(zip([*train, *test], [*copy.train, *copy.test], strict=True))
    for part, values in parts.items():
        names = [f"{copy.classes[label_of[grey]]}/{grey:04d}.jpg" for grey in values]
        write_lines(folder / "labels" / f"{part}1.txt", names)
        for name, grey in zip(names, values, strict=True):
            write_image(folder / "images" / name, grey)
    return copy


def flowers102(root: Path, monkeypatch: pytest.MonkeyPatch) -> Copy:
    folder = root / "flowers-102"
    copy = Copy([0, 101, 5, 0], [101, 7], datasets.Flowers102.classes)
    values = [*greys(copy.train), *greys(copy.test, test=True)]
    for number, grey in enumerate(values, 1):
        write_image(folder / "jpg" / f"image_{number:05d}.jpg", grey)
    savemat(folder / "imagelabels.mat", {"labels": np.array([[*copy.train, *copy.test]], dtype=np.uint8) + 1})
    ids = {"trnid": [1, 2], "valid": [3, 4], "tstid": [5, 6]}
    savemat(folder / "setid.mat", {name: np.array([numbers], dtype=np.uint16) for name, numbers in ids.items()})
    table = dict(datasets.Flowers102._file_dict)
    for key, file in (("label", "imagelabels.mat"), ("setid", "setid.mat")):
        table[key] = (file, calculate_md5(folder / file))
    monkeypatch.setattr(datasets.Flowers102, "_file_dict", table)
    return copy


def food101(root: Path, monkeypatch: pytest.MonkeyPatch) -> Copy:
    folder = root / "food-101"
    # The lists go through class after class.
    copy = Copy([0, 0, 1], [0, 1], ["apple_pie", "waffles"])
    for part, labels in (("train", copy.train), ("test", copy.test)):
        listed: dict[str, list[str]] = {}
        for label, grey in zip(labels, greys(labels, part == "test"), strict=True):
            name = f"{copy.classes[label]}/{grey}"
            listed.setdefault(copy.classes[label], []).append(name)
            write_image(folder / "images" / f"{name}.jpg", grey)
        write_lines(folder / "meta" / f"{part}.json", [json.dumps(listed)])
    return copy


def tiny_imagenet(root: Path, monkeypatch: pytest.MonkeyPatch) -> Copy:
    folder = root / "tiny-imagenet-200"
    # Numbered as in wnids.txt, not by name.
    wnids = ["n02124075", "n01443537"]
    copy = Copy([0, 0, 1], [1, 0], ["Egyptian cat", "goldfish, Carassius auratus"])
    write_lines(folder / "wnids.txt", wnids)
    write_lines(
        folder / "words.txt",
        ["n00001740\tentity", "n01443537\tgoldfish, Carassius auratus", "n02124075\tEgyptian cat"],
    )
    boxes: dict[str, list[str]] = {wnid: [] for wnid in wnids}
    for label, grey in zip(copy.train, greys(copy.train), strict=True):
        wnid = wnids[label]
        file = f"{wnid}_{grey}.JPEG"
        write_image(folder / "train" / wnid / "images" / file, grey, 64, 64)
        boxes[wnid].append(f"{file}\t0\t10\t63\t58")
    for wnid, lines in boxes.items():
        write_lines(folder / "train" / wnid / f"{wnid}_boxes.txt", lines)
    annotations = []
    for place, (label, grey) in enumerate(zip(copy.test, greys(copy.test, test=True), strict=True)):
        write_image(folder / "val" / "images" / f"val_{place}.JPEG", grey, 64, 64)
        annotations.append(f"val_{place}.JPEG\t{wnids[label]}\t0\t32\t44\t62")
    write_lines(folder / "val" / "val_annotations.txt", annotations)
    write_image(folder / "test" / "images" / "test_0.JPEG", 0, 64, 64)
    return copy


def cub200_2011(root: Path, monkeypatch: pytest.MonkeyPatch) -> Copy:
    folder = root / "CUB_200_2011"
    copy = Copy([0, 0, 1], [0, 1], ["Black footed Albatross", "Laysan Albatross"])
    names = ["001.Black_footed_Albatross", "002.Laysan_Albatross"]
    # Images are numbered class after class, those to train and to test mixed.
    images = sorted(
        (label, test, grey)
        for test, labels in ((False, copy.train), (True, copy.test))
        for label, grey in zip(labels, greys(labels, test), strict=True)
    )
    files = [f"{names[label]}/{names[label][4:]}_{grey:04d}.jpg" for label, _, grey in images]
    for file, (_, _, grey) in zip(files, images, strict=True):
        write_image(folder / "images" / file, grey)
    write_lines(folder / "classes.txt", (f"{number} {name}" for number, name in enumerate(names, 1)))
    write_lines(folder / "images.txt", (f"{number} {file}" for number, file in enumerate(files, 1)))
    write_lines(
        folder / "image_class_labels.txt", (f"{number} {label + 1}" for number, (label, _, _) in enumerate(images, 1))
    )
    write_lines(
        folder / "train_test_split.txt", (f"{number} {int(not test)}" for number, (_, test, _) in enumerate(images, 1))
    )
    return copy


def stanford_dogs(root: Path, monkeypatch: pytest.MonkeyPatch) -> Copy:
    copy = Copy([1, 0, 1], [0, 1], ["Chihuahua", "flat-coated retriever"])
    folders = ["n02085620-Chihuahua", "n02099267-flat-coated_retriever"]
    for part, labels in (("train", copy.train), ("test", copy.test)):
        files = [
            f"{folders[label]}/{folders[label][:9]}_{grey}.jpg"
            for label, grey in zip(labels, greys(labels, part == "test"), strict=True)
        ]
        for file, grey in zip(files, greys(labels, part == "test"), strict=True):
            write_image(root / "Images" / file, grey)
        content = {
            "file_list": cells(files),
            "annotation_list": cells([file.removesuffix(".jpg") for file in files]),
            "labels": np.array([[label + 1] for label in labels], dtype=np.uint8),
        }
        savemat(root / f"{part}_list.mat", content)
    return copy


Writer = Callable[[Path, pytest.MonkeyPatch], Copy]
# Each writes into the dataset's own folder, and gives torchvision the checksums of the copy.
WRITERS: dict[str, Writer] = {
    writer.__name__: writer
    for writer in (
        *(cifar10, cifar100, svhn, stl10, fashion_mnist, fgvc_aircraft, stanford_cars, dtd, flowers102, food101),
        *(tiny_imagenet, cub200_2011, stanford_dogs),
    )
}


def assert_is(images: ImageSet, name: str, labels: list[int], colours: list[int], size: int) -> None:
    """The set has this name, these labels, and images of these colours in this order (JPEG changes them a little)."""
    assert images.name == name
    assert images.images.dtype == torch.uint8
    assert images.images.shape == (len(labels), 3, size, size)
    assert images.labels.tolist() == labels
    assert (images.images.int() - torch.tensor(colours).view(-1, 1, 1, 1)).abs().max() <= 3


def assert_is_copy(loaded: tuple[ImageSet, ImageSet], copy: Copy, name: str, size: int) -> None:
    train, test = loaded
    assert_is(train, name, list(copy.train), greys(copy.train), size)
    assert_is(test, f"{name} (test)", list(copy.test), greys(copy.test, test=True), size)
    assert train.classes == test.classes == tuple(copy.classes)
