"""The configuration of ``fit`` as it is read: sources of their own kinds, and what lies in ``conf/``."""

import re
from pathlib import Path

import hydra
import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from mp_lightning.cli import app
from mp_lightning.cli.fit_settings import FitSettings, read
from mp_lightning.data import ImageSet, list_datasets
from mp_lightning.errors import ConfigurationError
from mp_lightning.meta.settings import MetaSettings
from mp_lightning.meta.sources import SourceSettings
from mp_lightning.meta.tasks import Source, Split, make_tasks
from mp_lightning.runs import run_name

CONF = Path(__file__).resolve().parents[2] / "conf"


def compose(*overrides: str) -> DictConfig:
    with hydra.initialize_config_module("mp_lightning.conf", version_base="1.3"):
        config = hydra.compose("fit", list(overrides))
    assert isinstance(config, DictConfig)
    return config


def settings(*overrides: str) -> FitSettings:
    return read(compose(*overrides))


def files(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.mark.parametrize("words", [(), ("seed=3", "data=[a.npz]"), ("+experiment=few_images", "data=[a.npz]")])
def test_the_id_of_a_logger_is_the_name_of_the_run_by_default(words: tuple[str, ...]) -> None:
    """By which ``make_logger`` knows that the user did not choose it."""
    OmegaConf.register_new_resolver("run_name", app._run_name, replace=True)
    given = settings(*words, "logger=wandb")
    assert given.logger["id"] == run_name(given.relevant)


def test_the_published_setting_number_by_number() -> None:
    """Section 4 of the paper and the authors' code."""
    given = settings("+experiment=paper")
    split = Split(groups=5, classes=None, architectures=["resnet20"], train_per_class=None, valid_per_class=None)
    assert given.sources == [SourceSettings("tiny_imagenet", "tiny_imagenet", 32, None, split)]
    assert given.meta == MetaSettings(
        steps=750,
        lr=1e-3,
        weight_decay=5e-4,
        theta_lr=1e-3,
        theta_weight_decay=5e-4,
        batch_size=128,
        restart_after=None,
        on_divergence="stop",
    )
    assert given.evaluation.dataset not in {source.dataset for source in given.sources}


def test_the_published_tasks() -> None:
    """Ten of 40 consecutive classes, 10,000 + 10,000 images each, in pairs that swap their halves."""
    labels = torch.arange(200).repeat_interleave(500)  # as many as Tiny ImageNet has
    names = tuple(map(str, range(200)))
    images = ImageSet("tiny_imagenet", torch.zeros(len(labels), 3, 1, 1, dtype=torch.uint8), labels, names)
    (source,) = settings("+experiment=paper").sources
    tasks = make_tasks([Source(images, True, source.split)], seed=0)
    assert len(tasks) == 10
    assert {(len(task.train), len(task.valid), str(task.architecture)) for task in tasks} == {
        (10_000, 10_000, "resnet20")
    }
    for number, task in enumerate(tasks):
        first = 40 * (number // 2)
        assert task.train.classes == tuple(images.classes[first : first + 40])


@pytest.mark.parametrize("group", ["sources", "experiment"])
def test_the_package_has_several_of_each(group: str) -> None:
    assert len(files(group)) >= 3


OF_COMPARE = {"paper_transfer"}
EXPERIMENTS = [name for name in files("experiment") if name not in OF_COMPARE]
WORDS = [f"sources={name}" for name in files("sources")] + [f"+experiment={name}" for name in EXPERIMENTS]


@pytest.mark.parametrize("word", WORDS)
def test_everything_in_the_package_composes_and_names_known_datasets(word: str) -> None:
    given = settings(word)
    datasets = [source.dataset for source in given.sources]
    assert set(datasets) <= set(list_datasets()) and len(set(datasets)) == len(datasets)
    assert given.evaluation.dataset in (None, *list_datasets())
    assert given.evaluation.dataset not in datasets, "judged on images that it has seen"
    assert datasets or "sources" not in word


def test_several_groups_of_sources_go_together() -> None:
    both = settings("sources=[cifar,tiny_imagenet]").sources
    alone = [source for name in ("cifar", "tiny_imagenet") for source in settings(f"sources={name}").sources]
    assert both == alone


def test_every_source_has_settings_of_its_own() -> None:
    given = settings(
        *("data=[svhn,a.npz]", "image_size=48", "tasks.groups=2", "tasks.train_per_class=7", "sources=cifar"),
        *("+sources.birds.dataset=birds.npz", "+sources.birds.image_size=64", "+sources.birds.flip=false"),
        *("+sources.birds.groups=3", "+sources.birds.classes=4", "+sources.birds.architectures=[vgg9-2,resnet20]"),
        *("+sources.birds.train_per_class=null", "+sources.birds.valid_per_class=9"),
    )
    shared = Split(
        groups=2, classes=None, architectures=["conv4-16", "resnet20-8"], train_per_class=7, valid_per_class=None
    )
    birds = Split(groups=3, classes=4, architectures=["vgg9-2", "resnet20"], train_per_class=None, valid_per_class=9)
    assert [(source.name, source.dataset) for source in given.sources] == [
        *((None, "svhn"), (None, "a.npz")),
        *(("cifar10", "cifar10"), ("cifar100", "cifar100"), ("birds", "birds.npz")),
    ]
    assert [source.image_size for source in given.sources] == [48, 48, 48, 48, 64]
    assert [source.flip for source in given.sources] == [None] * 4 + [False]
    assert given.sources[0].split == given.split == shared
    assert given.sources[-1].split == birds
    assert [source.split.groups for source in given.sources] == [2, 2, 2, 5, 3]
    assert given.evaluation.image_size == 48


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["+sources.birds=svhn"], r"sources\.birds=svhn is not a source; write .* \+sources\.birds\.dataset=cifar10"),
        (["+sources.birds.image_size=64"], r"sources\.birds=.* is not a source"),
        (["+sources.birds.dataset=3"], r"sources\.birds=.* is not a source"),
        (["+sources.birds.dataset=a", "+sources.birds.size=3"], r"unknown key 'sources\.birds\.size'"),
        (["+sources.birds.dataset=a", "+sources.birds.groups=0"], r"sources\.birds\.groups=0 cannot be used"),
        (["+sources.birds.dataset=a", "+sources.birds.flip=left"], r"sources\.birds\.flip=left cannot be used"),
        (["+sources.birds.dataset=a", "+sources.birds.image_size=4"], r"sources\.birds\.image_size=4 is too small"),
        (["+sources.birds.dataset=a", "+sources.birds.architectures=[]"], r"sources\.birds\.architectures=\[\] is not"),
        (["+sources.birds.dataset=a", "+sources.birds.architectures=[vgg]"], "architecture 'vgg'"),
        (
            ["+sources.birds.dataset=a", "+sources.birds.image_size=8"],
            "architecture 'conv4-16': .*at least 16 pixels",
        ),
        (["+sources={a.b:{dataset:svhn}}"], r"sources\.a\.b cannot be a name; use letters, digits, - and _"),
    ],
)
def test_a_source_that_cannot_be_used_is_named(words: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        settings(*words)


@pytest.mark.parametrize(
    ("sources", "target"), [("data=a.npz", "./a.npz"), ("data=[b.npz,x/../a.npz]", "a.npz"), ("data=svhn", "svhn")]
)
def test_a_source_is_no_target(sources: str, target: str) -> None:
    with pytest.raises(ConfigurationError, match="is a source as well; judge phi on images it has not seen"):
        settings(sources, f"evaluation.data={target}")


SMALL = ["+sources.x.dataset=a.npz", "+sources.x.architectures=[resnet20-2]"]


def test_the_network_of_the_evaluation_fits_the_source_that_is_held_out() -> None:
    with pytest.raises(ConfigurationError, match=r"of 8 pixels .*write image_size= as \+\+sources\.x\.image_size="):
        settings(*SMALL, "+sources.x.image_size=8")
    remedies = (["++sources.x.image_size=16"], ["evaluation.architecture=resnet20-2"], ["evaluation.data=t.npz"])
    for remedy in remedies:
        settings(*SMALL, "+sources.x.image_size=8", *remedy)


def test_the_network_of_the_evaluation_need_not_fit_the_size_of_no_target() -> None:
    words = ["image_size=8", "tasks.architectures=[resnet20-2]"]
    settings(*words, *SMALL, "+sources.x.image_size=16")
    with pytest.raises(ConfigurationError, match="images of 8 pixels"):
        settings(*words, *SMALL, "+sources.x.image_size=16", "evaluation.data=t.npz")


@pytest.mark.parametrize(
    "key", ["meta.share_of_sites", "meta.strength", "evaluation.full_strength_at", "evaluation.acts_below"]
)
@pytest.mark.parametrize("value", ["0", "1.5"])
def test_a_share_that_is_none_is_named(key: str, value: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"{re.escape(key)}={value}.* cannot be used; give a number above"):
        settings(f"{key}={value}")


@pytest.mark.parametrize("words", [("0.4", "0.4"), ("0.4", "0.3"), ("1", "0.5")])
def test_acts_below_must_be_above_full_strength_at(words: tuple[str, str]) -> None:
    with pytest.raises(ConfigurationError, match=r"evaluation\.acts_below=0\.\d cannot be used with full_strength_at="):
        settings(f"evaluation.full_strength_at={words[0]}", f"evaluation.acts_below={words[1]}")


@pytest.mark.parametrize("value", ["row", "true", "3", "null"])
def test_noise_of_no_kind_is_named(value: str) -> None:
    with pytest.raises(ConfigurationError, match=r"meta\.noise_per=\w+ is unknown; use one of element, channel"):
        settings(f"meta.noise_per={value}")
