"""The course of meta-training as a table, metrics.csv, that a resumed run continues."""

import csv
import os
from pathlib import Path

ROWS = 100


class History:
    """Writes one row every hundredth of the run: mean losses since the last row, scale and noise at the row's step.

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
        return step == 1 or step == steps or step % max(1, steps // ROWS) == 0

    def add(self, step: int, losses: dict[str, tuple[float, float]]) -> None:
        """Note the training and the validation loss of each task at one step."""
        for name, pair in losses.items():
            self._losses.setdefault(name, []).append(pair)

    def observe(self, task: str, scales: list[float], noises: list[float]) -> None:
        """Note the mean scale and noise of each site of a task, for the next row."""
        for site, (scale, noise) in enumerate(zip(scales, noises, strict=True)):
            self._observed[f"{task}/site{site}/scale"] = scale
            self._observed[f"{task}/site{site}/noise"] = noise

    def write(self, step: int) -> None:
        """Append a row with all that was noted since the last one."""
        row: dict[str, float] = {"step": step}
        for name, pairs in self._losses.items():
            row[f"{name}/train_loss"] = sum(pair[0] for pair in pairs) / len(pairs)
            row[f"{name}/valid_loss"] = sum(pair[1] for pair in pairs) / len(pairs)
        row.update(sorted(self._observed.items()))
        new = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(row), lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)
        self._losses.clear()
        self._observed.clear()

    def pending(self) -> dict[str, list[list[float]]]:
        """The losses that wait for the next row, as plain lists for a checkpoint."""
        return {name: [list(pair) for pair in pairs] for name, pairs in self._losses.items()}

    def resume(self, step: int, pending: dict[str, list[list[float]]]) -> None:
        """Continue after ``step`` with what :meth:`pending` gave."""
        self.truncate(step)
        self._losses = {name: [(train, valid) for train, valid in pairs] for name, pairs in pending.items()}

    def truncate(self, step: int) -> None:
        """Drop the rows of steps after ``step``: the checkpoint that is resumed from does not know them."""
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        if step < 1 or not lines or not lines[0].endswith("\n"):
            self.path.unlink()
            return
        kept = lines[:1] + [line for line in lines[1:] if line.endswith("\n") and int(line.partition(",")[0]) <= step]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(kept), encoding="utf-8")
        os.replace(partial, self.path)

    def read(self) -> dict[str, list[float]]:
        """The table by column."""
        with self.path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return {name: [float(row[name]) for row in rows] for name in (rows[0] if rows else {})}
