"""What the user can mend ends in one line on standard error that names culprit and remedy, and a non-zero exit."""

import fcntl
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import TINY, CommandLine
from images_on_disk import save_archive, save_folder
from PIL import Image

from mp_lightning.cli.card import without_folders
from mp_lightning.cli.words import compose, split_words
from mp_lightning.meta.checkpoint import checkpoints


def assert_refused(mp: CommandLine, folder: Path, words: list[str], *parts: str, leaves_nothing: bool = False) -> None:
    """One line with all ``parts`` in it, exit code 2, no traceback."""
    done = mp(folder, *words)
    assert done.code == 2, f"ended with {done.code}\n{done.stdout}{done.stderr}"
    assert "Traceback" not in done.stdout + done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("mp_lightning: "), done.stderr
    missing = [part for part in parts if part not in lines[0]]
    assert not missing, f"{missing} not in: {lines[0]}"
    if leaves_nothing:
        assert not list(folder.iterdir()), "a refused command left something behind"


CASES: dict[str, tuple[list[str], list[str]]] = {
    "no verb": ([], ["no verb given", "use one of: fit"]),
    "unknown verb": (["fitt"], ["unknown verb 'fitt'", "use one of: fit"]),
    "unknown option": (["fit", "--fresh"], ["unknown option '--fresh'"]),
    # Keys
    "key without a value deleted": (["fit", "~data"], ["'~data' takes a setting away that 'fit' needs; leave it out"]),
    "key of compare deleted": (["compare", "~seeds"], ["'~seeds' takes a setting away that 'compare' needs"]),
    "unknown key": (["fit", "meta.stps=3"], ["unknown key 'meta.stps'", "did you mean 'meta.steps'?"]),
    "unknown top-level key": (["fit", "sed=3"], ["unknown key 'sed'", "'seed'"]),
    "unknown key of hydra": (["fit", "hydra.run.dri=x"], ["unknown key 'hydra.run.dri'", "'hydra.run.dir'"]),
    "key added": (["fit", "+meta.stps=3"], ["unknown key 'meta.stps'", "'meta.steps'"]),
    "top-level key added": (["fit", "+sed=3"], ["unknown key 'sed'", "'seed'"]),
    "key of tasks added": (["fit", "+tasks.group=2"], ["unknown key 'tasks.group'", "'tasks.groups'"]),
    "key of evaluation added": (["fit", "+evaluation.step=2"], ["unknown key 'evaluation.step'", "'evaluation.steps'"]),
    "key twice wrong": (["fit", "seed=1", "meta.lrr=1", "x.y=2"], ["unknown key 'meta.lrr'"]),
    "key deleted": (["fit", "~meta.steps"], ["'~meta.steps' takes a setting away that 'fit' needs; leave it out"]),
    "section deleted": (["fit", "~meta"], ["'~meta' takes a setting away that 'fit' needs"]),
    "section replaced": (["fit", "meta=null"], ["'meta=null'"]),
    "unknown key in a sweep": (["fit", "-m", "meta.lrr=1,2"], ["unknown key 'meta.lrr'", "'meta.lr'"]),
    # Words
    "no value": (["fit", "foo"], ["'foo'", "write key=value"]),
    "no key": (["fit", "=3"], ["'=3'", "write key=value"]),
    "two dots": (["fit", "meta..steps=3"], ["'meta..steps=3'", "write key=value"]),
    "empty value": (["fit", "meta.steps="], ["meta.steps= cannot be used; give a positive whole number"]),
    "open bracket": (["fit", "data=[a.npz"], ["'data=[a.npz'", "lists are written [a,b]"]),
    "several values": (["fit", "seed=1,2"], ["'seed=1,2' names several values", "-m"]),
    "unknown experiment": (["fit", "+experiment=nope"], ["no configuration 'experiment/nope'", "few_images"]),
    "unknown group": (["fit", "meta=nope"], ["no configuration 'meta/nope'", "joint"]),
    # Values
    "clipping": (["fit", "+trainer.gradient_clip_val=1.0"], ["trainer.gradient_clip_val cannot be set", "meta.lr"]),
    "accumulation": (["fit", "+trainer.accumulate_grad_batches=2"], ["accumulate_grad_batches", "meta.batch_size"]),
    "steps of logging": (["fit", "trainer.log_every_n_steps=x"], ["trainer.log_every_n_steps=x cannot be used"]),
    "a list of lists": (["fit", "tasks.architectures=[[conv4-2]]"], ["tasks.architectures=", "not a list of networks"]),
    "a list of keys": (["fit", "tasks.architectures=[{a:1}]"], ["tasks.architectures=", "not a list of networks"]),
    "steps of text": (["fit", "meta.steps=abc"], ["meta.steps=abc cannot be used; give a positive whole number"]),
    "no steps": (["fit", "meta.steps=0"], ["meta.steps=0 cannot be used; give a positive whole number"]),
    "half a step": (["fit", "meta.steps=1.5"], ["meta.steps=1.5 cannot"]),
    "steps null": (["fit", "meta.steps=null"], ["meta.steps=None cannot"]),
    "steps true": (["fit", "meta.steps=true"], ["meta.steps=True cannot"]),
    "negative lr": (["fit", "meta.lr=-1"], ["meta.lr=-1 cannot be used; give a finite number from 0"]),
    "lr not a number": (["fit", "meta.lr=nan"], ["meta.lr=nan cannot"]),
    "lr beyond float32": (["fit", "meta.lr=1e39"], ["meta.lr=1e+39 cannot be used; give a finite number from 0"]),
    "no checkpoints": (["fit", "+trainer.enable_checkpointing=false"], ["fit continues from its checkpoints"]),
    "infinite lr": (["fit", "meta.lr=inf"], ["meta.lr=inf cannot"]),
    "lr of text": (["fit", "evaluation.lr=fast"], ["evaluation.lr=fast cannot"]),
    "no batch": (["fit", "meta.batch_size=0"], ["meta.batch_size=0 cannot"]),
    "unknown policy": (
        ["fit", "meta.on_divergence=ignore"],
        ["meta.on_divergence=ignore is unknown; use one of stop, leave_out"],
    ),
    "restart never": (["fit", "meta.restart_after=0"], ["meta.restart_after=0 cannot", "or null"]),
    "negative seed": (["fit", "seed=-1"], ["seed=-1 cannot be used; give a whole number from 0"]),
    "seed of text": (["fit", "seed=x"], ["seed=x cannot"]),
    "huge seed": (["fit", "seed=99999999999999999999"], ["seed=99999999999999999999 cannot"]),
    "small images": (["fit", "image_size=7"], ["image_size=7 is too small; give at least 8"]),
    "fresh maybe": (["fit", "run.fresh=maybe"], ["run.fresh=maybe cannot be used; give true or false"]),
    "flip of text": (["fit", "flip=left"], ["flip=left cannot be used; give true or false"]),
    "no groups": (["fit", "tasks.groups=0"], ["tasks.groups=0 cannot"]),
    "architectures not a list": (["fit", "tasks.architectures=conv4"], ["tasks.architectures=conv4 is not a list"]),
    "no architectures": (["fit", "tasks.architectures=[]"], ["tasks.architectures=[] is not a list"]),
    "unknown architecture": (["fit", "tasks.architectures=[alexnet]"], ["architecture 'alexnet'", "conv4, conv6"]),
    "no width": (["fit", "tasks.architectures=[conv4-x]"], ["architecture 'conv4-x'", "'conv4-16'"]),
    "unknown target architecture": (["fit", "evaluation.architecture=nope"], ["architecture 'nope'", "conv4"]),
    "pools that do not fit": (["fit", "image_size=8"], ["architecture 'conv4-16'", "at least 16 pixels"]),
    "data of numbers": (["fit", "data=[1,2]"], ["data=[1, 2] is not a path"]),
    "empty list of data": (["fit", "data=[]"], ["data=[] is not a path"]),
    # Trainer
    "unknown strategy": (
        ["fit", "trainer.strategy=fsdp"],
        ["trainer.strategy=fsdp is unknown; use one of auto, task_parallel, ddp"],
    ),
    "plugins of the trainer": (["fit", "+trainer.plugins=[]"], ["trainer.plugins cannot be set: fit adds its own"]),
    "logger of the trainer": (
        ["fit", "+trainer.logger=true"],
        ["trainer.logger cannot be set: choose one with logger="],
    ),
    "synchronised batch norm": (
        ["fit", "+trainer.sync_batchnorm=true"],
        ["trainer.sync_batchnorm cannot be set", "never leaves its process"],
    ),
    "half precision": (["fit", "trainer.precision=16-mixed"], ["trainer.precision=16-mixed cannot", "bf16-mixed"]),
    "a trial of the trainer": (
        ["fit", "+trainer.fast_dev_run=true"],
        ["trainer.fast_dev_run cannot be set", "meta.steps=2"],
    ),
    "the same batches": (["fit", "+trainer.overfit_batches=1"], ["trainer.overfit_batches cannot be set", "per_class"]),
    "steps of the trainer": (["fit", "+trainer.max_steps=3"], ["trainer.max_steps cannot be set", "meta.steps"]),
    "epochs of the trainer": (["fit", "+trainer.max_epochs=3"], ["trainer.max_epochs cannot be set", "meta.steps"]),
    "double precision": (["fit", "trainer.precision=64-true"], ["trainer.precision=64-true cannot", "32-true"]),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_before_anything_is_written(mp: CommandLine, tmp_path: Path, case: str) -> None:
    words, parts = CASES[case]
    assert_refused(mp, tmp_path, words, *parts, leaves_nothing=True)


@pytest.mark.parametrize("path", ["~nobody-of-this-name/a.npz", f"{'long' * 100}.npz"])
def test_a_path_of_which_the_system_makes_nothing(mp: CommandLine, tmp_path: Path, path: str) -> None:
    assert_refused(mp, tmp_path, ["fit", f"data={path}"], f"no images at '{path}'")


def test_in_a_process_of_its_own(tmp_path: Path) -> None:
    """The other tests fork; this one starts Python as a person does."""
    command = [sys.executable, "-m", "mp_lightning.meta", "fit", "meta.stps=3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "did you mean 'meta.steps'?" in done.stderr


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("+trainer.foo=1", ["trainer: no argument 'foo'", "lightning.pytorch.Trainer"]),
        ("trainer.accelerator=nope", ["trainer: ", "nope"]),
        ("trainer.devices=0", ["trainer: ", "devices=0", "lightning.pytorch.Trainer"]),
        ("trainer.devices=-1", ["trainer: ", "`devices`", "lightning.pytorch.Trainer"]),
        ("trainer.devices=5", ["4 tasks cannot be shared by 5 devices: use at most 4 devices, or more tasks"]),
    ],
)
def test_what_the_trainer_refuses(mp: CommandLine, tmp_path: Path, word: str, parts: list[str]) -> None:
    assert_refused(mp, tmp_path, ["fit", *TINY, word], *parts)


