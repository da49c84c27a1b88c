"""Randomness that follows from what it is for."""

import pytest
import torch

from mp_lightning.randomness import derived_seed, random_state


def test_derived_seed_is_the_same_in_every_process() -> None:
    assert derived_seed(3, "set-a", "theta") == 4807587424409711
    assert derived_seed(3, "set-a", "theta") != derived_seed(3, "set-b", "theta") != derived_seed(4, "set-b", "theta")
    assert 0 <= derived_seed("x") < 2**63


def test_inside_the_state_draws_follow_from_the_seed_and_outside_nothing_is_seen_of_them() -> None:
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    drawn = []
    for seed in (1, 1, 2):
        with random_state(seed, torch.device("cpu")):
            drawn.append(torch.rand(3))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])
    assert torch.equal(torch.rand(2), expected)


def test_an_error_inside_puts_the_generator_back() -> None:
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), random_state(1, torch.device("cpu")):
        torch.rand(1)
        1 / 0  # noqa: B018
    assert torch.equal(torch.get_rng_state(), before)
