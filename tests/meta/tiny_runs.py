"""Meta-training so small that it takes no time: four tasks of random images, and two kinds of networks."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from rich.console import Console

from mp_lightning.cli.training import meta_train
from mp_lightning.data import image_set
from mp_lightning.meta.checkpoint import KeepCheckpoint, WholeFiles
from mp_lightning.meta.history import History
from mp_lightning.meta.module import JointMetaTraining
from mp_lightning.meta.settings import MetaSettings
from mp_lightning.meta.tasks import Source, Split, Task, make_tasks
from mp_lightning.runs import RunFolder

SETTINGS = MetaSettings(
    steps=6, lr=1e-2, weight_decay=1e-4, theta_lr=1e-2, theta_weight_decay=5e-4, batch_size=4, restart_after=None
)
NAMES = ["first-a", "first-b", "second-a", "second-b"]
TWO_KINDS = ("conv4-3", "resnet20-2")


def tiny_tasks(seed: int = 0, architectures: Sequence[str] = TWO_KINDS) -> list[Task]:
    """Two sources of 18 images in 3 classes, each learned both ways."""
    split = Split(groups=1, classes=None, architectures=list(architectures), train_per_class=None, valid_per_class=None)
    sources = []
    for number, name in enumerate(("first", "second")):
        images = np.random.default_rng(number).integers(0, 255, (18, 3, 16, 16), dtype=np.uint8)
        sources.append(Source(image_set(name, images, np.arange(18) % 3), flip=bool(number), split=split))
    return make_tasks(sources, seed=seed)


def new_module(
    settings: MetaSettings = SETTINGS,
    *,
    seed: int = 7,
    tasks: Sequence[Task] | None = None,
    history: History | None = None,
    mine: Sequence[int] | None = None,
    tell: Callable[[str], None] = print,
) -> JointMetaTraining:
    """What is to be trained, before its first step."""
    return JointMetaTraining(tiny_tasks() if tasks is None else tasks, settings, seed, history, mine, tell)


def fit(
    module: JointMetaTraining, folder: Path, *callbacks: L.Callback, every: int = 2, rows: int = 1
) -> JointMetaTraining:
    """Train to the last step in a run folder, from its newest readable checkpoint, with another ``every`` steps."""
    run = RunFolder(folder, {}, owner=False)
    trainer = L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        max_epochs=1,
        callbacks=[KeepCheckpoint(run.checkpoints, every, rows), *callbacks],
        plugins=[WholeFiles()],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    meta_train(trainer, module, run, False, Console(soft_wrap=True, highlight=False))
    return module


def checkpoint_names(folder: Path) -> list[str]:
    """What is in a run folder's folder of checkpoints."""
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


class BeforeStep(L.Callback):
    """Does something once, before the meta-step with the given number (from 0)."""

    def __init__(self, step: int, action: Callable[[JointMetaTraining], None]) -> None:
        self._step = step
        self._action = action

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, JointMetaTraining)
        if pl_module.meta_step == self._step:
            self._action(pl_module)


def assert_same(value: Any, expected: Any, place: str = "") -> None:
    """Nested dictionaries and lists are equal, their tensors bit for bit."""
    if isinstance(expected, dict):
        assert value.keys() == expected.keys(), place
        for key, inner in expected.items():
            assert_same(value[key], inner, f"{place}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(value) == len(expected), place
        for number, inner in enumerate(expected):
            assert_same(value[number], inner, f"{place}/{number}")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(value, expected), place
    else:
        assert value == expected, place
