"""How far long work on images has come: told to a function of the caller, who decides how to show it."""

from collections.abc import Callable

# Called with what is being done, how many parts of it are done, and how many there are.
Progress = Callable[[str, int, int], None]


def no_progress(what: str, done: int, total: int) -> None:
    """Show nothing."""
