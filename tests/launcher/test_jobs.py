"""The jobs of a sweep: what runs, how many at a time, and what becomes of their results."""

import math
import os
from dataclasses import replace
from pathlib import Path

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobStatus
from hydra.types import RunMode
from omegaconf import OmegaConf

from hydra_plugins.mp_lightning_launcher._jobs import Job, Outcome, SweepError, job_returns, make_job, run_jobs
from mp_lightning.cli.words import CONFIGURATION, compose

CONFIG = OmegaConf.create({"seed": 0, "hydra": {"job": {"name": "fit"}}})


def shell_job(number: int, folder: Path, script: str) -> Job:
    command = ["sh", "-c", script, str(folder)]
    return Job(number, f"seed={number}", [f"seed={number}"], command, folder, CONFIG)


def run(jobs: list[Job], at_a_time: int = 1) -> list[Outcome]:
    return [outcome for _, outcome in run_jobs(jobs, at_a_time)]


def test_at_once(tmp_path: Path) -> None:
    """Each waits for the other."""
    meet = 'touch "$0/../{0}"; while [ ! -e "$0/../{1}" ]; do sleep 0.01; done'
    names = [("a", "b"), ("b", "a")]
    jobs = [shell_job(i, tmp_path / f"run{i}", meet.format(*pair)) for i, pair in enumerate(names)]
    assert run(jobs, at_a_time=2) == [Outcome(), Outcome()]


def test_one_after_the_other(tmp_path: Path) -> None:
    alone = 'mkdir "$0/../lock" && sleep 0.1 && rmdir "$0/../lock"'
    assert run([shell_job(i, tmp_path / f"run{i}", alone) for i in range(3)]) == [Outcome()] * 3


def test_jobs_of_one_folder_are_one_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    once = 'echo \'{"nll": 1.5}\' > "$0/report.json"; echo started'
    jobs = [shell_job(i, tmp_path / "run", once) for i in range(2)]
    assert run(jobs) == [Outcome(score=1.5)] * 2
    assert capfd.readouterr().out.splitlines() == [
        f"Job 0 (seed=0) starts in {tmp_path / 'run'}",
        "started",
        "Job 0 (seed=0) finished with NLL 1.5000",
    ]


