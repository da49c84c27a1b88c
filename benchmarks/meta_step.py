"""What a joint meta-step costs: theta's step and phi's, as a ratio to a plain training step of the same network.

    python -m benchmarks.meta_step
    python -m benchmarks.meta_step --device cuda

``reference`` and ``fast`` are the two paths of the perturbation. On a CPU times are those of the process on one thread.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from benchmarks.arms import SMALL, build
from benchmarks.environment import describe
from benchmarks.measure import interleaved
from benchmarks.options import check_device, some_of
from benchmarks.table import Table
from mp_lightning import MetaPerturb, attach
from mp_lightning.meta.step import phi_gradient, theta_step
from mp_lightning.perturbation import initial_phi

ARMS = ("plain", "reference", "fast")
COLUMNS = ["model", "batch", "arm", "milliseconds", "ratio", "ratio_q1", "ratio_q3", "rounds"]


def make_step(arm: str, model: str, batch: int, device: str) -> Callable[[], None]:
    """One step of one arm, with a training batch and, for phi, a validation batch of the same size."""
    torch.manual_seed(0)
    network, side = build(model)
    network = network.to(device).train()
    x, x_valid = torch.randn(2, batch, 3, side, side, device=device)
    y, y_valid = torch.randint(10, (2, batch), device=device)
    theta = torch.optim.Adam(network.parameters(), lr=1e-3, weight_decay=5e-4)

    def plain() -> None:
        theta.zero_grad()
        cross_entropy(network(x), y).backward()
        theta.step()

    if arm == "plain":
        return plain
    perturbation = MetaPerturb(initial_phi(0), trainable=True).to(device)
    attach(network, perturbation=perturbation, path="auto" if arm == "fast" else "reference")
    phi = list(perturbation.parameters())
    optimizer = torch.optim.Adam(phi, lr=1e-3, weight_decay=5e-4)

    def joint() -> None:
        theta_step(network, theta, x, y)
        _, gradients = phi_gradient(network, phi, x_valid, y_valid)
        for parameter, gradient in zip(phi, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()

    return joint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="resnet20,conv4", help=f"some of {','.join(SMALL)}")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, default=None, help="default: benchmarks/results/meta_step-DEVICE.csv")
    arguments = parser.parse_args()
    models = some_of(parser, "models", arguments.models, SMALL)
    check_device(parser, arguments.device)
    torch.set_num_threads(1)
    device = arguments.device
    table = Table(arguments.out or Path(f"benchmarks/results/meta_step-{device}.csv"), COLUMNS, describe(device))
    for model in models:
        values = {"model": model, "batch": str(arguments.batch)}
        if not table.has(values):
            steps = [make_step(arm, model, arguments.batch, device) for arm in ARMS]
            timings = interleaved(steps, arguments.rounds, torch.device(device))
            rounds = {"rounds": str(arguments.rounds)}
            table.add([{**values, "arm": a, **t.columns(), **rounds} for a, t in zip(ARMS, timings, strict=True)])
        print(f"\n{model}, batch {arguments.batch}")
        table.show(values)


if __name__ == "__main__":
    main()
