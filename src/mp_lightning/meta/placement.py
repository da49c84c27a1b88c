"""Which rank works on which task."""

from collections.abc import Sequence

from mp_lightning.errors import ConfigurationError


def place(costs: Sequence[float], ranks: int) -> list[int]:
    """The rank of each task: the longest tasks first, each to the rank that has least to do (Graham 1969).

    The busiest rank gets at most 4/3 of what it would get at best. Every rank gets a task. Of equally busy ranks the
    one with fewer tasks, then the first, is taken; of equal tasks the first goes first. So tasks of one cost are dealt
    out in turn, and the same costs are always placed in the same way.

    Args:
        costs: what one step of each task costs, in any unit, none of them negative.
        ranks: how many ranks there are, at least one.

    Raises:
        ConfigurationError: there are fewer tasks than ranks.
    """
    if len(costs) < ranks:
        raise ConfigurationError(
            f"trainer.devices: {len(costs)} tasks cannot be shared by {ranks} devices: use at most {len(costs)} "
            "devices, or more tasks"
        )
    loads = [0.0] * ranks
    counts = [0] * ranks
    placed = [0] * len(costs)
    for task in sorted(range(len(costs)), key=lambda task: -costs[task]):
        rank = min(range(ranks), key=lambda rank: (loads[rank], counts[rank]))
        placed[task] = rank
        loads[rank] += costs[task]
        counts[rank] += 1
    return placed
