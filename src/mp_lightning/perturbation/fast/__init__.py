"""The fast path: the same function as :mod:`mp_lightning.perturbation.mathematics`, for the price of a dropout."""

from mp_lightning.perturbation.fast.backends import available
from mp_lightning.perturbation.fast.call import Call, Forward, Numbers
from mp_lightning.perturbation.fast.operator import perturb, record

__all__ = ["Call", "Forward", "Numbers", "available", "perturb", "record"]
