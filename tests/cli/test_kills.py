"""``fit`` killed anywhere ends as if it had not been, and no process is left waiting for another."""

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import CommandLine
from several_processes import assert_same_run, run, succeed

from mp_lightning.meta.checkpoint import checkpoints

pytestmark = pytest.mark.slow


KILL = """
import itertools, os, signal
from mp_lightning.meta import checkpoint, history, joint, learner, module, transfer
def kill_at(place, name, nth, late=False):
    original, count = getattr(place, name), itertools.count(1)
    def patched(*args, **kwargs):
        now = next(count) == nth
        if now and not late:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if now:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(place, name, patched)
"""
# By name, code that kills its process in the n-th passage of one place.
PLACES: dict[str, Callable[[int], str]] = {
    "before theta's step": lambda n: f"kill_at(learner, 'theta_step', {n})",
    "between theta's and phi's step": lambda n: f"kill_at(learner, 'phi_gradient', {n})",
    "before the exchange": lambda n: f"kill_at(joint, 'add_up', {n})",
    "between the exchange and phi's step": lambda n: f"kill_at(joint, 'add_up', {n}, late=True)",
    "after a row of the table": lambda n: f"kill_at(history.History, '_append', {n}, late=True)",
    "while states are collected": lambda n: f"kill_at(module.exchange, 'collect', {n})",
    "before a checkpoint is written": lambda n: f"kill_at(checkpoint.torch, 'save', {max(1, n // 6)})",
    # The first of these are of the settings and the record.
    "in the middle of a checkpoint": lambda n: f"kill_at(os, 'fsync', {3 + max(1, n // 6)})",
    "before a checkpoint is in its place": lambda n: f"kill_at(os, 'replace', {3 + max(1, n // 6)})",
    "before the old one goes": lambda n: f"kill_at(checkpoint, '_remove', {max(1, n // 6)})",
}
OF_THE_FIRST = set(list(PLACES)[6:]) | {"after a row of the table"}
# From the start of training on: processes that have not met yet are ended by what started them, such as torchrun.
AT_A_MOMENT = """
import threading
start = module.JointMetaTraining.on_train_start
def starting(self):
    start(self)
    threading.Timer({}, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()  # seconds
module.JointMetaTraining.on_train_start = starting
"""
IN_VALIDATION = "kill_at(transfer, 'evaluate', {})"
LONG = ["meta.steps=150", "meta.restart_after=40", "evaluation.seeds=2", "tasks.architectures=[conv4-2,conv4-3]"]
KILLS, MOMENTS, VALIDATIONS = 20, 4, 3


def killings(ranks: int) -> list[tuple[int, str, str]]:
    """Twenty (rank, what, code), drawn with a seed; those in validation come last, as validation does."""
    draw = random.Random(ranks)
    places = [*PLACES, *draw.choices(list(PLACES), k=KILLS - MOMENTS - VALIDATIONS - len(PLACES))]
    found = []
    for place in places:
        rank = 0 if place in OF_THE_FIRST else draw.randrange(ranks)
        found.append((rank, place, PLACES[place](draw.randint(2, 18))))
    for _ in range(MOMENTS):
        moment = draw.uniform(0.1, 1.5)
        found.append((draw.randrange(ranks), f"after {moment:.2f} seconds", AT_A_MOMENT.format(moment)))
    draw.shuffle(found)
    validations = [(0, "in validation", IN_VALIDATION.format(nth)) for nth in (1, 2, 1)]
    return [*found, *validations]


@pytest.fixture(scope="module")
def uninterrupted(mp: CommandLine, pictures: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return succeed(mp, tmp_path_factory.mktemp("uninterrupted"), [*pictures, *LONG], 1)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_twenty_times_ends_as_if_it_had_not_been(
    mp: CommandLine, pictures: list[str], uninterrupted: Path, tmp_path: Path, ranks: int
) -> None:
    steps = []
    for rank, what, code in killings(ranks):
        started = time.monotonic()
        done = run(mp, tmp_path, [*pictures, *LONG], ranks, first={rank: f"{KILL}\n{code}"})
        assert done[rank].code == -signal.SIGKILL, f"{what}: {done[rank].code}\n{done[rank].stdout}{done[rank].stderr}"
        assert time.monotonic() - started < 60
        for other in done[:rank] + done[rank + 1 :]:
            # The last process may have done its part when the first is killed in validation.
            assert other.code in ((0,) if what == "in validation" else (2, 3)), f"{what}: {other}"
            assert "Traceback" not in other.stderr
            assert other.code == 0 or "the same command continues" in other.stderr
        found = checkpoints(tmp_path / "run" / "checkpoints")
        steps.append(int(found[0].stem.partition("-")[2]) if found else 0)
    assert steps == sorted(steps) and steps[-1] == 150 and len(set(steps)) > 5, steps
    assert_same_run(succeed(mp, tmp_path, [*pictures, *LONG], ranks), uninterrupted)


@pytest.mark.parametrize(
    ("rank", "which"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (0, signal.SIGSTOP), (1, signal.SIGSTOP)]
)
def test_no_one_waits_for_a_process_that_is_gone(
    mp: CommandLine, pictures: list[str], tmp_path: Path, rank: int, which: signal.Signals
) -> None:
    """Also of one that is only stopped: it holds its connections, so nothing but its silence tells."""
    code = f"which = {int(which)}\n{GONE}"

    def silent_for_long() -> bool:
        return (tmp_path / "gone").exists() and time.time() - (tmp_path / "gone").stat().st_mtime > 28

    # The server waits for a stopped process as well: it is killed when the other should have ended.
    options = {"signal_when": (silent_for_long, signal.SIGKILL), "signalled": rank} if which == signal.SIGSTOP else {}
    done = run(mp, tmp_path, [*pictures, "meta.steps=100000"], 2, first={rank: code}, **options)
    gone = (tmp_path / "gone").stat().st_mtime
    other = done[1 - rank]
    assert other.code == 3 if which == signal.SIGSTOP else other.code in (2, 3), other
    (line,) = other.stderr.splitlines()
    assert line.startswith(f"mp_lightning: process {1 - rank} ") and "the same command continues" in line
    assert time.time() - gone < 30


GONE = """
import os, threading
from mp_lightning.meta import module
start = module.JointMetaTraining.on_train_start
def end():
    open("gone", "w").close()
    os.kill(os.getpid(), which)
def starting(self):
    start(self)
    threading.Timer(0.5, end).start()
module.JointMetaTraining.on_train_start = starting
"""
