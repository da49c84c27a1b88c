"""What ``compare`` cannot use ends in one line that names culprit and remedy, before anything is trained."""

import fcntl
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import CommandLine
from comparisons import IMAGES, SMALL, compare, runs, succeed
from images_on_disk import save_archive
from safetensors.torch import save_file
from test_bad_input import assert_refused

from mp_lightning.compare.architecture import Architecture
from mp_lightning.perturbation import initial_phi, save_phi

KNOWN_ARMS = ["'droput' is unknown", "none, dropout, dropblock", "fixed_noise", "mean_one", "combination with +"]
REFUSED: dict[str, tuple[list[str], list[str]]] = {
    # Keys
    "unknown key": (["step=3"], ["unknown key 'step'", "did you mean 'steps'?"]),
    "unknown key added": (["+sed=3"], ["unknown key 'sed'", "'seeds'"]),
    "unknown key of tuning": (["+tuning.value=3"], ["unknown key 'tuning.value'", "'tuning.values'"]),
    # Arms
    "unknown arm": (["arms=[none,droput]"], ["arm 'droput'", *KNOWN_ARMS]),
    "unknown part": (["arms=[metaperturb+droput]"], ["arm 'metaperturb+droput'", *KNOWN_ARMS]),
    "no arms": (["arms=[]"], ["arms=[] is not a list of arms", "arms=[none,dropout,metaperturb]"]),
    "arms of text": (["arms=dropout"], ["arms=dropout is not a list of arms"]),
    "arm twice": (["arms=[none,dropout,dropout]"], ["arm 'dropout' is named twice"]),
    "two at the sites": (["arms=[metaperturb+fixed_noise]"], ["metaperturb and fixed_noise both stand at the sites"]),
    "none with another": (["arms=[none+dropout]"], ["arm 'none+dropout' cannot be combined so"]),
    "value of text": (["arms=[dropout:much]"], ["arm 'dropout:much': p=much is not a number"]),
    "no probability": (["arms=[dropout:1.5]"], ["arm 'dropout:1.5'", "between 0 and 1"]),
    "no fraction": (["arms=[dropblock:1]"], ["arm 'dropblock:1'", "a number from 0 up to 1"]),
    "no exponent": (["arms=[mixup:0]"], ["arm 'mixup:0'", "alpha=0.0 is not positive"]),
    "too smooth": (["arms=[label_smoothing:1]"], ["arm 'label_smoothing:1'", "up to 1"]),
    "value where there is none": (["arms=[random_phi:3]"], ["'random_phi' takes no value"]),
    # Numbers and choices
    "no seeds": (["seeds=0"], ["seeds=0 cannot be used; give a positive whole number"]),
    "no jobs": (["jobs=0"], ["jobs=0 cannot be used; give a positive whole number"]),
    "no steps": (["steps=0"], ["mp_lightning: steps=0 cannot be used"]),
    "no images": (["n_per_class=0"], ["n_per_class=0 cannot be used", "or null"]),
    "too many values": (["tuning.values=9"], ["tuning.values=9 is too many"]),
    "metric": (["metric=loss"], ["metric=loss is unknown; use one of accuracy, nll"]),
    "inference": (["inference=fold"], ["inference=fold is unknown; use one of mc, mean"]),
    "precision": (["precision=16"], ["precision=16 is unknown; use one of 32-true, bf16-mixed"]),
    "accelerator": (["accelerator=gpu"], ["accelerator=gpu is unknown; use one of auto, cpu, cuda"]),
    "milestone beyond the end": (["milestones=[0.4,1.5]"], ["milestones=[0.4, 1.5] is not a list of fractions"]),
    "milestones of steps": (["milestones=[100]"], ["milestones=[100] is not a list of fractions", "[0.4,0.7,0.9]"]),
    "one milestone": (["milestones=0.5"], ["milestones=0.5 is not a list"]),
    "small images": (["image_size=7"], ["image_size=7 is too small"]),
    # Networks
    "unknown model": (["model=alexnet"], ["architecture 'alexnet'", "conv4, conv6"]),
    "no site": (["model=timm:repvgg_d2se"], ["architecture 'timm:repvgg_d2se'", "no site"]),
    "weights that are absent": (["weights=nowhere.pt"], ["weights 'nowhere.pt' do not exist"]),
    # phi
    "phi that is absent": (["phi=nowhere.safetensors"], ["phi file 'nowhere.safetensors' does not exist"]),
    "phi of an arm": (["arms=[metaperturb:nowhere.safetensors]"], ["phi file 'nowhere.safetensors' does not exist"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_written(mp: CommandLine, tmp_path: Path, case: str) -> None:
    words, parts = REFUSED[case]
    assert_refused(mp, tmp_path, ["compare", *words], *parts, leaves_nothing=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_gpu_where_there_is_none(mp: CommandLine, tmp_path: Path) -> None:
    words = ["compare", "accelerator=cuda"]
    assert_refused(mp, tmp_path, words, "accelerator=cuda cannot be used", "cpu", leaves_nothing=True)


def save_file_of(kind: str, folder: Path) -> Path:
    """A file that holds neither a phi nor weights of conv4-2."""
    path = folder / f"{kind.replace(' ', '-')}.safetensors"
    match kind:
        case "text":
            path.write_text("neither")
        case "cut off":
            save_phi(path, initial_phi(0), {})
            path.write_bytes(path.read_bytes()[:-20])
        case "another shape":
            save_file({name: value.flatten().repeat(2) for name, value in initial_phi(0)._asdict().items()}, path)
        case "another network":
            save_file(Architecture.parse("resnet20-2").construct(4, 16).state_dict(), path)
        case "numbers":
            path = path.with_suffix(".pt")
            torch.save({"state_dict": {"epoch": 3}}, path)
        case "objects":
            path = path.with_suffix(".pt")
            torch.save(Architecture.parse("conv4-2"), path)
    return path


@pytest.mark.parametrize("kind", ["text", "cut off", "another shape", "another network"])
@pytest.mark.parametrize("word", ["phi={}", "arms=[metaperturb:{}]"])
def test_a_phi_that_does_not_load(mp: CommandLine, tmp_path: Path, kind: str, word: str) -> None:
    path = save_file_of(kind, tmp_path)
    assert_refused(mp, tmp_path, ["compare", *SMALL, word.format(path.name)], f"phi file '{path.name}'")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("text", ["text.safetensors' cannot be read"]),
        ("another network", ["do not fit this network", "weights of the same architecture, or choose another model="]),
        ("numbers", ["numbers.pt' hold no tensors"]),
        ("objects", ["objects.pt' cannot be read with weights_only=True"]),
    ],
)
def test_weights_that_do_not_load(mp: CommandLine, tmp_path: Path, kind: str, parts: list[str]) -> None:
    path = save_file_of(kind, tmp_path)
    assert_refused(mp, tmp_path, ["compare", *SMALL, f"weights={path.name}"], *parts)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("archive", "words", "parts"),
    [
        ({}, ["target=nowhere"], ["no images at 'nowhere'", "cifar10, cifar100, svhn, stl10", "digits"]),
        ({}, ["n_per_class=11"], ["class '0' of target", "10 training images, fewer than n_per_class=11"]),
        ({}, ["batch_size=41"], ["has 40 training images, fewer than batch_size=41", "lower batch_size"]),
        ({}, ["n_per_class=2", "batch_size=9"], ["has 8 training images, fewer than batch_size=9"]),
        ({"y_train": np.repeat([0, 1, 3], [30, 30, 20])}, [], ["has the label 2", "without gaps"]),
        ({"y_train": np.repeat([0, 1, 2], [39, 40, 1])}, [], ["class '2'", "has 1 images", "too few"]),
        ({"y_train": np.zeros(80, int)}, [], ["at least two classes"]),
        ({"x_train": np.zeros((80, 16), np.uint8)}, [], ["shape (80, 16)"]),
    ],
    ids=["target", "images a class", "batch", "batch of few", "class missing", "one image", "one class", "no images"],
)
def test_images_that_cannot_be_compared_on(
    mp: CommandLine, tmp_path: Path, archive: dict[str, np.ndarray], words: list[str], parts: list[str]
) -> None:
    save_archive(tmp_path / IMAGES, classes=4, per_class=20, **archive)
    assert_refused(mp, tmp_path, ["compare", *SMALL, *words], *parts)
    assert not list(tmp_path.rglob("results.csv"))


def test_a_class_that_only_the_test_images_have(mp: CommandLine, tmp_path: Path) -> None:
    test = {"x_test": np.zeros((8, 16, 16, 3), np.uint8), "y_test": np.arange(8) % 5}
    save_archive(tmp_path / IMAGES, classes=4, per_class=20, **test)
    assert_refused(
        mp,
        tmp_path,
        ["compare", *SMALL],
        "label 4 of 'images (test)' is none of the 4 classes that have a name, or images to train on",
    )
    assert not list(tmp_path.rglob("results.csv"))


@pytest.fixture(scope="module")
def finished(mp: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a comparison of one arm in the folder ``run``."""
    folder = tmp_path_factory.mktemp("finished")
    succeed(mp, folder, "arms=[none]")
    return folder


def refused(mp: CommandLine, folder: Path, words: list[str], *parts: str) -> None:
    """As in :func:`assert_refused`, and the results are as they were."""
    before = (folder / "run" / "results.csv").read_bytes()
    assert_refused(mp, folder, ["compare", *SMALL, "arms=[none]", *words], *parts)
    assert (folder / "run" / "results.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("word", "difference"),
    [
        ("lr=0.5", "lr=0.005, not 0.5"),
        ("samples=3", "samples=2, not 3"),
        ("n_per_class=3", "n_per_class=auto, not 3"),
        ("tuning.values=1", "tuning.values=2, not 1"),
        ("precision=bf16-mixed", "precision=32-true, not bf16-mixed"),
    ],
)
def test_results_of_other_settings(mp: CommandLine, finished: Path, word: str, difference: str) -> None:
    refused(mp, finished, [word], "run", difference, "hydra.run.dir=", "run.fresh=true")


def test_images_that_have_changed(mp: CommandLine, finished: Path) -> None:
    kept = (finished / IMAGES).read_bytes()
    save_archive(finished / IMAGES, classes=4, per_class=24)
    try:
        refused(mp, finished, [], "images=", "hydra.run.dir=", "run.fresh=true")
    finally:
        (finished / IMAGES).write_bytes(kept)


def test_a_folder_in_use(mp: CommandLine, finished: Path) -> None:
    with (finished / "run" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refused(mp, finished, ["seeds=2"], "another process works in run folder", "hydra.run.dir=")


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"arm,seed\n",
        lambda content: content.replace(b",cpu,", b","),
        lambda content: content + b"\r1,2\r3\n",
        lambda content: content + b"\xff\xfe\n",
        lambda content: content + content.splitlines()[1].replace(b"none,0", b"none,first") + b"\n",
    ],
    ids=["other columns", "a column less", "line ends", "bytes", "a value"],
)
def test_results_that_are_damaged(mp: CommandLine, finished: Path, damage) -> None:
    path = finished / "run" / "results.csv"
    kept = path.read_bytes()
    path.write_bytes(damage(kept))
    try:
        refused(mp, finished, ["seeds=2"], "results.csv' is not a table of results", "run.fresh=true")
    finally:
        path.write_bytes(kept)


FULL = """
import resource
from mp_lightning.compare import store
write = store.Store._write
def full(self, row):
    size = self._path.stat().st_size if self._path.exists() else 0
    if size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, resource.RLIM_INFINITY))
    write(self, row)
