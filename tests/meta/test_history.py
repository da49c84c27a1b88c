"""metrics.csv: its rows, and what a resumed run does with those of the run before."""

import math
from pathlib import Path

import pytest

from mp_lightning.meta.history import ROWS, History, rows_every
from mp_lightning.runs import RunFolderError


def add_steps(history: History, first: int, last: int, steps: int = 10) -> None:
    """What meta-training notes in meta-steps ``first`` to ``last`` of ``steps``."""
    for step in range(first, last + 1):
        history.add({"a": (float(step), 2.0 * step), "b": (0.1 * step, 1.0)})
        if step % 2 == 0 or step == 1:
            sites = {"scale": [0.5, 0.25 + step], "noise": [0.75, 0.8], "multiplier": [0.4, 0.3 * step]}
            history.observe(0.5 * step, {"a": sites, "b": sites})
            history.write(step)


def test_rows_hold_the_mean_since_the_last_row(tmp_path: Path) -> None:
    history = History(tmp_path / "metrics.csv")
    add_steps(history, 1, 4)
    table = history.read()
    assert table["step"] == [1, 2, 4]
    assert table["a/train_loss"] == [1, 2, 3.5]
    assert table["a/valid_loss"] == [2, 4, 7]
    assert table["b/site1/scale"] == [1.25, 2.25, 4.25]
    assert table["b/site0/noise"] == [0.75] * 3
    assert table["a/site1/multiplier"] == [0.3 * 1, 0.3 * 2, 0.3 * 4]
    assert table["phi/gradient_norm"] == [0.5, 1, 2]


def test_a_row_is_returned_as_it_is_written(tmp_path: Path) -> None:
    history = History(tmp_path / "metrics.csv")
    history.add({"a": (1.0, 2.0)})
    history.observe(0.25, {"a": {"scale": [0.5]}})
    row = history.write(1)
    assert row == {"a/train_loss": 1.0, "a/valid_loss": 2.0, "a/site0/scale": 0.5, "phi/gradient_norm": 0.25}
    assert history.read() == {"step": [1.0], **{name: [value] for name, value in row.items()}}


def test_steps_that_a_task_was_left_out_of_do_not_count_for_its_loss(tmp_path: Path) -> None:
    history = History(tmp_path / "metrics.csv")
    for loss in (1.0, math.nan, 3.0):
        history.add({"a": (loss, 2 * loss), "b": (math.nan, math.nan)})
    row = history.write(3)
    assert (row["a/train_loss"], row["a/valid_loss"]) == (2.0, 4.0)
    assert math.isnan(row["b/train_loss"]) and math.isnan(row["b/valid_loss"])


def test_a_table_that_cannot_be_written_names_its_folder(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    history = History(tmp_path / "run" / "metrics.csv")
    history.add({"a": (1.0, 2.0)})
    with pytest.raises(RunFolderError, match=r"run' cannot be written \(Not a directory\); choose another with"):
        history.write(1)


def test_a_table_that_cannot_be_cut_names_its_folder(tmp_path: Path) -> None:
    history = History(tmp_path / "metrics.csv")
    add_steps(history, 1, 4)
    (tmp_path / "metrics.csv.partial").mkdir()
    with pytest.raises(RunFolderError, match=r"cannot be written \(Is a directory\); choose another with"):
        history.resume(2, {})
    assert history.read()["step"] == [1, 2, 4]


def test_rows_are_due_about_a_hundred_times() -> None:
    for steps in (1, 5, 99, 100, 150, 1000, 12345):
        due = [step for step in range(1, steps + 1) if History.is_due(step, steps)]
        assert due[0] == 1 and due[-1] == steps
        assert min(steps, ROWS) <= len(due) <= 2 * ROWS + 2
        assert all(step % rows_every(steps) == 0 for step in due[1:-1])


@pytest.mark.parametrize("stop", [3, 4, 5])
@pytest.mark.parametrize("written_after", [0, 3])
def test_resumed_equals_uninterrupted(tmp_path: Path, stop: int, written_after: int) -> None:
    whole, broken = History(tmp_path / "whole.csv"), History(tmp_path / "broken.csv")
    add_steps(whole, 1, 10)
    add_steps(broken, 1, stop)
    pending = broken.pending()
    add_steps(broken, stop + 1, stop + written_after)  # after the checkpoint, before the run was killed
    again = History(tmp_path / "broken.csv")
    again.resume(stop, pending)
    add_steps(again, stop + 1, 10)
    assert again.path.read_bytes() == whole.path.read_bytes()


def test_a_row_cut_off_by_a_kill_is_dropped(tmp_path: Path) -> None:
    history = History(tmp_path / "metrics.csv")
    add_steps(history, 1, 4)
    whole = history.path.read_bytes()
    history.path.write_bytes(whole + b"6,0.1")
    history.truncate(6)
    assert history.path.read_bytes() == whole
    history.path.write_bytes(whole[:-4])
    history.truncate(4)
    assert history.read()["step"] == [1, 2]


def test_a_table_of_which_a_kill_left_a_part_of_the_header_begins_anew(tmp_path: Path) -> None:
    history = History(tmp_path / "metrics.csv")
    history.path.write_text("step,los")
    history.truncate(5)
    assert not history.path.exists()


@pytest.mark.parametrize("left", [b"", b"step,a/tr", b"step,a/train_loss\r\n1,0.5\r\n"])
def test_from_the_start_nothing_is_left_of_the_run_before(tmp_path: Path, left: bytes) -> None:
    history = History(tmp_path / "metrics.csv")
    history.path.write_bytes(left)
    history.resume(0, {})
    add_steps(history, 1, 2)
    assert history.read()["step"] == [1, 2]


def test_nothing_to_resume_is_fine(tmp_path: Path) -> None:
    history = History(tmp_path / "metrics.csv")
    history.resume(4, {})
    assert not history.path.exists()


def test_pending_is_plain(tmp_path: Path) -> None:
    history = History(tmp_path / "metrics.csv")
    history.add({"a": (1.0, 2.0)})
    assert history.pending() == {"a": [[1.0, 2.0]]}
