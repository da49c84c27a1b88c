"""Does phi help? The comparisons that docs/results.md shows, one after another.

    python -m benchmarks.prove --data FOLDER --published published_phi.npz
    python -m benchmarks.results_page

FOLDER holds imagenette.npz, cifar10.npz, cub.npz and so on, each with x_train, y_train, x_test and y_test; in cub84.npz
are the images of cub.npz with 84 pixels, and in resnet20.safetensors the weights that are fine-tuned. Each comparison
is a run folder of ``compare`` below --runs, so that the same command continues one that was killed, and adds seeds and
arms. Finished runs are appended to benchmarks/results/compare.csv, which is all that the page needs. From it, and the
moments that controls are matched to, which are kept beside it, a run folder that was lost goes on. By default the phi
of the comparisons is the default one; --arms names another, as
none,metaperturb:tiny-imagenet-2,fixed_noise:tiny-imagenet-2.
"""

import argparse
import csv
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.options import some_of
from mp_lightning import Phi, save_phi
from mp_lightning.compare.arms import KINDS
from mp_lightning.perturbation.files import DEFAULT_PHI

RESULTS = Path(__file__).parent / "results" / "compare.csv"
PUBLISHED = "published.safetensors"
# Whose controls stand beside the default in tables and the picture: it has the same numbers, and is used alike but that
# it acts from the first fall of the loss on. Of its controls more was run.
SAME_NUMBERS = "tiny-imagenet-6"
# With the name of phi, so that the rows of one version stand beside those of the next.
ARMS = (
    *("none", f"fixed_noise:{DEFAULT_PHI}", f"shrink_only:{DEFAULT_PHI}", "dropblock"),
    *(f"metaperturb:{PUBLISHED}", f"metaperturb:{DEFAULT_PHI}"),
    *("dropout", "manifold_mixup", f"metaperturb:{DEFAULT_PHI}+manifold_mixup"),
)
_RATES = {"conv4": 3e-3, "resnet20": 3e-3}  # learning rates that go without saying in the name of a run folder
_NAMES = {"scale_kernels": "stat_kernels"}  # in the authors' file


@dataclass(frozen=True)
class Proof:
    """One comparison: a target, a network, and how it is trained."""

    target: str
    n_per_class: int | None
    model: str
    steps: int = 1200
    batch_size: int = 64
    lr: float = 1e-3
    image_size: int = 32
    weights: str | None = None  # fine-tuned from this file of FOLDER

    @property
    def name(self) -> str:
        """Of its run folder; it tells trainings of another length, batch size or learning rate apart."""
        usual = (self.steps, self.batch_size) == (Proof.steps, Proof.batch_size)
        length = "" if usual else f"-{self.steps}x{self.batch_size}"
        rate = "" if self.lr == _RATES.get(self.model, Proof.lr) else f"-lr{self.lr:g}"
        return f"{self.target}-{self.model.replace(':', '-')}{length}{rate}{'-finetuned' if self.weights else ''}"

    @property
    def short(self) -> str:
        """As tables name it, which say what most comparisons share."""
        length = "" if self.steps == Proof.steps else f", {self.steps} steps"
        rate = "" if self.lr == _RATES.get(self.model, Proof.lr) or self.weights else f", Adam {self.lr:g}"
        return f"{self.target}, {self.model}{' fine-tuned' if self.weights else ''}{length}{rate}"

    def __str__(self) -> str:
        images = "all images" if self.n_per_class is None else f"{self.n_per_class} images a class"
        model = f"{self.model} fine-tuned" if self.weights else self.model
        steps = f"{self.steps} steps of {self.batch_size}"
        return f"{self.target}, {images} of {self.image_size} pixels, {model}, {steps}, Adam {self.lr:g}"

    def words(self, data: Path) -> list[str]:
        """As ``compare`` takes it, with the files of a folder."""
        return [
            f"target={(data / f'{self.target}.npz').resolve()}",
            f"n_per_class={'null' if self.n_per_class is None else self.n_per_class}",
            *(f"{key}={getattr(self, key)}" for key in ("model", "steps", "batch_size", "lr", "image_size")),
            *([f"weights={(data / self.weights).resolve()}"] if self.weights else []),
            "inference=mean",
        ]


_TARGETS = {"imagenette": 50, "cifar10": 50, "cub": None, "dtd10": None, "fashion_mnist": 50}  # images of each class
_LONGER = {"dtd10": 3000, "cub": 6000}

# In the order in which they are made: small networks first, then larger ones. At a learning rate of 1e-3 Conv4 does not
# reach all its training images, and at 3e-3 it needs more than 1,200 steps for those of DTD and CUB. Nor is 1e-3 the
# best for ResNet20 without a regularizer on the validation target, clothing.
PROOFS = [
    *(Proof(target, n_per_class, "conv4", lr=3e-3) for target, n_per_class in _TARGETS.items()),
    *(Proof(target, None, "conv4", steps=steps, lr=3e-3) for target, steps in _LONGER.items()),
    *(Proof(target, n_per_class, "resnet20", lr=3e-3) for target, n_per_class in _TARGETS.items()),
    *(
        Proof(target, n_per_class, model)
        for model in ("vgg9", "torchvision:resnet18", "wrn28_2", "resnet44")
        for target, n_per_class in _TARGETS.items()
    ),
    *(Proof(target, 50, "conv4", lr=1e-2) for target in ("imagenette", "cifar10")),
    *(Proof(target, count, "resnet20", weights="resnet20.safetensors") for target, count in _TARGETS.items()),
    Proof("cub84", None, "resnet20", image_size=84),
]


