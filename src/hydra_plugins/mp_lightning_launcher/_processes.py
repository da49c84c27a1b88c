"""A process group for each job: started afresh, watched, and ended together with all that it started."""

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from mp_lightning.cli.output import start_line

GRACE = 10.0  # seconds between the request to end and the end by force
POLL = 0.05  # seconds
_RANK_VARIABLES = {
    *("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "GROUP_WORLD_SIZE"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
}
_RANK_PREFIXES = ("TORCHELASTIC_", "SLURM_", "PMI_", "PMIX_", "OMPI_", "JSM_", "LSB_")
# Becomes the command once it is told so; never, if this process dies before.
_BECOME = 'read -r _ && exec "$@" </dev/null'
# Ends a group once the other end of its standard input is closed, for which the death of this process is enough.
_WATCH = 'read -r _; kill -s KILL -- "-$0"'


def environment_without_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables without those that tell a process its rank, so that a job can start ranks of its own."""
    return {
        name: value
        for name, value in environment.items()
        if name not in _RANK_VARIABLES and not name.startswith(_RANK_PREFIXES)
    }


class ProcessGroup:
    """A command in a session and process group of its own, which does not outlive this process.

    Args:
        command: the program and its arguments.
        environment: its variables.
        log: file to which the command, its standard error and, unless shown, its standard output are added.
        show_output: pass standard output through, so that progress can be seen.

    Raises:
        OSError: the log cannot be written, or the command not started.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path, show_output: bool) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log.open("a+b")
        self._log.write(f"{start_line(shlex.join(command))}\n".encode())
        self._log.flush()
        self._start = self._log.tell()
        self._process = subprocess.Popen(
            ["sh", "-c", _BECOME, "sh", *command],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=None if show_output else self._log,
            stderr=self._log,
            start_new_session=True,
        )
        self._watcher = subprocess.Popen(
            ["sh", "-c", _WATCH, str(self._process.pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        with self._process.stdin as begin:
            begin.write(b"\n")

    def code(self) -> int | None:
        """The exit code of the command (minus the signal that ended it), or None while it runs."""
        return self._process.poll()

    def output(self) -> list[str]:
        """The lines that this start of the command has added to the log."""
        self._log.seek(self._start)
        return self._log.read().decode(errors="replace").splitlines()

    def send(self, which: signal.Signals) -> None:
        """Send a signal to every process of the group."""
        # macOS has no permission to signal a group whose last process has ended but was not waited for.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, which)

    def close(self) -> None:
        """End what is left of the group at once."""
        self.send(signal.SIGKILL)
        self._process.wait()
        self._watcher.kill()
        self._watcher.communicate()
        self._log.close()


def stop(groups: Collection[ProcessGroup], received: Sequence[signal.Signals]) -> None:
    """End all groups: asked first, by force after a while or as soon as ``received`` gets another signal."""
    for group in groups:
        group.send(signal.SIGTERM)
    deadline, before = time.monotonic() + GRACE, len(received)
    while any(group.code() is None for group in groups) and time.monotonic() < deadline and len(received) == before:
        time.sleep(POLL)
    for group in groups:
        group.close()


@contextlib.contextmanager
def collected_signals() -> Iterator[list[signal.Signals]]:
    """Requests to end this process are only noted within, so that no process is lost between start and note of it."""
    received: list[signal.Signals] = []
    previous = {
        which: signal.signal(which, lambda number, _: received.append(signal.Signals(number)))
        for which in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield received
    finally:
        for which, handler in previous.items():
            signal.signal(which, handler)
