"""Images in memory: what they are, where they come from, and how batches are drawn from them."""

from mp_lightning.data.arrays import image_set
from mp_lightning.data.augment import normalize, standard_augment
from mp_lightning.data.catalogue import list_datasets, load_dataset, load_source, may_mirror
from mp_lightning.data.digits import load_digits
from mp_lightning.data.draws import batch_indices
from mp_lightning.data.files import load_images
from mp_lightning.data.images import ImageSet
from mp_lightning.data.progress import Progress
from mp_lightning.data.textures import generate_textures

__all__ = [
    "ImageSet",
    "Progress",
    "batch_indices",
    "generate_textures",
    "image_set",
    "list_datasets",
    "load_dataset",
    "load_digits",
    "load_images",
    "load_source",
    "may_mirror",
    "normalize",
    "standard_augment",
]
