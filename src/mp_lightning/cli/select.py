"""``select``: which run of a sweep has the best score, and its phi with a card that lists the others."""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mp_lightning.cli.fit import PHI
from mp_lightning.cli.options import check, check_choice, check_keys
from mp_lightning.errors import ConfigurationError, UserError
from mp_lightning.perturbation import Phi, load_phi, save_phi
from mp_lightning.runs import REPORT, SETTINGS, differences, unusable

OUTPUT = "output.log"  # of a job of a sweep
_CRITERIA = ("nll", "accuracy")
_ARM = "final phi"
_LEAST_WIDTH = 100


class SelectionError(UserError):
    """A sweep holds no run that can be selected."""


@dataclass(frozen=True)
class SelectSettings:
    """Everything that ``select`` reads from its configuration, checked."""

    sweep: Path
    by: str
    to: Path


@dataclass(frozen=True)
class Candidate:
    """A finished run.

    Attributes:
        folder: its run folder.
        settings: what decides its result.
        target: what its phi was judged on.
        nll, accuracy: means over the seeds of the evaluation (nats; 0 to 1).
        phi, card: what it left.
    """

    folder: Path
    settings: dict[str, Any]
    target: str
    nll: float
    accuracy: float
    phi: Phi
    card: dict[str, Any]

    def rank(self, by: str) -> float:
        """The less the better."""
        return self.nll if by == "nll" else -self.accuracy


def read(config: DictConfig) -> SelectSettings:
    """The settings of a configuration.

    Raises:
        ConfigurationError: a key is unknown or a value of the wrong kind; the message names it.
    """
    check_keys([str(key) for key in config if key != "hydra"], ("command", "sweep", "by", "to"))
    sweep = Path(check(config.sweep, str, "sweep"))
    to = check(config.to, str | None, "to")
    by = check_choice(str(config.by), _CRITERIA, "by")
    if to is not None and not to.endswith(".safetensors"):
        raise ConfigurationError(f"to={to} cannot be used; give a file that ends with .safetensors")
    return SelectSettings(sweep, by, sweep / "best" / PHI if to is None else Path(to))


def run(config: DictConfig, path: Path) -> float:
    """Name the best run below a folder and write its phi; returns its score (nats, or the accuracy)."""
    given = read(config)
    candidates, unfinished = _runs(given.sweep, given.to)
    candidates.sort(key=lambda candidate: candidate.rank(given.by))
    best = candidates[0]
    names = {id(candidate): _difference(candidate, candidates) for candidate in candidates}
    console = Console(highlight=False, soft_wrap=True)
    wide = console if console.is_terminal else Console(highlight=False, width=max(console.width, _LEAST_WIDTH))
    wide.print(_table(candidates, names, given))
    for folder in unfinished:
        console.print(f"Failed or not finished, and left out: {escape(str(folder))}")
    score = best.nll if given.by == "nll" else best.accuracy
    card = {
        **{key: value for key, value in best.card.items() if key != "sha256"},
        "selected": {
            "by": given.by,
            "target": best.target,
            "runs": len(candidates),
            "unfinished": [folder.name for folder in unfinished],
            "winner": _entry(best, names),
            "losers": [_entry(loser, names) for loser in candidates[1:]],
        },
    }
    try:
        given.to.parent.mkdir(parents=True, exist_ok=True)
        save_phi(given.to, best.phi, card)
    except OSError as error:
        raise unusable(given.to.parent, error) from error
    console.print(f"Best by {given.by} on {best.target}: [bold]{escape(str(best.folder))}[/bold]")
    console.print(f"Its phi, with a card that lists all {len(candidates)} runs: [bold]{escape(str(given.to))}[/bold]")
    return score


def _runs(sweep: Path, to: Path) -> tuple[list[Candidate], list[Path]]:
    """The finished runs below a folder, and the folders of the others.

    Raises:
        SelectionError: there is none that is finished, or they were judged on different targets.
        PhiError: the phi of a run is damaged.
    """
    if not sweep.is_dir():
        raise SelectionError(f"there is no folder '{sweep}'; give that of a sweep with sweep=")
    candidates: list[Candidate] = []
    unfinished: list[Path] = []
    # A run that was refused has left nothing but what its sweep kept of its output.
    for folder in sorted({file.parent for name in (SETTINGS, OUTPUT) for file in sweep.rglob(name)}):
        if any(part.startswith("previous-") for part in folder.relative_to(sweep).parts):
            continue
        candidate = _candidate(folder)
        if candidate is None:
            unfinished.append(folder)
        else:
            candidates.append(candidate)
    if not candidates:
        what = f"holds {len(unfinished)} runs, none of them finished" if unfinished else "holds no runs"
        raise SelectionError(f"'{sweep}' {what}; let the sweep end first: the same command continues it")
    targets = {candidate.target: candidate.folder for candidate in candidates}
    if len(targets) > 1:
        (one, first), (other, second) = list(targets.items())[:2]
        raise SelectionError(
            f"the runs in '{sweep}' cannot be compared: '{first.name}' was judged on {one}, '{second.name}' on "
            f"{other}; give a folder of runs with one target"
        )
    return candidates, unfinished


def _candidate(folder: Path) -> Candidate | None:
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        nll, target = float(report["nll"]), str(report["target"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not (folder / PHI).is_file():
        return None
    named = load_phi(folder / PHI)
    card = named.card or {}
    try:
        arm = next(arm for arm in card["held_out"]["results"] if arm["arm"] == _ARM)
        accuracy = statistics.fmean(arm["accuracy"])
    except (KeyError, TypeError, StopIteration, statistics.StatisticsError) as error:
        raise SelectionError(
            f"the card of '{folder / PHI}' says nothing of its evaluation; run its command again with run.fresh=true"
        ) from error
    return Candidate(folder, settings, target, nll, accuracy, named.phi, card)


def _difference(candidate: Candidate, all_of_them: list[Candidate]) -> str:
    """The settings in which a run differs from others, such as 'seed=1 meta.lr=0.001'."""
    lines = [line for other in all_of_them for line in differences(candidate.settings, other.settings)]
    found = []
    for key in sorted({line.partition("=")[0] for line in lines}):
        value: Any = candidate.settings
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        found.append(f"{key}={value}")
    return " ".join(found) or candidate.folder.name


def _entry(candidate: Candidate, names: dict[int, str]) -> dict[str, Any]:
    return {
        "run": candidate.folder.name,
        "settings": names[id(candidate)],
        "nll": candidate.nll,
        "accuracy": candidate.accuracy,
        "sha256": candidate.card.get("sha256"),
    }


def _table(candidates: list[Candidate], names: dict[int, str], given: SelectSettings) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("run", overflow="fold")
    table.add_column("settings that differ", overflow="fold")
    table.add_column("NLL" + (" (best first)" if given.by == "nll" else ""), justify="right")
    table.add_column("accuracy, %" + (" (best first)" if given.by == "accuracy" else ""), justify="right")
    for candidate in candidates:
        table.add_row(
            escape(candidate.folder.name),
            escape(names[id(candidate)]),
            f"{candidate.nll:.4f}",
            f"{100 * candidate.accuracy:.1f}",
        )
    return table
