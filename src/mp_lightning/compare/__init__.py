"""Floor 4, does it help? Arms side by side on one target, with intervals."""

from mp_lightning.compare.api import compare
from mp_lightning.compare.arms import Arm
from mp_lightning.compare.conclusion import Comparison

__all__ = ["Arm", "Comparison", "compare"]
