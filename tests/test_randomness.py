"""Randomness that follows from what it is for."""

import random

import numpy as np
import pytest
import torch

from mp_lightning.randomness import derived_seed, random_state, seed_all


def test_derived_seed_is_the_same_in_every_process() -> None:
    assert derived_seed(3, "set-a", "theta") == 4807587424409711
    assert derived_seed(3, "set-a", "theta") != derived_seed(3, "set-b", "theta") != derived_seed(4, "set-b", "theta")
    assert 0 <= derived_seed("x") < 2**63


def draw() -> list[float]:
    """One number of each global generator that a network may draw from."""
    return [float(torch.rand(1)), random.random(), float(np.random.rand())]


def test_inside_the_state_draws_follow_from_the_seed_and_outside_nothing_is_seen_of_them() -> None:
    seed_all(5)
    expected = draw()
    seed_all(5)
    drawn = []
    for seed in (1, 1, derived_seed("large")):
        with random_state(seed, torch.device("cpu")):
            drawn.append(draw())
    assert drawn[0] == drawn[1] and not set(drawn[1]) & set(drawn[2])
    assert draw() == expected


def test_an_error_inside_puts_the_generators_back() -> None:
    seed_all(5)
    expected = draw()
    seed_all(5)
    with pytest.raises(ZeroDivisionError), random_state(1, torch.device("cpu")):
        draw()
        1 / 0  # noqa: B018
    assert draw() == expected
