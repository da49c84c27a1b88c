"""Train torchvision's ResNet18 on a few real digits, with and without MetaPerturb. Takes about a minute on a CPU.

It shows how to use it, not whether it helps: that is one run of each, short, and differs by points from seed to seed.
What judges is `python -m mp_lightning.meta compare`.
"""

import lightning as L
import torch
import torchvision
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset

from mp_lightning import MetaPerturbCallback
from mp_lightning.data import load_digits, normalize


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torchvision.models.resnet18(num_classes=10)

    def training_step(self, batch):
        return cross_entropy(self.net(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        x, y = batch
        out = self.net(x)
        self.log_dict({"nll": cross_entropy(out, y), "accuracy": (out.argmax(1) == y).float().mean()})

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


few, rest = load_digits(size=32).few_per_class(10, seed=0)
train = DataLoader(TensorDataset(normalize(few.images), few.labels), batch_size=20, shuffle=True)
test = DataLoader(TensorDataset(normalize(rest.images), rest.labels), batch_size=200)

for callbacks in ([], [MetaPerturbCallback()]):
    L.seed_everything(0)
    module = Classifier()
    trainer = L.Trainer(max_epochs=20, callbacks=callbacks, logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.fit(module, train)
    if not callbacks:
        update_bn(train, module.net)  # as the callback does, so that the two differ by MetaPerturb alone
    trainer.test(module, test)
