"""``select``: name the best run of a sweep, and write its phi with a card that lists the others."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mp_lightning.cli.options import check, check_top_level
from mp_lightning.cli.run_scores import PHI, Run, RunsError, differing_settings, judged_alike, read_runs
from mp_lightning.cli.words import PROGRAM
from mp_lightning.compare.console import make_console
from mp_lightning.errors import ConfigurationError
from mp_lightning.perturbation import NamedPhi, save_phi
from mp_lightning.runs import SETTINGS

_MEASURES = {"nll": "NLL", "accuracy": "accuracy, %"}
_OTHERS = ("initial phi", "no phi")  # what fit judges a phi beside
_NOTE = "The score of the best of several runs flatters it; judge it on images that had no part in the choice."


@dataclass(frozen=True)
class Selection:
    """What ``select`` reads from its configuration, checked."""

    sweep: Path
    by: str
    to: Path
    like: str | None


def read(config: DictConfig) -> Selection:
    """The settings of a configuration.

    Raises:
        ConfigurationError: a key is unknown, or a value cannot be used; the message names it.
    """
    check_top_level(config, ("sweep", "by", "like", "to", "command"))
    if config.by not in _MEASURES:
        raise ConfigurationError(f"by={config.by} cannot be used; give nll or accuracy")
    sweep = Path(check(config.sweep, str, "sweep"))
    to = Path(check(config.to, str | None, "to") or sweep / "best" / PHI)
    if to.suffix != ".safetensors":
        raise ConfigurationError(f"to={to} cannot be used; give a file name that ends in .safetensors")
    if (to.parent / SETTINGS).exists():
        raise ConfigurationError(f"to={to} lies in the folder of a run, which stays as it is; choose another place")
    return Selection(sweep, config.by, to, check(config.like, str | None, "like"))


def run(config: DictConfig, path: Path) -> None:
    """Compare the runs below a folder, and write the phi of the best.

    Raises:
        RunsError: there is no finished run, or they were judged on different images or in different ways.
    """
    given = read(config)
    found = read_runs(given.sweep)
    runs = [run for run in found if not run.compares]
    finished = ranked(runs, given.by)
    if not finished:
        raise RunsError(
            f"the runs below '{given.sweep}' are not of fit; what compare found is in its summary.md"
            if found and not runs
            else f"none of the {len(runs)} runs below '{given.sweep}' has a score ({states(runs)}); repeat the command "
            "that started them, or start others"
            if runs
            else f"there are no runs below '{given.sweep}'; start some with '{PROGRAM} fit seed=0,1,2 -m'"
        )
    finished = judged_alike(finished, given.like)
    left_out = {run.name for run in runs if run.scores} - {run.name for run in finished}
    runs = [run for run in runs if run.name not in left_out]
    words = differing_settings(runs)
    best = finished[0]
    assert best.phi is not None
    _write(given.to, best.phi, selected(runs, finished, words, given.by))
    console = make_console()
    _show(console, runs, finished, words, given.by)
    if left_out:
        console.print(f"Left out, as they were judged otherwise: {escape(', '.join(sorted(left_out)))}")
    console.print(
        f"\nThe best of {len(finished)} by {given.by} is [bold]{escape(best.name)}[/bold]"
        f"{escape(_in_brackets(words[best.name]))}. {_NOTE}\n"
        f"Written to [bold]{escape(str(given.to.parent))}[/bold]: {given.to.name}, {given.to.stem}.json"
    )
    for arm in not_beaten(best, given.by):
        own, other = (_written(scores[given.by], given.by) for scores in (best.scores, best.others[arm]))
        console.print(f"It is not better than {arm} on these images: {_MEASURES[given.by]} {own} beside {other}.")


def states(runs: list[Run]) -> str:
    """How many are in which state, and why."""
    counts = Counter(f"{run.state}: {run.reason}" if run.reason else run.state for run in runs)
    return "; ".join(f"{count} {state}" for state, count in counts.items())


def ranked(runs: list[Run], by: str) -> list[Run]:
    """The finished runs, the best first."""
    return sorted((run for run in runs if run.scores), key=lambda run: _loss(run.scores, by))


def not_beaten(run: Run, by: str) -> list[str]:
    """The arms beside a finished run that did as well as its phi, or better."""
    return [arm for arm in _OTHERS if arm in run.others and _loss(run.scores, by) >= _loss(run.others[arm], by)]


def _loss(scores: dict[str, float], by: str) -> float:
    return -scores[by] if by == "accuracy" else scores[by]


def selected(runs: list[Run], finished: list[Run], words: dict[str, list[str]], by: str) -> dict[str, Any]:
    """The entry of the winner's card that says among which runs it was chosen."""
    best = finished[0]

    def entry(run: Run) -> dict[str, Any]:
        return {"run": run.name, "settings": words[run.name], **run.scores}

    return {
        "by": by,
        "target": best.target,
        "runs": len(finished),
        "winner": entry(best),
        "losers": [entry(run) for run in finished[1:]],
        "without_score": [{**entry(run), "state": run.state} for run in runs if not run.scores],
        "note": _NOTE,
    }


def _write(to: Path, phi: NamedPhi, entry: dict[str, Any]) -> None:
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        save_phi(to, phi, {**phi.card, "selected": entry})
    except OSError as error:
        raise ConfigurationError(
            f"'{to}' cannot be written ({error.strerror}); choose another place with to="
        ) from error


def _show(console: Console, runs: list[Run], finished: list[Run], words: dict[str, list[str]], by: str) -> None:
    table = Table("run", "settings that differ", box=None, pad_edge=False, header_style="bold")
    others = [arm for arm in _OTHERS if any(arm in run.others for run in finished)]
    for column in (*_MEASURES.values(), *(f"{_MEASURES[by]}\n{arm}" for arm in others)):
        table.add_column(column, justify="right", no_wrap=True)
    for run in finished:
        scores = [_written(run.scores[measure], measure) for measure in _MEASURES]
        scores += [_written(run.others[arm][by], by) if arm in run.others else "-" for arm in others]
        table.add_row(escape(run.name), escape(" ".join(words[run.name])), *scores)
    console.print(f"Held-out images: {escape(finished[0].target)}\n")
    console.print(table, soft_wrap=False)
    for run in runs:
        if not run.scores:
            reason = f": {run.reason}" if run.reason else ""
            console.print(escape(f"{run.name}{_in_brackets(words[run.name])} {run.state}{reason}"))


def _written(score: float, measure: str) -> str:
    return f"{score:.3f}" if measure == "nll" else f"{100 * score:.1f}"


def _in_brackets(words: list[str]) -> str:
    return f" ({' '.join(words)})" if words else ""
