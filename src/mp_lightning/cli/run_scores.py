"""The runs below a folder: what was set in each, and how it did on held-out images."""

import json
import math
import os
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mp_lightning.cli.card import without_folders
from mp_lightning.cli.output import OUTPUT, last_error, only_stopped
from mp_lightning.errors import PhiError, UserError
from mp_lightning.nested import flat
from mp_lightning.perturbation import NamedPhi, load_phi
from mp_lightning.runs import ASIDE, REPORT, SETTINGS

PHI = "phi.safetensors"
_ARM = "final phi"
_BEFORE = {"full_strength_at": 1.0, "acts_below": 1.0}  # what held before there were these settings of a judgement


class RunsError(UserError):
    """Runs cannot be compared, or there are none."""


@dataclass
class Run:
    """A run folder. ``scores`` (NLL in nats, accuracy from 0 to 1; means over seeds) is empty while it has none.

    ``images`` are the digest of the images it was judged on and the seed; None in cards of older versions.
    """

    name: str
    settings: dict[str, Any]
    state: str = "finished"
    reason: str = ""
    scores: dict[str, float] = field(default_factory=dict)
    target: str = ""
    evaluation: Any = None
    images: tuple[Any, Any] | None = None
    phi: NamedPhi | None = None

    @property
    def compares(self) -> bool:
        """Whether it is one of ``compare``, and not of ``fit``."""
        return any(key.partition(".")[0] == "tuning" for key in self.settings)


def read_runs(sweep: Path) -> list[Run]:
    """All run folders below a folder, in the order of their names; those without a score say why in ``state``."""
    return [_read_run(folder, str(folder.relative_to(sweep))) for folder in sorted(_run_folders(sweep))]


def _run_folders(sweep: Path) -> Iterator[Path]:
    """Folders below this one in which something ran; through links as well, each folder once."""
    seen: set[Path] = set()
    for place, inner, files in os.walk(sweep, followlinks=True):
        folder = Path(place)
        if folder.resolve() in seen:
            inner.clear()
            continue
        seen.add(folder.resolve())
        inner[:] = sorted(name for name in inner if not name.startswith(ASIDE))
        if SETTINGS in files or OUTPUT in files:
            yield folder


def check_comparable(finished: list[Run]) -> None:
    """Refuse runs whose scores mean different things.

    Raises:
        RunsError: the targets differ, their images or seed, or how networks were trained on them.
    """
    first = finished[0]
    for other in finished[1:]:
        if other.target != first.target:
            raise RunsError(
                f"the runs were judged on different targets, '{first.name}' on {first.target}, '{other.name}' on "
                f"{other.target}; give sweep= a folder whose runs share one"
            )
        if other.evaluation != first.evaluation:
            raise RunsError(
                f"the runs '{first.name}' and '{other.name}' were judged with different settings of evaluation; "
                "give sweep= a folder whose runs share them"
            )
    known = [run for run in finished if run.images is not None]
    for other in known[1:]:
        if other.images != known[0].images:
            raise RunsError(
                f"the runs '{known[0].name}' and '{other.name}' were judged on different images or with another "
                "evaluation.seed; give sweep= a folder whose runs share both"
            )


def differing_settings(runs: list[Run]) -> dict[str, list[str]]:
    """By name of the run, the settings that are not the same in all runs, such as ``seed=1``; paths without folders."""
    keys = sorted({key for run in runs for key in run.settings})
    known = [run for run in runs if run.settings]
    differ = [key for key in keys if any(run.settings.get(key) != known[0].settings.get(key) for run in known)]
    return {
        run.name: [without_folders(f"{key}={json.dumps(run.settings.get(key)).strip(chr(34))}") for key in differ]
        if run.settings
        else []
        for run in runs
    }


def _read_run(folder: Path, name: str) -> Run:
    run = Run(name, flat(_json(folder / SETTINGS) or {}))
    report = _json(folder / REPORT)
    if report is None:
        try:
            error = last_error((folder / OUTPUT).read_text(encoding="utf-8", errors="replace").splitlines())
        except OSError:
            error = None
        failed = error is not None and not only_stopped(error)
        run.state, run.reason = ("failed", str(error)) if failed else ("unfinished", "")
        return run
    try:
        run.phi = load_phi(folder / PHI)
        held_out = run.phi.card["held_out"]
        (result,) = [result for result in held_out["results"] if result["arm"] == _ARM]
        nll = math.nan if report["nll"] is None else float(report["nll"])
        scores = {"nll": nll, "accuracy": statistics.fmean(result["accuracy"])}
        run.target, run.evaluation = str(report["target"]), {**_BEFORE, **(held_out.get("settings") or {})}
        if "images" in held_out:
            run.images = held_out["images"], held_out.get("seed")
    except PhiError as error:
        run.state, run.reason = "failed", str(error)
        return run
    except (KeyError, TypeError, ValueError, statistics.StatisticsError):
        run.state, run.reason = "failed", "its report or card holds no result on held-out images"
        return run
    if all(map(math.isfinite, scores.values())):
        run.scores = scores
    else:
        run.state, run.reason = "failed", "its score is not finite"
    return run


def _json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
