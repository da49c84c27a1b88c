"""The course of meta-training as a table, metrics.csv, that a resumed run continues."""

import csv
import math
from pathlib import Path

from mp_lightning.runs import unusable
from mp_lightning.whole import write_text

ROWS = 100


def rows_every(steps: int) -> int:
    """Meta-steps from one row to the next in a run of so many."""
    return max(1, steps // ROWS)


class History:
    """Writes one row every hundredth of the run: mean losses since the last row, and what the sites gave at its step.

    Args:
        path: the table; rows that are there stay.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._losses: dict[str, list[tuple[float, float]]] = {}
        self._observed: dict[str, float] = {}

    @staticmethod
    def is_due(step: int, steps: int) -> bool:
        """Whether a row belongs after meta-step ``step`` (from 1) of ``steps``."""
        return step == 1 or step == steps or step % rows_every(steps) == 0

    def add(self, losses: dict[str, tuple[float, float]]) -> None:
        """Note the training and the validation loss of each task at one step."""
        for name, pair in losses.items():
            self._losses.setdefault(name, []).append(pair)

    def observe(self, gradient_norm: float, sites: dict[str, dict[str, list[float]]]) -> None:
        """Note, for the next row, the norm of phi's gradient and, by task and quantity, what each of its sites gave."""
        self._observed["phi/gradient_norm"] = gradient_norm
        for task, quantities in sites.items():
            for quantity, values in quantities.items():
                for site, value in enumerate(values):
                    self._observed[f"{task}/site{site}/{quantity}"] = value

    def write(self, step: int) -> dict[str, float]:
        """Append a row with all that was noted since the last one; returns it without the number of the step.

        A loss is the mean over the steps in which its task was valid.

        Raises:
            RunFolderError: the table cannot be written.
        """
        row: dict[str, float] = {}
        for name, pairs in self._losses.items():
            for half, values in zip(("train", "valid"), zip(*pairs, strict=True), strict=True):
                finite = [value for value in values if math.isfinite(value)]
                row[f"{name}/{half}_loss"] = sum(finite) / len(finite) if finite else math.nan
        row.update(sorted(self._observed.items()))
        self._append({"step": step, **row})
        self._losses.clear()
        self._observed.clear()
        return row

    def _append(self, row: dict[str, float]) -> None:
        new = not self.path.exists()
        try:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(row), lineterminator="\n")
                if new:
                    writer.writeheader()
                writer.writerow(row)
        except OSError as error:
            raise unusable(self.path.parent, error) from error

    def pending(self) -> dict[str, list[list[float]]]:
        """The losses that wait for the next row, as plain lists for a checkpoint."""
        return {name: [list(pair) for pair in pairs] for name, pairs in self._losses.items()}

    def resume(self, step: int, pending: dict[str, list[list[float]]]) -> None:
        """Continue after ``step`` with what :meth:`pending` gave.

        Raises:
            RunFolderError: the table cannot be written.
        """
        try:
            self.truncate(step)
        except OSError as error:
            raise unusable(self.path.parent, error) from error
        self._losses = {name: [(train, valid) for train, valid in pairs] for name, pairs in pending.items()}

    def truncate(self, step: int) -> None:
        """Drop the rows of steps after ``step``: the checkpoint that is resumed from does not know them."""
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        if step < 1 or not lines or not lines[0].endswith("\n"):
            self.path.unlink()
            return
        kept = lines[:1] + [line for line in lines[1:] if line.endswith("\n") and _step(line) <= step]
        write_text(self.path, "".join(kept))

    def read(self) -> dict[str, list[float]]:
        """The table by column."""
        with self.path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return {name: [float(row[name]) for row in rows] for name in (rows[0] if rows else {})}


def _step(line: str) -> float:
    """The step of a row; infinity for one that is no row."""
    number = line.partition(",")[0]
    return int(number) if number.isdecimal() else math.inf
