"""``select``: the best run of a sweep is named, its phi written, and no other forgotten."""

import json
from pathlib import Path

import pytest
from command_line import CommandLine, Done, shared_command_line

from mp_lightning.perturbation import initial_phi, load_phi, save_phi
from mp_lightning.runs import RunFolder

TARGET = "digits59: 100 training and 796 test images of 5 classes"


@pytest.fixture(scope="module")
def mp() -> CommandLine:
    return shared_command_line()


def make_run(sweep: Path, seed: int, nll: float, accuracy: float, lr: float = 1e-3, target: str = TARGET) -> Path:
    """What a finished run leaves, with the phi of its seed."""
    path = sweep / f"seed{seed}-{lr}"
    folder = RunFolder(path, {"seed": seed, "meta": {"lr": lr, "steps": 3}})
    results = [
        {"arm": "final phi", "nll": [nll, nll], "accuracy": [accuracy - 0.01, accuracy + 0.01]},
        {"arm": "no phi", "nll": [9.0, 9.0], "accuracy": [0.1, 0.1]},
    ]
    save_phi(path / "phi.safetensors", initial_phi(seed), {"seed": seed, "held_out": {"results": results}})
    folder.finish({"nll": nll, "target": target, "results": []})
    return path


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Three finished runs, one that is not, one that was refused, and what an earlier run left aside."""
    path = tmp_path / "sweep"
    make_run(path, 0, nll=1.5, accuracy=0.4)
    make_run(path, 1, nll=1.2, accuracy=0.3, lr=3e-4)
    make_run(path, 2, nll=1.4, accuracy=0.5)
    RunFolder(path / "seed3-0.001", {"seed": 3})
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
    assert card["selected"]["runs"] == 3 and card["selected"]["unfinished"] == ["refused", "seed3-0.001"]
    entries = [card["selected"]["winner"], *card["selected"]["losers"]]
    assert [entry["settings"] for entry in entries] == [f"meta.lr={[1e-3, 3e-4, 1e-3][n]} seed={n}" for n in order]
    assert all(len(entry["sha256"]) == 64 for entry in entries)
    assert done.stderr == "" and max(map(len, done.stdout.splitlines())) < 200
    assert f"Best by {by} on {TARGET}: " in done.stdout and entries[0]["run"] in done.stdout
    for name in ("refused", "seed3-0.001"):
        assert f"left out: {sweep}/{name}" in done.stdout
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


def test_runs_of_two_targets_are_not_compared(mp: CommandLine, sweep: Path, tmp_path: Path) -> None:
    make_run(sweep, 5, nll=0.1, accuracy=0.9, target="birds: 3 images")
    error = select(mp, tmp_path, f"sweep={sweep}", code=2).stderr
    assert "cannot be compared" in error and "birds" in error and "digits59" in error


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["sweep=nowhere"], ["no folder 'nowhere'", "sweep="]),
        (["sweep=empty"], ["'empty' holds no runs"]),
        (["sweep=begun"], ["holds 1 runs, none of them finished", "the same command continues"]),
        (["by=loss"], ["by=loss is unknown; use one of nll, accuracy"]),
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


def test_a_damaged_phi_is_named(mp: CommandLine, sweep: Path, tmp_path: Path) -> None:
    (sweep / "seed2-0.001" / "phi.safetensors").write_bytes(b"damaged")
    assert "seed2-0.001" in select(mp, tmp_path, f"sweep={sweep}", code=2).stderr


def test_a_card_without_evaluation_is_named(mp: CommandLine, sweep: Path, tmp_path: Path) -> None:
    path = sweep / "seed2-0.001" / "phi.json"
    card = json.loads(path.read_text())
    del card["held_out"]
    path.write_text(json.dumps(card))
    error = select(mp, tmp_path, f"sweep={sweep}", code=2).stderr
    assert "seed2-0.001" in error and "run.fresh=true" in error
