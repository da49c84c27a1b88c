"""The benchmarks run, keep what they measured, and refuse what they do not know."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.measure import interleaved
from benchmarks.table import Table

CHECKOUT = Path(__file__).resolve().parents[1]


def run(*arguments, expect=0):
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == expect, done.stderr
    return done.stdout + done.stderr


def rows(path):
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# Python ") and "threads" in lines[0]
    return list(csv.DictReader(lines[1:]))


SMALL = ["--rounds", "2", "--batch", "4"]


@pytest.mark.slow
def test_overhead_writes_one_row_for_each_arm_and_continues(tmp_path):
    out = tmp_path / "overhead.csv"
    command = ["benchmarks.overhead", "--models", "conv4", "--out", str(out), *SMALL]
    printed = run(*command)
    found = rows(out)
    assert [row["arm"] for row in found] == ["plain", "dropout2d", "dropout", "dropblock", "reference", "fast"]
    assert found[0]["ratio"] == "1.000" and all(float(row["floor_ms"]) > 0 for row in found)
    assert "byte floor" in printed and "| fast |" in printed
    content = out.read_text()
    run(*command)
    assert out.read_text() == content


@pytest.mark.slow
def test_inference_and_meta_step_write_their_arms(tmp_path):
    run("benchmarks.inference", "--models", "conv4", "--samples", "2", "--out", str(tmp_path / "i.csv"), *SMALL)
    assert [row["arm"] for row in rows(tmp_path / "i.csv")] == ["plain", "mc", "reference", "mean", "fold"]
    run("benchmarks.meta_step", "--models", "conv4", "--out", str(tmp_path / "m.csv"), *SMALL)
    assert [row["arm"] for row in rows(tmp_path / "m.csv")] == ["plain", "reference", "fast"]


@pytest.mark.parametrize("name", ["overhead", "inference", "meta_step"])
def test_an_unknown_model_lists_the_known_ones(name):
    printed = run(f"benchmarks.{name}", "--models", "alexnet", expect=2)
    assert "'alexnet' is unknown; use some of conv4" in printed and "Traceback" not in printed


def test_ratios_are_those_of_a_round():
    work = torch.randn(200, 200)
    timings = interleaved([lambda: work @ work, lambda: [work @ work for _ in range(3)]], 5, torch.device("cpu"))
    assert timings[0].ratios == [1.0] * 5
    for ratio, own, first in zip(timings[1].ratios, timings[1].milliseconds, timings[0].milliseconds, strict=True):
        assert ratio == pytest.approx(own / first)


def test_a_table_with_other_columns_is_left_alone(tmp_path):
    path = tmp_path / "table.csv"
    Table(path, ["a", "b"], "heading").add([{"a": "1", "b": "2"}])
    with pytest.raises(SystemExit, match="other columns"):
        Table(path, ["a", "c"], "heading")
    assert Table(path, ["a", "b"], "heading").has({"a": "1"})
