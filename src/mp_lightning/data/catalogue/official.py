"""Datasets that torchvision does not read, each from what its authors' archive unpacks to."""

from pathlib import Path

from scipy.io import loadmat  # type: ignore[import-untyped]

from mp_lightning.data.catalogue.contents import Contents, Part


def tiny_imagenet(folder: Path) -> Contents:
    """Tiny ImageNet: 100,000 images to train, 10,000 to validate (used to test), 64 pixels, 200 classes.

    The classes are numbered in the order of ``wnids.txt``. The images to test have no published labels.
    """
    root = folder / "tiny-imagenet-200"
    wnids = (root / "wnids.txt").read_text(encoding="utf-8").split()
    words = dict(line.split("\t", 1) for line in _lines(root / "words.txt"))
    number = {wnid: label for label, wnid in enumerate(wnids)}
    paths, labels = [], []
    for wnid in wnids:
        # The list, not the folder's content: so an image that is missing is noticed.
        for line in _lines(root / "train" / wnid / f"{wnid}_boxes.txt"):
            paths.append(root / "train" / wnid / "images" / line.split("\t")[0])
            labels.append(number[wnid])
    held_out = [line.split("\t")[:2] for line in _lines(root / "val" / "val_annotations.txt")]
    test = Part([root / "val" / "images" / file for file, _ in held_out], [number[wnid] for _, wnid in held_out])
    return Contents(Part(paths, labels), test, [words[wnid] for wnid in wnids])


def cub200_2011(folder: Path) -> Contents:
    """Caltech-UCSD Birds-200-2011: 5,994 and 5,794 images, 200 classes."""
    root = folder / "CUB_200_2011"
    files = _by_number(root / "images.txt")
    labels = {image: int(label) - 1 for image, label in _by_number(root / "image_class_labels.txt").items()}
    to_train = {image: flag == "1" for image, flag in _by_number(root / "train_test_split.txt").items()}
    if not files.keys() == labels.keys() == to_train.keys():
        raise ValueError("images.txt, image_class_labels.txt and train_test_split.txt list different images")
    # Such as '001.Black_footed_Albatross'.
    classes = [_plain(text.split(".", 1)[1]) for text in _by_number(root / "classes.txt").values()]

    def part(train: bool) -> Part:
        chosen = [image for image in files if to_train[image] == train]
        return Part([root / "images" / files[image] for image in chosen], [labels[image] for image in chosen])

    return Contents(part(True), part(False), classes)


def stanford_dogs(folder: Path) -> Contents:
    """Stanford Dogs: 12,000 and 8,580 images, 120 classes."""
    names: dict[int, str] = {}

    def part(file: str) -> Part:
        content = loadmat(folder / file)
        paths = [str(cell.item()) for cell in content["file_list"].ravel()]
        labels = [int(label) - 1 for label in content["labels"].ravel()]
        # Such as 'n02085620-Chihuahua/n02085620_5927.jpg'.
        for path, label in zip(paths, labels, strict=True):
            names[label] = _plain(path.split("/")[0].split("-", 1)[1])
        return Part([folder / "Images" / path for path in paths], labels)

    train, test = part("train_list.mat"), part("test_list.mat")
    return Contents(train, test, [names[label] for label in range(len(names))])


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def _by_number(path: Path) -> dict[int, str]:
    """The lines of a file in which each begins with its number and a space, in the order of the numbers."""
    pairs = (line.split(" ", 1) for line in _lines(path))
    return dict(sorted((int(number), text) for number, text in pairs))


def _plain(name: str) -> str:
    return name.replace("_", " ")
