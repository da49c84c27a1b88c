"""A layer that keeps what it did."""

from torch import nn


class Seen(nn.Dropout):
    """Dropout that keeps the fraction it dropped in training, and how often it was called in evaluation."""

    def __init__(self, p=0.3):
        super().__init__(p)
        self.dropped, self.scales, self.evaluated = [], [], 0

    def forward(self, x):
        y = super().forward(x)
        if self.training:
            self.dropped.append((y == 0).float().mean().item())
            kept = y != 0
            self.scales.append((y[kept] / x[kept]).mean().item())
        else:
            self.evaluated += 1
        return y
