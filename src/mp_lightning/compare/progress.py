"""What a terminal shows while something long goes on."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from mp_lightning.data import Progress as OnProgress

_UPDATES_PER_SECOND = 4  # the default, 10, costs a few per cent of a small machine


class SpeedColumn(ProgressColumn):
    """Steps per second, or seconds per step where these are long."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("- steps/s")
        return Text(f"{speed:.2f} steps/s" if speed >= 0.1 else f"{1 / speed:.1f} s/step")


def progress_display(console: Console, *columns: str, enabled: bool, transient: bool) -> Progress:
    """A live bar: description, bar, number of steps, ``columns`` (templates of rich), speed and time that is left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        *map(TextColumn, columns),
        SpeedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=console,
        # Where nothing can be overwritten, only what stays is written.
        disable=not enabled or (transient and not console.is_terminal),
        transient=transient,
        refresh_per_second=_UPDATES_PER_SECOND,
    )


@contextmanager
def reading_display(console: Console) -> Iterator[OnProgress]:
    """A live bar for long reading, one line for each thing that is read; it goes away at the end."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn())
    bars: dict[str, TaskID] = {}
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as display:

        def on_progress(what: str, done: int, total: int) -> None:
            if what not in bars:
                bars[what] = display.add_task(what, total=total)
            display.update(bars[what], completed=done, total=total)

        yield on_progress
