"""What Hydra sees of the launcher. Every Hydra program on the system imports this file: it must stay light."""

import os
from collections.abc import Sequence

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class ProcessLauncher(Launcher):
    """Runs each job as ``python -m mp_lightning.meta VERB ...`` in ``<hydra.sweep.dir>/<hydra.sweep.subdir>``.

    Args:
        jobs: how many run at a time.
    """

    def __init__(self, jobs: int = 1) -> None:
        self._jobs = jobs
        self._failed: list[str] = []

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what the jobs' configurations are made from.

        Raises:
            ConfigurationError: ``jobs`` is no number of jobs, or the system has no process groups.
        """
        from mp_lightning.errors import ConfigurationError

        if not isinstance(self._jobs, int) or isinstance(self._jobs, bool) or self._jobs < 1:
            raise ConfigurationError(f"hydra.launcher.jobs={self._jobs} cannot be used; give a positive whole number")
        if not hasattr(os, "killpg"):
            raise ConfigurationError("hydra/launcher=processes needs process groups; use hydra/launcher=basic")
        self._loader = hydra_context.config_loader
        self._config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run all jobs, also after one has failed; the results are in the order of the jobs.

        A job that failed has the status FAILED, and asking for its value raises an error that names all that failed.

        Raises:
            ConfigurationError: there is no job.
            KeyboardInterrupt, SystemExit: the sweep was interrupted or terminated; its jobs are ended.
        """
        from hydra_plugins.mp_lightning_launcher import _jobs
        from mp_lightning.errors import ConfigurationError

        if not job_overrides:
            raise ConfigurationError("the sweep has no job, as no configuration fits a pattern; list the names, a,b")
        jobs = [
            _jobs.make_job(self._loader, self._config, initial_job_idx + index, list(overrides))
            for index, overrides in enumerate(job_overrides)
        ]
        outcomes = _jobs.run_jobs(jobs, self._jobs)
        self._failed += [f"{job.name} ({outcome.error})" for job, outcome in outcomes if outcome.error]
        return _jobs.job_returns(outcomes, self._failed, initial_job_idx + len(jobs))
