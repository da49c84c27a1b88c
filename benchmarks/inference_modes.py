"""Inference by 100 samples, by expectation, by constants, and by expectation without re-estimated batch norm.

    python -m benchmarks.inference_modes --data dtd10.npz imagenette.npz

Each seed trains one network for each target with MetaPerturbCallback on few labels, and evaluates it in all ways. Rows
are added to the table as they are measured; the same command continues where an interrupted one stopped.
"""

import argparse
import csv
import dataclasses
import time
from pathlib import Path

import lightning as L
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from mp_lightning import Fold, Mean, MetaPerturbCallback, MonteCarlo, attachment_of, load_phi, reestimate_batch_norm
from mp_lightning.compare.architecture import Architecture
from mp_lightning.compare.metrics import Scores, scores
from mp_lightning.data import ImageSet, batch_indices, load_images, normalize, standard_augment
from mp_lightning.inference.reestimation import BATCHES
from mp_lightning.sites.estimates import Estimates

COLUMNS = ["target", "mode", "seed", "accuracy", "nll", "ece", "seconds", "setting"]
TABLE = Path(__file__).parent / "results" / "inference_modes.csv"
_OLD = "mean, batch norm of training"


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


def measure(arguments: argparse.Namespace, module: Classifier, test: ImageSet, mode: str) -> tuple[Scores, float]:
    """Scores of one mode of inference, and how many seconds the test images took."""
    attachment = attachment_of(module)
    if mode in ("mean", "fold"):
        steps = [lambda index=index: module.training_step(index, 0) for index in range(BATCHES)]
        reestimate_batch_norm(attachment, steps, fold=mode == "fold")
    if mode == _OLD:
        attachment.estimates = Estimates({})
    sampled = MonteCarlo(arguments.samples, "logits")
    attachment.inference = sampled if mode.startswith("mc") else Fold() if mode == "fold" else Mean()
    start = time.perf_counter()
    with torch.no_grad():
        logits = torch.cat([module.net(normalize(x)) for x in test.images.split(250)])
    seconds = time.perf_counter() - start
    return scores(logits.float().softmax(dim=1), test.labels), seconds


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="npz or image folders with training and test images")
    parser.add_argument("--out", type=Path, default=TABLE, help="table, continued if it exists")
    parser.add_argument("--phi", default=None, help="phi file or name; default: the bundled one")
    parser.add_argument("--backbone", default="conv4-16", help="a reference network, with its width")
    parser.add_argument("--per-class", type=int, default=50)
    parser.add_argument("--test-images", type=int, default=1000, help="at most, the same for all seeds")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=100)
    arguments = parser.parse_args()
    modes = [f"mc, {arguments.samples} samples", "mean", "fold", _OLD]
    targets = [load_images(data) for data in arguments.data]
    for seed in range(arguments.seeds):
        for whole, test in targets:
            chosen = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[: arguments.test_images]
            test = dataclasses.replace(test, images=test.images[chosen], labels=test.labels[chosen])
            one_seed(arguments, whole, test, seed, modes)
    print_table(read(arguments.out), modes)


def one_seed(arguments: argparse.Namespace, whole: ImageSet, test: ImageSet, seed: int, modes: list[str]) -> None:
    """Train on one target with one seed, and add the rows that are missing."""
    setting = (
        f"{arguments.per_class} training images per class, {len(test)} test images, {arguments.backbone}, "
        f"{arguments.steps} steps of {arguments.batch_size}, phi {load_phi(arguments.phi).name}"
    )
    done = {(row["target"], row["mode"], row["seed"], row["setting"]) for row in read(arguments.out)}
    missing = [mode for mode in modes if (whole.name, mode, str(seed), setting) not in done]
    if not missing:
        return
    module = train(arguments, whole.few_per_class(arguments.per_class, seed)[0], seed)
    for mode in missing:
        found, seconds = measure(arguments, module, test, mode)
        new = not arguments.out.exists()
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        with arguments.out.open("a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(COLUMNS)
            numbers = (f"{found.accuracy:.5f}", f"{found.nll:.5f}", f"{found.ece:.5f}", f"{seconds:.2f}")
            writer.writerow([whole.name, mode, seed, *numbers, setting])
        words = f"accuracy {100 * found.accuracy:.1f} %, NLL {found.nll:.3f}, ECE {found.ece:.3f}, {seconds:.1f} s"
        print(f"{whole.name}, seed {seed}: {mode}: {words}", flush=True)


def print_table(rows: list[dict[str, str]], modes: list[str]) -> None:
    """Mean and standard deviation over seeds, as Markdown."""
    print("| target | inference | accuracy, % | NLL, nats | ECE | seconds |\n|---|---|---|---|---|---|")
    for target in dict.fromkeys(row["target"] for row in rows):
        for mode in modes:
            chosen = [row for row in rows if (row["target"], row["mode"]) == (target, mode)]
            columns = [torch.tensor([float(row[name]) for row in chosen]) for name in COLUMNS[3:7]]
            accuracy, nll, ece, seconds = columns
            print(
                f"| {target} | {mode} | {100 * accuracy.mean():.1f} ± {100 * accuracy.std():.1f} "
                f"| {nll.mean():.3f} ± {nll.std():.3f} | {ece.mean():.3f} ± {ece.std():.3f} | {seconds.median():.1f} |"
            )


if __name__ == "__main__":
    main()
