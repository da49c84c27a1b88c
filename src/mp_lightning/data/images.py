"""A labelled set of images in memory, and ways of cutting a smaller set out of it."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

from mp_lightning.errors import ConfigurationError, DataError


# Compared by identity: == of tensors gives a tensor, not a truth value.
@dataclass(frozen=True, eq=False)
class ImageSet:
    """Square colour images with one label each. Build one from unchecked arrays with :func:`image_set`.

    Attributes:
        name: what messages and reports call the set.
        images: uint8 (N, 3, H, W) with H = W, values 0 to 255.
        labels: int64 (N,), values 0 to K - 1.
        classes: the K names of the classes. A class may have no image, as can happen in a subset.
    """

    name: str
    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Number of classes, K."""
        return len(self.classes)

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return self.images.shape[-1]

    def subset(self, indices: Tensor | Sequence[int], name: str | None = None) -> "ImageSet":
        """The images at ``indices`` in that order, or those of which a mask says so, with the same classes.

        Raises:
            ConfigurationError: a mask is not of one value for each image, or an index is not that of one.
        """
        index = torch.as_tensor(indices)
        if index.dtype == torch.bool:
            if index.shape != self.labels.shape:
                raise ConfigurationError(
                    f"a mask of shape {tuple(index.shape)} for the {len(self)} images of '{self.name}': give one value "
                    "for each image"
                )
            index = index.nonzero().flatten()
        if index.numel() and index.is_floating_point():
            raise ConfigurationError(f"indices of type {index.dtype} for images of '{self.name}': give whole numbers")
        index = index.to(torch.int64)
        beyond = index[(index < -len(self)) | (index >= len(self))]
        if len(beyond):
            raise ConfigurationError(f"'{self.name}' has no image {int(beyond[0])}: choose among 0 to {len(self) - 1}")
        return replace(self, name=name or self.name, images=self.images[index], labels=self.labels[index])

    def select_classes(self, classes: Sequence[int], name: str | None = None) -> "ImageSet":
        """All images of the classes with the given numbers; the k-th of them gets the label k.

        Raises:
            ConfigurationError: fewer than two classes, one named twice, or one that does not exist.
        """
        chosen = [int(number) for number in classes]
        if len(chosen) < 2 or len(set(chosen)) < len(chosen):
            raise ConfigurationError(f"classes {chosen} of '{self.name}' are not at least two different ones")
        unknown = [number for number in chosen if not 0 <= number < self.num_classes]
        if unknown:
            raise ConfigurationError(
                f"'{self.name}' has no class {unknown[0]}: choose among 0 to {self.num_classes - 1}"
            )
        relabel = torch.full((self.num_classes,), -1)
        relabel[chosen] = torch.arange(len(chosen))
        labels = relabel[self.labels]
        kept = labels >= 0
        names = tuple(self.classes[number] for number in chosen)
        return ImageSet(name or self.name, self.images[kept], labels[kept], names)

    def add_to(self, digest: "hashlib._Hash") -> None:
        """Add images and labels to a digest."""
        digest.update(self.images.numpy().data)
        digest.update(self.labels.numpy().data)

    def digests(self) -> list[bytes]:
        """What tells each image from others of its size."""
        return [hashlib.blake2b(image.data, digest_size=16).digest() for image in self.images.contiguous().numpy()]

    def doubles(self) -> int:
        """How many of the images are copies of others, whatever their labels."""
        return len(self) - len(set(self.digests()))

    def on(self, device: torch.device) -> "ImageSet":
        """The same images on a device."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def few_per_class(self, n: int, seed: int) -> tuple["ImageSet", "ImageSet"]:
        """Draw ``n`` images of every class at random.

        Returns:
            The drawn images and the rest (which is empty when nothing is left), both in the order of this set.

        Raises:
            ConfigurationError: ``n`` is no whole number from 1 on.
            DataError: a class has fewer than ``n`` images.
        """
        if isinstance(n, bool) or not isinstance(n, Integral) or n < 1:
            raise ConfigurationError(
                f"{n} images per class of '{self.name}' is out of range: give a whole number, at least 1"
            )
        counts = torch.bincount(self.labels, minlength=self.num_classes)
        short = int(counts.argmin())
        if counts[short] < n:
            raise DataError(
                f"class '{self.classes[short]}' of '{self.name}' has {int(counts[short])} images, not {n}: "
                "ask for fewer per class"
            )
        order = self._shuffled_by_class(seed)
        # The place of each image within its class.
        first = torch.cumsum(counts, 0) - counts
        drawn = torch.arange(len(self)) - first[self.labels[order]] < n
        return self.subset(order[drawn].sort().values), self.subset(order[~drawn].sort().values)

    def halves(self, seed: int) -> tuple["ImageSet", "ImageSet"]:
        """Split at random in two, every class in two equal parts (an odd image goes to either part).

        Returns:
            Two sets without common images, which differ by at most one in size, and in the size of each class.
        """
        order = self._shuffled_by_class(seed)
        return self.subset(order[::2].sort().values), self.subset(order[1::2].sort().values)

    def _shuffled_by_class(self, seed: int) -> Tensor:
        """Indices of all images, int64 (N,): class after class, in random order within each."""
        order = np.random.default_rng(seed % 2**64).permutation(len(self))
        return torch.from_numpy(order[np.argsort(self.labels.numpy()[order], kind="stable")])