def test_a_job_whose_judgement_diverged_stops_no_other_and_is_the_worst(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    diverged = shell_job(0, tmp_path / "a", 'echo \'{"nll": null}\' > "$0/report.json"')
    assert run([diverged, shell_job(1, tmp_path / "b", "true")]) == [Outcome(score=math.inf), Outcome()]
    assert "Job 0 (seed=0) finished with NLL inf" in capfd.readouterr().out


def test_a_failure_stops_no_other(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    line = "echo 'mp_lightning: first' >&2; echo 'mp_lightning: meta.lr is wrong' >&2; echo other >&2; exit 2"
    jobs = [
        shell_job(0, tmp_path / "a", line),
        shell_job(1, tmp_path / "b", "exit 3"),
        shell_job(2, tmp_path / "file" / "c", "true"),
        shell_job(3, tmp_path / "d", "true"),
    ]
    outcomes = run(jobs)
    assert outcomes[0].error == "meta.lr is wrong" and outcomes[3] == Outcome()
    assert outcomes[1].error == f"ended with 3, see {tmp_path / 'b' / 'output.log'}"
    assert "cannot be written" in str(outcomes[2].error) and "hydra.sweep.dir=" in str(outcomes[2].error)
    printed = capfd.readouterr()
    assert "Job 0 (seed=0) failed: meta.lr is wrong" in printed.out and printed.err == ""


def test_threads_are_shared_among_jobs_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    for at_a_time, threads in ((1, "none"), (2, "3"), (8, "1")):
        folder = tmp_path / str(at_a_time)
        run([shell_job(0, folder, 'echo "${OMP_NUM_THREADS-none}" > "$0/threads"')], at_a_time)
        assert (folder / "threads").read_text().strip() == threads


def test_results_as_sweepers_read_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = (shell_job(i, tmp_path, "true") for i in range(2))
    failed = ["seed=9 (earlier)", "seed=1 (no)"]
    first, second = job_returns([(good, Outcome(score=1.5)), (bad, Outcome(error="no"))], failed, total=3)
    assert (first.status, first.return_value, first.overrides) == (JobStatus.COMPLETED, 1.5, ["seed=0"])
    assert first.cfg == {"seed": 0} and set(first.hydra_cfg) == {"hydra"}
    assert second.status == JobStatus.FAILED
    with pytest.raises(SweepError, match=r"^2 of 3 jobs failed: seed=9 \(earlier\); seed=1 \(no\)$"):
        _ = second.return_value
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "folder", ["runs/sweep-fit", "my runs, all", 'it\'s "odd"', "a=b[c]{d}", "back\\slash", "$HOME ${seed}"]
)
def test_values_and_folders_survive(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command that a job becomes is read back as what was meant, whatever characters stand in it."""
    monkeypatch.chdir(tmp_path)
    OmegaConf.register_new_resolver("run_name", lambda: "name", replace=True)
    quoted = folder.replace('"', '\\"').replace("${", "\\${")
    words = ["command=fit", "seed=1,2", f'data=["{quoted}.npz",b.npz]', "tasks.architectures=[conv4-2, resnet20-2]"]
    others = ["hydra.verbose=true", "hydra.mode=MULTIRUN", f'hydra.sweep.dir="{quoted}"']
    with hydra.initialize_config_module(CONFIGURATION, version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        sweep = loader.load_configuration("fit", [*words, *others], RunMode.MULTIRUN)
        job = make_job(loader, sweep, 1, ["command=fit", "seed=2", *words[2:]])
    assert job.folder == Path(folder) / "name" and job.name == "seed=2"
    assert job.command[1:4] == ["-m", "mp_lightning.meta", "fit"]
    config = compose("fit", job.command[4:])
    assert config.hydra.run.dir == f"{folder}/name" and config.hydra.verbose is True and config.hydra.mode is None
    assert list(config.data) == [f"{folder}.npz", "b.npz"] and config.seed == 2
    assert list(config.tasks.architectures) == ["conv4-2", "resnet20-2"]


def test_a_job_of_other_settings_in_the_folder_of_another_fails(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It would be given the score of a run that is not its own."""
    once = 'echo \'{"nll": 1.5}\' > "$0/report.json"'
    first = shell_job(0, tmp_path / "run", once)
    other = replace(first, number=1, name="seed=1", config=OmegaConf.merge(CONFIG, {"seed": 1}))
    done, refused = run([first, other])
    assert done == Outcome(score=1.5)
    assert "is that of job 0 (seed=0), which has other settings; leave out hydra.sweep.subdir=" in str(refused.error)
    assert "Job 1 (seed=1) failed: its folder" in capfd.readouterr().out


def test_jobs_that_add_to_one_another_in_a_folder_run_one_after_the_other(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As sweeps over arms and seeds of a comparison do; none may be left out, or meet another in its folder."""
    alone = 'mkdir "$0/lock" && sleep 0.1 && rmdir "$0/lock" && echo job >> "$0/made"'
    jobs = [shell_job(number, tmp_path / "run", alone) for number in range(3)]
    jobs = [replace(job, config=OmegaConf.merge(CONFIG, {"arms": [f"a{job.number // 2}"]})) for job in jobs]
    assert run(jobs, at_a_time=3) == [Outcome()] * 3
    assert (tmp_path / "run" / "made").read_text().split() == ["job"] * 2, "0 and 1 are the same"
    printed = capfd.readouterr().out
    assert "Job 0 (seed=0) finished" in printed and "Job 2 (seed=2) finished" in printed and "Job 1" not in printed
