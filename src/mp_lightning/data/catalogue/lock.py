"""One process at a time in the folder of a dataset."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows, where two processes may do the same work twice
    fcntl = None  # type: ignore[assignment]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder and wait until no other process, such as another rank of the same job, is in this block.

    Where nothing can be written there is no lock, and nothing to guard.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError:
        file = None
    try:
        if file is not None and fcntl is not None:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        if file is not None:
            file.close()
