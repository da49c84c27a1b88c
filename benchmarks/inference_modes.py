"""Inference by 100 samples, by expectation, and by expectation without re-estimated batch norm, on one target.

    python -m benchmarks.inference_modes --data imagenette.npz --out benchmarks/results/inference_modes.csv

Each seed trains one network with MetaPerturbCallback on few labels and evaluates it in all three ways. Rows are
appended to the table as they are measured; the same command continues where an interrupted one stopped.
"""

import argparse
import csv
import time
from pathlib import Path

import lightning as L
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from benchmarks.environment import describe
from mp_lightning import MetaPerturbCallback, MonteCarlo, attachment_of
from mp_lightning.compare.architecture import Architecture
from mp_lightning.data import ImageSet, batch_indices, load_images, standard_augment
from mp_lightning.meta.transfer import evaluate

COLUMNS = ["mode", "seed", "accuracy", "nll", "seconds"]


class Classifier(L.LightningModule):
    """A backbone trained by the paper's optimizer on batches drawn from memory."""

    def __init__(self, net: torch.nn.Module, images: ImageSet, batch_size: int, seed: int) -> None:
        super().__init__()
        self.net = net
        self.images, self.batch_size, self.seed = images, batch_size, seed

    def training_step(self, batch, batch_idx):
        chosen = batch_indices(len(self.images), self.batch_size, int(batch), self.seed)
        x = standard_augment(self.images.images[chosen], torch.Generator().manual_seed(int(batch)))
        return cross_entropy(self.net(x.to(self.device)), self.images.labels[chosen].to(self.device))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3, weight_decay=5e-4)


def train(arguments: argparse.Namespace, images: ImageSet, seed: int) -> Classifier:
    L.seed_everything(seed, verbose=False)
    net = Architecture.parse(arguments.backbone).build(images, seed)
    module = Classifier(net, images, arguments.batch_size, seed)
    trainer = L.Trainer(
        max_epochs=1,
        callbacks=[MetaPerturbCallback(arguments.phi, inference="mean")],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, DataLoader(range(arguments.steps), batch_size=None))
    return module.eval()


def measure(arguments: argparse.Namespace, module: Classifier, test: ImageSet, mode: str) -> tuple[float, float, float]:
    """NLL (nats), accuracy and seconds of one mode of inference."""
    attachment = attachment_of(module)
    by_expectation, buffers = attachment.inference, attachment.evaluation_buffers
    if mode.startswith("mc"):
        attachment.inference = MonteCarlo(arguments.samples, "logits")
    elif mode == "mean, batch norm of training":
        attachment.evaluation_buffers = {}
    start = time.perf_counter()
    nll, accuracy = evaluate(module.net, test, module.device)
    seconds = time.perf_counter() - start
    attachment.inference, attachment.evaluation_buffers = by_expectation, buffers
    return nll, accuracy, seconds


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="npz or image folder with training and test images")
    parser.add_argument("--out", type=Path, required=True, help="table, continued if it exists")
    parser.add_argument("--phi", default=None, help="phi file or name; default: the bundled one")
    parser.add_argument("--backbone", default="conv4-16", help="a reference network, with its width")
    parser.add_argument("--per-class", type=int, default=50)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=100)
    arguments = parser.parse_args()
    whole, test = load_images(arguments.data)
    modes = [f"mc, {arguments.samples} samples", "mean", "mean, batch norm of training"]
    if not arguments.out.exists():
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        setting = (
            f"# {whole.name}, {arguments.per_class} training images per class, {len(test)} test images; "
            f"{arguments.backbone}, {arguments.steps} steps of batch {arguments.batch_size}; {describe()}"
        )
        arguments.out.write_text(f"{setting}\n{','.join(COLUMNS)}\n")
    done = {(row["mode"], row["seed"]) for row in read(arguments.out)}
    for seed in range(arguments.seeds):
        missing = [mode for mode in modes if (mode, str(seed)) not in done]
        if not missing:
            continue
        module = train(arguments, whole.few_per_class(arguments.per_class, seed)[0], seed)
        for mode in missing:
            nll, accuracy, seconds = measure(arguments, module, test, mode)
            with arguments.out.open("a", newline="") as file:
                csv.writer(file).writerow([mode, seed, f"{accuracy:.5f}", f"{nll:.5f}", f"{seconds:.2f}"])
            print(f"seed {seed}: {mode}: accuracy {100 * accuracy:.1f} %, NLL {nll:.3f}, {seconds:.1f} s", flush=True)
    print_table(read(arguments.out), modes)


def print_table(rows: list[dict[str, str]], modes: list[str]) -> None:
    """Mean and standard deviation over seeds, as Markdown."""
    print("| inference | accuracy, % | NLL, nats | seconds |\n|---|---|---|---|")
    for mode in modes:
        of_mode = [row for row in rows if row["mode"] == mode]
        columns = [torch.tensor([float(row[name]) for row in of_mode]) for name in ("accuracy", "nll", "seconds")]
        accuracy, nll, seconds = columns
        print(
            f"| {mode} | {100 * accuracy.mean():.1f} ± {100 * accuracy.std():.1f} | {nll.mean():.3f} ± {nll.std():.3f} "
            f"| {seconds.median():.1f} |"
        )


if __name__ == "__main__":
    main()
