"""Sweeps: each job is a process group of its own, in one tree, and whatever happens to it is said."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import TINY, CommandLine

from hydra_plugins.mp_lightning_launcher._processes import ProcessGroup, environment_without_ranks
from mp_lightning.perturbation import load_phi

SMALL = [*TINY, "tasks.architectures=[conv4-2]", "logger=csv"]


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_sweep_over_two_devices_with_a_job_that_fails(mp: CommandLine, tmp_path: Path) -> None:
    """Also a value with commas, brackets and a space, and a second start, which finds what is finished."""
    words = ["fit", *SMALL, "trainer.devices=2", "meta.lr=1e-3,-1", "-m"]
    done = mp(tmp_path, *words)
    assert done.code == 2 and "Traceback" not in done.stderr, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("mp_lightning: 1 of 2 jobs failed: meta.lr=-1 (meta.lr=-1 cannot be used")
    assert "Job 0 (meta.lr=0.001) finished with NLL " in done.stdout and "Job 1 (meta.lr=-1) failed: " in done.stdout
    assert "shared by 2 processes" in done.stdout
    finished = [path.parent for path in (tmp_path / "runs" / "sweep-fit").rglob("phi.safetensors")]
    assert [path.parent for path in finished] == [tmp_path / "runs" / "sweep-fit"]
    card = load_phi(finished[0] / "phi.safetensors").card
    assert card["settings"]["lr"] == 1e-3 and card["processes"] == 2
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["sweep-fit"]
    again = mp(tmp_path, *words)
    assert again.code == 2 and "This run is finished" in again.stdout
    chosen = mp(tmp_path, "select")
    assert chosen.code == 0 and finished[0].name in chosen.stdout
    assert "failed: meta.lr=-1 cannot be used" in chosen.stdout


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.skipif(
    importlib.util.find_spec("hydra_plugins.hydra_optuna_sweeper") is None, reason="hydra-optuna-sweeper is not here"
)
def test_optuna_minimizes_the_score(mp: CommandLine, tmp_path: Path) -> None:
    search = [
        "hydra/sweeper=optuna",
        "hydra.sweeper.n_trials=2",
        "hydra.sweeper.n_jobs=1",
        "hydra.sweeper.sampler.seed=1",
    ]
    done = mp(tmp_path, "fit", *SMALL, *search, "meta.lr=interval(1e-4,1e-2)", "-m")
    assert done.code == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    tree = tmp_path / "runs" / "sweep-fit"
    cards = [load_phi(path).card for path in tree.rglob("phi.safetensors")]
    rates = {card["settings"]["lr"] for card in cards}
    assert len(rates) == 2 and all(1e-4 <= rate <= 1e-2 for rate in rates)
    best = (tree / "optimization_results.yaml").read_text()
    losses = [sum(card["held_out"]["results"][0]["nll"]) for card in cards]
    assert f"{min(losses):.6f}" in best.replace("\n", " ") or str(min(losses))[:8] in best


@pytest.mark.parametrize("word", ["hydra/launcher=nope", "hydra/sweeper=nope"])
def test_unknown_ones_are_refused_with_the_known_ones(mp: CommandLine, tmp_path: Path, word: str) -> None:
    done = mp(tmp_path, "fit", *SMALL, "seed=1,2", "-m", word)
    (line,) = done.stderr.splitlines()
    assert done.code == 2 and f"'{word}': no configuration" in line and "basic" in line
    assert "sweeper" in word or "processes" in line
    assert not list(tmp_path.iterdir())


def test_an_interval_needs_a_sweeper_that_searches(mp: CommandLine, tmp_path: Path) -> None:
    done = mp(tmp_path, "fit", *SMALL, "meta.lr=interval(1e-4,1e-2)", "-m")
    assert done.code == 2 and "add hydra/sweeper=optuna" in done.stderr


def test_no_number_of_jobs(mp: CommandLine, tmp_path: Path) -> None:
    done = mp(tmp_path, "fit", *SMALL, "seed=1,2", "-m", "hydra.launcher.jobs=0")
    assert done.code == 2 and "hydra.launcher.jobs=0 cannot be used" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("which", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_sweep_that_is_ended_leaves_no_process(tmp_path: Path, which: signal.Signals, code: int) -> None:
    words = [*SMALL, "meta.steps=100000", "seed=1,2", "hydra.launcher.jobs=2", "-m"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MARK": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-m", "mp_lightning.meta", "fit", *words],
        **{"cwd": tmp_path, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True},
    ) as sweep:
        deadline = time.monotonic() + 90
        while len(list(tmp_path.rglob("metrics.csv"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(marked(tmp_path)) >= 3
        os.kill(sweep.pid, which)
        _, errors = sweep.communicate(timeout=60)
    assert sweep.returncode == code and "Traceback" not in errors
    assert which == signal.SIGKILL or "the same command continues this sweep" in errors
    deadline = time.monotonic() + 10
    while marked(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not marked(tmp_path)


def marked(folder: Path) -> list[int]:
    """The processes that inherited the mark of a test."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"MARK={folder}".encode() in (path / "environ").read_bytes().split(b"\0"):
                found.append(int(path.name))
        except OSError:
            continue
    return found


def test_a_job_knows_no_rank() -> None:
    given = {"LOCAL_RANK": "1", "RANK": "3", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "x", "SLURM_PROCID": "2"}
    assert environment_without_ranks({**given, "HOME": "/", "CUDA_VISIBLE_DEVICES": "0"}) == {
        "HOME": "/",
        "CUDA_VISIBLE_DEVICES": "0",
    }


def test_a_group_ends_with_all_that_it_started(tmp_path: Path) -> None:
    command = ["sh", "-c", "sleep 100 & echo $! > child; wait"]
    group = ProcessGroup(["env", "-C", str(tmp_path), *command], os.environ, tmp_path / "log", show_output=False)
    while not (tmp_path / "child").exists() or not (tmp_path / "child").read_text().strip():
        time.sleep(0.01)
    child = int((tmp_path / "child").read_text())
    group.close()
    deadline = time.monotonic() + 5
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        if "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]:
            break  # ended, and only not waited for
        time.sleep(0.01)
    else:
        assert not Path(f"/proc/{child}").exists()
