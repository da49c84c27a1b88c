"""The LightningModule of the command: a network, cross-entropy, Adam and steps of the learning rate."""

from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mp_lightning.compare.architecture import Architecture
from mp_lightning.compare.weights import Weights, load_weights


@dataclass(frozen=True)
class Optimization:
    """How theta is trained.

    Attributes:
        steps: training batches.
        batch_size: images in each.
        lr: learning rate of Adam.
        weight_decay: L2 penalty.
        milestones: fractions of the steps after which the learning rate is multiplied by ``lr_factor``.
        lr_factor: see ``milestones``.
    """

    steps: int
    batch_size: int
    lr: float
    weight_decay: float
    milestones: list[float] = field(default_factory=list)
    lr_factor: float = 1.0


class Classifier(L.LightningModule):
    """Trains ``net``, from images (B, 3, H, W) to logits (B, K); labels are class numbers or probabilities."""

    def __init__(self, net: nn.Module, optimization: Optimization) -> None:
        super().__init__()
        self.net = net
        self._optimization = optimization

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> Any:
        how = self._optimization
        optimizer = torch.optim.Adam(self.parameters(), lr=how.lr, weight_decay=how.weight_decay)
        if not how.milestones:
            return optimizer
        at = [round(fraction * how.steps) for fraction in how.milestones]
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, at, how.lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@dataclass(frozen=True)
class ClassifierFactory:
    """Makes freshly initialised classifiers from torch's global generator, with given weights where there are any."""

    architecture: Architecture
    num_classes: int
    image_size: int
    optimization: Optimization
    weights: Weights | None = None

    def __call__(self) -> Classifier:
        net = self.architecture.construct(self.num_classes, self.image_size)
        if self.weights is not None:
            load_weights(net, self.weights)
        return Classifier(net, self.optimization)
