"""The table at the end of meta-training."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from histories import description, history_of
from rich.console import Console
from rich.text import Text

from mp_lightning.meta.table import site_multipliers, training_table


def lines_of(
    columns: Mapping[str, list[float]], tasks: Mapping[str, Mapping], path: Path, width: int = 100
) -> list[str]:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(training_table(history_of(columns, path), tasks))
    return [line.rstrip() for line in capture.get().splitlines() if line.strip()]


def test_a_row_says_what_the_task_is_and_where_it_began_and_ended(tmp_path: Path) -> None:
    # Twenty rows, so the first and the last two count.
    columns = {
        "step": [float(step) for step in range(20)],
        "digits-a/train_loss": [3.0, 2.0, *[9.0] * 16, 1.0, 0.5],
        "digits-a/valid_loss": [2.0, 2.2, *[9.0] * 16, 1.5, 1.3],
        "digits-a/site0/multiplier": [*[9.0] * 18, 0.4, 0.5],
        "digits-a/site1/multiplier": [*[9.0] * 18, 0.6, 0.7],
    }
    *_, row = lines_of(columns, {"digits-a": description("resnet20-8", classes=5)}, tmp_path)
    assert row.split() == [
        *("digits-a", "resnet20-8", "32", "5", "100+200"),
        *("2.50", "->", "0.75", "2.10", "->", "1.40", "0.550"),
    ]


def test_steps_that_were_left_out_have_a_column_where_there_are_any(tmp_path: Path) -> None:
    history, tasks = history_of({"step": [1.0]}, tmp_path), {"a": description(), "b": description()}
    assert len(training_table(history, tasks, {"a": 0, "b": 0}).columns) == 8
    (*_, last) = training_table(history, tasks, {"a": 0, "b": 12}).columns
    assert list(last.cells) == ["0", "12"]


def test_rows_follow_the_order_of_the_tasks(tmp_path: Path) -> None:
    columns = {"step": [1.0], "b/train_loss": [1.0], "a/train_loss": [2.0]}
    *_, first, second = lines_of(columns, {"a": description(), "b": description()}, tmp_path)
    assert first.split()[0] == "a" and second.split()[0] == "b"
    assert "2.00 -> 2.00" in first and "1.00 -> 1.00" in second


def test_what_a_history_does_not_hold_is_a_dash(tmp_path: Path) -> None:
    columns = {"step": [1.0], "a/train_loss": [1.0], "a/site0/scale": [0.5], "a/site0/noise": [0.8]}
    *_, row = lines_of(columns, {"a": description()}, tmp_path)
    assert row.split()[-5:] == ["1.00", "->", "1.00", "-", "-"]


def test_names_in_brackets_are_no_markup(tmp_path: Path) -> None:
    *_, row = lines_of({"step": [1.0]}, {"x[red]-a": description()}, tmp_path)
    assert row.split()[0] == "x[red]-a"


@pytest.mark.parametrize(
    "name", ["tiny-imagenet-200-0-a", "a-folder-with-a-name-that-is-much-longer-than-a-column-4-b"]
)
@pytest.mark.parametrize("network", ["resnet20", "timm:mobilenetv4_conv_small_050.e3000_r224_in1k"])
def test_it_fits_a_hundred_columns_and_cuts_nothing_off(tmp_path: Path, name: str, network: str) -> None:
    columns = {"step": [1.0], f"{name}/train_loss": [12.5], f"{name}/valid_loss": [102.5]}
    task = description(network, classes=1000, images="100000 + 100000 of 224 pixels")
    lines = lines_of(columns, {name: task}, tmp_path)
    assert all(Text(line).cell_len <= 100 for line in lines)
    assert "…" not in "".join(lines)
    rows = lines[3:] if "multi-" in lines[0] else lines[2:]
    assert "100000+100000" in rows[0] and "12.50 -> 12.50" in rows[0] and "102.50 -> 102.50" in rows[0]
    pieces = [row.split() for row in rows]
    in_pieces = "".join(piece for row in pieces for piece in row if piece in name)
    assert in_pieces.startswith(name[:5]) and name[-3:] in in_pieces


def test_sites_come_in_the_order_of_depth() -> None:
    columns = {f"a/site{site}/multiplier": [float(site)] for site in sorted(range(12), key=str)}
    columns["a/site12/scale"] = columns["ab/site12/multiplier"] = [0.0]
    assert site_multipliers(columns, "a") == [[float(site)] for site in range(12)]
    assert site_multipliers(columns, "b") == []
