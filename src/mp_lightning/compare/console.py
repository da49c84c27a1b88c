"""The consoles that commands print to."""

from rich.console import Console


def make_console() -> Console:
    """Standard output; lines are not broken, as paths and commands in them are to be copied."""
    return Console(highlight=False, soft_wrap=True)


def for_tables(console: Console, width: int) -> Console:
    """The console; where it is a file or a pipe, in which tables may be wide, one of at least ``width`` characters."""
    if console.is_terminal:
        return console
    return Console(file=console.file, highlight=False, width=max(console.width, width))