def test_gpu_where_there_is_none(mp: CommandLine, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("this machine has a GPU")
    assert_refused(mp, tmp_path, ["fit", *TINY, "trainer.accelerator=gpu"], "trainer: ", "gpu")


def broken_data(kind: str, folder: Path) -> Path:
    """Something at a path that cannot be learned from."""
    path = folder / f"{kind.replace(' ', '-')}.npz"
    images = np.zeros((8, 16, 16, 3), np.uint8)
    match kind:
        case "empty folder":
            (path := folder / "pictures").mkdir()
        case "one class":
            path = save_folder(folder / "pictures", classes=1)
        case "class without images":
            (save_folder(path := folder / "pictures") / "zebra").mkdir()
        case "damaged picture":
            (save_folder(path := folder / "pictures") / "class0" / "1.png").write_bytes(b"\x89PNG\r\n")
        case "truncated archive":
            path.write_bytes(save_archive(path).read_bytes()[:1000])
        case "text":
            path.write_text("not an archive")
        case "no labels":
            np.savez(path, x_train=images)
        case "not a number":
            np.savez(path, x_train=np.full((8, 16, 16, 3), np.nan), y_train=np.arange(8) % 2)
        case "one label":
            np.savez(path, x_train=images, y_train=np.zeros(8, int))
        case "one image a class":
            np.savez(path, x_train=images, y_train=np.arange(8))
        case "two images a class":
            np.savez(path, x_train=images, y_train=np.arange(8) // 2)
        case "few images of few classes":
            np.savez(path, x_train=images[:6], y_train=np.arange(6) % 3)
        case "integers of 0 and 1":
            np.savez(path, x_train=(np.arange(8 * 256) % 2).reshape(8, 16, 16), y_train=np.arange(8) % 2)
        case "labels from 1":
            np.savez(path, x_train=images, y_train=np.arange(8) % 2 + 1)
        case "objects":
            np.savez(path, x_train=images, y_train=np.array([{}] * 8, dtype=object))
    return path


BROKEN = {
    "absent": ["no images at", "absent.npz"],
    "empty folder": ["pictures' holds no folders", "at least two classes"],
    "one class": ["only the folder 'class0'", "at least two classes"],
    "class without images": ["zebra' holds no image files"],
    "damaged picture": ["1.png' is not a readable image"],
    "truncated archive": ["truncated-archive.npz' is not a readable .npz archive"],
    "text": ["text.npz' is not a readable .npz archive"],
    "no labels": ["lacks y_train"],
    "not a number": ["not finite"],
    "one label": ["give at least two classes"],
    "integers of 0 and 1": ["integers of 0 and 1 alone", "multiply them by 255"],
    "labels from 1": ["has the label 0", "number the classes from 0 without gaps"],
    "objects": ["holds Python objects"],
}


@pytest.mark.parametrize("kind", BROKEN)
def test_data_that_cannot_be_used(mp: CommandLine, tmp_path: Path, kind: str) -> None:
    path = broken_data(kind, tmp_path)
    assert_refused(mp, tmp_path, ["fit", *TINY, f"data={path}"], *BROKEN[kind])


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("one image a class", ["has a class with 1 images", "evaluation.data="]),
        ("few images of few classes", ["one of them 2 images", "evaluation.data="]),
    ],
)
def test_data_too_few_to_hold_out(mp: CommandLine, tmp_path: Path, kind: str, parts: list[str]) -> None:
    assert_refused(mp, tmp_path, ["fit", *TINY, f"data={broken_data(kind, tmp_path)}"], *parts)


