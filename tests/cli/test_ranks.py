"""``fit`` on several processes: the same phi on any number of them, however they were started."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import TINY, CommandLine, free_port
from several_processes import TWENTY, assert_phi_close, run, succeed

from mp_lightning.meta.checkpoint import checkpoints

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def alone(mp: CommandLine, pictures: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty steps of four tasks on one process."""
    return succeed(mp, tmp_path_factory.mktemp("alone"), [*pictures, *TWENTY], 1)


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


def test_under_slurm(mp: CommandLine, pictures: list[str], alone: Path, tmp_path: Path) -> None:
    """With the variables that srun sets for two tasks on one node."""
    slurm = {"SLURM_JOB_ID": str(random.randint(1000, 9999)), "SLURM_JOB_NAME": "meta", "SLURM_NTASKS": "2"}
    slurm |= {"SLURM_NTASKS_PER_NODE": "2", "SLURM_NODELIST": "127.0.0.1", "SLURM_NODEID": "0"}
    environments = [{**slurm, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
    for done in run(mp, tmp_path, [*pictures, *TWENTY], 2, environments=environments):
        assert done.code == 0, done
    assert_phi_close(tmp_path / "run", alone)


@pytest.mark.parametrize(("which", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_all_processes_ends_them_with_one_line(
    pictures: list[str], tmp_path: Path, which: signal.Signals, code: int
) -> None:
    """As torchrun, a scheduler, or Ctrl-C in a terminal sends it."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = command(*pictures, "meta.steps=100000", "trainer.devices=2")
    with subprocess.Popen(
        words, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as run:
        deadline = time.monotonic() + 90
        while not (tmp_path / "run" / "metrics.csv").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        os.killpg(run.pid, which)
        _, errors = run.communicate(timeout=60)
    what = "terminated" if which == signal.SIGTERM else "interrupted"
    assert (run.returncode, errors) == (code, f"mp_lightning: {what}; the same command continues this run\n")
    # Who is terminated has time for a checkpoint.
    assert (len(checkpoints(tmp_path / "run" / "checkpoints")) > 0) == (which == signal.SIGTERM)
