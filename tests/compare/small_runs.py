"""The smallest comparison that goes through every stage: modules, data and experiments that tests share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from mp_lightning.compare.arms import AnyArm, parse_arm
from mp_lightning.compare.comparison import Outcome, Plan, Shown, carry_out
from mp_lightning.compare.run import Experiment
from mp_lightning.compare.tuning import Budget
from mp_lightning.compare.user_data import UserData
from mp_lightning.perturbation import initial_phi, load_phi

PHI = load_phi(initial_phi(3))
CLASSES = 3


class Small(L.LightningModule):
    """A user's classifier with dropout of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(4, CLASSES),
        )
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        self.seen.append(x.detach().clone())
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Augmented(Dataset[tuple[Tensor, int]]):
    """Images with noise from all three global generators, as augmentation draws it."""

    def __init__(self, count: int, seed: int) -> None:
        self._images = torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._images[index] + 0.1 * torch.randn(()) + 0.1 * float(np.random.rand()), index % CLASSES


class SmallData(L.LightningDataModule):
    """Twelve training images, six to validate and six to test."""

    num_classes = CLASSES

    def setup(self, stage: str) -> None:
        self.train, self.valid, self.test = Augmented(12, 0), Augmented(6, 1), Augmented(6, 2)

    def train_dataloader(self) -> Any:
        return DataLoader(self.train, batch_size=4, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(self.valid, batch_size=6)

    def test_dataloader(self) -> Any:
        return DataLoader(self.test, batch_size=6)


def experiment(**options: Any) -> Experiment:
    """Two epochs of three batches."""
    defaults: dict[str, Any] = {
        "module_factory": Small,
        "data": UserData(SmallData()),
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "limit_val_batches": 0},
        "steps": 6,
        "num_classes": CLASSES,
        **{"inference": "mc", "samples": 2},  # of the modes the one that is reported beside the other
    }
    return Experiment(**{**defaults, **options})


def plan(arms: Sequence[str | AnyArm], seeds: int = 2, **options: Any) -> Plan:
    """A comparison of these arms."""
    defaults: dict[str, Any] = {
        "experiment": experiment(),
        "target": "small",
        "model": "Small",
        "settings": {},
        "metric": "accuracy",
        "budget": Budget(1, 1),
        "processes": 1,
    }
    parsed = [parse_arm(arm, PHI) if isinstance(arm, str) else arm for arm in arms]
    return Plan(arms=parsed, seeds=range(seeds), **{**defaults, **options})


class Counting:
    """A display that notes what was made."""

    def __init__(self) -> None:
        self.made: list[tuple[str, int]] = []
        self.steps = 0

    def __call__(self, what: str, runs: int, finished: int) -> Any:
        return self

    def __enter__(self) -> Shown:
        outer = self

        class Noting(Shown):
            def step(self, batches: int) -> None:
                outer.steps += batches

            def finished(self, row: Any) -> None:
                outer.made.append((row.arm, row.seed))

        return Noting()

    def __exit__(self, *error: object) -> None:
        return None


def made(what: Plan, folder: Path) -> tuple[Outcome, Counting]:
    """What a comparison gives, and which runs it made."""
    display = Counting()
    return carry_out(what, folder, display), display
