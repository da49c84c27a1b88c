"""Fetching the published files of a dataset, so that a dataset is there as a whole or not at all."""

import errno
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError, URLError

from torchvision.datasets.utils import check_md5, download_url, extract_archive

from mp_lightning.data.progress import Progress
from mp_lightning.errors import DataError

# Seconds without an answer, or without a byte of it, after which there is no network.
_PATIENCE = 60
_DISK_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOTDIR, errno.EEXIST),
}


@dataclass(frozen=True)
class Download:
    """One published file.

    Attributes:
        url: where it is.
        md5: its checksum: torchvision's, where torchvision states one.
        gives: the files and folders that come out of it and are needed; its own name where it is used as it is.
    """

    url: str
    md5: str
    gives: tuple[str, ...]

    @property
    def file(self) -> str:
        """The file's name."""
        return self.url.rsplit("/", 1)[1]

    def is_in(self, folder: Path) -> bool:
        """Whether all that it gives is in the folder."""
        return all((folder / entry).exists() for entry in self.gives)


def fetch(name: str, downloads: Sequence[Download], folder: Path, on_progress: Progress) -> None:
    """Bring into the folder what the downloads give and is not there yet.

    A published file that the user has put into the folder is used instead of the network. Everything is written into a
    subfolder ``.partial`` first and moved when it is whole; nothing that is in the folder already is changed.

    Raises:
        DataError: no network, a wrong checksum, no space or no right to write.
    """
    for download in downloads:
        if download.is_in(folder):
            continue
        try:
            _fetch(download, folder, on_progress)
        except DataError:
            raise
        # torchvision, urllib and the unpackers raise errors of many kinds, none of which say what to do.
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
                raise DataError(
                    f"'{name}' cannot be written to '{folder}' ({error.strerror}): free some space or allow writing "
                    "there, or choose another data root"
                ) from error
            urls = " and ".join(other.url for other in downloads if not other.is_in(folder))
            raise DataError(f"'{name}' cannot be downloaded ({_reason(error)}): put {urls} into '{folder}'") from error


def _fetch(download: Download, folder: Path, on_progress: Progress) -> None:
    partial, archive = folder / ".partial", folder / download.file
    # What a killed process has left.
    shutil.rmtree(partial, ignore_errors=True)
    try:
        content = partial / "content"
        content.mkdir(parents=True)
        brought = archive.exists()
        if not brought:
            with _limited_patience():
                download_url(download.url, partial, md5=download.md5)
            os.replace(partial / download.file, archive)
        elif not check_md5(archive, download.md5):
            raise DataError(f"'{archive}' is damaged or not that of {download.url}: replace it, or remove it")
        if download.gives == (download.file,):
            return
        on_progress(f"unpacking {download.file}", 0, 1)
        extract_archive(archive, content)
        for entry in download.gives:
            if not (folder / entry).exists():
                (content / entry).rename(folder / entry)
        on_progress(f"unpacking {download.file}", 1, 1)
        if not brought:
            archive.unlink()
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _limited_patience() -> Iterator[None]:
    # Python's own default is to wait for ever, and torchvision states no other.
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_PATIENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _reason(error: Exception) -> str:
    if isinstance(error, RuntimeError):
        return "what arrived is incomplete or altered"
    cause = error.reason if isinstance(error, URLError) and not isinstance(error, HTTPError) else error
    return getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
