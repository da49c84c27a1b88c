"""A model that holds a network, attached, trained for a few steps, and ready to be evaluated."""

import torch
from torch import nn

from lightning_modules import digits
from mp_lightning import Mean, attach, reestimate_batch_norm
from mp_lightning.backbones import build_backbone

ACTING = {"ramp_steps": 0, "full_strength_at": 1.0}  # from the first batch on


def network():
    return build_backbone("conv4", 10, width=8, image_size=16)


def images():
    return digits()[0][:16]


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x):
        return self.net(x)


def trained():
    torch.manual_seed(0)
    model = Holder()
    attachment = attach(model, **ACTING)
    for _ in range(4):
        model(images())
        attachment.step(1.0)
    reestimate_batch_norm(attachment, [lambda: model(images())])
    attachment.inference = Mean()
    return model.eval(), attachment
