"""Several processes that need the same dataset, and one that is killed while it downloads."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from published_copies import Copy
from publisher import Publisher

from mp_lightning.data.catalogue.table import DATASETS

# Three ranks of a job, forked after the slow imports. Each begins when it is told to.
SCRIPT = """
import multiprocessing, sys, time
from dataclasses import replace
from pathlib import Path
from mp_lightning.data import load_dataset
from mp_lightning.data.catalogue.table import DATASETS

name, url, md5, folder = sys.argv[1:]
folder = Path(folder)
(download,) = DATASETS[name].downloads
DATASETS[name] = replace(DATASETS[name], downloads=(replace(download, url=url, md5=md5),))

def rank(number, begin):
    for _ in range(3000):
        if (folder / begin).exists():
            break
        time.sleep(0.02)
    train, test = load_dataset(name, folder / "root", 16)
    (folder / f"loaded-{number}").write_text(f"{train.images[:, 0, 8, 8].tolist()} {test.labels.tolist()}")

fork = multiprocessing.get_context("fork")
ranks = [fork.Process(target=rank, args=each) for each in ((0, "first"), (1, "others"), (2, "others"))]
for each in ranks:
    each.start()
print(*(each.pid for each in ranks), flush=True)
for each in ranks:
    each.join()
print(*(each.exitcode for each in ranks))
"""


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    assert condition()


def test_a_killed_download_counts_for_nothing_and_two_processes_download_once(
    publish: Callable[[str], Copy], publisher: Publisher, tmp_path: Path
) -> None:
    copy = publish("tiny_imagenet")
    (download,) = DATASETS["tiny_imagenet"].downloads
    folder = tmp_path / "root" / "tiny_imagenet"
    command = [sys.executable, "-c", SCRIPT, "tiny_imagenet", download.url, download.md5, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        first = int(job.stdout.readline().split()[0])

        # Half of the archive comes, and the rest never.
        killed = threading.Event()
        publisher.cut.add(download.file)
        publisher.after_half = lambda: killed.wait(60)
        (tmp_path / "first").touch()
        wait_for(lambda: (folder / ".partial" / download.file).exists())
        os.kill(first, signal.SIGKILL)
        killed.set()
        assert not (folder / "tiny-imagenet-200").exists()

        publisher.cut.clear()
        publisher.asked.clear()
        # So that a process which does not wait for the other has time to ask as well.
        publisher.before_body = lambda: time.sleep(0.5)
        (tmp_path / "others").touch()
        assert job.stdout.read() == f"{-signal.SIGKILL} 0 0\n"
    # torchvision asks first where a file is, and then for the file.
    assert publisher.asked == [download.file] * 2
    first_read, other_read = ((tmp_path / f"loaded-{number}").read_text() for number in (1, 2))
    assert first_read == other_read
    assert first_read.endswith(f" {list(copy.test)}")
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "cache", "tiny-imagenet-200"]
