"""Real handwritten digits that need no download: they come inside scikit-learn."""

import numpy as np
from sklearn import datasets

from mp_lightning.data.arrays import image_set
from mp_lightning.data.images import ImageSet


def load_digits(size: int = 32) -> ImageSet:
    """The 1,797 digits of scikit-learn (8x8 pixels, 10 classes), grey repeated to colour, enlarged.

    Args:
        size: side in pixels; 32 because four poolings leave nothing of 8 pixels.

    Raises:
        ConfigurationError: the size is below 1.
    """
    digits = datasets.load_digits()
    # The values are counts from 0 to 16.
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return image_set("digits", grey, digits.target, [str(name) for name in digits.target_names], size=size)
