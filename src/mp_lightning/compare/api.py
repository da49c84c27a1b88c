"""``mp_lightning.compare``: does a regularizer help a module of one's own, on data of one's own?"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.utilities.seed import isolate_rng
from rich.console import Console
from torch import nn

from mp_lightning.compare.arms import Arm, NamedArm, parse_arm
from mp_lightning.compare.calibration import PILOT_SEED
from mp_lightning.compare.comparison import Plan
from mp_lightning.compare.conclusion import Comparison, conclude
from mp_lightning.compare.console import make_console
from mp_lightning.compare.examine import Predict, predict_pair
from mp_lightning.compare.fingerprint import described, fingerprint
from mp_lightning.compare.first_look import check_length, first_batches, gives_validation, look_at
from mp_lightning.compare.given import (
    check_choices,
    check_names,
    check_numbers,
    check_settings,
    check_trainer,
    list_of_arms,
)
from mp_lightning.compare.run import Experiment, fresh_module
from mp_lightning.compare.tuning import Budget, trials, untuned
from mp_lightning.compare.user_code import identity
from mp_lightning.compare.user_data import UserData
from mp_lightning.errors import ConfigurationError
from mp_lightning.inference import Output
from mp_lightning.perturbation import NamedPhi, Phi, load_phi
from mp_lightning.quiet import quiet
from mp_lightning.runs import RunFolder

ARMS = ("none", "dropout", "dropblock", "fixed_noise", "metaperturb")


def compare(
    module_factory: Callable[[], L.LightningModule],
    datamodule: L.LightningDataModule | Callable[[int], L.LightningDataModule],
    *,
    trainer: dict[str, Any],
    arms: Sequence[str | Arm] = ARMS,
    seeds: int = 5,
    phi: "str | Path | Phi | NamedPhi | None" = None,
    metric: Literal["accuracy", "nll"] = "accuracy",
    inference: Literal["mc", "mean"] = "mean",
    samples: int = 20,
    tuning_values: int = 3,
    tuning_seeds: int = 1,
    num_classes: int | None = None,
    predict: Predict = predict_pair,
    output: Output | None = None,
    settings: dict[str, Any] | None = None,
    target: str | None = None,
    model: str | None = None,
    folder: str | Path | None = None,
    fresh: bool = False,
    jobs: int = 1,
    console: Console | None = None,
) -> Comparison:
    """Train arms side by side with paired seeds, and say with intervals whether any of them helps.

    The arms of one seed share initialization, batches and augmentation, so that their differences are paired. Every
    finished run is a row of ``results.csv`` in the folder; the same call continues what is missing, and more seeds or
    arms can be added. The last lines printed are the verdict.

    Example::

        comparison = mp_lightning.compare(
            lambda: Classifier(torchvision.models.resnet18(num_classes=10)),
            FlowersData("flowers"),
            trainer={"max_epochs": 30},
            arms=["none", "dropout", "metaperturb", "fixed_noise"],
        )

    Args:
        module_factory: makes a new LightningModule that classifies images; it is called once for each run, when the
            global generators have been seeded.
        datamodule: is copied for each run with all that it holds, so what is large is better loaded in its ``setup``;
            or a function from a seed, such as one that draws few labelled images. Beside the seeds of the comparison,
            from 0, the function is called with those of tuning, from 10^9, and with 2 * 10^9 where phi is measured for
            its controls. It needs ``train_dataloader`` and ``test_dataloader``; hyperparameters are tuned on its
            ``val_dataloader``, if there is one that gives a loader. Test images must not depend on the seed, or those
            of one seed are trained on with another. With ``train_evaluation_dataloader`` it can give training images
            without augmentation, on which train accuracy is measured.
        trainer: arguments of ``lightning.Trainer``, with ``max_epochs`` or the like.
        arms: names as in ``python -m mp_lightning.meta compare --help``, or :class:`Arm`.
        seeds: how many; fewer than five never give a verdict but *underfitted* and *diverged*.
        phi: for the arms that take one, as for :class:`~mp_lightning.MetaPerturbCallback`.
        metric: what the verdict is about and what is tuned for.
        inference: how arms with noise in evaluation classify: 'mean', as by default in the callback, which is always
            reported, or 'mc'.
        samples: noisy forwards of 'mc'.
        tuning_values: so many values of the hyperparameter of each arm are tried (1 to 4).
        tuning_seeds: runs for each of them.
        num_classes: which arms that mix labels need; None takes that of the datamodule, if it has one.
        predict: from a module in evaluation mode and a batch to scores (B, K) and labels (B,); needed where a batch
            does not begin with images and labels, or the module's forward does not give the scores.
        output: what the scores are; None finds out.
        settings: anything else that decides the results, as plain values. A folder holds results of one set of
            settings, one network with the plain attributes of its layers, one set of optimizers' and schedulers'
            settings, data with the same first batches, and methods of their classes with the same code; what cannot be
            told by these, such as an object that a layer holds, or what ``predict`` calls, belongs here.
        target, model: what tables call the data and the module; None takes the names of their classes.
        folder: for the results; None: one in ``runs`` whose name follows from the settings.
        fresh: start anew; what is there is kept in a folder beside.
        jobs: runs at a time, in processes of their own; with more than one, the call must stand under
            ``if __name__ == "__main__":``, and functions that are passed at the top level of a module.
        console: where progress and the verdict are printed; None: standard output.

    Raises:
        UserError: something that was given cannot be used; before the first training step where that can be known.
    """
    if isinstance(module_factory, nn.Module) or not callable(module_factory):
        kind = type(module_factory).__name__
        raise ConfigurationError(
            f"module_factory is a {kind}; give a function that makes a new one for each run, as lambda: {kind}(...)"
        )
    check_trainer(trainer)
    check_choices(metric, inference, output)
    seeds, samples, jobs, tuning_seeds = check_numbers(
        tuning_values, num_classes, seeds=seeds, samples=samples, jobs=jobs, tuning_seeds=tuning_seeds
    )
    tuning_values = int(tuning_values)
    check_names(target=target, model=model)
    check_settings(settings)
    data = UserData(datamodule)
    loaded = load_phi(phi)
    parsed = [arm if isinstance(arm, Arm) else parse_arm(arm, loaded) for arm in list_of_arms(arms)]
    names = target or data.kind, model or _name(module_factory)
    shared = {
        "target": names[0],
        "model": names[1],
        "trainer": {key: _plain(value) for key, value in trainer.items()},
        "inference": inference,
        "samples": samples,
        # What is left at its default is not named, so that older results stand.
        **({} if output is None else {"output": output}),
        # Before, each epoch repeated the first.
        **({"reloaded": "each epoch"} if trainer.get("reload_dataloaders_every_n_epochs") else {}),
        **({} if predict is predict_pair else {"predict": identity(predict)}),
        **{key: _plain(value) for key, value in (settings or {}).items()},
    }
    steps = trainer.get("max_steps")
    experiment = Experiment(
        module_factory=module_factory,
        data=data,
        trainer=trainer,
        steps=steps if isinstance(steps, int) and steps > 0 else None,
        num_classes=num_classes if num_classes is not None else data.num_classes,
        inference=inference,
        samples=samples,
        predict=predict,
        output=output,
    )
    with quiet(), isolate_rng():
        module, found = fresh_module(experiment, 0), first_batches(experiment)
        shared |= fingerprint(module, found, datamodule, module_factory)
        look_at(experiment, module, found)
        kinds = [part.kind for arm in parsed if isinstance(arm, NamedArm) for part in arm.parts]
        if any(kind.multiplies for kind in kinds):
            check_length(experiment, module, found)
        data.can_validate = data.can_validate and gives_validation(found)
        budget = Budget(tuning_values, tuning_seeds)
        tried = [trial for name in untuned(parsed) for trial in trials(name, budget)] if data.can_validate else []
        data.check_seeds(
            {seed: "hyperparameters are tuned" for _, seed in tried}
            | ({PILOT_SEED: "phi is measured for its controls"} if any(kind.needs_moments for kind in kinds) else {})
        )
    plan = Plan(
        experiment=experiment,
        arms=parsed,
        seeds=range(seeds),
        target=names[0],
        model=names[1],
        settings=shared,
        metric=metric,
        budget=budget,
        processes=jobs,
    )
    tuning = [tuning_values, tuning_seeds]
    judged = {**shared, "metric": metric, "tuning": tuning}
    unusual = (metric, tuning) != ("accuracy", [3, 1])  # older folders are named without
    place = Path(folder) if folder is not None else Path("runs") / f"compare-{_digest(judged if unusual else shared)}"
    kept = RunFolder(place, judged, fresh=fresh, remedies=("folder=", "fresh=True"))
    console = console or make_console()
    try:
        return conclude(plan, kept.path, console, "mp_lightning.compare(...), as it was called", shared)
    finally:
        kept.release()


def _name(factory: Callable[[], Any]) -> str:
    name = getattr(factory, "__name__", type(factory).__name__)
    return "module" if name == "<lambda>" else name


def _plain(value: Any) -> Any:
    """A value as JSON has it; of anything else the name of its class, as an address would be another in each run."""
    if isinstance(value, L.Callback):
        return described(value)
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        return [_plain(one) for one in value] if isinstance(value, list | tuple) else type(value).__name__


def _digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