def test_data_of_one_image_a_class_with_a_target(mp: CommandLine, tmp_path: Path) -> None:
    path, target = broken_data("one image a class", tmp_path), save_archive(tmp_path / "target.npz")
    words = ["fit", *TINY, f"data={path}", f"evaluation.data={target}"]
    assert_refused(mp, tmp_path, words, "class '0' of 'one-image-a-class' has 1 images", "too few for two halves")


def test_target_that_is_absent(mp: CommandLine, tmp_path: Path) -> None:
    path = save_archive(tmp_path / "a.npz")
    words = ["fit", *TINY, f"data={path}", "evaluation.data=nowhere.npz"]
    assert_refused(mp, tmp_path, words, "no images at 'nowhere.npz'")
    assert_refused(mp, tmp_path, ["fit", *TINY, "evaluation.data=nowhere.npz"], "no images at 'nowhere.npz'")


def test_target_of_images_that_are_learned_from(mp: CommandLine, tmp_path: Path) -> None:
    words = ["fit", *TINY, "evaluation.data=digits"]
    assert_refused(mp, tmp_path, words, "source 'digits04' as well", "give other evaluation.data=")
    save_archive(tmp_path / "a.npz")
    words = ["fit", *TINY, "data=a.npz", "evaluation.data=./a.npz"]
    assert_refused(mp, tmp_path, words, "evaluation.data=./a.npz is a source as well")


