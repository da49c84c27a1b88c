"""The smallest comparison that still goes through every stage, and what it leaves."""

import csv
from pathlib import Path
from typing import Any

from command_line import CommandLine, Done
from images_on_disk import save_archive

# Ten training and ten test images of each of four classes; the words name them in the folder where the command runs.
# This phi acts from the first step on; one that follows the loss would not in so few steps.
IMAGES = "images.npz"
SMALL = [
    *("image_size=16", "model=conv4-2", "steps=5", "batch_size=8", "samples=2", "tuning.values=2", "jobs=1"),
    *("arms=[none,dropout,fixed_noise,metaperturb]", "seeds=1", "hydra.run.dir=run", f"target={IMAGES}"),
    "phi=tiny-imagenet-4",
]
# The server's processes end at once; these wait for what they started, as one from a shell does.
_END_AS_FROM_A_SHELL = """
import atexit, os, sys, threading
end = os._exit
def ending(code):
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    end(code)
os._exit = ending
"""
MEASURED = {"step_ms", "seconds"}


def compare(mp: CommandLine, folder: Path, *words: str, first: str = "", **options: Any) -> Done:
    """``compare`` on small images that are in ``folder`` afterwards; ``first`` is Python code that runs before it."""
    if not (folder / IMAGES).exists():
        save_archive(folder / IMAGES, classes=4, per_class=20)
    (done,) = mp.together(folder, "compare", *SMALL, *words, first={0: f"{_END_AS_FROM_A_SHELL}\n{first}"}, **options)
    return done


def succeed(mp: CommandLine, folder: Path, *words: str, **options: Any) -> Done:
    """The same, where it must end well."""
    done = compare(mp, folder, *words, **options)
    assert done.code == 0, f"ended with {done.code}\n{done.stdout}\n{done.stderr}"
    assert done.stderr == ""
    return done


def table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none where it is absent."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def runs(folder: Path) -> list[tuple[str, int]]:
    """Arm and seed of each run in the results of a run folder, in the order in which they were made."""
    return [(row["arm"], int(row["seed"])) for row in table(folder / "results.csv")]


def unmeasured(path: Path) -> list[dict[str, str]]:
    """The rows, whatever their order was, without what depends on the clock."""
    rows = [{name: value for name, value in row.items() if name not in MEASURED} for row in table(path)]
    return sorted(rows, key=lambda row: (row["arm"], int(row["seed"])))
