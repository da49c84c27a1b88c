"""Datasets that torchvision reads, each from a folder laid out as torchvision lays it out.

The batches of CIFAR are pickles, which torchvision unpickles itself, after it has compared the checksum of every one
with that of the published file (``CIFAR10.__init__`` and ``_load_meta``): no other pickle is ever read.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchvision import datasets

from mp_lightning.data.catalogue.contents import Contents, Part


def cifar10(folder: Path) -> Contents:
    """CIFAR-10: 50,000 and 10,000 images of 32 pixels, 10 classes."""
    return _cifar(datasets.CIFAR10, folder)


def cifar100(folder: Path) -> Contents:
    """CIFAR-100: 50,000 and 10,000 images of 32 pixels, 100 classes."""
    return _cifar(datasets.CIFAR100, folder)


def _cifar(kind: Callable[..., Any], folder: Path) -> Contents:
    train, test = kind(folder, train=True), kind(folder, train=False)
    return Contents(Part(train.data, train.targets), Part(test.data, test.targets), train.classes)


def svhn(folder: Path) -> Contents:
    """Street view house numbers: 73,257 and 26,032 images of 32 pixels, 10 digits; without the extra images."""
    train, test = datasets.SVHN(folder, "train"), datasets.SVHN(folder, "test")
    return Contents(Part(train.data, train.labels), Part(test.data, test.labels), [str(digit) for digit in range(10)])


def stl10(folder: Path) -> Contents:
    """STL-10: 5,000 and 8,000 images of 96 pixels, 10 classes; without the images that have no label."""
    train, test = datasets.STL10(folder, "train"), datasets.STL10(folder, "test")
    return Contents(Part(train.data, train.labels), Part(test.data, test.labels), train.classes)


def fashion_mnist(folder: Path) -> Contents:
    """Fashion-MNIST: 60,000 and 10,000 grey images of 28 pixels, 10 classes."""
    train, test = datasets.FashionMNIST(folder, train=True), datasets.FashionMNIST(folder, train=False)
    return Contents(Part(train.data, train.targets), Part(test.data, test.targets), train.classes)


def fgvc_aircraft(folder: Path) -> Contents:
    """FGVC-Aircraft: 6,667 images to train and to validate, 3,333 to test; 100 variants."""
    train, test = (datasets.FGVCAircraft(folder, split, "variant", loader=Path) for split in ("trainval", "test"))
    return Contents(_files(train), _files(test), train.classes)


def stanford_cars(folder: Path) -> Contents:
    """Stanford Cars: 8,144 and 8,041 images, 196 classes. torchvision itself appends the folder's name."""
    train, test = (datasets.StanfordCars(folder.parent, split, loader=Path) for split in ("train", "test"))
    return Contents(_files(train), _files(test), train.classes)


def dtd(folder: Path) -> Contents:
    """Describable textures, first partition: 1,880 images to train, as many to validate, as many to test; 47 classes.

    Those to validate are used to train as well. torchvision itself appends the folder's name.
    """
    train, val, test = (datasets.DTD(folder.parent, split, loader=Path) for split in ("train", "val", "test"))
    return Contents(_files(train, val), _files(test), train.classes)


def flowers102(folder: Path) -> Contents:
    """Oxford flowers: 1,020 images to train, 1,020 to validate (used to train as well), 6,149 to test; 102 classes."""
    train, val, test = (datasets.Flowers102(folder, split, loader=Path) for split in ("train", "val", "test"))
    return Contents(_files(train, val), _files(test), train.classes)


def food101(folder: Path) -> Contents:
    """Food-101: 75,750 and 25,250 images, 101 classes."""
    train, test = (datasets.Food101(folder, split, loader=Path) for split in ("train", "test"))
    return Contents(_files(train), _files(test), train.classes)


def _files(*sets: Any) -> Part:
    """The files and labels of sets whose loader gives the path instead of the image."""
    paths, labels = zip(*(images[index] for images in sets for index in range(len(images))), strict=True)
    return Part(paths, labels)
