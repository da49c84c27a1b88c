"""One run of a comparison: train one arm with one seed, and test it."""

import copy
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.seed import isolate_rng

from mp_lightning.callback import MetaPerturbCallback
from mp_lightning.compare.arm_callbacks import Context, Inference, callbacks_of, listed
from mp_lightning.compare.arms import AnyArm, NamedArm
from mp_lightning.compare.cost import Cost
from mp_lightning.compare.examine import Examination, Examined, Predict, predict_pair
from mp_lightning.compare.pairing import PairedSteps
from mp_lightning.compare.results import Details, Row, SiteMultiplier
from mp_lightning.compare.store import RunKey
from mp_lightning.errors import ConfigurationError, DataError, UserError, one_line
from mp_lightning.inference import Output
from mp_lightning.mixin import MetaPerturbMixin
from mp_lightning.randomness import derived_seed, seed_all
from mp_lightning.sites import attachment_of

OnStep = Callable[[int], None]


class RunError(UserError):
    """A run failed in code of the user, or of a library."""


class Data(Protocol):
    """Makes the datamodule of a seed."""

    def __call__(self, seed: int, validation: bool = False) -> L.LightningDataModule:
        """With ``validation``, one that is tested on a part of the training images, which it does not train on."""
        ...

    @property
    def can_validate(self) -> bool:
        """Whether there is such a part."""
        ...


@dataclass(frozen=True)
class Experiment:
    """What all runs of a comparison share. It is sent to other processes where there are several.

    Attributes:
        module_factory: makes a freshly initialised module; it draws from the global generators.
        data: makes the datamodule of a seed.
        trainer: arguments of ``lightning.Trainer``.
        steps: training batches of a run where known, for progress.
        num_classes: of the target where known.
        inference, samples: how arms with noise in evaluation classify.
        ramp: see :class:`~mp_lightning.compare.arm_callbacks.Context`.
        predict, output: see :class:`~mp_lightning.compare.examine.Examination`.

    Raises:
        ConfigurationError: the trainer's callbacks would let every arm train with phi.
    """

    module_factory: Callable[[], L.LightningModule]
    data: Data
    trainer: dict[str, Any] = field(default_factory=dict)
    steps: int | None = None
    num_classes: int | None = None
    inference: Inference = "mean"
    samples: int = 20
    ramp: bool = True
    predict: Predict = predict_pair
    output: Output | None = None

    def __post_init__(self) -> None:
        for callback in listed(self.trainer.get("callbacks")):
            if isinstance(callback, MetaPerturbCallback):
                raise ConfigurationError(
                    f"trainer= has a {type(callback).__name__} among its callbacks, with which every arm, 'none' too, "
                    "would train; leave it out, as compare adds it to the arms that take one"
                )


@dataclass(frozen=True)
class Job:
    """A run that is to be made: its key, its arm, and whether it is one of tuning."""

    key: RunKey
    arm: AnyArm
    validation: bool = False


def perform(experiment: Experiment, job: Job, on_step: OnStep | None = None) -> tuple[Row, Details]:
    """Make one run. The global generators are left as they were.

    Raises:
        UserError: what the user gave cannot be used.
        RunError: anything else that was raised; the message names the arm and the seed.
    """
    start = time.perf_counter()
    gc.collect()  # networks of earlier runs, which would count as memory of this one
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    seed = job.key.seed
    with isolate_rng():
        context = Context(
            seed=derived_seed(seed, "noise"),
            num_classes=experiment.num_classes,
            inference=experiment.inference,
            samples=experiment.samples,
            ramp=experiment.ramp,
        )
        callbacks, perturbation = callbacks_of(job.arm, context)
        module = fresh_module(experiment, seed)
        cost = Cost(on_step)
        examination = Examination(
            perturbation,
            experiment.predict,
            experiment.output,
            derived_seed(seed, "examination"),
            setup_seed(seed),
            tested="val_dataloader" if job.validation else "test_dataloader",
        )
        trainer = train(
            experiment, module, job, [PairedSteps(derived_seed(seed, "steps")), *callbacks, cost, examination]
        )
        found = examination.found
        assert found is not None
        row = _row(job, found, cost, trainer, time.perf_counter() - start)
    multiplier = [SiteMultiplier(site.site, site.mean, site.var**0.5) for site in found.multiplier]
    return row, Details(cost.curve, found.reliability, multiplier, found.acted)


