"""Run folders: a name that follows from the configuration, and what the same command finds there later."""

import hashlib
import json
from pathlib import Path
from typing import Any

from mp_lightning.errors import UserError
from mp_lightning.whole import write_json

try:
    import fcntl
except ImportError:  # not on Windows, where two processes in one folder are not noticed
    fcntl = None  # type: ignore[assignment]

REPORT = "report.json"
SETTINGS = "settings.json"
OUTPUT = "output.log"  # what a job of a sweep prints
ASKED = ".hydra"  # what was asked for
_LOCK = ".lock"
_ANEW = ".anew"
ASIDE = "previous-"
_NOT_RELEVANT: dict[str, set[str] | None] = {
    "run": None,
    "hydra": None,
    "command": None,
    "data_root": None,
    "logger": None,
    # More seeds and arms are added to a comparison.
    **{"arms": None, "seeds": None, "jobs": None, "accelerator": None},
    "trainer": {
        *("accelerator", "devices", "num_nodes", "strategy", "default_root_dir"),
        *("limit_train_batches", "max_time"),  # they end a command early, and the next one continues
        *("enable_progress_bar", "enable_model_summary", "log_every_n_steps", "profiler"),
    },
}


class RunFolderError(UserError):
    """A run folder cannot be used."""


def relevant_settings(config: dict[str, Any]) -> dict[str, Any]:
    """What decides the result of a run: all but devices and what is shown on the screen; plain JSON values."""
    relevant: dict[str, Any] = {}
    for key, value in config.items():
        left_out = _NOT_RELEVANT.get(key, set())
        if left_out is None:
            continue
        relevant[key] = {k: v for k, v in value.items() if k not in left_out} if isinstance(value, dict) else value
    plain: dict[str, Any] = json.loads(json.dumps(relevant, sort_keys=True, default=str))
    return plain


def run_name(config: dict[str, Any]) -> str:
    """A name for the run of this configuration, which the relevant settings alone decide."""
    digest = hashlib.sha256(json.dumps(relevant_settings(config), sort_keys=True).encode()).hexdigest()[:8]
    return f"seed{config['seed']}-{digest}" if "seed" in config else digest


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Where two nested dictionaries of settings differ, such as ``meta.lr=0.003, not 0.001``."""
    found: list[str] = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key}={_short(old)}, not {_short(new)}")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, list | dict | None) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class RunFolder:
    """The folder of one run.

    Args:
        path: the folder; it is made if it is absent.
        settings: the run's :func:`relevant_settings`; a folder keeps those of its run.
        fresh: move what an earlier run left into a subfolder ``previous-K`` and start anew.
        owner: whether this process keeps the folder; of several that train together one does, and the others only read.
        remedies: what the user writes to choose another folder, and to start anew.

    Raises:
        RunFolderError: the folder cannot be written, another process works in it, or it holds a run of other settings.
    """

    def __init__(
        self,
        path: Path,
        settings: dict[str, Any],
        fresh: bool = False,
        owner: bool = True,
        remedies: tuple[str, str] = ("hydra.run.dir=", "run.fresh=true"),
    ) -> None:
        self.path = path
        self._elsewhere, self._anew = remedies
        if not owner:
            return
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._locked = (path / _LOCK).open("w")
            try:
                self._lock()
                if fresh:
                    self._set_aside()
                self._claim(settings)
            except BaseException:  # a notebook keeps the error, and so this folder, for as long as it is open
                self.release()
                raise
        except OSError as error:
            raise unusable(path, error) from error

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
        """Mark the run as finished, with its report.

        Raises:
            RunFolderError: it cannot be written.
        """
        try:
            write_json(self.path / REPORT, report)
        except OSError as error:
            raise unusable(self.path, error) from error

    def release(self) -> None:
        """Let other processes, and this one, work in the folder again before this process ends."""
        self._locked.close()

    def _lock(self) -> None:
        """Keep other processes out of the folder until this one ends, however it ends."""
        if fcntl is None:
            return
        try:
            fcntl.flock(self._locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunFolderError(
                f"another process works in run folder '{self.path}'; wait for it, or choose another with "
                f"{self._elsewhere}"
            ) from error
        except OSError:  # a file system without locks
            pass

    def _claim(self, settings: dict[str, Any]) -> None:
        path = self.path / SETTINGS
        if not path.exists():
            write_json(path, settings)
            return
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            before = None
        if not isinstance(before, dict):
            raise RunFolderError(
                f"'{path}' does not hold the settings of a run: remove it, or choose another folder with "
                f"{self._elsewhere}"
            )
        different = differences(before, settings)
        if different:
            more = f" and {len(different) - 3} more" if len(different) > 3 else ""
            raise RunFolderError(
                f"run folder '{self.path}' holds a run with {'; '.join(different[:3])}{more}: set it back, choose "
                f"another folder with {self._elsewhere}, or start anew with {self._anew}"
            )

    def _set_aside(self) -> None:
        old, number = _left(self.path), times_anew(self.path, fresh=True)
        if not old:
            return
        if not (self.path / SETTINGS).exists():
            raise RunFolderError(
                f"folder '{self.path}' holds '{old[0].name}' and no run that could be started anew: choose another "
                f"with {self._elsewhere}"
            )
        numbers = [entry.name.removeprefix(ASIDE) for entry in self.path.glob(f"{ASIDE}*")]
        aside = self.path / f"{ASIDE}{1 + max((int(one) for one in numbers if one.isdecimal()), default=0)}"
        aside.mkdir()
        for entry in old:
            entry.rename(aside / entry.name)
        (self.path / _ANEW).write_text(str(number), encoding="utf-8")


def times_anew(path: Path, fresh: bool) -> int:
    """How many times a run was started anew in a folder, with the time that ``fresh`` is about to add."""
    try:
        text = (path / _ANEW).read_text(encoding="utf-8") if (path / _ANEW).exists() else ""
        return (int(text) if text.isdecimal() else 0) + (fresh and path.is_dir() and bool(_left(path)))
    except OSError as error:
        raise unusable(path, error) from error


def _left(path: Path) -> list[Path]:
    """What a run left in its folder."""
    kept = (ASKED, _LOCK, _ANEW, OUTPUT)  # the last is being written
    return [entry for entry in path.iterdir() if entry.name not in kept and not entry.name.startswith(ASIDE)]


def unusable(path: Path, error: OSError) -> RunFolderError:
    """The error for a folder that the system does not let us write."""
    return RunFolderError(
        f"run folder '{path}' cannot be written ({error.strerror}); choose another with hydra.run.dir= "
        "(in Python folder=)"
    )
