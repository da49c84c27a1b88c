"""Whether images on disk are those that were read before, without reading them."""

import os
from collections.abc import Iterable
from contextlib import suppress

from mp_lightning.data.catalogue import list_datasets
from mp_lightning.walking import walk

# Number of files, their size in bytes, and the newest time of a change in ns since the epoch.
Stamp = list[int]


def stamps(sources: Iterable[str]) -> dict[str, Stamp]:
    """Of the sources that are files or folders, and there, by their paths as given."""
    paths = {source: os.path.expanduser(source) for source in sources if source not in list_datasets()}
    return {source: _stamp(path) for source, path in paths.items() if os.path.exists(path)}


def _stamp(path: str) -> Stamp:
    files = [path] if os.path.isfile(path) else []
    files += [os.path.join(folder, name) for folder, _, names in walk(path) for name in names]
    found = [0, 0, 0]
    for file in files:
        with suppress(OSError):  # it may go meanwhile
            state = os.stat(file)
            found = [found[0] + 1, found[1] + state.st_size, max(found[2], state.st_mtime_ns)]
    return found
