"""Runs in processes of their own: none of them outlives a comparison that ends early, or keeps it waiting."""

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from small_runs import PHI, Small, experiment

from mp_lightning.compare.arms import parse_arm
from mp_lightning.compare.pool import perform_all
from mp_lightning.compare.run import Job, RunError
from mp_lightning.compare.store import RunKey

FIRST = "MP_LIGHTNING_TEST_FIRST"  # names the file in which the first process writes its number


class Uneven(Small):
    """Ends at once in the process that is first to train, and trains for minutes in any other."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        try:
            with Path(os.environ[FIRST]).open("x") as file:
                file.write(str(os.getpid()))
            self.trainer.should_stop = True
        except FileExistsError:
            time.sleep(0.2)
        return super().training_step(batch, batch_idx)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.timeout(120)
def test_an_idle_process_that_is_killed_does_not_leave_the_comparison_waiting_for_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies with the lock of the queue of runs, and Lightning answers the SIGTERM that the pool sends the other."""
    monkeypatch.setenv(FIRST, str(tmp_path / "first"))
    trainer = {"max_epochs": 200, "accelerator": "cpu", "limit_val_batches": 0, "min_epochs": 0}
    what, arm = experiment(module_factory=Uneven, trainer=trainer), parse_arm("none", PHI)
    jobs = [Job(RunKey("small", "Uneven", "none", seed, ""), arm) for seed in (0, 1)]
    made = perform_all(what, jobs, 2, lambda count: None)
    next(made)
    time.sleep(1)  # by now it waits for another run
    os.kill(int((tmp_path / "first").read_text()), signal.SIGKILL)
    end = threading.Timer(60, lambda: [process.kill() for process in multiprocessing.active_children()])
    end.start()
    started = time.monotonic()
    with pytest.raises(RunError, match="a process of the comparison ended by itself"):
        next(made)
    assert time.monotonic() - started < 50 and not multiprocessing.active_children()
    end.cancel()
