"""What a terminal shows while runs are made: one line for each that is finished, and a bar over all of them."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, TaskID

from mp_lightning.compare.comparison import Shown
from mp_lightning.compare.progress import progress_display
from mp_lightning.compare.results import Row
from mp_lightning.compare.tuning import FIRST_SEED


class Bars:
    """Makes the bar of each stage of a comparison.

    Args:
        console: where.
        steps: training batches of a run; None where it is not known, and the bar counts runs.
    """

    def __init__(self, console: Console, steps: int | None) -> None:
        self._console = console
        self._steps = steps

    @contextmanager
    def __call__(self, what: str, runs: int, finished: int) -> Iterator[Shown]:
        """A stage of so many runs, some of them finished already."""
        if finished:
            self._console.print(f"{what}: {finished} of {runs} runs are there already")
        with progress_display(self._console, "{task.fields[runs]}", enabled=True, transient=True) as progress:
            per_run = self._steps or 1
            bar = progress.add_task(what, total=runs * per_run, completed=finished * per_run, runs="")
            yield _Bar(self._console, progress, bar, runs, finished, counts_steps=self._steps is not None)


class _Bar(Shown):
    def __init__(
        self, console: Console, progress: Progress, bar: TaskID, runs: int, finished: int, counts_steps: bool
    ) -> None:
        self._console, self._progress, self._bar = console, progress, bar
        self._runs, self._finished, self._counts_steps = runs, finished, counts_steps

    def step(self, batches: int) -> None:
        if self._counts_steps:
            self._progress.update(self._bar, advance=batches)

    def finished(self, row: Row) -> None:
        self._finished += 1
        if not self._counts_steps:
            self._progress.update(self._bar, advance=1)
        count = f"{self._finished:>{len(str(self._runs))}}/{self._runs}"
        self._progress.update(self._bar, runs=f"run {count}")
        what = f"{row.arm} {row.parameters}" if row.parameters and ":" not in row.arm else row.arm
        seed = f"seed {row.seed}" if row.seed < FIRST_SEED else ""
        self._console.print(
            f"  {count}  {what:<24} {seed:<8} accuracy {100 * row.accuracy:5.1f} %   NLL {row.nll:.3f}   "
            f"train {100 * row.train_accuracy:5.1f} %   {row.seconds:.0f} s",
            markup=False,
        )
