"""Arms of one seed see the same, whatever they draw."""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from small_runs import PHI, Small, SmallData, experiment
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from mp_lightning.compare import arm_callbacks
from mp_lightning.compare.arms import parse_arm
from mp_lightning.compare.pairing import PairedLoader, RandomStream, paired
from mp_lightning.compare.run import Job, perform
from mp_lightning.compare.store import RunKey
from mp_lightning.compare.user_data import UserData

ARMS = [
    "none",
    "dropout",
    "mixup",
    "manifold_mixup",
    "information_dropout",
    "metaperturb",
    "fixed_noise+label_smoothing",
]


def observed(
    arm: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """The images that reach the training step before an arm changes them, and the weights at the start."""
    images: list[torch.Tensor] = []
    weights: dict[str, torch.Tensor] = {}

    class Watched(L.LightningDataModule):
        num_classes = 3

        def __init__(self) -> None:
            super().__init__()
            self._inner = SmallData()

        def setup(self, stage: str) -> None:
            self._inner.setup(stage)

        def train_dataloader(self) -> Any:
            return self._inner.train_dataloader()

        def test_dataloader(self) -> Any:
            return self._inner.test_dataloader()

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            if self.trainer.training:
                # As augmentation on the device does, from the global generator.
                batch = [batch[0] + torch.rand(()), batch[1]]
                images.append(batch[0].clone())
            return batch

    def factory() -> Small:
        module = Small()
        weights.update({name: value.clone() for name, value in module.state_dict().items()})
        return module

    parsed = parse_arm(arm, PHI)
    if "fixed_noise" in arm:
        monkeypatch.setattr(arm_callbacks, "set_constants", lambda attachment, moments: None)
        parsed = replace(parsed, parts=tuple(replace(part, moments=[]) for part in parsed.parts))
    what = experiment(module_factory=factory, data=UserData(Watched()))
    perform(what, Job(RunKey("t", "m", arm, seed, ""), parsed))
    return images, weights


def test_arms_of_one_seed_share_initialization_batches_and_augmentation(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = {arm: observed(arm, 0, monkeypatch) for arm in ARMS}
    images, weights = runs["none"]
    assert len(images) >= 6
    for arm in ARMS[1:]:
        own, its = runs[arm]
        for batch, other in zip(images[:6], own[:6], strict=True):
            assert torch.equal(batch, other), arm
        assert all(torch.equal(weights[name], its[name]) for name in weights), arm


def test_seeds_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    (images, weights), (other, its) = observed("none", 0, monkeypatch), observed("none", 1, monkeypatch)
    assert not torch.equal(images[0], other[0])
    assert not torch.equal(weights["net.0.weight"], its["net.0.weight"])


def test_a_run_repeats_and_leaves_the_global_generators_alone() -> None:
    def run() -> float:
        row, _ = perform(experiment(), Job(RunKey("t", "m", "dropout", 0, ""), parse_arm("dropout", PHI)))
        return row.nll

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = (random.random(), np.random.rand(), torch.rand(2))
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    first = run()
    after = (random.random(), np.random.rand(), torch.rand(2))
    assert after[:2] == expected[:2] and torch.equal(after[2], expected[2])
    torch.rand(5)
    assert run() == first


def test_a_stream_continues_where_it_left_and_hides_its_draws() -> None:
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    stream = RandomStream(7)
    drawn = []
    for _ in range(2):
        with stream.active():
            drawn.append(torch.rand(3))
    assert torch.equal(torch.rand(2), expected)
    with RandomStream(7).active():
        assert torch.equal(torch.rand(6), torch.cat(drawn))


def test_order_of_a_loader_does_not_depend_on_draws_between_batches() -> None:
    loader = DataLoader(TensorDataset(torch.arange(20)), batch_size=5, shuffle=True)

    def epochs(disturb: bool) -> list[torch.Tensor]:
        wrapped = PairedLoader(loader, 3)
        found = []
        for _ in range(2):
            for (batch,) in wrapped:
                found.append(batch)
                if disturb:
                    torch.rand(10)
        return found

    calm, disturbed = epochs(False), epochs(True)
    assert all(torch.equal(a, b) for a, b in zip(calm, disturbed, strict=True))
    assert not torch.equal(torch.cat(calm[:4]), torch.cat(calm[4:]))
    assert len(PairedLoader(loader, 3)) == 4 and PairedLoader(loader, 3).dataset is loader.dataset


def test_order_of_a_loader_that_draws_it_at_once_follows_from_the_seed() -> None:
    class Drawn:
        def __iter__(self) -> Iterator[torch.Tensor]:
            return iter(torch.randperm(20).split(5))

    orders = []
    for _ in range(2):
        torch.rand(3)
        orders.append(torch.cat(list(PairedLoader(Drawn(), 3))))
    assert torch.equal(*orders)


class OwnGenerator(BatchSampler):
    """Draws the order of the batches from a generator of its own."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__(range(20), 5, drop_last=False)
        self.generator = generator

    def __iter__(self) -> Iterator[list[int]]:
        batches = list(super().__iter__())
        return (batches[number] for number in torch.randperm(4, generator=self.generator))


@pytest.mark.parametrize(
    "batches",
    [lambda g: BatchSampler(RandomSampler(range(20), generator=g), 5, drop_last=False), OwnGenerator],
    ids=["of its sampler", "its own"],
)
def test_the_generator_of_a_batch_sampler_follows_from_the_seed(
    batches: Callable[[torch.Generator], BatchSampler],
) -> None:
    loader = DataLoader(TensorDataset(torch.arange(20)), batch_sampler=batches(torch.Generator()))
    first, second = (torch.cat([batch for (batch,) in PairedLoader(loader, 3)]) for _ in range(2))
    assert torch.equal(first, second)


def test_collections_of_loaders_keep_their_form() -> None:
    loader = DataLoader(TensorDataset(torch.arange(4)))
    assert isinstance(paired({"a": loader, "b": [loader]}, 0)["b"][0], PairedLoader)
    for mode in ("max_size", "sequential"):
        combined = paired(CombinedLoader({"a": loader}, mode), 0)
        assert isinstance(combined, CombinedLoader) and isinstance(combined.iterables["a"], PairedLoader)
        assert combined._mode == mode