def fresh_module(experiment: Experiment, seed: int) -> L.LightningModule:
    """The module of a seed, the same for all arms.

    Raises:
        ConfigurationError: the factory does not make a LightningModule, or one that is perturbed in every arm.
        RunError: the factory failed.
    """
    seed_all(derived_seed(seed, "theta"))
    try:
        module = experiment.module_factory()
    except UserError:
        raise
    except Exception as error:
        raise RunError(f"module_factory failed: {type(error).__name__}: {one_line(error)}") from error
    if not isinstance(module, L.LightningModule):
        raise ConfigurationError(
            f"module_factory made a {type(module).__name__}, not a LightningModule; give a function without arguments "
            "that makes a new one"
        )
    perturbs = isinstance(module, MetaPerturbMixin) or attachment_of(module) is not None
    if perturbs or any(isinstance(one, MetaPerturbCallback) for one in _callbacks_of(module)):
        raise ConfigurationError(
            f"{type(module).__name__} perturbs itself, so that every arm, 'none' too, would train with phi; let "
            "module_factory make one without MetaPerturbMixin, attach() or a MetaPerturbCallback, which compare adds"
        )
    return module


def _callbacks_of(module: L.LightningModule) -> list[Any]:
    try:
        return listed(module.configure_callbacks())
    except Exception:  # it may ask the trainer, which is not there yet; where phi is added, a second one is refused
        return []


def train(experiment: Experiment, module: L.LightningModule, job: Job, callbacks: list[Callback]) -> L.Trainer:
    """Train with these callbacks; returns the trainer.

    Raises:
        RunError: something that is no UserError was raised.
        DataError: there was nothing to train on.
        KeyboardInterrupt: the user stopped it.
    """
    own = copy.deepcopy(listed(experiment.trainer.get("callbacks")))  # they may count
    options: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in own),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "devices": 1,
        **experiment.trainer,
        "callbacks": [*own, *callbacks],
    }
    try:
        data = experiment.data(job.key.seed, validation=job.validation)
        trainer = L.Trainer(**options)
        seed_all(setup_seed(job.key.seed))
        trainer.fit(module, datamodule=data)
    except UserError:
        raise
    except (SystemExit, Exception) as error:
        # Lightning makes an exit of Ctrl-C.
        if isinstance(error, SIGTERMException) or (
            isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt)
        ):
            raise KeyboardInterrupt from error
        raise RunError(f"{describe(job)} failed: {type(error).__name__}: {one_line(error)}") from error
    if trainer.global_step == 0:
        raise DataError(
            "train_dataloader gives no batch to train on; give more images, a smaller batch, or another "
            "limit_train_batches"
        )
    return trainer


def setup_seed(seed: int) -> int:
    """What the generators start from when the datamodule is set up, before training and before the test."""
    return derived_seed(seed, "setup")


def describe(job: Job) -> str:
    """A run in words."""
    parameters = job.arm.parameters if isinstance(job.arm, NamedArm) else ""
    what = "tuning arm" if job.validation else "arm"
    return f"{what} '{job.key.arm}'{f' ({parameters})' if parameters else ''}, seed {job.key.seed}"


def _row(job: Job, found: Examined, cost: Cost, trainer: L.Trainer, seconds: float) -> Row:
    device = trainer.strategy.root_device
    return Row(
        **job.key._asdict(),
        parameters=job.arm.parameters if isinstance(job.arm, NamedArm) else "",
        inference=found.inference,
        **found.test._asdict(),
        train_accuracy=found.train.accuracy,
        train_nll=found.train.nll,
        **{f"mean_{name}": value for name, value in found.mean._asdict().items()},
        step_ms=cost.step_ms,
        memory_mb=cost.memory_mb,
        seconds=seconds,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    )
