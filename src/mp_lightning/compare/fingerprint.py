"""A few characters that tell a user's module and data from others of the same names, as far as that can be seen."""

import hashlib
from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils._pytree import tree_leaves

from mp_lightning.compare.pairing import seed_all
from mp_lightning.compare.run import Experiment, fresh_module, setup_seed


def fingerprint(experiment: Experiment) -> dict[str, str]:
    """Digests of the module of seed 0 with its optimizers' settings, and of its first training and test batches.

    What cannot be read without a trainer is left out. The global generators are left as they were.

    Raises:
        UserError: the module cannot be made.
    """
    with isolate_rng():
        module = _digest([*fresh_module(experiment, 0).state_dict().items(), *_optimizers(fresh_module(experiment, 0))])
        seed_all(setup_seed(0))
        return {"module": module, "data": _digest(_first_batches(experiment))}


def _optimizers(module: L.LightningModule) -> list[Any]:
    try:
        found = [leaf for leaf in tree_leaves(module.configure_optimizers()) if hasattr(leaf, "param_groups")]
    except Exception:  # it may ask the trainer, which is not there yet
        return []
    return [
        [type(one).__name__, *(sorted((k, v) for k, v in group.items() if k != "params") for group in one.param_groups)]
        for one in found
    ]


def _first_batches(experiment: Experiment) -> list[Any]:
    try:
        data = experiment.data(0)
        data.prepare_data()
        found = []
        for stage, hook in (("fit", "train_dataloader"), ("test", "test_dataloader")):
            data.setup(stage)
            found += [next(iter(loader)) for loader in tree_leaves(getattr(data, hook)())]
        return found
    except Exception:  # as a run will say, or because the trainer is asked
        return []


def _digest(values: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for leaf in tree_leaves(list(values)):
        if isinstance(leaf, Tensor):
            digest.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(leaf, str | int | float | bool | None):
            digest.update(repr(leaf).encode())
    return digest.hexdigest()[:12]
