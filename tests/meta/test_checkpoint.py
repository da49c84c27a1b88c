"""Checkpoints: whole or not there, two of them, and what becomes of a run whose newest is damaged."""

import errno
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from tiny_runs import SETTINGS, BeforeStep, checkpoint_names, fit, new_module, tiny_tasks

from mp_lightning.meta.checkpoint import (
    RunCheckpointError,
    WholeFiles,
    checkpoint_path,
    checkpoints,
    newest_readable,
    read_checkpoint,
)
from mp_lightning.meta.module import JointMetaTraining
from mp_lightning.runs import RunFolderError

pytestmark = pytest.mark.filterwarnings("ignore:.*before the epoch ended.*", "ignore:.*LeafSpec.*")


@contextmanager
def small_disk() -> Iterator[Callable[[int], None]]:
    """Gives a function; once it is called, and inside this context, no file can grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def content(step: int) -> dict[str, object]:
    """What could be a checkpoint: 40 kB of numbers."""
    return {"description": {}, "meta_step": step, "phi": torch.full((10_000,), float(step))}


def saved(folder: Path, *steps: int) -> list[Path]:
    """The paths of checkpoints after these steps, which are written."""
    paths = [checkpoint_path(folder, step) for step in steps]
    for step, path in zip(steps, paths, strict=True):
        WholeFiles().save_checkpoint(content(step), path)
    return paths


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def quick_module(steps: int = 6) -> JointMetaTraining:
    return new_module(replace(SETTINGS, steps=steps), tasks=tiny_tasks(architectures=["conv4-2"])[:2])


@pytest.mark.parametrize("after", [0, 1000, 40_000])
def test_a_full_disk_leaves_the_old_file_and_no_part_of_the_new(tmp_path: Path, after: int) -> None:
    (path,) = saved(tmp_path, 3)
    before = path.read_bytes()
    files = WholeFiles()
    with small_disk() as limit:
        limit(after)
        files.save_checkpoint(content(4), path)
    assert files.failure is not None and files.failure.errno == errno.EFBIG
    assert path.read_bytes() == before
    assert names(tmp_path) == [path.name]


def test_a_file_in_the_place_of_the_folder_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "folder").touch()
    files = WholeFiles()
    files.save_checkpoint(content(1), checkpoint_path(tmp_path / "folder", 1))
    assert isinstance(files.failure, OSError)


def test_a_folder_that_is_not_there_is_made(tmp_path: Path) -> None:
    (path,) = saved(tmp_path / "a" / "b", 1)
    assert read_checkpoint(path)["meta_step"] == 1


def test_a_disk_that_fills_up_ends_the_run_and_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    message = r"cannot be written \(File too large\); choose another with"
    with small_disk() as limit, pytest.raises(RunFolderError, match=message) as caught:
        fit(quick_module(), tmp_path, BeforeStep(4, lambda module: limit(1000)))
    assert f"'{tmp_path / 'checkpoints'}'" in str(caught.value) and caught.value.on_every_rank
    assert checkpoint_names(tmp_path) == ["step-00000002.ckpt", "step-00000004.ckpt"]
    continued = fit(quick_module(), tmp_path)
    expected = fit(quick_module(), tmp_path / "other")
    for value, wanted in zip(continued.perturbation.phi, expected.perturbation.phi, strict=True):
        assert torch.equal(value, wanted)


@pytest.mark.parametrize(
    ("steps", "every", "kept"), [(6, 2, [4, 6]), (5, 2, [4, 5]), (3, 1, [2, 3]), (3, 5, [3]), (1, 1, [1])]
)
def test_the_newest_two_are_kept(tmp_path: Path, steps: int, every: int, kept: list[int]) -> None:
    fit(quick_module(steps), tmp_path, every=every)
    assert checkpoint_names(tmp_path) == [f"step-{step:08d}.ckpt" for step in kept]
    found = checkpoints(tmp_path / "checkpoints")
    assert [read_checkpoint(path)["meta_step"] for path in found] == kept[::-1]


def test_where_steps_take_long_checkpoints_come_sooner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mp_lightning.meta.checkpoint._LONGEST_SECONDS", 0.0)
    fit(quick_module(), tmp_path, every=100, rows=2)
    assert checkpoint_names(tmp_path) == ["step-00000004.ckpt", "step-00000006.ckpt"]


def test_checkpoints_come_in_the_order_of_their_steps(tmp_path: Path) -> None:
    saved(tmp_path, 9, 123456789, 10)
    assert [read_checkpoint(path)["meta_step"] for path in checkpoints(tmp_path)] == [123456789, 10, 9]


def test_where_there_is_no_checkpoint_there_is_nothing_to_tell(tmp_path: Path) -> None:
    told: list[str] = []
    assert newest_readable(tmp_path, told.append) is None
    assert newest_readable(tmp_path / "nowhere", told.append) is None
    assert not told


def truncate(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


def flip(path: Path, place: float) -> None:
    """Change one byte, as a disk does that forgets."""
    damaged = bytearray(path.read_bytes())
    damaged[int(place * len(damaged))] ^= 0x10
    path.write_bytes(damaged)


DAMAGES = {
    **{f"cut to {keep}": (truncate, keep) for keep in (0, 1, 100, -1)},
    **{f"a byte at {place}": (flip, place) for place in (0.1, 0.5, 0.9)},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path, damage: str) -> None:
    saved(tmp_path, 2, 4)
    function, argument = DAMAGES[damage]
    newest, before = checkpoints(tmp_path)
    function(newest, argument)
    told: list[str] = []
    found = newest_readable(tmp_path, told.append)
    assert found is not None and found[0] == before and found[1]["meta_step"] == 2
    assert told == [f"checkpoint '{newest}' is damaged and cannot be continued from; continuing from the one before"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_where_every_checkpoint_is_damaged_the_run_starts_anew_or_not_at_all(tmp_path: Path, damage: str) -> None:
    function, argument = DAMAGES[damage]
    for path in saved(tmp_path, 2, 4):
        function(path, argument)
    with pytest.raises(RunCheckpointError, match=r"step-00000002.ckpt' is damaged .* run.fresh=true"):
        newest_readable(tmp_path, lambda line: None)


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, 1)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(RunCheckpointError, match="not written by this version"):
        read_checkpoint(path)


class Harmful:
    """Runs code where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_no_code_of_a_checkpoint_is_run(tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, 1)
    torch.save({"description": Harmful(tmp_path / "harm")}, path)
    with pytest.raises(RunCheckpointError, match="is damaged"):
        read_checkpoint(path)
    assert not (tmp_path / "harm").exists()


def save_and_die(path: Path, moment: str) -> None:
    """Be killed in the middle of a save."""

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(os, moment, die)
    WholeFiles().save_checkpoint(content(4), path)


@pytest.mark.parametrize("moment", ["fsync", "replace"])
@pytest.mark.parametrize("step", [2, 4])
def test_killed_during_a_save_the_checkpoint_before_is_what_it_was(tmp_path: Path, moment: str, step: int) -> None:
    (path,) = saved(tmp_path, 2)
    before = path.read_bytes()
    process = get_context("fork").Process(target=save_and_die, args=(checkpoint_path(tmp_path, step), moment))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert f"step-{step:08d}.ckpt.partial" in names(tmp_path), "it was not killed in the middle"
    told: list[str] = []
    found = newest_readable(tmp_path, told.append)
    assert found is not None and found[0] == path and not told
    assert path.read_bytes() == before
    saved(tmp_path, step)
    assert "partial" not in " ".join(names(tmp_path))
