"""What the site at the end does in a network whose residual stream is not multiplied: the default phi with and without.

    python -m benchmarks.end_site --data FOLDER --target clothing50 --model wrn28_2-8

Arms: ``none``; ``inner``, the deeper third of the sites inside the branches; ``inner+tail``, these and the site at the
end, as the default phi has them; ``tail``, that at the end alone. --target is one of benchmarks.validation_targets. The
rows that were made are in benchmarks/results/end_site.csv.
"""

import argparse
from pathlib import Path

from benchmarks.prove import Proof
from benchmarks.validation_targets import CLOTHING, write_target
from mp_lightning import Arm, MetaPerturbCallback, compare, find_sites, load_phi
from mp_lightning.compare.architecture import Architecture
from mp_lightning.compare.classifier import ClassifierFactory, Optimization
from mp_lightning.compare.target import TargetFactory, read_target
from mp_lightning.sites.rules import END


def at(name: str, sites: list[str]) -> Arm:
    return Arm(name, lambda seed: [MetaPerturbCallback(sites=sites)])


def arms(factory: ClassifierFactory) -> list[str | Arm]:
    """The uses of the default phi in the networks that a factory makes."""
    plan = find_sites(factory(), share=load_phi().share_of_sites)
    inner = [site.name for site in plan if site.rule != END]
    tail = [site.name for site in plan if site.rule == END]
    return ["none", at("inner", inner), at("inner+tail", inner + tail), at("tail", tail)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with npz files")
    parser.add_argument("--target", default=CLOTHING)
    parser.add_argument("--model", default="wrn28_2-8")
    parser.add_argument("--n-per-class", type=int, default=50)
    parser.add_argument("--lr", type=float, default=Proof.lr)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("runs/end_site"))
    given = parser.parse_args()
    write_target(given.target, given.data)
    target = read_target(
        str(given.data / f"{given.target}.npz"),
        given.data,
        Proof.image_size,
        n_per_class=given.n_per_class,
        flip=None,
        batch_size=Proof.batch_size,
    )
    optimization = Optimization(Proof.steps, Proof.batch_size, given.lr, weight_decay=0.0)
    classes = target.train.num_classes
    factory = ClassifierFactory(Architecture.parse(given.model), classes, Proof.image_size, optimization)
    compare(
        factory,
        TargetFactory(target, Proof.steps, Proof.batch_size),
        trainer={"max_epochs": 1},
        arms=arms(factory),
        seeds=given.seeds,
        num_classes=classes,
        output="logits",
        target=given.target,
        model=given.model,
        folder=given.runs / f"{given.target}-{given.model}",
    )


if __name__ == "__main__":
    main()
