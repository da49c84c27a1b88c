"""``fit`` as several processes of one run, on small pictures."""

from pathlib import Path
from typing import Any

import torch
from command_line import TINY, CommandLine, Done
from images_on_disk import save_archive

from mp_lightning.meta.checkpoint import checkpoints, read_checkpoint
from mp_lightning.perturbation import load_phi

TWENTY = ["meta.steps=20"]
SETS = [("many", 4, 40), ("few", 3, 8), ("target", 2, 8)]


def save_pictures(folder: Path) -> list[str]:
    """The words for two sources of unequal length, four tasks, and a target."""
    paths = [save_archive(folder / f"{name}.npz", classes, per_class) for name, classes, per_class in SETS]
    return [f"data=[{paths[0]},{paths[1]}]", f"evaluation.data={paths[2]}"]


def run(mp: CommandLine, folder: Path, words: list[str], ranks: int, **options: Any) -> list[Done]:
    return mp.together(folder, "fit", *TINY, *words, "hydra.run.dir=run", ranks=ranks, **options)


def succeed(mp: CommandLine, folder: Path, words: list[str], ranks: int) -> Path:
    """The run folder after a command that must end well."""
    folder.mkdir(exist_ok=True)
    for done in run(mp, folder, words, ranks):
        assert done.code == 0, f"ended with {done.code}\n{done.stdout}\n{done.stderr}"
        assert done.stderr == ""
    return folder / "run"


def tensors_of(value: Any, name: str = "") -> dict[str, Any]:
    """All leaves of a checkpoint, by their paths."""
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in tensors_of(inner, f"{name}/{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for key, inner in enumerate(value) for k, v in tensors_of(inner, f"{name}/{key}").items()}
    return {name: value}


def assert_same_run(run: Path, expected: Path) -> None:
    """phi, card apart from its date, table, score, and every task's network and optimizer, bit for bit."""
    for name in ("phi.safetensors", "metrics.csv", "report.json", "evaluation.json"):
        assert (run / name).read_bytes() == (expected / name).read_bytes(), name
    own, its = (read_checkpoint(checkpoints(path / "checkpoints")[0]) for path in (run, expected))
    kept = ("tasks", "state_dict", "optimizer_states", "meta_step", "history")
    left, right = (tensors_of({key: content[key] for key in kept}) for content in (own, its))
    assert left.keys() == right.keys() and len(left) > 100
    for name, value in left.items():
        same = torch.equal(value, right[name]) if isinstance(value, torch.Tensor) else value == right[name]
        assert same, name


def assert_phi_close(run: Path, expected: Path) -> None:
    own, its = (load_phi(path / "phi.safetensors").phi for path in (run, expected))
    for value, wanted in zip(own, its, strict=True):
        assert (value - wanted).abs().max() <= 1e-5 * wanted.abs().max()
