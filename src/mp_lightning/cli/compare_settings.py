"""What ``compare`` reads from its configuration, checked."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch
from omegaconf import DictConfig, OmegaConf

from mp_lightning.cli.options import (
    check,
    check_choice,
    check_image_size,
    check_keys,
    check_top_level,
    plain,
    plain_section,
    settings,
)
from mp_lightning.compare.architecture import Architecture
from mp_lightning.compare.arms import NamedArm, parse_arm
from mp_lightning.compare.classifier import Optimization
from mp_lightning.compare.comparison import check_arms
from mp_lightning.compare.summary import VERDICT_METRICS
from mp_lightning.compare.tuning import MOST_VALUES, Budget
from mp_lightning.compare.weights import Weights, load_weights, read_weights
from mp_lightning.data import list_datasets
from mp_lightning.errors import ConfigurationError
from mp_lightning.perturbation import load_phi
from mp_lightning.runs import relevant_settings

_FEW_DIGITS = 10
_OPTIMIZATION = ("steps", "batch_size", "lr", "weight_decay", "milestones", "lr_factor")
_TOP_LEVEL = (
    *("target", "n_per_class", "data_root", "image_size", "flip", "model", "weights", "arms", "phi", "seeds"),
    *("metric", "inference", "samples", "ramp", "tuning", "jobs", "accelerator", "precision", "run", "command"),
    *_OPTIMIZATION,
)
# What decides which arms are shown and how they are judged, but not how any of them does.
_OF_NO_RUN = ("metric", "tuning", "phi")


@dataclass(frozen=True)
class CompareSettings:
    """Everything that ``compare`` reads from its configuration, checked.

    Attributes:
        relevant: what a folder of results belongs to.
        of_runs: what decides the result of a run beside its arm, its seed and the images.
    """

    target: str
    n_per_class: int | None
    data_root: Path
    image_size: int
    flip: bool | None
    architecture: Architecture
    weights: Weights | None
    arms: list[NamedArm]
    seeds: int
    metric: str
    inference: Any
    samples: int
    ramp: bool
    optimization: Optimization
    budget: Budget
    jobs: int
    trainer: dict[str, Any]
    fresh: bool
    relevant: dict[str, Any]
    of_runs: dict[str, Any]


def read(config: DictConfig) -> CompareSettings:
    """The settings of a configuration.

    Raises:
        ConfigurationError: a key is unknown or missing, or a value cannot be used; the message names it.
        PhiError: a phi cannot be loaded.
    """
    check_top_level(config, _TOP_LEVEL)
    folder = plain_section(config, "run")
    check_keys(folder, ("fresh",), "run.")
    image_size = check_image_size(config.image_size, "image_size")
    architecture = Architecture.parse(check(config.model, str, "model"))
    architecture.check(image_size)
    target = check(config.target, str, "target")
    whole = plain(config)
    relevant = relevant_settings(whole)
    return CompareSettings(
        target=target,
        n_per_class=_per_class(config.n_per_class, target),
        data_root=Path(check(config.data_root, str, "data_root")).expanduser(),
        image_size=image_size,
        flip=check(config.flip, bool | None, "flip"),
        architecture=architecture,
        weights=_weights(config.weights, architecture, image_size),
        arms=_arms(config),
        seeds=check(config.seeds, int, "seeds"),
        metric=check_choice(config.metric, VERDICT_METRICS, "metric"),
        inference=check_choice(config.inference, ("mc", "mean"), "inference"),
        samples=check(config.samples, int, "samples"),
        ramp=check(config.ramp, bool, "ramp"),
        optimization=_optimization(whole),
        budget=_budget(config),
        jobs=check(config.jobs, int, "jobs"),
        trainer={
            "accelerator": _accelerator(config.accelerator),
            "precision": check_choice(str(config.precision), ("32-true", "bf16-mixed"), "precision"),
        },
        fresh=check(folder.get("fresh"), bool, "run.fresh"),
        relevant=relevant,
        of_runs={key: value for key, value in relevant.items() if key not in _OF_NO_RUN and not _is_place(key, value)},
    )


def _is_place(key: str, value: Any) -> bool:
    """Whether a setting says where files lie; what they hold is a part of the key of a run."""
    return key in ("target", "weights") and isinstance(value, str) and value not in list_datasets()


def _per_class(value: Any, target: str) -> int | None:
    if value == "auto":
        return _FEW_DIGITS if target == "digits" else None
    number: int | None = check(value, int | None, "n_per_class")
    return number


def _weights(path: Any, architecture: Architecture, image_size: int) -> Weights | None:
    if path is None:
        return None
    weights = read_weights(check(path, str, "weights"))
    load_weights(architecture.construct(2, image_size), weights)  # so that what does not fit is known now
    return weights


def _arms(config: DictConfig) -> list[NamedArm]:
    texts = OmegaConf.to_container(config.arms) if OmegaConf.is_config(config.arms) else config.arms
    if not isinstance(texts, list) or not texts:
        raise ConfigurationError(
            f"arms={texts} is not a list of arms; write for example arms=[none,dropout,metaperturb]"
        )
    phi = load_phi(check(config.phi, str | None, "phi"))
    arms = [parse_arm("none" if text is None else text, phi) for text in texts]
    check_arms(arms)
    return arms


def _accelerator(value: Any) -> str:
    accelerator = check_choice(value, ("auto", "cpu", "cuda"), "accelerator")
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("accelerator=cuda cannot be used: torch finds no GPU here; use auto or cpu")
    return accelerator


def _optimization(whole: dict[Any, Any]) -> Optimization:
    milestones = whole.get("milestones")
    if not isinstance(milestones, list) or not all(
        isinstance(at, int | float) and not isinstance(at, bool) and 0 < at < 1 for at in milestones
    ):
        raise ConfigurationError(
            f"milestones={milestones} is not a list of fractions of the steps; write for example [0.4,0.7,0.9]"
        )
    kinds = get_type_hints(Optimization)
    numbers = {key: check(whole.get(key), kinds[key], key) for key in _OPTIMIZATION if key != "milestones"}
    return Optimization(milestones=[float(at) for at in milestones], **numbers)


def _budget(config: DictConfig) -> Budget:
    budget = settings(Budget, plain_section(config, "tuning"), "tuning")
    if budget.values > MOST_VALUES:
        raise ConfigurationError(f"tuning.values={budget.values} is too many; each arm knows {MOST_VALUES} values")
    return budget
