"""``fit`` on several processes: the same phi on any number of them, killed anywhere, and no one left waiting."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import TINY, CommandLine, Done, free_port, shared_command_line
from images_on_disk import save_archive

from mp_lightning.meta.checkpoint import checkpoints, read_checkpoint
from mp_lightning.perturbation import load_phi

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def mp() -> CommandLine:
    return shared_command_line()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The words for two sources of unequal length, four tasks, and a target."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = [save_archive(folder / f"{name}.npz", classes, per_class) for name, classes, per_class in SETS]
    return [f"data=[{paths[0]},{paths[1]}]", f"evaluation.data={paths[2]}"]


SETS = [("many", 4, 40), ("few", 3, 8), ("target", 3, 8)]


def run(mp: CommandLine, folder: Path, words: list[str], ranks: int, **options: Any) -> list[Done]:
    return mp.together(folder, "fit", *TINY, *words, "hydra.run.dir=run", ranks=ranks, **options)


def succeed(mp: CommandLine, folder: Path, words: list[str], ranks: int) -> Path:
    """The run folder after a command that must end well."""
    folder.mkdir(exist_ok=True)
    for done in run(mp, folder, words, ranks):
        assert done.code == 0, f"ended with {done.code}\n{done.stdout}\n{done.stderr}"
        assert done.stderr == ""
    return folder / "run"


def tensors_of(value: Any, name: str = "") -> dict[str, Any]:
    """All leaves of a checkpoint, by their paths."""
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in tensors_of(inner, f"{name}/{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for key, inner in enumerate(value) for k, v in tensors_of(inner, f"{name}/{key}").items()}
    return {name: value}


def assert_same_run(run: Path, expected: Path) -> None:
    """phi, card apart from its date, table, score, and every task's network and optimizer, bit for bit."""
    for name in ("phi.safetensors", "metrics.csv", "report.json", "evaluation.json"):
        assert (run / name).read_bytes() == (expected / name).read_bytes(), name
    own, its = (read_checkpoint(checkpoints(path / "checkpoints")[0]) for path in (run, expected))
    kept = ("tasks", "state_dict", "optimizer_states", "meta_step", "history")
    left, right = (tensors_of({key: content[key] for key in kept}) for content in (own, its))
    assert left.keys() == right.keys() and len(left) > 100
    for name, value in left.items():
        same = torch.equal(value, right[name]) if isinstance(value, torch.Tensor) else value == right[name]
        assert same, name


TWENTY = ["meta.steps=20"]