def test_two_sources_of_one_name(mp: CommandLine, tmp_path: Path) -> None:
    path = save_archive(tmp_path / "a.npz")
    assert_refused(
        mp, tmp_path, ["fit", *TINY, f"data=[{path},{path}]"], "two sources are called 'a'", "different names"
    )


def test_more_groups_than_classes_allow(mp: CommandLine, tmp_path: Path) -> None:
    assert_refused(mp, tmp_path, ["fit", *TINY, "tasks.groups=3"], "digits04", "tasks.groups=3", "lower tasks.groups")


def test_more_images_a_class_than_there_are(mp: CommandLine, tmp_path: Path) -> None:
    words = ["fit", *TINY, "tasks.train_per_class=5000"]
    assert_refused(
        mp, tmp_path, words, "of 'digits04'", "in one of its two halves, not tasks.train_per_class=5000", "lower"
    )


def test_a_task_that_diverges(mp: CommandLine, tmp_path: Path) -> None:
    words = ["fit", *TINY, "meta.steps=5", "meta.theta_lr=1e30"]
    assert_refused(mp, tmp_path, words, "diverged at meta-step", "lower meta.theta_lr")


@pytest.mark.parametrize("below", ["", "/runs/x"])
def test_run_folder_that_is_a_file(mp: CommandLine, tmp_path: Path, below: str) -> None:
    (tmp_path / "file").touch()
    words = ["fit", *TINY, f"hydra.run.dir=file{below}"]
    assert_refused(mp, tmp_path, words, f"run folder 'file{below}' cannot be written", "hydra.run.dir=")