def published_phi(path: Path, folder: Path) -> None:
    """Write the authors' numbers, which are not part of this project, as a phi file into a folder."""
    with np.load(path) as content:
        phi = Phi(**{name: torch.from_numpy(content[_NAMES.get(name, name)].copy()).float() for name in Phi._fields})
    save_phi(folder / PUBLISHED, phi, {"kind": "the phi that the authors of MetaPerturb published"})


def bring_back(proof: Proof, runs: Path, results: Path, arms: list[str] | None = None) -> None:
    """Give a run folder that is not there, as on another machine, the rows that are kept of it.

    With ``arms``, give one that may be there those rows of these arms that it lacks.
    """
    rows = [row for row in _rows(results) if row["comparison"] == str(proof) and (not arms or row["arm"] in arms)]
    place = runs / proof.name / "results.csv"
    there = _rows(place)
    known = {(row["arm"], row["seed"]) for row in there}
    rows = [row for row in rows if (row["arm"], row["seed"]) not in known]
    if not rows or (there and not arms):
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    if not arms:
        _copy_new(_moments(proof, results), place.parent)
    columns = list(there[0]) if there else [column for column in rows[0] if column != "comparison"]
    partial = place.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows([*there, *rows])
    partial.replace(place)


def make(proof: Proof, given: argparse.Namespace, arms: list[str]) -> None:
    """Make, or continue, one comparison."""
    command = [
        *(sys.executable, "-m", "mp_lightning.meta", "compare"),
        *proof.words(given.data),
        *(f"arms=[{','.join(arms)}]", f"seeds={given.seeds}", f"jobs={given.jobs}", f"hydra.run.dir={proof.name}"),
    ]
    subprocess.run(command, cwd=given.runs, check=True)


def keep(proof: Proof, runs: Path, results: Path) -> None:
    """Add the finished runs of a comparison that are not there yet; the file is replaced as a whole."""
    kept = _rows(results)
    known = {(row["comparison"], row["arm"], row["seed"]): row["settings"] for row in kept}
    new, other = [], []
    for row in _rows(runs / proof.name / "results.csv"):
        key = (str(proof), row["arm"], row["seed"])
        if key not in known:
            new.append({"comparison": str(proof), **row})
        elif known[key] != row["settings"]:
            other.append(f"arm {row['arm']}, seed {row['seed']}")
        known.setdefault(key, row["settings"])
    _copy_new(runs / proof.name, _moments(proof, results))
    if new:
        partial = results.with_name(f"{results.name}.partial")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(new[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows([*kept, *new])
        partial.replace(results)
    if other:
        raise SystemExit(
            f"{results} has {'; '.join(other)} of '{proof}' made with other settings than in {runs / proof.name}; "
            f"remove those rows from either, or name another file with --out. {len(new)} others are kept"
        )


def make_and_keep(proof: Proof, given: argparse.Namespace, arms: list[str]) -> None:
    """Make one comparison, or go on with it, and keep what is finished however that ends."""
    keep(proof, given.runs, given.out)  # what was made before this command was killed
    lost = _without_moments(proof, given, arms)
    if lost:
        print(f"Left out, as the moments of their rows were not kept: {', '.join(lost)}", flush=True)
        arms = [arm for arm in arms if arm not in lost]
    bring_back(proof, given.runs, given.out)
    try:
        make(proof, given, arms)
    finally:
        keep(proof, given.runs, given.out)


def _without_moments(proof: Proof, given: argparse.Namespace, arms: list[str]) -> list[str]:
    """Controls that have rows, while the moments of their phi are neither kept nor in the run folder."""
    places = (_moments(proof, given.out), given.runs / proof.name)
    files = (file for place in places for file in place.glob("moments-*.json"))
    there = {json.loads(file.read_text(encoding="utf-8"))["phi"] for file in files}
    rows = {row["arm"] for row in _rows(given.out) if row["comparison"] == str(proof)}
    return [arm for arm in arms if arm in rows and not _matched_to(arm) <= there]


def _matched_to(arm: str) -> set[str]:
    """The phi whose moments an arm needs."""
    parts = (part.partition(":") for part in arm.split("+"))
    return {phi or DEFAULT_PHI for kind, _, phi in parts if kind in KINDS and KINDS[kind].needs_moments}


def _moments(proof: Proof, results: Path) -> Path:
    """Folder of the moments that controls of a comparison are matched to."""
    return results.parent / "moments" / proof.name


def _copy_new(source: Path, target: Path) -> None:
    """Copy the files of moments that are not there yet."""
    for file in source.glob("moments-*.json"):
        target.mkdir(parents=True, exist_ok=True)
        if not (target / file.name).exists():
            shutil.copyfile(file, target / file.name)


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [proof.name for proof in PROOFS]
    parser.add_argument("--data", type=Path, required=True, help="folder with the npz files of the targets")
    parser.add_argument("--published", type=Path, help="npz with the authors' phi; without it that arm is left out")
    parser.add_argument("--only", default=",".join(names), help="some of the comparisons, with commas")
    parser.add_argument("--arms", default=",".join(ARMS), help="with commas")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=Path("runs/prove"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    chosen = some_of(parser, "only", given.only, names)
    given.runs.mkdir(parents=True, exist_ok=True)
    arms = given.arms.split(",")
    if given.published is not None:
        published_phi(given.published, given.runs)
    else:
        arms = [arm for arm in arms if PUBLISHED not in arm]
    for proof in PROOFS:
        if proof.name in chosen:
            print(f"\n{proof}", flush=True)
            make_and_keep(proof, given, arms)


if __name__ == "__main__":
    main()
