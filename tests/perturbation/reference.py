"""The perturbation in float64, written from the formulas with loops and nothing clever: what the library must equal."""

import numpy as np


def filter3(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Cross-correlation of (H, W) with (3, 3), zeros outside."""
    height, width = image.shape
    padded = np.pad(image, 1)
    return sum(kernel[i, j] * padded[i : i + height, j : j + width] for i in range(3) for j in range(3))


def equivariant(x: np.ndarray, own: np.ndarray, everyone: np.ndarray) -> np.ndarray:
    out = np.empty_like(x)
    for b in range(x.shape[0]):
        shared = filter3(x[b].mean(axis=0), everyone)
        for c in range(x.shape[1]):
            out[b, c] = filter3(x[b, c], own) + shared
    return out


def location(x: np.ndarray, phi: dict[str, np.ndarray]) -> np.ndarray:
    hidden = np.maximum(equivariant(x, phi["op1_identity"], phi["op1_all"]), 0)
    return equivariant(hidden, phi["op2_identity"], phi["op2_all"])


def responses(x: np.ndarray, phi: dict[str, np.ndarray]) -> np.ndarray:
    out = np.empty((*x.shape[:2], 4))
    for b in range(x.shape[0]):
        for c in range(x.shape[1]):
            for k in range(4):
                out[b, c, k] = np.maximum(filter3(x[b, c], phi["scale_kernels"][k]), 0).mean()
    return out


def scale(mean: np.ndarray, var: np.ndarray, phi: dict[str, np.ndarray], channels: float, size: float) -> np.ndarray:
    out = np.empty(len(mean))
    for c in range(len(mean)):
        vector = np.concatenate([mean[c], var[c], [channels, size]])
        out[c] = 1 / (1 + np.exp(-phi["scale_weight"] @ vector))
    return out


def perturb(x, eps, phi, channel_norm, spatial_norm, coeff, clip) -> np.ndarray:
    """The output in training."""
    z = np.logaddexp(0, location(x, phi) + eps)
    f = responses(x, phi)
    s = scale(f.mean(axis=0), f.var(axis=0, ddof=1), phi, x.shape[1] / channel_norm, x.shape[2] / spatial_norm)
    return np.minimum(x * (1 + coeff * (s[None, :, None, None] * z - 1)), clip)
