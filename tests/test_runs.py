"""The folder of a run: whose it is, and for how long."""

from pathlib import Path

import pytest

from mp_lightning.runs import RunFolder, RunFolderError


def test_a_folder_that_was_refused_can_be_started_anew_by_the_same_process(tmp_path: Path) -> None:
    """As in a notebook, which keeps the error, and all that it holds, until the next one."""
    RunFolder(tmp_path / "run", {"lr": 1}).release()
    with pytest.raises(RunFolderError, match=r"lr=1, not 2.*start anew with") as kept:
        RunFolder(tmp_path / "run", {"lr": 2})
    RunFolder(tmp_path / "run", {"lr": 2}, fresh=True).release()
    assert kept.value is not None


def test_two_do_not_work_in_one_folder(tmp_path: Path) -> None:
    first = RunFolder(tmp_path, {})
    with pytest.raises(RunFolderError, match="another process works in run folder"):
        RunFolder(tmp_path, {})
    first.release()
    RunFolder(tmp_path, {}).release()


@pytest.mark.parametrize("text", ["// of an editor\n{}", "", "[1]"])
def test_settings_that_are_not_a_run_s_stay_as_they_are(tmp_path: Path, text: str) -> None:
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(RunFolderError, match=r"settings\.json' does not hold the settings of a run: remove it, or"):
        RunFolder(tmp_path, {"lr": 1})
    assert (tmp_path / "settings.json").read_text() == text


def test_a_folder_that_holds_no_run_is_not_cleared_out(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("")
    with pytest.raises(RunFolderError, match=r"holds 'train\.py' and no run that could be started anew"):
        RunFolder(tmp_path, {}, fresh=True)
    assert (tmp_path / "train.py").exists()
    RunFolder(tmp_path / "new", {}, fresh=True).release()
