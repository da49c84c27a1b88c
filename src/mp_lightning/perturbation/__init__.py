"""Floor 1: what is the perturbation? The mathematics, the net, its noise, its files, and what each one obeys."""

from mp_lightning.perturbation.catalogue import PhiDescription, describe_phi
from mp_lightning.perturbation.files import (
    NamedPhi,
    check_following,
    check_fraction,
    list_phi,
    load_phi,
    phi_digest,
    save_phi,
)
from mp_lightning.perturbation.net import MetaPerturb
from mp_lightning.perturbation.noise import NoiseKey, NoisePer, check_noise_per, gaussian_noise
from mp_lightning.perturbation.phi import Phi, initial_phi
from mp_lightning.perturbation.protocol import FusedPerturbation, Norms, Perturbation, Perturbed, Statistics

__all__ = [
    "FusedPerturbation",
    "MetaPerturb",
    "NamedPhi",
    "NoiseKey",
    "NoisePer",
    "Norms",
    "Perturbation",
    "Perturbed",
    "Phi",
    "PhiDescription",
    "Statistics",
    "check_following",
    "check_fraction",
    "check_noise_per",
    "describe_phi",
    "gaussian_noise",
    "initial_phi",
    "list_phi",
    "load_phi",
    "phi_digest",
    "save_phi",
]
