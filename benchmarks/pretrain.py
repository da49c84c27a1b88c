"""Weights to fine-tune from: train a network on a data set and save its state_dict.

python -m benchmarks.pretrain --data tiny_imagenet.npz --model resnet20 --steps 3000 --out resnet20.safetensors
"""

import argparse
from pathlib import Path

import lightning as L
from safetensors.torch import save_file

from mp_lightning.compare.architecture import Architecture
from mp_lightning.compare.classifier import ClassifierFactory, Optimization
from mp_lightning.compare.examine import predict_pair, predictions
from mp_lightning.compare.metrics import scores
from mp_lightning.compare.target import TargetFactory, read_target
from mp_lightning.randomness import seed_all


class Tested(L.Callback):
    """Prints how the network does on test images when training ends."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.eval()
        loader = trainer.datamodule.test_dataloader()  # type: ignore[attr-defined]
        found = scores(*predictions(trainer, pl_module, loader, predict_pair, "logits", "test_dataloader"))
        print(f"test accuracy {100 * found.accuracy:.1f} %, NLL {found.nll:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a dataset by name, an npz or an ImageFolder")
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, required=True, help="a safetensors file")
    given = parser.parse_args()
    target = read_target(
        given.data, given.data_root, given.image_size, n_per_class=None, flip=None, batch_size=given.batch_size
    )
    print(target)
    optimization = Optimization(given.steps, given.batch_size, given.lr, 5e-4, [0.4, 0.7, 0.9], 0.3)
    seed_all(0)
    classes = target.train.num_classes
    module = ClassifierFactory(Architecture.parse(given.model), classes, given.image_size, optimization)()
    trainer = L.Trainer(max_epochs=1, logger=False, enable_checkpointing=False, callbacks=[Tested()])
    trainer.fit(module, datamodule=TargetFactory(target, given.steps, given.batch_size)(0))
    save_file({name: value.contiguous() for name, value in module.net.state_dict().items()}, given.out)


if __name__ == "__main__":
    main()
