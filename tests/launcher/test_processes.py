"""A process group knows no rank, keeps what it printed, and ends with all that it started.

This folder must not be called like the package: it would become a part of it, and Hydra import the tests as plugins.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hydra_plugins.mp_lightning_launcher import _processes
from hydra_plugins.mp_lightning_launcher._processes import (
    ProcessGroup,
    collected_signals,
    environment_without_ranks,
    stop,
)

# A shell that starts another process, notes its number, and waits.
PARENT = "sleep 100 & echo $! > child; wait"
STUBBORN = "trap '' TERM; sleep 100 & echo $! > child; while true; do wait; done"


def soon(holds: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether something comes true within a while."""
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    return holds()


def child_of(folder: Path) -> int:
    """The number of the process that one of the shells above started."""
    file = folder / "child"
    assert soon(lambda: file.exists() and file.read_text().endswith("\n"))
    return int(file.read_text())


def ended(number: int) -> bool:
    """Whether a process is gone, or dead and only not waited for."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except FileNotFoundError:
        return True


def start(folder: Path, script: str, show_output: bool = False) -> ProcessGroup:
    command = ["sh", "-c", f'cd "$0"; {script}', str(folder)]
    return ProcessGroup(command, os.environ, folder / "logs" / "log", show_output)


def test_no_rank_is_inherited() -> None:
    ranks = {"LOCAL_RANK": "1", "RANK": "3", "WORLD_SIZE": "4", "MASTER_PORT": "1", "NODE_RANK": "0", "GROUP_RANK": "0"}
    others = {"TORCHELASTIC_RUN_ID": "x", "SLURM_PROCID": "2", "SLURM_NTASKS": "4", "OMPI_COMM_WORLD_RANK": "1"}
    kept = {"HOME": "/", "CUDA_VISIBLE_DEVICES": "0", "PL_TRAINER_DEVICES": "2"}
    assert environment_without_ranks({**ranks, **others, **kept}) == kept


@pytest.mark.parametrize("show_output", [False, True])
def test_the_log_has_the_command_and_what_it_printed(
    tmp_path: Path, show_output: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        group = start(tmp_path, "echo shown; echo wrong >&2; exit 3", show_output)
        assert soon(lambda group=group: group.code() == 3)
        assert group.output() == (["wrong"] if show_output else ["shown", "wrong"])  # of this start alone
        group.close()
    assert capfd.readouterr().out == ("shown\n" * 2 if show_output else "")
    lines = (tmp_path / "logs" / "log").read_text().splitlines()
    assert len([line for line in lines if line.startswith("$ sh -c ")]) == 2 and lines.count("wrong") == 2


def test_closed_with_all_that_it_started(tmp_path: Path) -> None:
    group = start(tmp_path, PARENT)
    child = child_of(tmp_path)
    group.close()
    assert soon(lambda: ended(child))


def test_what_a_job_leaves_behind_is_ended(tmp_path: Path) -> None:
    group = start(tmp_path, "sleep 100 & echo $! > child")
    child = child_of(tmp_path)
    assert soon(lambda: group.code() == 0) and not ended(child)
    group.close()
    assert soon(lambda: ended(child))


@pytest.mark.parametrize(("script", "forced"), [(PARENT, False), (STUBBORN, True)])
def test_asked_first_and_then_forced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, forced: bool
) -> None:
    monkeypatch.setattr(_processes, "GRACE", 0.5)
    group = start(tmp_path, script)
    child = child_of(tmp_path)
    stop([group], [])
    assert group.code() == -(signal.SIGKILL if forced else signal.SIGTERM)
    assert soon(lambda: ended(child))


def test_a_second_signal_ends_the_wait(tmp_path: Path) -> None:
    group = start(tmp_path, STUBBORN)
    child_of(tmp_path)
    with collected_signals() as received:
        timer = subprocess.Popen([sys.executable, "-c", f"import os, time; time.sleep(0.3); os.kill({os.getpid()}, 2)"])
        before = time.monotonic()
        stop([group], received)
        timer.wait()
    assert received == [signal.SIGINT]
    assert time.monotonic() - before < _processes.GRACE / 2 and group.code() == -signal.SIGKILL


def test_does_not_outlive_the_sweep(tmp_path: Path) -> None:
    """Not even if that is killed without a chance to end its jobs."""
    sweep = os.fork()
    if sweep == 0:
        start(tmp_path, PARENT)
        signal.pause()
    child = child_of(tmp_path)
    os.kill(sweep, signal.SIGKILL)
    os.waitpid(sweep, 0)
    assert soon(lambda: ended(child))
