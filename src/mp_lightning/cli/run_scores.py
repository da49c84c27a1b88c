"""The runs below a folder: what was set in each, and how it did on held-out images."""

import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mp_lightning.cli.card import without_folders
from mp_lightning.cli.output import last_error, only_stopped
from mp_lightning.errors import PhiError, UserError
from mp_lightning.nested import flat
from mp_lightning.perturbation import NamedPhi, load_phi
from mp_lightning.runs import ASIDE, OUTPUT, REPORT, SETTINGS
from mp_lightning.walking import walk

PHI = "phi.safetensors"
_ARM = "final phi"


class RunsError(UserError):
    """Runs cannot be compared, or there are none."""


@dataclass
class Run:
    """A run folder. ``scores`` (NLL in nats, accuracy from 0 to 1; means over seeds) is empty while it has none.

    ``others`` are those of the arms it was judged beside, by name; NaN for one that diverged.
    ``images`` are the digest of the images it was judged on and the seed.
    """

    name: str
    settings: dict[str, Any]
    state: str = "finished"
    reason: str = ""
    scores: dict[str, float] = field(default_factory=dict)
    others: dict[str, dict[str, float]] = field(default_factory=dict)
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
    for folder, inner, files in walk(sweep):
        inner[:] = [name for name in inner if not name.startswith(ASIDE)]
        if SETTINGS in files or OUTPUT in files:
            yield Path(folder)


def judged_alike(finished: list[Run], like: str | None) -> list[Run]:
    """Those of the runs whose scores mean the same.

    Args:
        finished: runs that have scores.
        like: name of one of them, as which they must have been judged; None where all were judged alike.

    Raises:
        RunsError: the targets differ, their images or seed, or how networks were trained on them, and it was not said
            which are meant; or there is no such run.
    """
    groups: list[list[Run]] = []
    for run in finished:
        group = next((group for group in groups if all(_alike(run, other) for other in group)), None)
        if group is None:
            groups.append([run])
        else:
            group.append(run)
    if like is None and len(groups) == 1:
        return finished
    chosen = next((group for group in groups if like in {run.name for run in group}), None)
    if chosen is not None:
        return chosen
    if like is not None:
        raise RunsError(
            f"like={like} is no run that has a score; name one of {', '.join(sorted(run.name for run in finished))}"
        )
    one, other, *_ = sorted((min(group, key=lambda run: run.name) for group in groups), key=lambda run: run.name)
    different = differing_settings([one, other])[one.name]
    settings = ", ".join(word.partition("=")[0] for word in different if not word.startswith("seed="))
    why = "" if not settings else f"; they differ in {settings}"
    raise RunsError(
        f"the runs were judged in {len(groups)} ways, such as '{one.name}' on {one.target} and '{other.name}' on "
        f"{other.target}{why}; choose those that were judged like one of them by like={one.name}, and give each sweep "
        "a folder of its own by hydra.sweep.dir="
    )


def _alike(run: Run, other: Run) -> bool:
    return (run.target, run.evaluation, run.images) == (other.target, other.evaluation, other.images)


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
        run.others = {
            other["arm"]: {measure: statistics.fmean(other[measure]) for measure in scores}
            for other in held_out["results"]
            if other is not result
        }
        run.target, run.evaluation = str(report["target"]), held_out["settings"]
        run.images = held_out["images"], held_out["seed"]
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
