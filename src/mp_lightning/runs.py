"""Run folders: a name that follows from the configuration, and what is found there when the same command comes again."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from mp_lightning.errors import UserError

REPORT = "report.json"
LAST_CHECKPOINT = "last.ckpt"
_NOT_IN_NAME = {
    "run": None,
    "hydra": None,
    "command": None,
    "trainer": {"accelerator", "devices", "strategy", "enable_progress_bar"},
}


class RunFolderError(UserError):
    """A run folder cannot be used."""


def run_name(config: dict[str, Any]) -> str:
    """A name for the run of this configuration; devices and what is shown on the screen do not change it."""
    relevant: dict[str, Any] = {}
    for key, value in config.items():
        left_out = _NOT_IN_NAME.get(key, set())
        if left_out is None:
            continue
        relevant[key] = {k: v for k, v in value.items() if k not in left_out} if isinstance(value, dict) else value
    digest = hashlib.sha256(json.dumps(relevant, sort_keys=True, default=str).encode()).hexdigest()[:8]
    return f"seed{config.get('seed', 0)}-{digest}"


class RunFolder:
    """The folder of one run.

    Args:
        path: the folder; it is made if it is absent.
        fresh: move what an earlier run left into a subfolder ``previous-K`` and start anew.

    Raises:
        RunFolderError: the folder cannot be written.
    """

    def __init__(self, path: Path, fresh: bool = False) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            if fresh:
                self._set_aside()
            probe = path / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise RunFolderError(
                f"run folder '{path}' cannot be written ({error.strerror}); choose another with hydra.run.dir="
            ) from error

    def checkpoint(self) -> Path | None:
        """The last checkpoint, if there is one."""
        path = self.checkpoints / LAST_CHECKPOINT
        return path if path.is_file() else None

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are written."""
        return self.path / "checkpoints"

    def report(self) -> dict[str, Any] | None:
        """What :meth:`finish` wrote, or None while the run is not finished."""
        try:
            report = json.loads((self.path / REPORT).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return report if isinstance(report, dict) else None

    def finish(self, report: dict[str, Any]) -> None:
        """Mark the run as finished, with its report."""
        partial = self.path / f"{REPORT}.partial"
        partial.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, self.path / REPORT)

    def _set_aside(self) -> None:
        old = [p for p in self.path.iterdir() if p.name != ".hydra" and not p.name.startswith("previous-")]
        if not old:
            return
        number = 1 + len(list(self.path.glob("previous-*")))
        aside = self.path / f"previous-{number}"
        aside.mkdir()
        for entry in old:
            entry.rename(aside / entry.name)
