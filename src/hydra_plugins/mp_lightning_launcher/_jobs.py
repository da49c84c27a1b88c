"""From the overrides of a sweep's jobs to their results."""

import json
import math
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, OmegaConf, open_dict

from hydra_plugins.mp_lightning_launcher._processes import (
    POLL,
    ProcessGroup,
    collected_signals,
    environment_without_ranks,
    stop,
)
from mp_lightning.cli.interruption import TERMINATED
from mp_lightning.cli.output import error_line, last_error
from mp_lightning.errors import UserError
from mp_lightning.runs import OUTPUT, REPORT, relevant_settings

# What a job must not inherit from the sweep: how there are several of it, and where they lie.
_OF_THE_SWEEP = ("hydra.mode", "hydra.run", "hydra.sweep", "hydra/sweep", "hydra.launcher", "hydra/launcher")


class SweepError(UserError):
    """Jobs of a sweep failed."""


@dataclass(frozen=True)
class Job:
    """A job of a sweep; ``name`` is what sets it apart from the others."""

    number: int
    name: str
    overrides: list[str]
    command: list[str]
    folder: Path
    config: DictConfig


@dataclass(frozen=True)
class Outcome:
    """The score of a job (held-out NLL in nats, None where its verb gives none), or its error in one line."""

    score: float | None = None
    error: str | None = None


class FailedJob(JobReturn):
    """Asked for its value it raises, without the lines that Hydra prints in that case."""

    @property
    def return_value(self) -> Any:
        """Never returns."""
        raise self._return_value

    @return_value.setter
    def return_value(self, value: Any) -> None:
        self._return_value = value


def make_job(loader: ConfigLoader, sweep: DictConfig, number: int, overrides: list[str]) -> Job:
    """The job of these overrides, as a command that runs it in single-run mode."""
    config = loader.load_sweep_config(sweep, overrides)
    with open_dict(config):
        config.hydra.job.id, config.hydra.job.num = str(number), number
    HydraConfig.instance().set_config(config)
    folder = Path(str(config.hydra.sweep.dir)) / str(config.hydra.sweep.subdir)
    verb = str(sweep.hydra.job.config_name)
    program = [sys.executable, "-m", "mp_lightning.meta", verb]
    own = [word for word in overrides if not word.startswith("command=")]
    kept = [word for word in sweep.hydra.overrides.hydra if not word.lstrip("+~").startswith(_OF_THE_SWEEP)]
    given = OverridesParser.create().parse_overrides(list(sweep.hydra.overrides.task))
    common = {override.get_key_element() for override in given if not override.is_sweep_override()}
    return Job(
        number=number,
        name=" ".join([word for word in own if word.partition("=")[0] not in common] or own) or verb,
        overrides=overrides,
        command=[*program, *kept, *own, f"hydra.run.dir={_as_value(str(folder))}"],
        folder=folder,
        config=config,
    )


def run_jobs(jobs: Sequence[Job], at_a_time: int) -> list[tuple[Job, Outcome]]:
    """Run every job to its end, and say on the terminal which starts and how it ends.

    Of jobs that share a folder such as are the same run once; such as add to one another, as arms and seeds do, run one
    after the other; and such as have other settings fail.

    Raises:
        KeyboardInterrupt: the sweep was interrupted.
        SystemExit: the sweep was terminated.
    """
    first_of: dict[Path, Job] = {}
    same: dict[int, int] = {}  # the number of the job that runs in place of each
    refused: dict[int, Outcome] = {}
    waiting: list[Job] = []
    for job in jobs:
        first = first_of.setdefault(job.folder, job)
        if _settings(job) != _settings(first):
            refused[job.number] = _tell(job, Outcome(error=_taken(job, first)))
            continue
        twin = next((one for one in waiting if one.folder == job.folder and _own(one) == _own(job)), job)
        same[job.number] = twin.number
        waiting += [job] if twin is job else []
    running: dict[Path, tuple[Job, ProcessGroup]] = {}
    outcomes: dict[int, Outcome] = {}
    environment = _environment(at_a_time)
    with collected_signals() as received:
        try:
            while (waiting or running) and not received:
                while len(running) < at_a_time:
                    free = [job for job in waiting if job.folder not in running]
                    if not free:
                        break
                    job = free[0]
                    waiting.remove(job)
                    try:
                        running[job.folder] = job, _start(job, environment, show_output=at_a_time == 1)
                    except OSError as error:
                        outcomes[job.number] = _tell(job, Outcome(error=_unwritable(job.folder, error)))
                for job, group in list(running.values()):
                    if group.code() is not None:
                        del running[job.folder]
                        outcomes[job.number] = _tell(job, _outcome(job.folder, group))
                        group.close()
                time.sleep(POLL)
        finally:
            stop([group for _, group in running.values()], received)
    if signal.SIGTERM in received:
        print(error_line("terminated; the same command continues this sweep"), file=sys.stderr)
        raise SystemExit(TERMINATED)
    if received:
        raise KeyboardInterrupt
    return [(job, refused.get(job.number) or outcomes[same[job.number]]) for job in jobs]


