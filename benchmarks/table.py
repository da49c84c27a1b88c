"""A table on disk that grows row by row, so that an interrupted measurement continues."""

import csv
from pathlib import Path


class Table:
    """Rows of text in a CSV file whose first line, a comment, says what they were measured with.

    Args:
        path: the file; it is made if need be, and continued if it exists.
        columns: their names.
        heading: the first line.
    """

    def __init__(self, path: Path, columns: list[str], heading: str) -> None:
        self.path = path
        self.columns = columns
        if path.exists():
            self.rows = self._read()
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {heading}\n{','.join(columns)}\n")
        self.rows = []

    def has(self, values: dict[str, str]) -> bool:
        """Whether there is a row with these values."""
        return bool(self.of(values))

    def of(self, values: dict[str, str]) -> list[dict[str, str]]:
        """The rows with these values."""
        return [row for row in self.rows if all(row[name] == value for name, value in values.items())]

    def add(self, rows: list[dict[str, str]]) -> None:
        """Append rows, at once."""
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns, lineterminator="\n").writerows(rows)
        self.rows += rows

    def show(self, values: dict[str, str], extra: dict[str, str] | None = None) -> None:
        """Print the rows with these values as Markdown: arm, time, ratio, and more columns under their headings."""
        extra = extra or {}
        print("| " + " | ".join(["arm", "ms", "ratio (quartiles)", *extra.values()]) + " |")
        print("|---" * (3 + len(extra)) + "|")
        for row in self.of(values):
            ratio = f"{row['ratio']} ({row['ratio_q1']} to {row['ratio_q3']})"
            print("| " + " | ".join([row["arm"], row["milliseconds"], ratio, *(row[name] for name in extra)]) + " |")
        print(end="", flush=True)

    def _read(self) -> list[dict[str, str]]:
        with self.path.open(newline="") as file:
            lines = [line for line in file if not line.startswith("#")]
        rows = list(csv.DictReader(lines))
        if lines and lines[0].strip() != ",".join(self.columns):
            raise SystemExit(f"{self.path} has other columns than this benchmark writes; name another file with --out")
        return rows
