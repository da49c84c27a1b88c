"""LightningModules as users write them, and digits, for the tests of training."""

from functools import cache

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from mp_lightning.backbones import build_backbone
from mp_lightning.data import load_digits, normalize

BATCH = 16
SIZE = 16


@cache
def digits():
    """All of them at 16 pixels, (1797, 3, 16, 16), and their labels."""
    images = load_digits(SIZE)
    return normalize(images.images), images.labels


def loader(batches=4, *, start=0, shuffle=False, batch=BATCH):
    x, y = digits()
    chosen = slice(start, start + batches * batch)
    return DataLoader(TensorDataset(x[chosen], y[chosen]), batch_size=batch, shuffle=shuffle)


class Classifier(pl.LightningModule):
    """The usual module: a network inside, called as self(x)."""

    def __init__(self, name="conv4", dropout=0.0):
        super().__init__()
        self.net = build_backbone(name, 10, width=8, image_size=SIZE)
        self.dropout = dropout

    def forward(self, x):
        return self.net(F.dropout(x, self.dropout, self.training))

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def _evaluate(self, batch, stage):
        logits = self(batch[0])
        self.log(f"{stage}_loss", F.cross_entropy(logits, batch[1]))
        self.log(f"{stage}_accuracy", (logits.argmax(1) == batch[1]).float().mean())

    def validation_step(self, batch, batch_idx):
        self._evaluate(batch, "val")

    def test_step(self, batch, batch_idx):
        self._evaluate(batch, "test")

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2, weight_decay=1e-2)


def module(cls=Classifier, seed=0, **options):
    """A module whose weights follow from the seed."""
    torch.manual_seed(seed)
    return cls(**options)


def trainer(path, callbacks=(), cls=pl.Trainer, **options):
    """A trainer that writes and prints as little as it can."""
    settings = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return cls(default_root_dir=path, callbacks=list(callbacks), **{**settings, **options})