def test_run_folder_in_use(mp: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "pinned").mkdir()
    with (tmp_path / "pinned" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert_refused(mp, tmp_path, ["fit", *TINY, "hydra.run.dir=pinned"], "another process works in run folder")


@pytest.fixture(scope="module")
def pinned(mp: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, in the folder ``pinned``, that stopped in the middle."""
    folder = tmp_path_factory.mktemp("stopped")
    done = mp(folder, "fit", *PINNED)
    assert done.code == 2 and "stopped after 2 of 4" in done.stderr
    return folder


PINNED = [*TINY, "meta.steps=4", "+trainer.limit_train_batches=2", "hydra.run.dir=pinned"]


@pytest.mark.parametrize(
    ("word", "difference"),
    [
        ("meta.lr=0.02", "meta.lr=0.003, not 0.02"),
        ("seed=1", "seed=0, not 1"),
        ("tasks.groups=2", "tasks.groups=1, not 2"),
        ("evaluation.lr=0.5", "evaluation.lr=0.001, not 0.5"),
        ("meta.restart_after=2", "meta.restart_after=null, not 2"),
    ],
)
def test_pinned_folder_with_other_settings(mp: CommandLine, pinned: Path, word: str, difference: str) -> None:
    assert_refused(mp, pinned, ["fit", *PINNED, word], "pinned", difference, "hydra.run.dir=", "run.fresh=true")


def test_checkpoint_of_other_settings(mp: CommandLine, pinned: Path) -> None:
    """Where the folder itself does not know, its checkpoint does."""
    kept = pinned / "pinned" / "settings.json"
    before = kept.read_text()
    kept.unlink()
    try:
        assert_refused(mp, pinned, ["fit", *PINNED, "meta.lr=0.02"], "checkpoint", "meta.lr=0.003, not 0.02")
    finally:
        kept.write_text(before)


def test_source_that_has_changed(mp: CommandLine, tmp_path: Path) -> None:
    save_archive(tmp_path / "a.npz", per_class=8)
    words = ["fit", *PINNED, "data=a.npz"]
    assert_refused(mp, tmp_path, words, "stopped after 2 of 4")
    save_archive(tmp_path / "a.npz", per_class=10)
    assert_refused(mp, tmp_path, words, "checkpoint", "other images of 'a-a'", "run.fresh=true")


def test_damaged_checkpoint(mp: CommandLine, tmp_path: Path) -> None:
    words = ["fit", *PINNED]
    assert_refused(mp, tmp_path, words, "stopped after 2 of 4")
    found = checkpoints(tmp_path / "pinned" / "checkpoints")
    for path in found:
        path.write_bytes(path.read_bytes()[:-2000])
    assert_refused(mp, tmp_path, words, f"{found[-1].name}' is damaged", "run.fresh=true")
    done = mp(tmp_path, *[word for word in words if "limit" not in word], "run.fresh=true")
    assert done.code == 0, done.stderr
    assert json.loads((tmp_path / "pinned" / "report.json").read_text())["results"]


def test_sixteen_bit_pictures(mp: CommandLine, tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "pictures")
    Image.fromarray(np.zeros((20, 20), np.uint16)).save(folder / "class1" / "deep.png")
    assert_refused(mp, tmp_path, ["fit", *TINY, f"data={folder}"], "deep.png' has more than 8 bits")


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("command=fit", "fit"),
        ("seed=3", "seed=3"),
        ("data=/secret/a.npz", "data=a.npz"),
        ("data=[/secret/a.npz,../b/c.npz]", "data=[a.npz,c.npz]"),
        ("data=/secret/folder/", "data=folder/"),
        ("+experiment=few_images", "+experiment=few_images"),
        ("hydra/launcher=basic", "hydra/launcher=basic"),
    ],
)
def test_cards_name_no_folders(word: str, shown: str) -> None:
    assert without_folders(word) == shown


def test_names_of_checkpoints_need_no_quotes():
    options, overrides = split_words(["ckpt=ck/epoch=1-step=10.ckpt", "a=[b=1]", "c='d=1'", "e=1"])
    assert (options, overrides) == ([], ["ckpt='ck/epoch=1-step=10.ckpt'", "a=['b=1']", "c='d=1'", "e=1"])
    assert compose("export", overrides[:1]).ckpt == "ck/epoch=1-step=10.ckpt"
