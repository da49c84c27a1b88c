"""A publisher of files, and the datasets that it publishes."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from published_copies import WRITERS, Copy
from publisher import Publisher, pack
from torchvision.datasets.utils import calculate_md5

from mp_lightning.data.catalogue.table import DATASETS


@pytest.fixture
def publisher(monkeypatch: pytest.MonkeyPatch) -> Iterator[Publisher]:
    monkeypatch.setenv("no_proxy", "*")
    publisher = Publisher()
    yield publisher
    publisher.stop()


@pytest.fixture
def publish(publisher: Publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Copy]:
    """Makes a tiny copy of a dataset, packs it, and lets the catalogue download that from the publisher."""

    def publish(name: str) -> Copy:
        dataset = DATASETS[name]
        copy = WRITERS[name](tmp_path / "published", monkeypatch)
        downloads = []
        for download in dataset.downloads:
            archive = tmp_path / "archives" / download.file
            pack(tmp_path / "published" / dataset.inside, download.gives, archive)
            publisher.files[download.file] = archive.read_bytes()
            downloads.append(replace(download, url=publisher.url(download.file), md5=calculate_md5(archive)))
        monkeypatch.setitem(DATASETS, name, replace(dataset, downloads=tuple(downloads)))
        return copy

    return publish
