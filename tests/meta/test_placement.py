"""Tasks on ranks: every rank works, none much longer than it must."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mp_lightning.errors import ConfigurationError
from mp_lightning.meta.placement import place


@st.composite
def costs_and_ranks(draw: st.DrawFn, most: int = 12) -> tuple[list[int], int]:
    costs = draw(st.lists(st.integers(0, 50), min_size=1, max_size=most))
    return costs, draw(st.integers(1, len(costs)))


def longest(costs: list[int], placed: tuple[int, ...] | list[int]) -> int:
    """What the busiest rank has to do."""
    return max(sum(c for c, r in zip(costs, placed, strict=True) if r == rank) for rank in set(placed))


@given(costs_and_ranks())
def test_every_task_has_a_rank_and_every_rank_a_task(case: tuple[list[int], int]) -> None:
    costs, ranks = case
    placed = place(costs, ranks)
    assert len(placed) == len(costs)
    assert set(placed) == set(range(ranks))


@settings(deadline=None)  # the search for the best placement is slow on a busy machine
@given(costs_and_ranks(most=6))
def test_the_busiest_rank_is_within_a_third_of_the_best_placement(case: tuple[list[int], int]) -> None:
    costs, ranks = case
    best = min(longest(costs, placed) for placed in product(range(ranks), repeat=len(costs)))
    assert 3 * ranks * longest(costs, place(costs, ranks)) <= (4 * ranks - 1) * best


@given(st.floats(0, 1e12), st.integers(1, 40), st.integers(1, 40))
def test_tasks_of_one_cost_are_dealt_out_in_turn(cost: float, tasks: int, ranks: int) -> None:
    ranks = min(tasks, ranks)
    assert place([cost] * tasks, ranks) == [task % ranks for task in range(tasks)]


def test_the_longest_task_has_a_rank_of_its_own() -> None:
    assert place([1, 1, 10, 1, 1], 2) == [1, 1, 0, 1, 1]


def test_a_task_that_costs_nothing_goes_to_a_rank_that_has_none() -> None:
    assert place([0.0, 0.0, 3.0], 3) == [1, 2, 0]


def test_fewer_tasks_than_ranks_are_refused() -> None:
    with pytest.raises(
        ConfigurationError, match=r"trainer\.devices: 2 tasks cannot be shared by 4 devices: use at most 2"
    ):
        place([1.0, 2.0], 4)
