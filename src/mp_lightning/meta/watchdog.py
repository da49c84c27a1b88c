"""Notices that a process of a run is gone, whatever the others are waiting for, and ends them."""

import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

_INTERVAL = 1.0  # seconds between two signs of life
_PATIENCE = 15.0  # seconds without any


class RankWatch:
    """A thread that gives signs of life to the other processes and listens for theirs.

    A collective operation waits for a lost process for minutes, on some devices forever, and cannot be interrupted from
    within its process; so the signs go through a store of their own, and ``on_lost`` should end the process.

    Args:
        host: address of the first process.
        rank: of this process.
        world: number of processes.
        share: gives every process the number that the first one passed.
        on_lost: called, on the thread, with the rank that gave no sign.
    """

    def __init__(
        self, host: str, rank: int, world: int, share: Callable[[int], int], on_lost: Callable[[int], None]
    ) -> None:
        self._rank, self._world, self._on_lost = rank, world, on_lost
        timeout = timedelta(seconds=_PATIENCE)
        # The first process takes any free port and tells it to the others.
        if rank == 0:
            self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
            share(self._store.port)
        else:
            self._store = dist.TCPStore(host, share(0), is_master=False, wait_for_workers=False, timeout=timeout)
        self._over = threading.Event()
        self._rounds = 0
        self._thread = threading.Thread(target=self._run, name="rank-watch", daemon=True)
        self._thread.start()
        if rank > 0:
            threading.Thread(target=self._watch_store, name="store-watch", daemon=True).start()

    def stop(self) -> None:
        """Stop listening. Before its process ends or stops as well, every process must have come this far."""
        self._over.set()
        self._thread.join(_PATIENCE)  # it may wait for a store that does not answer

    @property
    def stopped(self) -> bool:
        """Whether :meth:`stop` was called."""
        return self._over.is_set()

    def _run(self) -> None:
        others = [rank for rank in range(self._world) if rank != self._rank]
        last = dict.fromkeys(others, (-1, time.monotonic()))
        while not self._over.wait(_INTERVAL):
            try:
                self._store.add(str(self._rank), 1)
                signs = {rank: self._store.add(str(rank), 0) for rank in others}
            except RuntimeError:  # the store lives in the first process
                if not self._over.is_set():
                    self._on_lost(0)
                return
            self._rounds += 1
            now = time.monotonic()
            for rank, sign in signs.items():
                if sign != last[rank][0]:
                    last[rank] = sign, now
                elif now - last[rank][1] > _PATIENCE:
                    self._on_lost(rank)
                    return

    def _watch_store(self) -> None:
        """End where the store no longer answers, as of a first process that is stopped: its requests wait forever.

        Moments in which this process was awake are counted, not seconds, or one that was stopped itself would end.
        """
        seen, silent = 0, 0
        while not self._over.wait(_INTERVAL):
            silent = silent + 1 if self._rounds == seen else 0
            seen = self._rounds
            if silent * _INTERVAL > _PATIENCE:
                self._on_lost(0)
                return
