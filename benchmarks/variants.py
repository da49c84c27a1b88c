"""Variants of one phi beside each other on a validation target, as one was chosen to come with the package.

    python -m benchmarks.variants --data FOLDER --phi tiny-imagenet-6 --full-strength-at 0.4,0.1 --strength 0.95,0.8

--target is one of benchmarks.validation_targets, which is made of files in FOLDER, or another npz file there. Each
combination of what is given is an arm, what is not given is as phi comes with. Runs are kept as those of
benchmarks.prove are, in benchmarks/results/selection.csv.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

from benchmarks.prove import Proof, make_and_keep
from benchmarks.validation_targets import CLOTHING, write_target
from mp_lightning import UserError, load_phi, save_phi
from mp_lightning.perturbation import NamedPhi
from mp_lightning.perturbation.files import DEFAULT_PHI

RESULTS = Path(__file__).parent / "results" / "selection.csv"


def numbers(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]


def words(text: str) -> list[str]:
    return text.split(",")


# Fields of NamedPhi that can be varied, and how they are read.
VARIED = {
    **{"strength": numbers, "noise_per": words, "share_of_sites": numbers},
    **{"full_strength_at": numbers, "acts_below": numbers},
}


def variants(phi: NamedPhi, varied: dict[str, list[float] | list[str]]) -> Iterator[NamedPhi]:
    """phi in each combination of the values, named after those that are not its own."""
    for values in product(*varied.values()):
        chosen = dict(zip(varied, values, strict=True))
        changed = [f"{key}-{value}" for key, value in chosen.items() if value != getattr(phi, key)]
        yield replace(phi, **chosen, name="_".join([phi.name, *changed]))


def write_arms(phi: NamedPhi, source: str, varied: dict[str, list[float] | list[str]], folder: Path) -> list[str]:
    """Write the variants into a folder, and name the arms that are compared; phi as it is stays where it comes from."""
    arms = ["none"]
    for variant in variants(phi, varied):
        file = f"{variant.name}.safetensors"
        if variant.name == phi.name:
            arms.append(f"metaperturb:{Path(source).resolve() if Path(source).exists() else source}")
            continue
        save_phi(folder / file, variant, {"kind": f"a variant of {phi.name}"})
        arms.append(f"metaperturb:{file}")
    return arms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with npz files")
    parser.add_argument(
        "--target", default=CLOTHING, help="clothing50, tiny10_0 to tiny10_14, tiny100, or the name of an npz file"
    )
    parser.add_argument("--phi", default=DEFAULT_PHI, help="name of a bundled one, or a file")
    for key, kind in VARIED.items():
        parser.add_argument(f"--{key.replace('_', '-')}", type=kind, help="with commas")
    parser.add_argument("--n-per-class", type=int, default=50)
    parser.add_argument("--model", default="conv4")
    parser.add_argument("--steps", type=int, default=Proof.steps)
    parser.add_argument("--batch-size", type=int, default=Proof.batch_size)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=Path("runs/variants"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    given.runs.mkdir(parents=True, exist_ok=True)
    try:
        phi = load_phi(given.phi)
        varied = {key: getattr(given, key) or [getattr(phi, key)] for key in VARIED}
        if given.full_strength_at and not given.acts_below:
            varied["acts_below"] = [1.0]  # as for attach
        arms = write_arms(phi, given.phi, varied, given.runs)
        write_target(given.target, given.data)
    except (OSError, UserError, ValueError) as error:
        parser.error(str(error))
    proof = Proof(
        given.target, given.n_per_class, given.model, steps=given.steps, batch_size=given.batch_size, lr=given.lr
    )
    print(proof, flush=True)
    make_and_keep(proof, given, arms)


if __name__ == "__main__":
    main()
