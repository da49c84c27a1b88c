"""Compare regularizers on a LightningModule and a DataModule of one's own, in some two minutes on two CPU cores.

    python examples/compare_own_module.py [EPOCHS]

Digits are easy: a plain network gets 93 % of the new ones right from eight labels a class, and there is little to gain.
"""

import sys

import lightning as L
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import mp_lightning
from mp_lightning import Arm, MetaPerturbCallback
from mp_lightning.data import load_digits, normalize


class Classifier(L.LightningModule):
    """A plain convolutional network."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, o in ((3, 16), (16, 32), (32, 32)):
            layers += [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2)]
        self.net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 2 * 2, 10))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=2e-3)


class FewDigits(L.LightningDataModule):
    """Ten labelled digits a class, drawn by the seed; what they are drawn from holds no test image."""

    num_classes = 10

    def __init__(self, seed: int) -> None:
        super().__init__()
        pool, self.test = load_digits(size=16).halves(seed=0)
        few, _ = pool.few_per_class(10, seed)
        self.train, self.valid = few.few_per_class(8, seed)

    def _loader(self, images, shuffle=False):
        return DataLoader(TensorDataset(normalize(images.images), images.labels), batch_size=20, shuffle=shuffle)

    def train_dataloader(self):
        return self._loader(self.train, shuffle=True)

    def val_dataloader(self):  # on which hyperparameters are tuned
        return self._loader(self.valid)

    def test_dataloader(self):
        return self._loader(self.test)


def weaker(seed: int) -> list[L.Callback]:
    return [MetaPerturbCallback("tiny-imagenet-7", strength=0.5)]


if __name__ == "__main__":  # needed for jobs=2, whose processes import this file
    comparison = mp_lightning.compare(
        Classifier,
        FewDigits,
        trainer={
            "max_epochs": int(sys.argv[1]) if len(sys.argv) > 1 else 120,
            "accelerator": "cpu",
            "limit_val_batches": 0,
        },
        arms=["none", "dropout", "fixed_noise", "metaperturb", Arm("strength 0.5", weaker)],
        seeds=5,
        jobs=2,
    )
    print(f"\n{comparison.folder / 'report.html'} shows the pictures.")
