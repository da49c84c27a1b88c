"""``select``: the best run of a sweep is named, its phi written, and no other forgotten."""

import json
from pathlib import Path

import pytest
from command_line import CommandLine, Done

from mp_lightning.cli.run_scores import read_runs
from mp_lightning.perturbation import initial_phi, load_phi, save_phi
from mp_lightning.runs import RunFolder

TARGET = "digits59: 100 training and 796 test images of 5 classes"
RATES = [1e-3, 3e-4, 1e-3]
SCORES = {"nll": [1.5, 1.2, 1.4], "accuracy": [0.4, 0.3, 0.5]}


def make_run(
    sweep: Path,
    seed: int,
    nll: float,
    accuracy: float,
    lr: float = 1e-3,
    target: str = TARGET,
    judged: dict[str, object] | None = None,
) -> Path:
    """What a finished run leaves, with the phi of its seed."""
    path = sweep / f"seed{seed}-{lr}"
    folder = RunFolder(path, {"seed": seed, "meta": {"lr": lr, "steps": 3}})
    results = [
        {"arm": "final phi", "nll": [nll, nll], "accuracy": [accuracy - 0.01, accuracy + 0.01]},
        {"arm": "no phi", "nll": [9.0, 9.0], "accuracy": [0.1, 0.1]},
    ]
    held_out = {"results": results, "settings": {}, "images": "abc", "seed": 0, **(judged or {})}
    save_phi(path / "phi.safetensors", initial_phi(seed), {"seed": seed, "held_out": held_out})
    folder.finish({"nll": nll, "target": target, "results": []})
    return path


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Three finished runs, one that is not, one that was refused, and what an earlier run left aside."""
    path = tmp_path / "sweep"
    for seed, lr in enumerate(RATES):
        make_run(path, seed, SCORES["nll"][seed], SCORES["accuracy"][seed], lr)
    RunFolder(path / "seed3-0.001", {"seed": 3, "meta": {"lr": 1e-3, "steps": 3}})
    (path / "refused").mkdir()
    (path / "refused" / "output.log").write_text("mp_lightning: no\n")
    make_run(path / "seed0-0.001" / "previous-1", 7, nll=0.1, accuracy=0.9)
    return path


def select(mp: CommandLine, folder: Path, *words: str, code: int = 0) -> Done:
    done = mp(folder, "select", *words)
    assert done.code == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.mark.parametrize(("by", "winner", "order"), [("nll", 1, [1, 2, 0]), ("accuracy", 2, [2, 0, 1])])
def test_the_best_is_written_with_a_card_of_all(
    mp: CommandLine, sweep: Path, tmp_path: Path, by: str, winner: int, order: list[int]
) -> None:
    before = {path: path.read_bytes() for path in sweep.rglob("*") if path.is_file()}
    done = select(mp, tmp_path, f"sweep={sweep}", f"by={by}")
    chosen = load_phi(sweep / "best" / "phi.safetensors")
    assert all((a == b).all() for a, b in zip(chosen.phi, initial_phi(winner), strict=True))
    card = chosen.card
    assert card["seed"] == winner and card["selected"]["by"] == by and card["selected"]["target"] == TARGET
    without = {entry["run"]: entry["state"] for entry in card["selected"]["without_score"]}
    assert card["selected"]["runs"] == 3 and without == {"refused": "failed", "seed3-0.001": "unfinished"}
    entries = [card["selected"]["winner"], *card["selected"]["losers"]]
    assert [entry["settings"] for entry in entries] == [[f"meta.lr={RATES[n]}", f"seed={n}"] for n in order]
    assert [entry[by] for entry in entries] == pytest.approx([SCORES[by][n] for n in order])
    assert done.stderr == "" and max(map(len, done.stdout.splitlines())) < 200
    assert TARGET in done.stdout and f"The best of 3 by {by} is {entries[0]['run']} (" in done.stdout
    assert "refused failed: no" in done.stdout and "seed3-0.001 (meta.lr=0.001 seed=3) unfinished" in done.stdout
    after = {path: path.read_bytes() for path in sweep.rglob("*") if path.is_file()}
    assert {path for path in after if after[path] != before.get(path)} == {
        sweep / "best" / "phi.safetensors",
        sweep / "best" / "phi.json",
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep"]
    assert select(mp, tmp_path, f"sweep={sweep}", f"by={by}").stdout == done.stdout  # its own output is no run


def test_written_elsewhere(mp: CommandLine, sweep: Path, tmp_path: Path) -> None:
    select(mp, tmp_path, f"sweep={sweep}", "to=new/mine.safetensors")
    assert load_phi(tmp_path / "new" / "mine.safetensors").card["seed"] == 1
    assert not (sweep / "best").exists()


def test_runs_that_are_linked_together_are_found_each_once(mp: CommandLine, tmp_path: Path) -> None:
    for seed in (0, 1):
        run = make_run(tmp_path / f"there{seed}", seed, nll=1.0 + seed, accuracy=0.4)
        (tmp_path / "sweep").mkdir(exist_ok=True)
        (tmp_path / "sweep" / f"run{seed}").symlink_to(run)
    (tmp_path / "sweep" / "run0" / "again").symlink_to(tmp_path / "sweep")
    select(mp, tmp_path, "sweep=sweep")
    card = load_phi(tmp_path / "sweep" / "best" / "phi.safetensors").card
    assert card["seed"] == 0 and card["selected"]["runs"] == 2


def test_runs_of_two_targets_are_not_compared(mp: CommandLine, sweep: Path, tmp_path: Path) -> None:
    make_run(sweep, 5, nll=0.1, accuracy=0.9, target="birds: 3 images")
    error = select(mp, tmp_path, f"sweep={sweep}", code=2).stderr
    assert "judged in 2 ways" in error and "birds" in error and "digits59" in error
    assert "like=seed0-0.001" in error and "hydra.sweep.dir=" in error


def test_runs_of_one_target_are_chosen_by_one_of_them(mp: CommandLine, sweep: Path, tmp_path: Path) -> None:
    make_run(sweep, 5, nll=0.1, accuracy=0.9, target="birds: 3 images")
    done = select(mp, tmp_path, f"sweep={sweep}", "like=seed0-0.001")
    assert "The best of 3 by nll is seed1-0.0003" in done.stdout
    assert "Left out, as they were judged otherwise: seed5-0.001" in done.stdout
    assert "like=seed9 is no run that has a score; name one of seed0-0.001, " in (
        select(mp, tmp_path, f"sweep={sweep}", "like=seed9", code=2).stderr
    )


@pytest.mark.parametrize("other", [{"images": "def", "seed": 0}, {"images": "abc", "seed": 1}])
def test_runs_of_other_images_or_another_seed_are_not_compared(
    mp: CommandLine, tmp_path: Path, other: dict[str, object]
) -> None:
    sweep = tmp_path / "sweep"
    for seed in range(3):
        make_run(sweep, seed, nll=1.0 + seed / 10, accuracy=0.4)
    assert "The best of 3 by nll is seed0-0.001 " in select(mp, tmp_path, "sweep=sweep").stdout
    make_run(sweep, 3, nll=1.3, accuracy=0.4, judged=other)
    (line,) = select(mp, tmp_path, "sweep=sweep", code=2).stderr.splitlines()
    assert "the runs were judged in 2 ways, such as 'seed0-0.001' on" in line and "and 'seed3-0.001' on" in line


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["sweep=nowhere"], ["there are no runs below 'nowhere'", "start some with"]),
        (["sweep=empty"], ["there are no runs below 'empty'"]),
        (["sweep=begun"], ["none of the 1 runs below 'begun' has a score (1 unfinished)", "repeat the command"]),
        (["by=loss"], ["by=loss cannot be used; give nll or accuracy"]),
        (["to=begun/run/phi.safetensors"], ["lies in the folder of a run"]),
        (["to=phi.pt"], ["to=phi.pt cannot be used", ".safetensors"]),
        (["sweeps=x"], ["unknown key 'sweeps'", "'sweep'"]),
        (["+bye=x"], ["unknown key 'bye'"]),
    ],
)
def test_what_cannot_be_selected(mp: CommandLine, tmp_path: Path, words: list[str], parts: list[str]) -> None:
    (tmp_path / "empty").mkdir()
    RunFolder(tmp_path / "begun" / "run", {"seed": 3})
    (line,) = select(mp, tmp_path, *words, code=2).stderr.splitlines()
    assert line.startswith("mp_lightning: ") and all(part in line for part in parts), line


def test_a_damaged_phi_has_no_score(mp: CommandLine, sweep: Path, tmp_path: Path) -> None:
    (sweep / "seed1-0.0003" / "phi.safetensors").write_bytes(b"damaged")
    done = select(mp, tmp_path, f"sweep={sweep}")
    assert "The best of 2 by nll is seed2-0.001 " in done.stdout
    assert "seed1-0.0003 (meta.lr=0.0003 seed=1) failed: " in done.stdout


def test_runs_of_compare_are_told_from_those_of_fit(mp: CommandLine, tmp_path: Path) -> None:
    RunFolder(tmp_path / "sweep" / "a", {"target": "a.npz", "tuning": {"values": 3, "seeds": 1}})
    done = select(mp, tmp_path, f"sweep={tmp_path / 'sweep'}", code=2)
    assert "are not of fit; what compare found is in its summary.md" in done.stderr


def test_runs_that_were_judged_with_other_settings_are_not_compared(mp: CommandLine, tmp_path: Path) -> None:
    for seed in range(2):
        make_run(tmp_path / "sweep", seed, 1.5, 0.4, judged={"settings": {"steps": 9, "acts_below": 1.0}})
    select(mp, tmp_path, "sweep=sweep")
    make_run(tmp_path / "sweep", 2, 1.2, 0.3, judged={"settings": {"steps": 9, "acts_below": 0.6}})
    assert "judged in 2 ways" in select(mp, tmp_path, "sweep=sweep", code=2).stderr


def test_a_card_without_evaluation_is_no_score(mp: CommandLine, sweep: Path, tmp_path: Path) -> None:
    path = sweep / "seed1-0.0003" / "phi.json"
    card = json.loads(path.read_text())
    del card["held_out"]
    path.write_text(json.dumps(card))
    done = select(mp, tmp_path, f"sweep={sweep}")
    assert "The best of 2 by nll is seed2-0.001 " in done.stdout and "holds no result" in done.stdout


def test_comparisons_are_no_runs_of_fit(mp: CommandLine, sweep: Path, tmp_path: Path) -> None:
    before = [run.name for run in read_runs(sweep)]
    (sweep / "compared").mkdir()
    settings = {"target": "birds.npz", "tuning": {"seeds": 1, "values": 3}}
    (sweep / "compared" / "settings.json").write_text(json.dumps(settings))
    assert [run.name for run in read_runs(sweep) if not run.compares] == before and len(before) == 5
    assert "compared" not in select(mp, tmp_path, f"sweep={sweep}").stdout


def test_a_winner_that_does_not_beat_what_it_was_judged_beside_is_told(mp: CommandLine, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    make_run(sweep, 0, nll=9.5, accuracy=0.3)
    make_run(sweep, 1, nll=9.2, accuracy=0.2)
    done = select(mp, tmp_path, "sweep=sweep")
    assert "It is not better than no phi on these images: NLL 9.200 beside 9.000." in done.stdout
    (row,) = [line for line in done.stdout.splitlines() if line.startswith("seed1-0.001")]
    assert row.split()[-3:] == ["9.200", "20.0", "9.000"]
    by_accuracy = select(mp, tmp_path, "sweep=sweep", "by=accuracy").stdout
    assert "is not better" not in by_accuracy and "10.0" in by_accuracy
