"""The one line in which a command that fails says why, and how it is found in what the jobs of a sweep print."""

import re
from collections.abc import Iterable

_PREFIX = "mp_lightning: "
_START = "$ "
# What a run says that only has to be continued.
_STOPPED = re.compile(r"(interrupted|terminated|stopped after \d+ of \d+ meta-steps); the same command continues.*")


def error_line(message: str) -> str:
    """A message as it is printed on standard error."""
    return f"{_PREFIX}{' '.join(message.split())}"


def start_line(command: str) -> str:
    """What stands in the file before the output of a command."""
    return f"{_START}{command}"


def last_error(lines: Iterable[str]) -> str | None:
    """The message of the last error line of the last command, if there is one."""
    found = None
    for line in lines:
        if line.startswith(_START):
            found = None
        elif line.startswith(_PREFIX):
            found = line.removeprefix(_PREFIX)
    return found


def only_stopped(error: str) -> bool:
    """Whether a message says that a run was stopped from outside, and not that something was wrong with it."""
    return _STOPPED.fullmatch(error) is not None