store.Store._write = full
"""


def test_a_full_disk_loses_no_row(mp: CommandLine, tmp_path: Path) -> None:
    """The system lets the table grow by less than a row."""
    words = ["arms=[none,label_smoothing:0.1]", "seeds=2"]
    done = compare(mp, tmp_path, *words, first=FULL)
    assert done.code == 2 and len(done.stderr.splitlines()) == 1, done
    assert "/run' cannot be written (File too large)" in done.stderr
    before = (tmp_path / "run" / "results.csv").read_bytes()
    assert before.endswith(b"\n") and len(runs(tmp_path / "run")) == 1
    succeed(mp, tmp_path, *words)
    assert (tmp_path / "run" / "results.csv").read_bytes().startswith(before)
    assert len(runs(tmp_path / "run")) == len(set(runs(tmp_path / "run"))) == 4


def test_controls_where_the_pilot_run_diverges(mp: CommandLine, tmp_path: Path) -> None:
    save_archive(tmp_path / IMAGES, classes=4, per_class=20)
    words = ["compare", *SMALL, "lr=1e35", "arms=[none,fixed_noise]"]
    assert_refused(mp, tmp_path, words, "the pilot run of the controls", "diverged", "lower the learning rate")
    assert not list(tmp_path.rglob("results.csv"))


def test_a_run_folder_that_is_a_file(mp: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    words = ["compare", *SMALL, "target=digits", "hydra.run.dir=file"]
    assert_refused(mp, tmp_path, words, "run folder 'file' cannot be written", "hydra.run.dir=")
