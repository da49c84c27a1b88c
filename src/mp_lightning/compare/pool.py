"""Runs one after the other, or several at a time in processes of their own, which do not outlive this one.

Several processes share one GPU, or are dealt out over those there are.
"""

import multiprocessing
import os
import pickle
import queue
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from mp_lightning.compare.results import Details, Row
from mp_lightning.compare.run import Experiment, Job, RunError, perform
from mp_lightning.errors import ConfigurationError, one_line
from mp_lightning.quiet import quiet

Finished = tuple[Job, Row, Details]
_POLL = 0.2  # seconds


def perform_all(
    experiment: Experiment, jobs: Sequence[Job], processes: int, on_step: Callable[[int], None]
) -> Generator[Finished, None, None]:
    """Make all runs; yields each when it is finished.

    Args:
        experiment: what they share.
        jobs: what is to be made.
        processes: how many at a time; with one, in this process.
        on_step: called with the number of training batches that were made since the last call.

    Raises:
        UserError: a run failed; others that were going on are given up.
        ConfigurationError: the experiment cannot be sent to other processes.
    """
    if not jobs:
        return
    if processes == 1 or len(jobs) == 1:
        for job in jobs:
            yield (job, *perform(experiment, job, on_step))
        return
    yield from _in_processes(experiment, jobs, min(processes, len(jobs)), on_step)


def _in_processes(
    experiment: Experiment, jobs: Sequence[Job], processes: int, on_step: Callable[[int], None]
) -> Generator[Finished, None, None]:
    _check_sendable(experiment, jobs)
    # A process that was forked could not use CUDA, and may hang in a library's threads.
    context = multiprocessing.get_context("spawn")
    steps: Any = context.Queue()
    threads = max(1, torch.get_num_threads() // processes)
    # Sent at the start, jobs too: tensors that are sent later are handed over by threads, which complain on standard
    # error when the other process is gone.
    shared = (experiment, list(jobs), steps, context.Value("i", 0), threads, multiprocessing.get_start_method())
    pool = ProcessPoolExecutor(processes, context, _begin, shared)
    others = set(multiprocessing.active_children())
    own: set[Any] = set()
    waiting: set[Future[tuple[Row, Details]]] = set()
    try:
        with _interrupts_wait():
            numbers = {pool.submit(_perform, number): number for number in range(len(jobs))}
            own, waiting = set(multiprocessing.active_children()) - others, set(numbers)
        while waiting:
            done, waiting = wait(waiting, timeout=_POLL, return_when=FIRST_COMPLETED)
            _drain(steps, on_step)
            for future in sorted(done, key=lambda one: one.exception() is not None):  # what is finished is kept
                yield (jobs[numbers[future]], *future.result())
        pool.shutdown()  # a process sends what it has left to say before it ends
        _drain(steps, on_step)
    except BrokenProcessPool as error:
        raise RunError(
            "a process of the comparison ended by itself: the system may have killed it when memory ran out, or it "
            "could not import the script (put the call under if __name__ == '__main__':; notebooks need jobs=1); "
            "the same command continues with what is missing, with fewer processes (jobs=) if need be"
        ) from error
    finally:
        # Killed: Lightning answers SIGTERM by ending the run, and the process would go on to wait for another one.
        for process in own:
            process.kill()
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Ctrl-C is answered after this context, and never by a process that is started in it."""
    if not hasattr(signal, "pthread_sigmask"):  # on Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _check_sendable(experiment: Experiment, jobs: Sequence[Job]) -> None:
    for what, value in [("the experiment", experiment), *((f"arm '{job.key.arm}'", job.arm) for job in jobs)]:
        try:
            pickle.dumps(value)
        except Exception as error:  # whatever a user's class raises
            raise ConfigurationError(
                f"{what} cannot be sent to other processes ({one_line(error, 200)}); use jobs=1, or "
                "functions and classes at the top level of a module"
            ) from error


def _drain(steps: Any, on_step: Callable[[int], None]) -> None:
    try:
        while True:
            on_step(steps.get_nowait())
    except queue.Empty:
        return


# Of a process of the pool.
_EXPERIMENT: Experiment
_JOBS: Sequence[Job]
_STEPS: Any
_EVERY = 10  # steps between two messages


def _begin(
    experiment: Experiment, jobs: Sequence[Job], steps: Any, started: Any, threads: int, start_method: str
) -> None:
    global _EXPERIMENT, _JOBS, _STEPS
    multiprocessing.set_start_method(start_method, force=True)  # of the workers of loaders, as without such processes
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    gpus = torch.cuda.device_count()
    if gpus > 1 and "devices" not in experiment.trainer and experiment.trainer.get("accelerator") != "cpu":
        with started:
            number, started.value = started.value, started.value + 1
        experiment = replace(experiment, trainer={**experiment.trainer, "devices": [number % gpus]})
    _EXPERIMENT, _JOBS, _STEPS = experiment, jobs, steps


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _perform(number: int) -> tuple[Row, Details]:
    made = 0

    def on_step(count: int) -> None:
        nonlocal made
        made += count
        if made % _EVERY == 0:
            _STEPS.put(_EVERY)

    with quiet():
        row, details = perform(_EXPERIMENT, _JOBS[number], on_step)
    _STEPS.put(made % _EVERY)
    return row, details
