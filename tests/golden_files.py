"""The golden files: exact inputs and outputs, and how they are compared."""

from pathlib import Path

import numpy as np
import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"


def load_golden(name: str) -> dict[str, np.ndarray]:
    """A golden file by name; skips the test where the files are absent."""
    path = SHARED / "golden" / name
    if not path.is_file():
        pytest.skip(
            f"golden file {name} is not here: the files lie in ../shared/golden and are not part of the project"
        )
    with np.load(path) as content:
        return {key: content[key] for key in content.files}


def golden_phi(content: dict[str, np.ndarray], prefix: str):
    """phi out of a golden file, in which the scale's filters have another name."""
    from mp_lightning.perturbation import Phi

    return Phi(
        **{
            field: torch.from_numpy(content[prefix + {"scale_kernels": "stat_kernels"}.get(field, field)].copy())
            for field in Phi._fields
        }
    )


def assert_close_to_golden(actual, expected, what: str, tolerance: float = 1e-5) -> None:
    """max|difference| <= tolerance * max|golden|, as the golden files ask to be compared."""
    expected = torch.as_tensor(expected)
    difference = (torch.as_tensor(actual) - expected).abs().max()
    assert difference <= tolerance * expected.abs().max(), f"{what}: off by {difference} of {expected.abs().max()}"
