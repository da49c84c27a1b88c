"""Rows on disk: appended whole or not at all, never twice."""

import dataclasses
import math
from pathlib import Path

import pytest

from mp_lightning.compare.results import Details, Row, SiteMultiplier
from mp_lightning.compare.store import RunKey, Store, key_of
from mp_lightning.runs import RunFolderError

ROW = Row(
    **{
        "target": 'a, "b"\nc',
        "model": "m",
        "arm": "dropout:0.1+mixup",
        "seed": 3,
        "settings": "d",
        "parameters": "p=0.1",
    },
    **{"inference": "plain", "accuracy": 1 / 3, "nll": math.nan, "brier": 0.1, "ece": 0.2, "train_accuracy": 1.0},
    **{"train_nll": 1e-300, "mean_accuracy": 0.3, "mean_nll": math.inf, "mean_brier": 0.5, "mean_ece": 0.25},
    **{"step_ms": 1.5, "memory_mb": 2.0, "seconds": 3.0, "device": "cpu"},
)
DETAILS = Details([(1, 0.5)], [(2, 0.25, 0.5)], [SiteMultiplier("net.0", 0.4, 0.1)], acted=0.25)


def same(row: Row, other: Row) -> bool:
    pairs = zip(dataclasses.astuple(row), dataclasses.astuple(other), strict=True)
    return all(a == b or (a != a and b != b) for a, b in pairs)


def test_what_is_kept_comes_back_exactly(tmp_path: Path) -> None:
    store = Store(tmp_path / "results.csv")
    store.append(ROW, DETAILS)
    for one in (store, Store(tmp_path / "results.csv")):
        (row,) = one.rows([key_of(ROW)])
        assert same(row, ROW) and one.details(row) == DETAILS
        assert one.missing([key_of(ROW)]) == []


def test_the_same_run_is_kept_once(tmp_path: Path) -> None:
    store = Store(tmp_path / "results.csv")
    store.append(ROW, DETAILS)
    store.append(ROW, Details())
    Store(tmp_path / "results.csv").append(ROW, Details())
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 3  # the target's name holds a line break
    assert store.details(ROW) == DETAILS


@pytest.mark.parametrize("field", RunKey._fields)
def test_runs_that_differ_in_any_part_of_the_key_are_others(tmp_path: Path, field: str) -> None:
    store = Store(tmp_path / "results.csv")
    store.append(ROW, DETAILS)
    other = key_of(ROW)._replace(**{field: 9 if field == "seed" else "other"})
    assert store.missing([other, key_of(ROW)]) == [other]


def test_a_row_that_was_cut_off_anywhere_is_missing_and_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    rows = [dataclasses.replace(ROW, target="t", seed=seed) for seed in range(2)]
    store = Store(path)
    for row in rows:
        store.append(row, DETAILS)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for length in (0, 5, len(lines[0]), len(lines[0]) + 1, len(whole) - len(lines[2]) + 3, len(whole) - 1):
        path.write_bytes(whole[:length])
        again = Store(path)
        for key in again.missing(map(key_of, rows)):
            again.append(rows[key.seed], DETAILS)
        assert path.read_bytes() == whole, length


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.csv"
    store = Store(path)
    store.append(ROW, DETAILS)
    before = path.read_bytes()

    def fail(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(RunFolderError, match="No space left"):
        store.append(dataclasses.replace(ROW, seed=4), DETAILS)
    assert path.read_bytes() == before
    assert store.missing([key_of(ROW)._replace(seed=4)])


@pytest.mark.parametrize(
    "content", ["arm,seed\nnone,1\n", "{}\n", "\x00\n\x00\n"], ids=["other columns", "JSON", "binary"]
)
def test_another_file_is_refused_and_stays(tmp_path: Path, content: str) -> None:
    path = tmp_path / "results.csv"
    path.write_text(content)
    if content == "{}\n":  # a header without rows, of columns that are not ours
        path.write_text("{}\n{}\n")
    before = path.read_bytes()
    with pytest.raises(RunFolderError, match=r"results\.csv' is not a table of results of this version"):
        Store(path)
    assert path.read_bytes() == before


def test_details_that_are_lost_cost_no_row(tmp_path: Path) -> None:
    store = Store(tmp_path / "results.csv")
    store.append(ROW, DETAILS)
    (details,) = (tmp_path / "details").iterdir()
    for damage in (lambda: details.write_text("{"), lambda: details.write_text("[]"), details.unlink):
        damage()
        again = Store(tmp_path / "results.csv")
        assert again.details(again.rows([key_of(ROW)])[0]) == Details()
