"""What inference costs: forwards in evaluation mode by each mode, interleaved in one process, as ratios to a plain one.

    python -m benchmarks.inference
    python -m benchmarks.inference --device cuda

``mc`` averages ``--samples`` noisy forwards, ``mean`` makes one with the expected noise, ``fold`` one with a constant
for each channel. ``reference`` is ``mean`` by the readable path. On a CPU times are those of the process on one thread.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.arms import LARGE, PHI, SMALL, build
from benchmarks.environment import describe
from benchmarks.measure import interleaved
from benchmarks.options import check_device, some_of
from benchmarks.table import Table
from mp_lightning import Fold, Mean, MonteCarlo, attach, reestimate_batch_norm

ARMS = ("plain", "mc", "reference", "mean", "fold")
COLUMNS = ["model", "batch", "arm", "milliseconds", "ratio", "ratio_q1", "ratio_q3", "samples", "rounds"]


class Evaluation:
    """One forward of one arm on one batch."""

    def __init__(self, arm: str, model: str, batch: int, samples: int, device: str) -> None:
        torch.manual_seed(0)
        network, side = build(model)
        self.network: nn.Module = network.to(device)
        self.x: Tensor = torch.randn(batch, 3, side, side, device=device)
        if arm != "plain":
            attachment = attach(self.network, PHI, sites=1, path="reference" if arm == "reference" else "auto")
            self.network(self.x)
            reestimate_batch_norm(attachment, [lambda: self.network(self.x)], fold=arm == "fold")
            modes = {"mc": MonteCarlo(samples, "logits"), "fold": Fold()}
            attachment.inference = modes.get(arm, Mean())
        self.network.eval()

    @torch.no_grad()
    def __call__(self) -> Tensor:
        output: Tensor = self.network(self.x)
        return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="conv4,vgg9,resnet20,resnet18", help=f"some of {','.join(SMALL + LARGE)}")
    parser.add_argument("--batch", type=int, default=None, help="default: 128 at 32 pixels, 16 at 224")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, default=None, help="default: benchmarks/results/inference-DEVICE.csv")
    arguments = parser.parse_args()
    models = some_of(parser, "models", arguments.models, SMALL + LARGE)
    check_device(parser, arguments.device)
    torch.set_num_threads(1)
    device = arguments.device
    table = Table(arguments.out or Path(f"benchmarks/results/inference-{device}.csv"), COLUMNS, describe(device))
    for model in models:
        batch = arguments.batch or (16 if model in LARGE else 128)
        values = {"model": model, "batch": str(batch), "samples": str(arguments.samples)}
        if not table.has(values):
            # Samples take a hundred times as long as the rest, and are timed less often.
            evaluations = {arm: Evaluation(arm, model, batch, arguments.samples, device) for arm in ARMS}
            quick = [arm for arm in ARMS if arm != "mc"]
            timings = dict(
                zip(
                    quick,
                    interleaved([evaluations[arm] for arm in quick], arguments.rounds, torch.device(device)),
                    strict=True,
                )
            )
            timings["mc"] = interleaved([evaluations["plain"], evaluations["mc"]], 3, torch.device(device))[1]
            rounds = {arm: str(3 if arm == "mc" else arguments.rounds) for arm in ARMS}
            table.add([{**values, "arm": a, **timings[a].columns(), "rounds": rounds[a]} for a in ARMS])
        print(f"\n{model}, batch {batch}")
        table.show(values)


if __name__ == "__main__":
    main()
