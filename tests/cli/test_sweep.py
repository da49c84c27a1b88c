"""Sweeps: each job is a process group of its own, in one tree, and whatever happens to it is said."""

import importlib.util
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import TINY, CommandLine
from omegaconf import OmegaConf
from test_bad_input import assert_refused

from mp_lightning.perturbation import load_phi

SMALL = [*TINY, "tasks.architectures=[conv4-2]", "logger=csv"]


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_sweep_over_two_devices_with_a_job_that_fails(mp: CommandLine, tmp_path: Path) -> None:
    """Also a second start, which finds what is finished."""
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
    again = mp(tmp_path, *words[:-2], "meta.lr=1e-3", "-m")
    assert again.code == 0 and "This run is finished" in again.stdout and again.stderr == ""
    chosen = mp(tmp_path, "select")
    assert chosen.code == 0 and finished[0].name in chosen.stdout
    assert "failed: meta.lr=-1 cannot be used" in chosen.stdout


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.skipif(
    importlib.util.find_spec("hydra_plugins.hydra_optuna_sweeper") is None, reason="needs hydra-optuna-sweeper"
)
def test_optuna_minimizes_the_score(mp: CommandLine, tmp_path: Path) -> None:
    search = [
        "hydra/sweeper=optuna",
        *(f"hydra.sweeper.{word}" for word in ("n_trials=2", "n_jobs=1", "sampler.seed=1")),
    ]
    done = mp(tmp_path, "fit", *SMALL, "meta.lr=interval(1e-4,1e-2)", "tasks.groups=choice(1)", *search, "-m")
    assert done.code == 0 and done.stderr == "", done.stdout + done.stderr
    tree = tmp_path / "runs" / "sweep-fit"
    cards = [load_phi(path).card for path in tree.rglob("phi.safetensors")]
    rates = {card["settings"]["lr"]: card["held_out"]["results"][0]["nll"][0] for card in cards}
    assert len(rates) == 2 and all(1e-4 <= rate <= 1e-2 for rate in rates)
    best = OmegaConf.load(tree / "optimization_results.yaml")
    assert best.best_value == pytest.approx(min(rates.values()))
    assert rates[best.best_params["meta.lr"]] == pytest.approx(min(rates.values()))


REFUSED: dict[str, tuple[list[str], list[str]]] = {
    "unknown launcher": (["hydra/launcher=nope"], ["'hydra/launcher=nope': no configuration", "basic, processes"]),
    "unknown sweeper": (["hydra/sweeper=nope"], ["'hydra/sweeper=nope': no configuration", "there are: basic"]),
    "key of a launcher": (["hydra.launcher.job=2"], ["unknown key 'hydra.launcher.job'", "'hydra.launcher.jobs'"]),
    "interval": (["meta.lr=interval(1e-4,1e-2)"], ["'meta.lr=interval(1e-4,1e-2)'", "add hydra/sweeper=optuna"]),
    "empty range": (["meta.steps=range(3,1)"], ["'meta.steps=range(3,1)' names no value"]),
    "unknown key": (["meta.lrr=1,2"], ["unknown key 'meta.lrr'", "'meta.lr'"]),
    "folder": (["hydra.sweep.dir=/dev/null/x"], ["sweep folder '/dev/null/x' cannot be written", "hydra.sweep.dir="]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_written(mp: CommandLine, tmp_path: Path, case: str) -> None:
    words, parts = REFUSED[case]
    assert_refused(mp, tmp_path, ["fit", *SMALL, "seed=1,2", "-m", *words], *parts, leaves_nothing=True)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["hydra.launcher.jobs=0"], ["hydra.launcher.jobs=0 cannot be used"]),
        (["hydra.launcher.jobs=two"], ["hydra.launcher.jobs=two cannot be used"]),
        (["hydra.launcher.jobs=1,2"], ["the sweep stopped: Sweeping over Hydra's configuration is not supported"]),
        (["experiment=glob(nope*)"], ["the sweep has no job"]),
    ],
)
def test_refused_by_the_sweep(mp: CommandLine, tmp_path: Path, words: list[str], parts: list[str]) -> None:
    assert_refused(mp, tmp_path, ["fit", *SMALL, "seed=1,2", "-m", *words], *parts)
    assert not list(tmp_path.rglob("output.log"))


def test_several_values_without_a_sweep(mp: CommandLine, tmp_path: Path) -> None:
    for word in ("meta.lr=interval(0,1)", "seed=range(3)", "seed=choice(1,2)"):
        assert_refused(mp, tmp_path, ["fit", word], f"'{word}' names several values; add -m", leaves_nothing=True)


def test_select_is_not_swept(mp: CommandLine, tmp_path: Path) -> None:
    assert_refused(mp, tmp_path, ["select", "by=nll,accuracy", "-m"], "select runs once", leaves_nothing=True)


@pytest.mark.parametrize("order", [1, -1])
def test_an_extra_that_is_absent_is_named(mp: CommandLine, tmp_path: Path, order: int) -> None:
    absent = "import hydra_plugins; hydra_plugins.__path__ = []"
    words = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=3"][::order]
    (done,) = mp.together(tmp_path, "fit", "-m", *words, "meta.lr=interval(1e-4,1e-2)", first={0: absent})
    assert done.code == 2 and "Traceback" not in done.stderr
    (line,) = done.stderr.splitlines()
    assert "no configuration 'hydra/sweeper/optuna'" in line and "pip install 'mp_lightning[sweep]'" in line


def processes_of(folder: Path) -> list[int]:
    """The processes that inherited the mark of a test."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"MARK={folder}".encode() in (path / "environ").read_bytes().split(b"\0"):
                found.append(int(path.name))
        except OSError:  # it has ended meanwhile
            continue
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("which", "training", "code", "line"),
    [
        (signal.SIGTERM, True, 143, "mp_lightning: terminated; the same command continues this sweep\n"),
        (signal.SIGINT, False, 130, "mp_lightning: interrupted; the same command continues this sweep\n"),
        (signal.SIGKILL, False, -signal.SIGKILL, ""),
    ],
)
def test_a_sweep_that_is_ended_leaves_no_process(
    mp: CommandLine, tmp_path: Path, which: signal.Signals, training: bool, code: int, line: str
) -> None:
    """While its jobs train, or just start."""

    def both_run() -> bool:
        return len(list(tmp_path.rglob("metrics.csv" if training else "output.log"))) == 2

    words = [*SMALL, "meta.steps=100000", "seed=1,2", "hydra.launcher.jobs=2", "-m"]
    mark = [{"MARK": str(tmp_path)}]
    (done,) = mp.together(tmp_path, "fit", *words, signal_when=(both_run, which), environments=mark)
    assert (done.code, done.stderr) == (code, line)
    assert len(list(tmp_path.rglob("output.log"))) == 2
    assert soon_none(lambda: processes_of(tmp_path))


def soon_none(found: Callable[[], list[int]]) -> bool:
    """Whether nothing is found any more after a while."""
    deadline = time.monotonic() + 10
    while found() and time.monotonic() < deadline:
        time.sleep(0.1)
    return not found()
