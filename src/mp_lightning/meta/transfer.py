"""Does phi transfer? A small network trained afresh on few images of a target, with and without it."""

import hashlib
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mp_lightning.compare.architecture import Architecture
from mp_lightning.data import ImageSet, batch_indices, normalize, standard_augment
from mp_lightning.inference import MonteCarlo
from mp_lightning.perturbation import NamedPhi, phi_digest
from mp_lightning.randomness import derived_seed, random_state
from mp_lightning.runs import unusable
from mp_lightning.sites import attach
from mp_lightning.whole import write_json


@dataclass(frozen=True)
class Target:
    """Images that meta-training has not seen."""

    train: ImageSet
    test: ImageSet
    flip: bool

    def __str__(self) -> str:
        return (
            f"{self.train.name}: {len(self.train)} training and {len(self.test)} test images of "
            f"{self.train.num_classes} classes"
        )

    def digest(self) -> str:
        """A few characters that tell these images, labels and mirroring from others."""
        digest = hashlib.sha256(f"{self.flip}".encode())
        for images in (self.train, self.test):
            images.add_to(digest)
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class TransferSettings:
    """How the target is trained.

    Attributes:
        samples: number of noisy forwards that are averaged at evaluation.
        full_strength_at: share of the first training loss at or below which the whole strength of phi acts; 1 for a
            strength that does not follow the loss. Nothing of it enters meta-training, so it is no setting of that.
        acts_below: share of it, above the other, at or above which nothing acts, likewise.
    """

    architecture: str
    steps: int
    seeds: int
    batch_size: int
    lr: float
    weight_decay: float
    samples: int
    full_strength_at: float = 1.0
    acts_below: float = 1.0


@dataclass(frozen=True)
class ArmResult:
    """Held-out negative log-likelihood (nats) and accuracy of one arm, one value a seed."""

    arm: str
    nll: list[float]
    accuracy: list[float]

    def __str__(self) -> str:
        return f"{self.arm:<12} NLL {_spread(self.nll, 3)}   accuracy {_spread([100 * a for a in self.accuracy], 1)} %"


class KeptRuns:
    """The finished runs of a comparison in a file, so that one that was killed continues with what is missing.

    Args:
        path: a JSON file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            content = {}
        self._runs: dict[str, Any] = content if isinstance(content, dict) else {}

    def get(self, key: str) -> tuple[float, float] | None:
        """NLL and accuracy of a run, if it was finished."""
        match self._runs.get(key):
            case [float(nll), float(accuracy)]:
                return nll, accuracy
        return None

    def put(self, key: str, result: tuple[float, float]) -> None:
        """Keep a run.

        Raises:
            RunFolderError: the file cannot be written.
        """
        self._runs[key] = list(result)
        try:
            write_json(self._path, self._runs)
        except OSError as error:
            raise unusable(self._path.parent, error) from error


def compare_transfer(
    target: Target,
    arms: dict[str, NamedPhi | None],
    settings: TransferSettings,
    seed: int,
    device: torch.device,
    on_progress: Callable[[str, int, int], None],
    kept: KeptRuns,
) -> list[ArmResult]:
    """Train every arm with the same seeds: initialisation, batches and augmentation of one seed are shared by all arms.

    Args:
        target: the images.
        arms: by name, the phi to train with (None: no perturbation).
        settings: how to train.
        seed: seed of the whole comparison.
        device: where to train.
        on_progress: called with the arm's name, the number of its seed and how many steps were done since the last
            call; 0 before the test.
        kept: the runs that are finished.
    """
    results, images = [], target.digest()
    for arm, phi in arms.items():
        runs = []
        for i in range(settings.seeds):
            key = _key(images, arm, phi, settings, seed, i)
            result = kept.get(key)
            if result is None:
                result = _train_and_test(
                    target, phi, settings, derived_seed(seed, "transfer", i), device, partial(on_progress, arm, i)
                )
                kept.put(key, result)
            else:
                on_progress(arm, i, settings.steps)
            runs.append(result)
        results.append(ArmResult(arm, [nll for nll, _ in runs], [accuracy for _, accuracy in runs]))
    return results


def _key(images: str, arm: str, phi: NamedPhi | None, settings: TransferSettings, seed: int, number: int) -> str:
    """A name of a run that everything which decides its result has a part in."""
    what = f"{images}/{settings}/{seed}/{None if phi is None else phi_digest(phi)}"
    return f"{arm}/{number}/{hashlib.sha256(what.encode()).hexdigest()[:16]}"


def _train_and_test(
    target: Target,
    phi: NamedPhi | None,
    settings: TransferSettings,
    seed: int,
    device: torch.device,
    on_progress: Callable[[int], None],
) -> tuple[float, float]:
    model = Architecture.parse(settings.architecture).build(target.train, derived_seed(seed, "theta")).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    attachment = None
    if phi is not None:
        # One process trains here, however many learned phi.
        attachment = attach(model, phi, total_steps=settings.steps, seed=derived_seed(seed, "noise"), distributed=False)
    for step in range(settings.steps):
        chosen = batch_indices(len(target.train), settings.batch_size, step, derived_seed(seed, "batches"))
        generator = torch.Generator().manual_seed(derived_seed(seed, "augmentation", step))
        x = standard_augment(target.train.images[chosen], generator, flip=target.flip).to(device)
        optimizer.zero_grad()
        with random_state(derived_seed(seed, "step", step), device):
            loss = F.cross_entropy(model(x), target.train.labels[chosen].to(device))
            loss.backward()
        optimizer.step()
        if attachment is not None:
            attachment.step(loss)
        on_progress(1)
    on_progress(0)
    if attachment is not None:
        attachment.inference = MonteCarlo(settings.samples, output="logits")
    return evaluate(model.eval(), target.test, device)


@torch.no_grad()
def evaluate(model: nn.Module, images: ImageSet, device: torch.device, batch_size: int = 256) -> tuple[float, float]:
    """Mean negative log-likelihood (nats) and accuracy over all images."""
    nll, correct = 0.0, 0
    for x, y in zip(images.images.split(batch_size), images.labels.split(batch_size), strict=True):
        logits: Tensor = model(normalize(x).to(device)).float()
        nll += float(F.cross_entropy(logits, y.to(device), reduction="sum"))
        correct += int((logits.argmax(dim=1) == y.to(device)).sum())
    return nll / len(images), correct / len(images)


def _spread(values: Sequence[float], digits: int) -> str:
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} +- {statistics.stdev(values):.{digits}f}"