@pytest.fixture(scope="module")
def alone(mp: CommandLine, pictures: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty steps of four tasks on one process."""
    return succeed(mp, tmp_path_factory.mktemp("alone"), [*pictures, *TWENTY], 1)


def assert_phi_close(run: Path, expected: Path) -> None:
    own, its = (load_phi(path / "phi.safetensors").phi for path in (run, expected))
    for value, wanted in zip(own, its, strict=True):
        assert (value - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_any_number_of_processes_gives_the_same_phi(
    mp: CommandLine, pictures: list[str], alone: Path, tmp_path: Path, ranks: int
) -> None:
    done = succeed(mp, tmp_path, [*pictures, *TWENTY], ranks)
    assert_phi_close(done, alone)
    assert (done / "metrics.csv").read_text().count("\n") == 21


def test_stock_ddp_gives_the_same_phi(mp: CommandLine, pictures: list[str], alone: Path, tmp_path: Path) -> None:
    """Lightning's own DDP leaves theta of each process alone, since the module names it."""
    assert_phi_close(succeed(mp, tmp_path, [*pictures, *TWENTY, "trainer.strategy=ddp"], 2), alone)


def test_bfloat16_on_two_processes(mp: CommandLine, pictures: list[str], tmp_path: Path) -> None:
    words = [*pictures, "meta.steps=3", "trainer.precision=bf16-mixed"]
    runs = [succeed(mp, tmp_path / str(ranks), words, ranks) for ranks in (1, 2)]
    assert_phi_close(*runs)


def test_the_first_process_alone_speaks(mp: CommandLine, pictures: list[str], tmp_path: Path) -> None:
    first, second = run(mp, tmp_path, [*pictures, "meta.steps=2"], 2)
    assert "4 tasks, shared by 2 processes" in first.stdout and "process 1" in first.stdout
    assert second.stdout == second.stderr == first.stderr == ""
    (again, silent) = run(mp, tmp_path, [*pictures, "meta.steps=2"], 2)
    assert (again.code, silent.code, silent.stdout) == (0, 0, "")
    assert "This run is finished" in again.stdout


@pytest.mark.parametrize("ranks", [(2, 1, 4), (1, 2, 3)])
def test_a_run_continues_on_another_number_of_processes(
    mp: CommandLine, pictures: list[str], alone: Path, tmp_path: Path, ranks: tuple[int, ...]
) -> None:
    for number, step in zip(ranks, (7, 14), strict=False):
        for rank, done in enumerate(run(mp, tmp_path, [*pictures, *TWENTY, "+trainer.limit_train_batches=7"], number)):
            stopped = f"mp_lightning: stopped after {step} of 20 meta-steps; the same command continues\n"
            assert (done.code, done.stderr) == (2, "" if rank else stopped)
        assert checkpoints(tmp_path / "run" / "checkpoints")[0].name == f"step-{step:08d}.ckpt"
    assert_phi_close(succeed(mp, tmp_path, [*pictures, *TWENTY], ranks[2]), alone)


def test_fresh_on_two_processes(mp: CommandLine, pictures: list[str], alone: Path, tmp_path: Path) -> None:
    succeed(mp, tmp_path, [*pictures, "meta.steps=3"], 2)
    done = succeed(mp, tmp_path, [*pictures, *TWENTY, "run.fresh=true"], 2)
    assert_phi_close(done, alone)
    assert (done / "previous-1" / "phi.safetensors").is_file()


def test_more_processes_than_tasks(mp: CommandLine, pictures: list[str], tmp_path: Path) -> None:
    done = run(mp, tmp_path, [*pictures, "meta.steps=2"], 5)
    assert {one.code for one in done} == {2}
    assert "4 tasks cannot be shared by 5 devices" in done[0].stderr


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
    "in the middle of a checkpoint": lambda n: f"kill_at(checkpoint.os, 'fsync', {max(1, n // 6)})",
    "before a checkpoint is in its place": lambda n: f"kill_at(checkpoint.os, 'replace', {max(2, n // 6)})",
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


@pytest.mark.parametrize(("rank", "which"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)])
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


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "mp_lightning.meta", "fit", *TINY, *words, "hydra.run.dir=run"]


def test_two_processes_started_by_the_command_itself(pictures: list[str], alone: Path, tmp_path: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [*pictures, *TWENTY, "trainer.devices=2"]
    done = subprocess.run(command(*words), cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and "Initializing" not in done.stdout
    assert_phi_close(tmp_path / "run", alone)


def test_a_process_that_the_command_started_is_killed(pictures: list[str], tmp_path: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = command(*pictures, "meta.steps=100000", "trainer.devices=2")
    with subprocess.Popen(
        words, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as it:
        deadline = time.monotonic() + 90
        while not (tmp_path / "run" / "metrics.csv").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        (child,) = Path(f"/proc/{it.pid}/task/{it.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGKILL)
        _, errors = it.communicate(timeout=30)
    assert it.returncode in (2, 3)
    assert "the same command continues" in errors and "Traceback" not in errors


def test_two_nodes(pictures: list[str], alone: Path, tmp_path: Path) -> None:
    """Two agents of torchrun, as on two machines that share a file system."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    port = free_port()
    agents = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"),
                *(f"--node-rank={node}", "--master-addr=127.0.0.1", f"--master-port={port}", "-m"),
                *command(*pictures, *TWENTY, "trainer.devices=1", "trainer.num_nodes=2")[2:],
            ],
            cwd=tmp_path,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]
    outputs = [agent.communicate(timeout=200)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert "shared by 2 processes" in outputs[0] and "shared by" not in outputs[1]
    assert_phi_close(tmp_path / "run", alone)
