"""Does constant noise do as well when it is matched to what passes the activation, and to phi's noise alone?

    python -m benchmarks.positive_control --data FOLDER --only imagenette-conv4 --phi tiny-imagenet-6

The control ``fixed_noise`` of ``compare`` has the mean and the variance of phi's multiplier over all elements. Those of
negative features are discarded by the ReLU behind the site, and a part of the variance is no noise: the multiplier
differs from feature to feature. Here the control has the mean of the multiplier where features are positive, and the
variance that noise alone gives it there. All else is as in benchmarks.prove, of which --only names a comparison, and
whose rows of the other arms are taken over from benchmarks/results/compare.csv.
"""

import argparse
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.options import some_of
from benchmarks.prove import PROOFS, RESULTS, bring_back, keep
from mp_lightning.cli.app import main as command
from mp_lightning.compare import calibration
from mp_lightning.compare.moments import SiteMoments, watching
from mp_lightning.perturbation.files import DEFAULT_PHI
from mp_lightning.sites import Attachment

OUT = RESULTS.parent / "positive_control" / RESULTS.name  # in a folder of its own, as its moments are others


def positive_moments(attachment: Attachment, forwards: Iterable[Callable[[], Any]]) -> list[SiteMoments]:
    """Mean of the multiplier, and the variance that noise alone gives it, over positive features, at each site.

    In place of :func:`mp_lightning.compare.moments.site_moments`, with the same arguments.
    """
    sums: dict[str, Tensor] = {}  # count, sum of multipliers, sum of squares of what noise adds; float64

    def add(site: str, x: Tensor, multiplier: Tensor, expected: Callable[[], Tensor]) -> None:
        positive = (x > 0).double()
        noise = (multiplier - expected()).double()
        found = [positive.sum(), (positive * multiplier).sum(), (positive * noise.square()).sum()]
        sums[site] = sums.get(site, 0) + torch.stack(found)

    with watching(attachment, add):
        for forward in forwards:
            forward()
    return [
        SiteMoments(name, float(total / count), float(squares / count))
        for name, (count, total, squares) in ((name, sums[name]) for name in attachment.plan.names)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [proof.name for proof in PROOFS]
    parser.add_argument("--data", type=Path, required=True, help="folder with the npz files of the targets")
    parser.add_argument("--only", required=True, help="one of the comparisons")
    parser.add_argument("--phi", default=DEFAULT_PHI, help="name of a bundled one")
    parser.add_argument("--seeds", type=int, default=15)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=Path("runs/positive_control"))
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    (name,) = some_of(parser, "only", given.only, names)
    (proof,) = [proof for proof in PROOFS if proof.name == name]
    for folder in (given.runs, given.out.parent):
        folder.mkdir(parents=True, exist_ok=True)
    runs, out = given.runs.resolve(), given.out.resolve()
    others = ["none", f"metaperturb:{given.phi}"]
    bring_back(proof, runs, out)
    bring_back(proof, runs, RESULTS, others)
    calibration.site_moments = positive_moments
    arms = ",".join([*others, f"fixed_noise:{given.phi}"])
    words = [*proof.words(given.data), f"arms=[{arms}]", f"seeds={given.seeds}", f"jobs={given.jobs}"]
    os.chdir(runs)
    try:
        command(["compare", *words, f"hydra.run.dir={proof.name}"])
    finally:
        keep(proof, runs, out)


if __name__ == "__main__":
    main()
