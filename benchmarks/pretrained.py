"""What phi does to a network that was trained without it, before anything is trained again.

    python -m benchmarks.pretrained --data tiny_imagenet.npz --model resnet20 --weights resnet20.safetensors

Each line is the accuracy and NLL on the test images of the data set that the weights were trained on.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from mp_lightning import Mean, MonteCarlo, attach, load_phi, reestimate_batch_norm
from mp_lightning.compare.architecture import Architecture
from mp_lightning.compare.controls import MeanOne, set_constants
from mp_lightning.compare.metrics import scores
from mp_lightning.compare.moments import site_moments
from mp_lightning.compare.target import Target, TargetData, read_target
from mp_lightning.compare.weights import load_weights, read_weights
from mp_lightning.perturbation import MetaPerturb, Perturbation

BATCHES = 50


def network(given: argparse.Namespace, target: Target) -> nn.Module:
    net = Architecture.parse(given.model).construct(target.train.num_classes, given.image_size)
    load_weights(net, read_weights(given.weights))
    return net.eval()


@torch.no_grad()
def tested(what: str, net: nn.Module, data: TargetData) -> None:
    found = [(net(x).softmax(dim=1), y) for x, y in data.test_dataloader()]
    own = scores(torch.cat([p for p, _ in found]), torch.cat([y for _, y in found]))
    print(f"{what:<56} accuracy {100 * own.accuracy:5.1f} %   NLL {own.nll:7.3f}", flush=True)


def batches(data: TargetData) -> Iterator[Tensor]:
    return (x for x, _ in islice(data.train_dataloader(), BATCHES))


def forwards(net: nn.Module, data: TargetData) -> list[Callable[[], object]]:
    return [partial(net, x) for x in batches(data)]


def perturbed(given: argparse.Namespace, target: Target, data: TargetData, perturbation: Perturbation) -> None:
    """Test with a perturbation at full strength, its own running statistics estimated on training batches."""
    net = network(given, target)
    attachment = attach(net, perturbation=perturbation)
    if isinstance(perturbation, MeanOne):
        plain = network(given, target)
        measured = attach(plain, perturbation=MetaPerturb(perturbation.phi, noise_per=perturbation.noise_per))
        settle(plain, data)
        with torch.no_grad():
            set_constants(attachment, site_moments(measured, forwards(plain, data)[:5]))
    settle(net, data)
    attachment.inference = MonteCarlo(20, "logits")
    tested(f"{perturbation.name}, 20 samples", net, data)
    reestimate_batch_norm(attachment, forwards(net, data))
    attachment.inference = Mean()
    tested(f"{perturbation.name}, one forward, batch norm re-estimated", net, data)


@torch.no_grad()
def settle(net: nn.Module, data: TargetData) -> None:
    """Let the sites see training batches, and batch norm be as the weights have it."""
    kept = {name: value.clone() for name, value in net.state_dict().items()}
    net.train()
    for x in batches(data):
        net(x)
    net.load_state_dict(kept)
    net.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a dataset by name, an npz or an ImageFolder")
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--weights", required=True, help="trained on it, as by benchmarks.pretrain")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--phi", help="a phi.safetensors, or the name of a bundled one")
    given = parser.parse_args()
    target = read_target(given.data, given.data_root, given.image_size, n_per_class=None, flip=None, batch_size=64)
    data = TargetData(target, seed=0, steps=BATCHES, batch_size=64)
    phi = load_phi(given.phi)
    tested("as it was trained", network(given, target), data)
    for perturbation in (kind(phi.phi, noise_per=phi.noise_per) for kind in (MetaPerturb, MeanOne)):
        perturbed(given, target, data, perturbation)


if __name__ == "__main__":
    main()
