"""``compare``: train arms side by side on one target, and say with intervals whether any of them helps."""

import shlex
import sys
from pathlib import Path

from omegaconf import DictConfig

from mp_lightning.cli.compare_settings import CompareSettings, read
from mp_lightning.cli.record import record
from mp_lightning.cli.words import PROGRAM
from mp_lightning.compare.classifier import ClassifierFactory
from mp_lightning.compare.comparison import Plan
from mp_lightning.compare.conclusion import conclude
from mp_lightning.compare.console import make_console
from mp_lightning.compare.progress import reading_display
from mp_lightning.compare.run import Experiment
from mp_lightning.compare.target import Target, TargetFactory, read_target
from mp_lightning.runs import RunFolder

__all__ = ["read", "run"]


def run(config: DictConfig, path: Path) -> None:
    """Compare in the run folder ``path``."""
    given = read(config)
    console = make_console()
    with reading_display(console) as on_progress:
        target = read_target(
            given.target,
            given.data_root,
            given.image_size,
            n_per_class=given.n_per_class,
            flip=given.flip,
            batch_size=given.optimization.batch_size,
            on_progress=on_progress,
        )
    # Files may change under the same path.
    contents = {"images": target.digest()}
    if given.architecture.code is not None:
        contents["code of the model"] = given.architecture.code
    if given.weights is not None:
        contents["tensors of weights"] = given.weights.digest()
    folder = RunFolder(path, {**given.relevant, **contents}, fresh=given.fresh)
    record(config, path)
    console.print(f"Target {target}", markup=False)
    if given.weights is not None:
        console.print(_fine_tuning(given), markup=False)
    console.print()
    plan = _plan(given, target, contents)
    conclude(plan, folder.path, console, _command(), {**given.relevant, **contents})


def _fine_tuning(given: CompareSettings) -> str:
    """What is said where a network that was trained already meets arms that multiply its features by about a half.

    mean_one does not shrink them; at the start it may do the opposite, as it divides by the mean when training ends.
    """
    assert given.weights is not None
    text = f"Fine-tuning the weights of {given.weights.path}; the last layer starts afresh unless it fits."
    shrinking = [arm.name for arm in given.arms if any(p.kind.multiplies and p.name != "mean_one" for p in arm.parts)]
    if not shrinking:
        return text
    if given.ramp:
        slowly = "the features that shrink do so slowly, over the first 40 % of the steps or more."
        return f"{text} {', '.join(shrinking)}: {slowly}"
    return (
        f"{text} {', '.join(shrinking)}: with ramp=false the features shrink by half at once, which undoes what the "
        "network has learned; ramp=true lets them do so slowly."
    )


def _plan(given: CompareSettings, target: Target, contents: dict[str, str]) -> Plan:
    optimization = given.optimization
    num_classes, size = target.train.num_classes, given.image_size
    experiment = Experiment(
        module_factory=ClassifierFactory(given.architecture, num_classes, size, optimization, given.weights),
        data=TargetFactory(target, optimization.steps, optimization.batch_size),
        trainer={**given.trainer, "max_epochs": 1},
        steps=optimization.steps,
        num_classes=num_classes,
        inference=given.inference,
        samples=given.samples,
        ramp=given.ramp,
        output="logits",
    )
    return Plan(
        experiment=experiment,
        arms=given.arms,
        seeds=range(given.seeds),
        target=target.name,
        model=str(given.architecture),
        settings={**given.of_runs, **contents},
        metric=given.metric,
        budget=given.budget,
        processes=given.jobs,
    )


def _command() -> str:
    words = [word for word in sys.argv[1:] if not word.startswith("command=")]
    return shlex.join([*PROGRAM.split(), "compare", *words])
