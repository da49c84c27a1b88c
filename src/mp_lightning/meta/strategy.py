"""A strategy for networks that never leave their process: some tasks in each, and phi in all of them."""

import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from mp_lightning.meta.exchange import reporting_losses
from mp_lightning.meta.watchdog import RankWatch

NAME = "task_parallel"
RANK_LOST = 3  # the exit code of a process that ended because another one had


class TaskParallelStrategy(DDPStrategy):
    """Starts processes and connects them as DDP does, but wraps, compares and overwrites nothing.

    What the processes exchange is the module's business (:class:`~mp_lightning.meta.joint.JointGradient`). phi starts
    equal everywhere because its seed is. A process that is lost ends the others within half a minute.
    """

    strategy_name = NAME

    _watch: RankWatch | None = None

    def configure_ddp(self) -> None:
        """Leave the module as it is."""

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        self._launcher = _WatchedLauncher(self.cluster_environment, self.num_processes, self.num_nodes)

    def setup_environment(self) -> None:
        with reporting_losses():
            super().setup_environment()
            if self.world_size > 1:
                assert self.cluster_environment is not None
                address = self.cluster_environment.main_address
                self._watch = RankWatch(address, self.global_rank, self.world_size, self.broadcast, self._end_without)

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all processes.

        Raises:
            RankLostError: one of them is gone.
        """
        with reporting_losses():
            super().barrier(*args, **kwargs)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """The object of process ``src``.

        Raises:
            RankLostError: one of them is gone.
        """
        with reporting_losses():
            return super().broadcast(obj, src)

    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        self._stop_observing()
        if self._watch is not None:
            # No barrier: the others may be gone. What this process says is the reason, not that they are.
            self._watch.stop()

    def teardown(self) -> None:
        if self._watch is not None and not self._watch.stopped:
            self._watch.stop()
            self.barrier()
        self._stop_observing()
        super().teardown()

    def _end_without(self, rank: int) -> None:
        if isinstance(self._launcher, _WatchedLauncher):
            self._launcher.kill_children()
        _end_without(rank)

    def _stop_observing(self) -> None:
        if isinstance(self._launcher, _WatchedLauncher):
            self._launcher.over.set()


class _WatchedLauncher(_SubprocessScriptLauncher):
    """Lightning's launcher of local processes; if one of them ends badly, so does this process, and it says why."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.over = threading.Event()  # this process ends by itself, and says why

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
            threading.Thread(target=self._observe, name="rank-observer", daemon=True).start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)

    def kill_children(self) -> None:
        """End the processes that this one started: one that is stopped would stay, and hold the output open."""
        for process in self.procs:
            process.kill()

    def _observe(self) -> None:
        while not self.over.wait(0.5):
            codes = [process.poll() for process in self.procs]
            for rank, code in enumerate(codes, start=1):
                if code:
                    # Time for this process to notice by itself, with a better reason.
                    if self.over.wait(3.0):
                        return
                    self.kill_children()
                    _end_without(rank)
            if None not in codes:
                return


def _end_without(rank: int) -> None:
    """End this process at once, whatever it is waiting for."""
    own = dist.get_rank() if dist.is_initialized() else 0
    print(
        f"mp_lightning: process {own} ends because process {rank} of this run is gone; "
        "the same command continues from the last checkpoint",
        file=sys.stderr,
        flush=True,
    )
    os._exit(RANK_LOST)


StrategyRegistry.register(NAME, TaskParallelStrategy, description="tasks shared out over processes; phi in all of them")
