"""A user's training from end to end: fit and test with the callback, around the networks that people bring."""

import lightning as L
import pytest
import torch
import torchvision
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import DataLoader, TensorDataset

from lightning_modules import digits
from mp_lightning import MetaPerturbCallback, attachment_of
from mp_lightning.backbones import build_backbone
from research_nets import ResearchResNet


class Classifier(L.LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.net(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        self.log("test_loss", cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-4)


NETWORKS = {
    "torchvision ResNet18": (lambda: torchvision.models.resnet18(num_classes=10), 8),
    "torchvision VGG11-bn": (lambda: torchvision.models.vgg11_bn(num_classes=10), 8),
    "research ResNet": (lambda: ResearchResNet(num_classes=10), 3),
    "ResNet20": (lambda: build_backbone("resnet20", 10), 9),
    "Conv4": (lambda: build_backbone("conv4", 10), 4),
}


@pytest.mark.parametrize("inference", ["mean", "mc"])
@pytest.mark.parametrize("name", NETWORKS)
def test_fit_and_test_on_real_digits(tmp_path, name, inference):
    factory, sites = NETWORKS[name]
    torch.manual_seed(0)
    module = Classifier(factory())
    x, y = digits()
    images = TensorDataset(interpolate(x[:32], size=32), y[:32])
    trainer = L.Trainer(
        default_root_dir=tmp_path,
        max_epochs=2,
        callbacks=[MetaPerturbCallback(sites=1, inference=inference, samples=2, full_strength_at=1)],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(images, batch_size=16))
    attachment = attachment_of(module)
    assert len(attachment.plan) == sites
    assert attachment.coeff == attachment.strength
    assert float(attachment.input_size) == 32
    assert all((site.mean != 0).any() for site in attachment.sites), "a site was never reached"
    result = trainer.test(module, DataLoader(images, batch_size=16), verbose=False)[0]
    assert 0 < result["test_loss"] < 20
