"""Files of which at any time either the old content is there or the new one."""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Replace a file by what ``write`` writes to the path that it is given.

    Raises:
        OSError: the system refuses; whatever was there still is, and nothing else.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        write(partial)
        with partial.open("rb") as file:  # on the disk before it takes the place of another
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def write_text(path: Path, text: str) -> None:
    """As :func:`write_whole`, in UTF-8."""
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """As :func:`write_whole`, in JSON."""
    write_text(path, json.dumps(content, indent=2) + "\n")
