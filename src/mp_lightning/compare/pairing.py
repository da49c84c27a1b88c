"""Arms of one seed see the same: batches, augmentation and random draws do not depend on what an arm draws itself."""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils._pytree import tree_map

from mp_lightning.randomness import derived_seed, seed_all


class RandomStream:
    """The global generators of a CPU (Python, NumPy, torch), with a state of its own in :meth:`active`."""

    def __init__(self, seed: int) -> None:
        outer = self._states()
        seed_all(seed)
        self._own = self._states()
        self._restore(outer)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Draws in this context continue the stream; outside nothing is seen of them."""
        outer = self._states()
        self._restore(self._own)
        try:
            yield
        finally:
            self._own = self._states()
            self._restore(outer)

    @staticmethod
    def _states() -> tuple[Any, Any, torch.Tensor]:
        return random.getstate(), np.random.get_state(), torch.get_rng_state()

    @staticmethod
    def _restore(states: tuple[Any, Any, torch.Tensor]) -> None:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class PairedLoader:
    """A loader whose order, and whatever its dataset draws, follow from a seed, whoever else draws in between."""

    def __init__(self, loader: Iterable[Any], seed: int) -> None:
        self._loader = loader
        self._stream = RandomStream(seed)
        # Generators that the loader has for itself are shared by all runs of a process.
        sampler, batches = getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)
        for owner in (loader, sampler, batches, getattr(batches, "sampler", None)):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator):
                generator.manual_seed(seed)

    def __iter__(self) -> Iterator[Any]:
        with self._stream.active():
            batches = iter(self._loader)
        while True:
            with self._stream.active():
                try:
                    batch = next(batches)
                except StopIteration:
                    return
            yield batch

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_loader":  # before __init__, as when it is copied
            raise AttributeError(name)
        return getattr(self._loader, name)


def paired(loaders: Any, seed: int) -> Any:
    """A loader, or a collection of them as Lightning takes it, with each loader paired."""
    if isinstance(loaders, CombinedLoader):
        return CombinedLoader(paired(loaders.iterables, seed), loaders._mode)
    return tree_map(lambda loader: PairedLoader(loader, seed), loaders)


class PairedSteps(L.Callback):
    """Random draws of each training step, and between steps, follow from the seed and the number of the step."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed = seed
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = 0
        seed_all(derived_seed(self._seed, "between", 0))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        seed_all(derived_seed(self._seed, "step", self._step))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._step += 1
        seed_all(derived_seed(self._seed, "between", self._step))
