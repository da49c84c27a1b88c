"""The datasets known by name: where their files are published, how they are read, what may be done to them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mp_lightning.data.catalogue import official, torchvision_sets
from mp_lightning.data.catalogue.contents import Contents, Part
from mp_lightning.data.catalogue.downloads import Download
from mp_lightning.data.digits import load_digits

_TEST_DIGITS = 36  # of each: a fifth


@dataclass(frozen=True)
class Dataset:
    """What is known about one dataset.

    Attributes:
        read: reads the dataset from its folder, which holds what the downloads give.
        downloads: the published files.
        inside: where in the dataset's folder the published files and what they give belong; torchvision looks there.
        by_hand: the files and folders of a dataset that is not published any more.
        cached: whether reading is slow, so that the images are kept once they are resized.
        mirrors: whether an image and its mirror image are of the same class.
    """

    read: Callable[[Path], Contents]
    downloads: tuple[Download, ...] = ()
    inside: str = ""
    by_hand: tuple[str, ...] = ()
    cached: bool = True
    mirrors: bool = True


def _digits(folder: Path) -> Contents:
    """The digits of scikit-learn: 1,437 and 360 images of 8 pixels, 10 classes. They come without a file."""
    test, train = load_digits(size=8).few_per_class(_TEST_DIGITS, seed=0)
    return Contents(Part(train.images, train.labels), Part(test.images, test.labels), train.classes)


def _used_as_it_is(url: str, md5: str) -> Download:
    return Download(url, md5, (url.rsplit("/", 1)[1],))


_CIFAR = "https://www.cs.toronto.edu/~kriz/"
_SVHN = "http://ufldl.stanford.edu/housenumbers/"
_FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
_OXFORD = "https://www.robots.ox.ac.uk/~vgg/data/"
_DOGS = "http://vision.stanford.edu/aditya86/ImageNetDogs/"

DATASETS = {
    "cifar10": Dataset(
        torchvision_sets.cifar10,
        (Download(f"{_CIFAR}cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a", ("cifar-10-batches-py",)),),
        cached=False,
    ),
    "cifar100": Dataset(
        torchvision_sets.cifar100,
        (Download(f"{_CIFAR}cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85", ("cifar-100-python",)),),
        cached=False,
    ),
    "svhn": Dataset(
        torchvision_sets.svhn,
        (
            _used_as_it_is(f"{_SVHN}train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373"),
            _used_as_it_is(f"{_SVHN}test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3"),
        ),
        cached=False,
        mirrors=False,
    ),
    # Cached, although torchvision holds arrays: before each reading it computes the checksums of 3 GB.
    "stl10": Dataset(
        torchvision_sets.stl10,
        (
            Download(
                "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz",
                "91f7769df0f17e558f3565bffb0c7dfb",
                ("stl10_binary",),
            ),
        ),
    ),
    "fashion_mnist": Dataset(
        torchvision_sets.fashion_mnist,
        tuple(
            Download(f"{_FASHION}{file}.gz", md5, (file,))
            for file, md5 in (
                ("train-images-idx3-ubyte", "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
                ("train-labels-idx1-ubyte", "25c81989df183df01b3e8a0aad5dffbe"),
                ("t10k-images-idx3-ubyte", "bef4ecab320f06d8554ea6380940ec79"),
                ("t10k-labels-idx1-ubyte", "bb300cfdad3c16e7a12a480ee83cd310"),
            )
        ),
        inside="FashionMNIST/raw",
        cached=False,
    ),
    "fgvc_aircraft": Dataset(
        torchvision_sets.fgvc_aircraft,
        (
            Download(
                f"{_OXFORD}fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz",
                "d4acdd33327262359767eeaa97a4f732",
                ("fgvc-aircraft-2013b",),
            ),
        ),
    ),
    "stanford_cars": Dataset(
        torchvision_sets.stanford_cars,
        by_hand=(
            *("cars_train", "cars_test", "cars_test_annos_withlabels.mat"),
            *("devkit/cars_train_annos.mat", "devkit/cars_meta.mat"),
        ),
    ),
    "dtd": Dataset(
        torchvision_sets.dtd,
        (Download(f"{_OXFORD}dtd/download/dtd-r1.0.1.tar.gz", "fff73e5086ae6bdbea199a49dfb8a4c1", ("dtd",)),),
    ),
    "flowers102": Dataset(
        torchvision_sets.flowers102,
        (
            Download(f"{_OXFORD}flowers/102/102flowers.tgz", "52808999861908f626f3c1f4e79d11fa", ("jpg",)),
            _used_as_it_is(f"{_OXFORD}flowers/102/imagelabels.mat", "e0620be6f572b9609742df49c70aed4d"),
            _used_as_it_is(f"{_OXFORD}flowers/102/setid.mat", "a5357ecc9cb78c4bef273ce3793fc85c"),
        ),
        inside="flowers-102",
    ),
    "food101": Dataset(
        torchvision_sets.food101,
        (
            Download(
                "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz", "85eeb15f3717b99a5da872d97d918f87", ("food-101",)
            ),
        ),
    ),
    "tiny_imagenet": Dataset(
        official.tiny_imagenet,
        (
            Download(
                "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
                "90528d7ca1a48142e341f4ef8d21d0de",
                ("tiny-imagenet-200",),
            ),
        ),
    ),
    "cub200_2011": Dataset(
        official.cub200_2011,
        (
            Download(
                "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
                "97eceeb196236b17998738112f37df78",
                ("CUB_200_2011",),
            ),
        ),
    ),
    "stanford_dogs": Dataset(
        official.stanford_dogs,
        (
            Download(f"{_DOGS}images.tar", "1bb1f2a596ae7057f99d7d75860002ef", ("Images",)),
            Download(f"{_DOGS}lists.tar", "edbb9f16854ec66506b5f09b583e0656", ("train_list.mat", "test_list.mat")),
        ),
    ),
    "digits": Dataset(_digits, cached=False, mirrors=False),
}
