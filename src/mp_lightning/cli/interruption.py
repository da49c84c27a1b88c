"""Ctrl-C and SIGTERM: one line, exit code 130 or 143, and the end of the process whatever becomes of an exception."""

import os
import signal
import sys
import threading
from types import FrameType
from typing import NoReturn

import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from mp_lightning.cli.output import error_line

INTERRUPTED = 130  # 128 + SIGINT
TERMINATED = 143  # 128 + SIGTERM
# Seconds from Ctrl-C to the end, should a library swallow the exception or wait for a process that is gone.
PATIENCE = 30.0
_USUAL = signal.default_int_handler
_came = False  # a library that it stops may make another error of it
_said = False
_saying = threading.RLock()  # a signal may come while it is held


def listen(what: str) -> None:
    """From now on Ctrl-C ends this process, within :data:`PATIENCE`.

    Someone who handles it otherwise, or calls from a thread, is left alone.

    Args:
        what: it is that the same command would continue.
    """

    def on_ctrl_c(number: int, frame: FrameType | None) -> None:
        global _came
        if not _came:
            _came = True
            last = threading.Timer(PATIENCE, _end_at_once, (what,))
            last.daemon = True
            last.start()
        _USUAL(number, frame)

    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is _USUAL:
        signal.signal(signal.SIGINT, on_ctrl_c)


def listen_to_sigterm(what: str) -> None:
    """From now on SIGTERM ends this process with a line; not where someone handles it otherwise, or from a thread.

    Args:
        what: it is that the same command would continue.
    """
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda number, frame: _end_at_once(what, "terminated", TERMINATED))


def came() -> bool:
    """Whether there was a Ctrl-C."""
    return _came


def end(what: str) -> NoReturn:
    """Say it, on the first of several processes, and leave."""
    # At its exit a process would wait for those that it exchanges with, and they have left or are about to.
    if dist.is_available() and dist.is_initialized():
        _end_at_once(what)
    _say(what)
    sys.exit(INTERRUPTED)


def _end_at_once(what: str, how: str = "interrupted", code: int = INTERRUPTED) -> NoReturn:
    try:
        _say(what, how)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _say(what: str, how: str = "interrupted") -> None:
    global _said
    with _saying:
        if rank() == 0 and not _said:
            print(error_line(f"{how}; the same command continues this {what}"), file=sys.stderr, flush=True)
        _said = True


def rank() -> int:
    """Of this process among those that train together."""
    number: int = getattr(rank_zero_only, "rank", 0)
    return number