def job_returns(outcomes: Sequence[tuple[Job, Outcome]], failed: list[str], total: int) -> list[JobReturn]:
    """The results as sweepers read them.

    Args:
        outcomes: of the jobs of this launch.
        failed: names of the jobs that failed up to now, with their errors.
        total: number of jobs up to now.
    """
    error = SweepError(f"{len(failed)} of {total} jobs failed: {'; '.join(failed)}")
    returns: list[JobReturn] = []
    for job, outcome in outcomes:
        result = FailedJob() if outcome.error else JobReturn()
        result.status = JobStatus.FAILED if outcome.error else JobStatus.COMPLETED
        result.return_value = error if outcome.error else outcome.score
        result.overrides = job.overrides
        result.hydra_cfg = OmegaConf.masked_copy(job.config, ["hydra"])
        result.cfg = OmegaConf.masked_copy(job.config, [str(key) for key in job.config if key != "hydra"])
        result.working_dir = os.getcwd()
        result.task_name = job.config.hydra.job.name
        returns.append(result)
    return returns


def _as_value(text: str) -> str:
    """The text as Hydra reads it in an override, whatever it holds."""
    if re.fullmatch(r"[\w./-]+", text):
        return text
    return QuotedString(text.replace("${", r"\${"), Quote.single).with_quotes()


def _environment(at_a_time: int) -> dict[str, str]:
    environment = environment_without_ranks(os.environ)
    if at_a_time > 1:
        # Each process would otherwise compute with as many threads as there are cores, and wait for the others'.
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // at_a_time)))
    return environment


def _start(job: Job, environment: dict[str, str], show_output: bool) -> ProcessGroup:
    print(f"Job {job.number} ({job.name}) starts in {job.folder}", flush=True)
    return ProcessGroup(job.command, environment, job.folder / OUTPUT, show_output)


def _tell(job: Job, outcome: Outcome) -> Outcome:
    result = f"failed: {outcome.error}" if outcome.error else "finished"
    score = f" with NLL {outcome.score:.4f}" if outcome.score is not None else ""
    print(f"Job {job.number} ({job.name}) {result}{score}", flush=True)
    return outcome


def _outcome(folder: Path, group: ProcessGroup) -> Outcome:
    code = group.code()
    if code == 0:
        return Outcome(score=_score(folder))
    return Outcome(error=last_error(group.output()) or f"ended with {code}, see {shlex.quote(str(folder / OUTPUT))}")


def _own(job: Job) -> dict[str, Any]:
    """All settings of a job but those of Hydra."""
    own = OmegaConf.masked_copy(job.config, [str(key) for key in job.config if key != "hydra"])
    plain: Any = OmegaConf.to_container(own, resolve=True, throw_on_missing=False)
    return dict(plain)


def _settings(job: Job) -> dict[str, Any]:
    """Those that decide the result."""
    return relevant_settings(_own(job))


def _taken(job: Job, first: Job) -> str:
    return (
        f"its folder '{job.folder}' is that of job {first.number} ({first.name}), which has other settings; leave out "
        "hydra.sweep.subdir=, or let it tell the jobs apart"
    )


def _unwritable(folder: Path, error: OSError) -> str:
    return f"run folder '{folder}' cannot be written ({error.strerror}); choose another place with hydra.sweep.dir="


def _score(folder: Path) -> float | None:
    try:
        nll = json.loads((folder / REPORT).read_text(encoding="utf-8"))["nll"]
        return math.inf if nll is None else float(nll)  # None: a training that it was judged by diverged
    except (OSError, ValueError, KeyError):  # the verb gives no score
        return None
