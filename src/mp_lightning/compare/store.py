"""The results of a comparison on disk: one row of a CSV file for each run, and details for pictures beside it."""

import csv
import dataclasses
import hashlib
import io
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from mp_lightning.compare.results import Details, Row, SiteMultiplier
from mp_lightning.runs import RunFolderError, unusable
from mp_lightning.whole import write_json

_FIELDS = [field.name for field in dataclasses.fields(Row)]
_COLUMNS = [*_FIELDS, "gap"]


class RunKey(NamedTuple):
    """What tells one run from all others."""

    target: str
    model: str
    arm: str
    seed: int
    settings: str


def key_of(row: Row) -> RunKey:
    """The key of a finished run."""
    return RunKey(row.target, row.model, row.arm, row.seed, row.settings)


class Store:
    """Rows are appended and never changed. A row that was cut off, as by a kill or a full disk, counts as not written.

    Args:
        path: the CSV file; it need not exist.

    Raises:
        RunFolderError: the file is there and is not such a table.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: dict[RunKey, Row] = {}
        for row in self._read():
            self._rows.setdefault(key_of(row), row)

    def rows(self, keys: Iterable[RunKey]) -> list[Row]:
        """The rows of these runs that are finished, in the order of the keys."""
        return [self._rows[key] for key in keys if key in self._rows]

    def missing(self, keys: Iterable[RunKey]) -> list[RunKey]:
        """The runs that are not finished, in their order."""
        return [key for key in keys if key not in self._rows]

    def append(self, row: Row, details: Details) -> None:
        """Keep a run; when this returns it is on the disk.

        Raises:
            RunFolderError: it cannot be written.
        """
        if key_of(row) in self._rows:
            return
        try:
            place = self._details(row)
            place.parent.mkdir(parents=True, exist_ok=True)
            write_json(place, dataclasses.asdict(details))
            self._write(row)
        except OSError as error:
            raise unusable(self._path.parent, error) from error
        self._rows[key_of(row)] = row

    def details(self, row: Row) -> Details:
        """What pictures show of a run; empty if it was not kept."""
        try:
            content = json.loads(self._details(row).read_text(encoding="utf-8"))
            return Details(
                curve=[(int(step), float(loss)) for step, loss in content["curve"]],
                reliability=[(int(n), float(c), float(a)) for n, c, a in content["reliability"]],
                multiplier=[SiteMultiplier(**site) for site in content["multiplier"]],
                acted=None if content.get("acted") is None else float(content["acted"]),  # older runs say nothing
            )
        except (OSError, ValueError, KeyError, TypeError):
            return Details()

    def _details(self, row: Row) -> Path:
        digest = hashlib.sha256("/".join(map(str, key_of(row))).encode()).hexdigest()[:16]
        return self._path.parent / "details" / f"{self._path.stem}-{digest}.json"

    def _write(self, row: Row) -> None:
        """Append one line, after the header if there is none, in one write that reaches the disk."""
        new = not self._path.exists() or self._path.stat().st_size == 0
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if new:
            writer.writerow(_COLUMNS)
        writer.writerow([_written(getattr(row, column)) for column in _COLUMNS])
        line = text.getvalue().encode()
        # Without a buffer, which would be written once more when the file is closed.
        with self._path.open("ab", buffering=0) as file:
            start = file.tell()
            try:
                while line:
                    line = line[file.write(line) :]
                os.fsync(file.fileno())
            except OSError:
                os.truncate(self._path, start)  # what stands there must stay readable
                raise

    def _read(self) -> list[Row]:
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise unusable(self._path.parent, error) from error
        whole = content[: content.rfind(b"\n") + 1]
        try:
            table = csv.DictReader(io.StringIO(whole.decode(), newline=""))
            rows = [_row(values) for values in table]
            if table.fieldnames not in (None, _COLUMNS):
                raise ValueError("it has other columns")
        except (ValueError, KeyError, TypeError, csv.Error) as error:
            raise RunFolderError(
                f"'{self._path}' is not a table of results of this version ({error}); move it away, or start anew with "
                "run.fresh=true (in Python fresh=True)"
            ) from error
        if len(whole) < len(content):  # cut off in the middle of a row
            try:
                os.truncate(self._path, len(whole))
            except OSError as error:
                raise unusable(self._path.parent, error) from error
        return rows


def _written(value: Any) -> Any:
    return repr(value) if isinstance(value, float) else value


def _row(values: dict[str, Any]) -> Row:
    if None in values or None in values.values():
        raise ValueError("a row has too many columns or too few")
    kinds = get_type_hints(Row)
    row = Row(**{name: kinds[name](values[name]) for name in _FIELDS})
    if not math.isfinite(row.accuracy) or not 0 <= row.accuracy <= 1:
        raise ValueError(f"accuracy {values['accuracy']}")
    return row
