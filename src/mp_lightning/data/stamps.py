"""Whether images on disk are those that were read before, without reading them."""

import os
from collections.abc import Iterable
from pathlib import Path

from mp_lightning.data.catalogue import list_datasets

# Number of files, their size in bytes, and the newest time of a change in ns since the epoch.
Stamp = list[int]


def stamps(sources: Iterable[str]) -> dict[str, Stamp]:
    """Of the sources that are files or folders, and there, by their paths as given."""
    named = list_datasets()
    return {source: _stamp(Path(source).expanduser()) for source in sources if source not in named and _there(source)}


def _there(source: str) -> bool:
    return Path(source).expanduser().exists()


def _stamp(path: Path) -> Stamp:
    if path.is_file():
        return [1, path.stat().st_size, path.stat().st_mtime_ns]
    found = [0, 0, path.stat().st_mtime_ns]
    for folder, _, files in os.walk(path):
        for name in files:
            state = (Path(folder) / name).lstat()
            found = [found[0] + 1, found[1] + state.st_size, max(found[2], state.st_mtime_ns)]
    return found
