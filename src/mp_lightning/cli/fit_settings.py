"""What ``fit`` reads from its configuration, checked."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mp_lightning.cli.options import (
    check,
    check_image_size,
    check_keys,
    check_top_level,
    plain,
    plain_section,
    settings,
)
from mp_lightning.cli.training import device_options
from mp_lightning.compare.architecture import Architecture
from mp_lightning.errors import ConfigurationError
from mp_lightning.meta.settings import MetaSettings
from mp_lightning.meta.sources import Evaluation, SourceSettings, plain_name, same_data
from mp_lightning.meta.tasks import Split
from mp_lightning.meta.transfer import TransferSettings
from mp_lightning.perturbation import check_following, check_fraction
from mp_lightning.runs import relevant_settings

_MOST_SEED = 2**63 - 1
_TOP_LEVEL = (
    *("meta", "tasks", "evaluation", "trainer", "logger", "run", "sources"),
    *("command", "seed", "data", "data_root", "image_size", "flip"),
)
_SPLIT = ("groups", "classes", "architectures", "train_per_class", "valid_per_class")
_OF_A_SOURCE = ("dataset", "image_size", "flip", *_SPLIT)


@dataclass(frozen=True)
class FitSettings:
    """Everything that ``fit`` reads from its configuration, checked.

    Attributes:
        sources: empty for the images that need no download.
        split: how those are cut into tasks.
        logger: the section ``logger``, which Hydra instantiates; empty for none.
        relevant: what decides the result of the run.
        code: digests of the files with networks of the user's own, which decide it as well.
    """

    seed: int
    fresh: bool
    data_root: Path
    sources: list[SourceSettings]
    split: Split
    evaluation: Evaluation
    meta: MetaSettings
    transfer: TransferSettings
    trainer: dict[str, Any]
    logger: dict[str, Any]
    relevant: dict[str, Any]
    code: dict[str, str]


def read(config: DictConfig) -> FitSettings:
    """The settings of a configuration.

    Raises:
        ConfigurationError: a key is unknown or missing, or a value of the wrong kind; the message names it.
    """
    check_top_level(config, _TOP_LEVEL)
    tasks, evaluation, folder = (plain_section(config, name) for name in ("tasks", "evaluation", "run"))
    check_keys(tasks, _SPLIT, "tasks.")
    check_keys(folder, ("fresh",), "run.")
    shared = {**tasks, "image_size": config.image_size, "flip": config.flip}
    default = _source("", {**shared, "dataset": ""}, "tasks")
    target = check(evaluation.pop("data", None), str | None, "evaluation.data")
    evaluation_seed = _seed(evaluation.pop("seed", None), "evaluation.seed")
    per_class = check(evaluation.pop("train_per_class", None), int, "evaluation.train_per_class")
    transfer = settings(TransferSettings, evaluation, "evaluation")
    meta = settings(MetaSettings, plain_section(config, "meta"), "meta")
    check_fraction(meta.strength, "meta.strength")
    check_fraction(meta.share_of_sites, "meta.share_of_sites")
    check_fraction(transfer.full_strength_at, "evaluation.full_strength_at")
    check_fraction(transfer.acts_below, "evaluation.acts_below")
    check_following(transfer.full_strength_at, transfer.acts_below, "evaluation.acts_below")
    sources = _sources(config, shared)
    if target is None and sources:
        _check_held_out(transfer.architecture, sources[-1])
    else:
        Architecture.parse(transfer.architecture).check(default.image_size)
    if target is not None and any(same_data(target, source.dataset) for source in sources):
        raise ConfigurationError(f"evaluation.data={target} is a source as well; judge phi on images it has not seen")
    splits = [default.split, *(source.split for source in sources)]
    named = [name for split in splits for name in split.architectures]
    return FitSettings(
        seed=_seed(config.seed),
        fresh=check(folder.get("fresh"), bool, "run.fresh"),
        data_root=Path(check(config.data_root, str, "data_root")).expanduser(),
        sources=sources,
        split=default.split,
        evaluation=Evaluation(target, per_class, default.image_size, default.flip, evaluation_seed),
        meta=meta,
        transfer=transfer,
        trainer=device_options(plain_section(config, "trainer")),
        logger=plain_section(config, "logger"),
        relevant=relevant_settings(plain(config)),
        code=_code([*named, transfer.architecture]),
    )


def _code(names: list[str]) -> dict[str, str]:
    found = {f"code of {name}": Architecture.parse(name).code for name in names}
    return {key: code for key, code in found.items() if code is not None}


def _check_held_out(architecture: str, last: SourceSettings) -> None:
    """Refuse a network that takes no images of the size of those that are held out, which the last source has."""
    try:
        Architecture.parse(architecture).check(last.image_size)
    except ConfigurationError as error:
        if last.name is None:  # it has the size of all
            raise
        raise ConfigurationError(
            f"{error}; held-out images have the size of the last source: write image_size= as "
            f"++sources.{last.name}.image_size=, or choose another evaluation.architecture="
        ) from error


def _sources(config: DictConfig, shared: dict[str, Any]) -> list[SourceSettings]:
    """Those of ``data``, which have no settings of their own, and those of ``sources``."""
    found = [_source("", {**shared, "dataset": dataset}, "tasks") for dataset in _datasets(config.data)]
    sections = plain_section(config, "sources") if config.get("sources") is not None else {}
    for name, section in sections.items():
        if not isinstance(section, dict) or not isinstance(section.get("dataset"), str):
            raise ConfigurationError(
                f"sources.{name}={section} is not a source; write for example +sources.{name}.dataset=cifar10"
            )
        if plain_name(name) != name:
            raise ConfigurationError(f"sources.{name} cannot be a name; use letters, digits, - and _")
        check_keys(section, _OF_A_SOURCE, f"sources.{name}.")
        found.append(_source(name, {**shared, **section}, f"sources.{name}"))
    return found


def _source(name: str, values: dict[str, Any], key: str) -> SourceSettings:
    """A source from ``values``, in which every key is set."""
    top = "" if key == "tasks" else f"{key}."
    image_size = check_image_size(values["image_size"], f"{top}image_size")
    architectures = values.get("architectures")
    if not isinstance(architectures, list) or not architectures or not all(isinstance(a, str) for a in architectures):
        raise ConfigurationError(
            f"{key}.architectures={architectures} is not a list of networks; write for example [conv4-16,resnet20-8]"
        )
    for text in dict.fromkeys(architectures):
        Architecture.parse(text).check(image_size)
    return SourceSettings(
        dataset=str(values["dataset"]),
        name=name or None,
        image_size=image_size,
        flip=check(values["flip"], bool | None, f"{top}flip"),
        split=Split(
            groups=check(values.get("groups"), int, f"{key}.groups"),
            classes=check(values.get("classes"), int | None, f"{key}.classes"),
            architectures=[str(text) for text in architectures],
            train_per_class=check(values.get("train_per_class"), int | None, f"{key}.train_per_class"),
            valid_per_class=check(values.get("valid_per_class"), int | None, f"{key}.valid_per_class"),
        ),
    )


def _seed(seed: Any, key: str = "seed") -> int:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= _MOST_SEED:
        raise ConfigurationError(f"{key}={seed} cannot be used; give a whole number from 0 to 2**63 - 1")
    return seed


def _datasets(data: Any) -> list[str]:
    if data is None:
        return []
    names = OmegaConf.to_container(data) if OmegaConf.is_config(data) else [data]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise ConfigurationError(
            f"data={data} is not a path, a dataset or a list of them; write for example data=[cifar10,b.npz]"
        )
    return names
