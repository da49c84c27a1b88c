"""``fit`` from the outside: what it prints, what it leaves, and what happens when it is called again."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
from command_line import TINY, CommandLine, Done
from images_on_disk import save_archive, save_folder
from lightning.pytorch.loggers.logger import DummyLogger
from omegaconf import OmegaConf
from PIL import Image

from mp_lightning import MetaPerturbCallback
from mp_lightning.cli.fit import make_logger
from mp_lightning.meta.checkpoint import checkpoints, read_checkpoint
from mp_lightning.perturbation import load_phi
from mp_lightning.runs import RunFolder

CALLBACK_IN_USE = re.compile(r"^ *(trainer = L\.Trainer\(.*\))$", re.MULTILINE)


def fit(mp: CommandLine, folder: Path, *words: str, code: int = 0, **options) -> Done:
    done = mp(folder, "fit", *TINY, *words, **options)
    assert done.code == code, f"ended with {done.code}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stdout + done.stderr
    return done


def only_run(folder: Path) -> Path:
    (run,) = (folder / "runs").iterdir()
    return run


def phi_bytes(run: Path) -> bytes:
    return (run / "phi.safetensors").read_bytes()


@pytest.fixture(scope="module")
def finished(mp: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """The folder of a command that ran to its end, and what it printed; not to be written to."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, fit(mp, folder)


def test_fit_leaves_phi_card_table_and_picture(finished: tuple[Path, Done]) -> None:
    run = only_run(finished[0])
    names = {path.name for path in run.iterdir() if not path.name.startswith(".")}
    expected = {
        "phi.safetensors",
        "phi.json",
        "metrics.csv",
        "phi.png",
        "training.png",
        "evaluation.json",
        "report.json",
        "settings.json",
        "tensorboard",
        "checkpoints",
    }
    assert names == expected
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000001.ckpt", "step-00000002.ckpt"]
    assert list((run / "tensorboard").glob("events.*"))
    assert len(json.loads((run / "evaluation.json").read_text())) == 3
    for name in ("phi.png", "training.png"):
        with Image.open(run / name) as picture:
            picture.verify()
            assert picture.format == "PNG" and min(picture.size) > 400
    header, *rows = (run / "metrics.csv").read_text().splitlines()
    assert [row.partition(",")[0] for row in rows] == ["1", "2"]
    for task in ("digits04-a", "digits04-b", "textures-a", "textures-b"):
        assert f"{task}/train_loss" in header
        assert all(f"{task}/site0/{quantity}" in header for quantity in ("scale", "noise", "multiplier"))
    assert "phi/gradient_norm" in header


def test_card_says_where_phi_comes_from(finished: tuple[Path, Done]) -> None:
    run = only_run(finished[0])
    card = json.loads((run / "phi.json").read_text())
    assert card["sha256"] == hashlib.sha256(phi_bytes(run)).hexdigest()
    assert card["sources"] == ["digits04 (5 classes)", "textures (8 classes)"]
    assert card["architectures"] == ["conv4-2", "resnet20-2"]
    assert (card["seed"], card["steps"]) == (0, 2)
    assert {"python", "torch", "lightning", "torchvision", "mp_lightning"} <= set(card["versions"])
    assert card["command"].startswith("python -m mp_lightning.meta fit meta.steps=2")
    assert card["held_out"]["seed"] == 0 and re.fullmatch("[0-9a-f]{16}", card["held_out"]["images"])
    assert [result["arm"] for result in card["held_out"]["results"]] == ["final phi", "initial phi", "no phi"]
    assert load_phi(run / "phi.safetensors").card == card


def test_fit_prints_three_likelihoods_and_nothing_ugly(finished: tuple[Path, Done]) -> None:
    done = finished[1]
    nll = re.findall(r"^ +(final|initial|no) phi +NLL \d+\.\d{3} ", done.stdout, re.MULTILINE)
    assert nll == ["final", "initial", "no"]
    assert done.stderr == ""
    for word in ("Epoch", "max_steps", "LeafSpec", "litlogger", "workers", "GPU", "\x1b"):
        assert word not in done.stdout
    assert max(map(len, done.stdout.splitlines())) < 200


def test_the_printed_line_of_python_works(finished: tuple[Path, Done]) -> None:
    (line,) = CALLBACK_IN_USE.findall(finished[1].stdout)
    names = {"L": L, "MetaPerturbCallback": MetaPerturbCallback}
    exec(line, names)
    assert any(isinstance(callback, MetaPerturbCallback) for callback in names["trainer"].callbacks)


def test_the_same_command_says_that_the_run_is_finished(mp: CommandLine, finished: tuple[Path, Done]) -> None:
    folder, first = finished
    before = {path: path.stat().st_mtime_ns for path in only_run(folder).rglob("*") if ".hydra" not in path.parts}
    # Neither devices nor what is on the screen make another run of it.
    again = fit(mp, folder, "trainer.devices=auto", "trainer.log_every_n_steps=3")
    assert "This run is finished, and its images were not read again; run.fresh=true starts it anew" in again.stdout
    assert re.findall(r"NLL .*", again.stdout) == re.findall(r"NLL .*", first.stdout)
    assert CALLBACK_IN_USE.findall(again.stdout) == CALLBACK_IN_USE.findall(first.stdout)
    after = {path: path.stat().st_mtime_ns for path in only_run(folder).rglob("*") if ".hydra" not in path.parts}
    assert {p for p in before if before[p] != after[p]} <= {only_run(folder) / ".lock"}


class Named(DummyLogger):
    """A logger that has an id, as that of W&B."""

    def __init__(self, id: str, save_dir: str) -> None:
        super().__init__()
        self.id = id


def test_a_run_that_starts_anew_logs_under_an_id_of_its_own(tmp_path: Path) -> None:
    """W&B drops what a run logs for steps that it has behind it."""

    def logged(fresh: bool, id: str = "fit-1") -> str:
        made: str = make_logger({"_target_": f"{__name__}.Named", "id": id}, tmp_path, "fit-1", fresh).id
        RunFolder(tmp_path, {"seed": 0}, fresh=fresh).finish({})
        return made

    assert [logged(fresh) for fresh in (True, False, True, False, True)] == [
        *("fit-1", "fit-1"),  # there was nothing to set aside
        *("fit-1-2", "fit-1-2", "fit-1-3"),
    ]
    shutil.rmtree(tmp_path / "previous-1")
    (tmp_path / "previous-2").rename(tmp_path / "previous-good")
    assert [logged(fresh) for fresh in (False, True)] == ["fit-1-3", "fit-1-4"]
    assert logged(fresh=True, id="my own") == "my own"


def test_fresh_starts_anew_and_keeps_the_old(mp: CommandLine, tmp_path: Path) -> None:
    fit(mp, tmp_path)
    run = only_run(tmp_path)
    (run / "report.json").write_text(json.dumps({"nll": 0, "results": ["the old one"], "target": "x"}))
    for number in (1, 2):
        done = fit(mp, tmp_path, "run.fresh=true")
        assert "finished" not in done.stdout and "Meta-training phi" in done.stdout
        assert (run / f"previous-{number}" / "phi.safetensors").is_file()
        assert len((run / "metrics.csv").read_text().splitlines()) == 3
    assert "the old one" in (run / "previous-1" / "report.json").read_text()
    assert only_run(tmp_path) == run


def test_seed_makes_another_folder_and_another_phi(
    mp: CommandLine, finished: tuple[Path, Done], tmp_path: Path
) -> None:
    fit(mp, tmp_path, "seed=5")
    run = only_run(tmp_path)
    assert run.name.startswith("fit-seed5-") and only_run(finished[0]).name.startswith("fit-seed0-")
    assert phi_bytes(run) != phi_bytes(only_run(finished[0]))


def test_repeated_elsewhere_gives_the_same_phi(mp: CommandLine, finished: tuple[Path, Done], tmp_path: Path) -> None:
    fit(mp, tmp_path, f"hydra.run.dir={tmp_path / 'pinned'}")
    assert phi_bytes(tmp_path / "pinned") == phi_bytes(only_run(finished[0]))
    assert not (tmp_path / "runs").exists()


LONGER = ["meta.steps=40", "tasks.architectures=[conv4-2,conv4-3]"]  # a checkpoint every second step


@pytest.fixture(scope="module")
def uninterrupted(mp: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    fit(mp, folder, *LONGER)
    return only_run(folder)


@pytest.mark.slow
@pytest.mark.parametrize("row", [1, 9])
def test_killed_run_continues_to_the_same_phi(mp: CommandLine, tmp_path: Path, uninterrupted: Path, row: int) -> None:
    """Killed before the first checkpoint, or after several, by a signal that no one can catch."""

    def rows_written() -> bool:
        tables = list(tmp_path.glob("runs/*/metrics.csv"))
        return bool(tables) and tables[0].read_text().count("\n") > row

    killed = mp(tmp_path, "fit", *TINY, *LONGER, signal_when=(rows_written, signal.SIGKILL))
    assert killed.code == -signal.SIGKILL
    run = only_run(tmp_path)
    assert not (run / "phi.safetensors").exists()
    steps = [str(read_checkpoint(path)["meta_step"]) for path in checkpoints(run / "checkpoints")]
    assert steps or row == 1
    done = fit(mp, tmp_path, *LONGER)
    assert re.findall(r"Continuing after meta-step (\d+) of this run", done.stdout) == steps[:1]
    assert phi_bytes(run) == phi_bytes(uninterrupted)
    for name in ("metrics.csv", "report.json", "evaluation.json"):
        assert (run / name).read_bytes() == (uninterrupted / name).read_bytes()


@pytest.mark.parametrize("judged", [True, False])
def test_a_run_killed_before_its_report_only_judges_again(mp: CommandLine, tmp_path: Path, judged: bool) -> None:
    fit(mp, tmp_path)
    run = only_run(tmp_path)
    names = ("phi.safetensors", "metrics.csv", "report.json", "evaluation.json")
    before = {name: (run / name).read_bytes() for name in names}
    checkpoint = checkpoints(run / "checkpoints")[0]
    written = checkpoint.stat().st_mtime_ns
    for name in ("report.json", "phi.safetensors", *(() if judged else ("evaluation.json",))):
        (run / name).unlink()
    assert "Continuing after meta-step 2 of this run" in fit(mp, tmp_path).stdout
    assert {name: (run / name).read_bytes() for name in names} == before
    assert checkpoint.stat().st_mtime_ns == written


@pytest.mark.parametrize("without", [0.1, 10.0])
def test_a_phi_that_does_not_help_is_told_so(mp: CommandLine, tmp_path: Path, without: float) -> None:
    better = f"""
import mp_lightning.meta.transfer as transfer
judge = transfer._train_and_test
transfer._train_and_test = lambda target, phi, *rest: judge(target, phi, *rest) if phi else ({without}, 0.5)
"""
    (done,) = mp.together(tmp_path, "fit", *TINY, first={0: better})
    helps = without > json.loads((only_run(tmp_path) / "report.json").read_text())["nll"]
    said = f"compare target=images.npz 'arms=[none,metaperturb:{only_run(tmp_path) / 'phi.safetensors'}]'"
    assert (said in done.stdout) == (not helps) == (without == 0.1)
    assert (said in fit(mp, tmp_path).stdout) == (not helps)  # from the report


@pytest.mark.parametrize("gain", [-0.1, 0.0, 0.1])
def test_a_phi_that_is_not_better_than_the_initial_one_is_told_so(mp: CommandLine, tmp_path: Path, gain: float) -> None:
    better = f"""
import mp_lightning.meta.transfer as transfer
scores = iter([(1.0 - {gain}, 0.5), (1.0, 0.5), (2.0, 0.5)])
transfer._train_and_test = lambda *rest: next(scores)
"""
    (done,) = mp.together(tmp_path, "fit", *TINY, first={0: better})
    assert ("It is not better than the initial phi" in done.stdout) == (gain <= 0)
    assert ("It is not better than the initial phi" in fit(mp, tmp_path).stdout) == (gain <= 0)  # from the report


def test_a_task_that_never_counted_is_told(mp: CommandLine, tmp_path: Path) -> None:
    code = """
from mp_lightning.meta import learner
step = learner.Learner.step
def spoilt(self, number, watch=False):
    result = step(self, number, watch)
    return result._replace(valid_loss=result.valid_loss * float("nan")) if self.task.name == "textures-a" else result
learner.Learner.step = spoilt
"""
    (done,) = mp.together(tmp_path, "fit", *TINY, "meta.on_divergence=leave_out", first={0: code})
    assert done.code == 0 and "in so many of 2 steps: 'textures-a' 2." in done.stdout
    assert "Task 'textures-a' never counted, so phi learned nothing from it; lower meta.theta_lr" in done.stdout


def test_a_judgement_that_fails_leaves_what_was_learned(mp: CommandLine, tmp_path: Path) -> None:
    """Batch norm of one value, as in the last stage of a ResNet18 with images this small."""
    words = ("evaluation.batch_size=1", "evaluation.architecture=torchvision:resnet18", "image_size=32")
    (line,) = fit(mp, tmp_path, *words, code=2).stderr.splitlines()
    phi = only_run(tmp_path) / "phi.safetensors"
    assert f"phi was learned, and is in '{phi}'" in line and "Expected more than 1 value" in line
    assert load_phi(phi).card["held_out"]["results"] == []


def test_a_judgement_that_diverges_is_no_score(mp: CommandLine, tmp_path: Path) -> None:
    for _ in range(2):
        assert "diverged on these images" in fit(mp, tmp_path, "evaluation.lr=1e30").stdout
    assert json.loads((only_run(tmp_path) / "report.json").read_text())["nll"] is None
    done = mp(tmp_path, "select", "sweep=runs")
    assert done.code == 2 and "has a score (1 failed: its score is not finite)" in done.stderr


def test_a_judgement_at_a_part_of_the_strength_says_so(mp: CommandLine, tmp_path: Path) -> None:
    words = ("evaluation.full_strength_at=0.4", "evaluation.steps=12")
    assert "In so short a training at most 1% of the strength acts." in fit(mp, tmp_path, *words).stdout


def test_a_folder_with_brackets_passes_over_a_damaged_checkpoint(mp: CommandLine, tmp_path: Path) -> None:
    words = ("hydra.run.dir='f[/x]'", "meta.steps=3")
    fit(mp, tmp_path, *words, "+trainer.limit_train_batches=2", code=2)
    newest = max((tmp_path / "f[/x]" / "checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:1000])
    assert "Continuing after meta-step 1" in fit(mp, tmp_path, *words).stdout


def test_the_file_says_how_phi_is_to_be_used(mp: CommandLine, tmp_path: Path) -> None:
    words = (
        "meta.strength=0.9",
        "meta.noise_per=channel",
        "meta.share_of_sites=0.5",
        "evaluation.full_strength_at=0.4",
        "evaluation.acts_below=0.7",
    )
    fit(mp, tmp_path, *words)
    phi = load_phi(only_run(tmp_path) / "phi.safetensors")
    found = phi.strength, phi.share_of_sites, phi.full_strength_at, phi.acts_below
    assert found == pytest.approx((0.9, 0.5, 0.4, 0.7)) and phi.noise_per == "channel"
    assert phi.card["held_out"]["settings"]["full_strength_at"] == 0.4


def test_ctrl_c_ends_with_one_line_and_130(mp: CommandLine, tmp_path: Path) -> None:
    def training() -> bool:
        return bool(list(tmp_path.glob("runs/*/metrics.csv")))

    done = mp(tmp_path, "fit", *TINY, "meta.steps=2000", signal_when=(training, signal.SIGINT))
    assert done.code == 130
    assert done.stderr == "mp_lightning: interrupted; the same command continues this run\n"


def test_ctrl_c_of_which_a_library_makes_another_error_ends_alike(mp: CommandLine, tmp_path: Path) -> None:
    stopped = """
import os, signal
from lightning.pytorch.loggers import TensorBoardLogger
def log_metrics(*args, **kwargs):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt as error:
        raise ValueError("not supported") from error
TensorBoardLogger.log_metrics = log_metrics
"""
    (done,) = mp.together(tmp_path, "fit", *TINY, first={0: stopped})
    assert done.code == 130
    assert done.stderr == "mp_lightning: interrupted; the same command continues this run\n"


def test_ctrl_c_that_a_library_swallows_ends_the_process_soon(mp: CommandLine, tmp_path: Path) -> None:
    stopped = """
import os, signal
from lightning.pytorch.loggers import TensorBoardLogger
import mp_lightning.cli.interruption
mp_lightning.cli.interruption.PATIENCE = 1.0
def log_metrics(*args, **kwargs):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        pass
TensorBoardLogger.log_metrics = log_metrics
"""
    (done,) = mp.together(tmp_path, "fit", *TINY, "meta.steps=100000", first={0: stopped})
    assert (done.code, done.stderr) == (130, "mp_lightning: interrupted; the same command continues this run\n")


def test_ctrl_c_is_said_once_where_a_thread_outlives_it(tmp_path: Path) -> None:
    code = """
import os, signal, threading, time
from mp_lightning.cli import interruption
interruption.PATIENCE = 0.5
interruption.listen("run")
threading.Thread(target=time.sleep, args=(60,)).start()
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
except KeyboardInterrupt:
    interruption.end("run")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (
        130,
        "mp_lightning: interrupted; the same command continues this run\n",
    )


def test_termination_ends_with_one_line_and_143(mp: CommandLine, tmp_path: Path) -> None:
    def training() -> bool:
        return bool(list(tmp_path.glob("runs/*/metrics.csv")))

    done = mp(tmp_path, "fit", *TINY, "meta.steps=2000", signal_when=(training, signal.SIGTERM))
    assert done.code == 143
    assert done.stderr == "mp_lightning: terminated; the same command continues this run\n"


def test_time_limit_keeps_what_was_done(mp: CommandLine, tmp_path: Path) -> None:
    words = ["meta.steps=4", "+trainer.limit_train_batches=3", "hydra.run.dir=pinned"]
    done = fit(mp, tmp_path, *words, code=2)
    assert done.stderr == "mp_lightning: stopped after 3 of 4 meta-steps; the same command continues\n"
    assert (tmp_path / "pinned" / "checkpoints" / "step-00000003.ckpt").is_file()
    again = fit(mp, tmp_path, words[0], words[2])
    assert "Continuing after meta-step 3 of this run" in again.stdout


def test_each_command_has_its_own_time_limit(mp: CommandLine, tmp_path: Path) -> None:
    words = ["meta.steps=3000", "+trainer.max_time=00:00:00:01", "hydra.run.dir=pinned"]
    done = [int(re.search(r"after (\d+) of", fit(mp, tmp_path, *words, code=2).stderr)[1]) for _ in range(2)]
    assert 0 < done[0] < done[1]


TERMINATED_IN_THE_EXCHANGE = """
import os, signal
from mp_lightning.meta import joint
reduce, count = joint.JointGradient.reduce, iter(range(1, 99))
def reduce_and_end(self):
    reduce(self)
    if next(count) == 3:
        os.kill(os.getpid(), signal.SIGTERM)
joint.JointGradient.reduce = reduce_and_end
"""
TERMINATED_IN_THE_JUDGEMENT = """
import os, signal
from mp_lightning.cli import fit
def end(*args):
    os.kill(os.getpid(), signal.SIGTERM)
fit.compare_transfer = end
"""


@pytest.mark.parametrize("when", [TERMINATED_IN_THE_EXCHANGE, TERMINATED_IN_THE_JUDGEMENT])
def test_termination_is_heeded_whenever_it_comes(mp: CommandLine, tmp_path: Path, when: str) -> None:
    (done,) = mp.together(tmp_path, "fit", *TINY, "meta.steps=6", first={0: when})
    assert (done.code, done.stderr) == (143, "mp_lightning: terminated; the same command continues this run\n")
    reached = 4 if when == TERMINATED_IN_THE_EXCHANGE else 6
    assert f"Continuing after meta-step {reached} of" in fit(mp, tmp_path, "meta.steps=6").stdout


def test_images_that_were_changed_since_a_run_was_finished_are_told_of(mp: CommandLine, tmp_path: Path) -> None:
    save_archive(tmp_path / "a.npz")
    folder = save_folder(tmp_path / "birds")
    words = ["data=[a.npz,birds]"]
    fit(mp, tmp_path, *words)
    assert "was changed" not in fit(mp, tmp_path, *words).stdout
    save_archive(tmp_path / "a.npz", classes=6)
    assert "'a.npz' was changed since, so that another phi might be learned" in fit(mp, tmp_path, *words).stdout
    shutil.copy(next(folder.rglob("*.png")), folder / "class0" / "more.png")
    assert "'birds' was changed since" in fit(mp, tmp_path, *words).stdout


def test_a_phi_that_was_damaged_is_written_again_from_the_checkpoint(mp: CommandLine, tmp_path: Path) -> None:
    fit(mp, tmp_path)
    before = phi_bytes(only_run(tmp_path))
    (only_run(tmp_path) / "phi.safetensors").write_bytes(before[:100])
    assert "Continuing after meta-step 2 of" in fit(mp, tmp_path).stdout
    assert phi_bytes(only_run(tmp_path)) == before


def test_a_phi_that_harms_training_beyond_measure_is_not_offered(mp: CommandLine, tmp_path: Path) -> None:
    done = fit(mp, tmp_path, "meta.steps=1", "meta.lr=1e30")
    assert "lower meta.lr" in done.stdout and "Use it" not in done.stdout


def test_images_in_the_home_folder(mp: CommandLine, tmp_path: Path) -> None:
    save_archive(tmp_path / "a.npz")
    done, *_ = mp.together(tmp_path, "fit", *TINY, "data=~/a.npz", environments=[{"HOME": str(tmp_path)}])
    assert done.code == 0, done.stderr


def test_archive_as_source(mp: CommandLine, tmp_path: Path) -> None:
    save_archive(tmp_path / "my.pictures.npz")
    done = fit(mp, tmp_path, "data=my.pictures.npz")
    card = json.loads((only_run(tmp_path) / "phi.json").read_text())
    assert card["sources"] == ["my-pictures (3 classes)"]
    assert "my-pictures-held-out: 8 training and 8 test images of 2 classes" in done.stdout


def test_folder_as_source(mp: CommandLine, tmp_path: Path) -> None:
    path = save_folder(tmp_path / "pictures")
    fit(mp, tmp_path, f"data={path}")
    card = json.loads((only_run(tmp_path) / "phi.json").read_text())
    assert card["sources"] == ["pictures (3 classes)"]
    assert "data=pictures" in card["command"] and str(tmp_path) not in card["command"]


def test_two_sources_and_a_target(mp: CommandLine, tmp_path: Path) -> None:
    save_archive(tmp_path / "a.npz")
    save_archive(tmp_path / "b.npz", classes=4)
    save_archive(tmp_path / "target.npz", classes=3)
    done = fit(mp, tmp_path, f"data=[{tmp_path}/a.npz,b.npz]", "evaluation.data=target.npz")
    card = json.loads((only_run(tmp_path) / "phi.json").read_text())
    assert card["sources"] == ["a (5 classes)", "b (4 classes)"]
    assert [task["name"] for task in card["tasks"]] == ["a-a", "a-b", "b-a", "b-b"]
    assert "'data=[a.npz,b.npz]'" in card["command"]
    assert "target: 12 training and 12 test images of 3 classes" in done.stdout


def test_sources_of_unlike_kinds(mp: CommandLine, tmp_path: Path) -> None:
    save_archive(tmp_path / "a.npz", classes=4)
    save_archive(tmp_path / "b.npz")
    words = ["+sources.large.dataset=a.npz", "+sources.large.image_size=32", "+sources.large.groups=2"]
    words += ["+sources.large.architectures=[wrn28_2-2]", "+sources.small.dataset=b.npz"]
    done = fit(mp, tmp_path, *words)
    card = json.loads((only_run(tmp_path) / "phi.json").read_text())
    kinds = [(task["name"], task["architecture"], task["image_size"], task["classes"]) for task in card["tasks"]]
    assert kinds == [
        *((f"large-{group}-{half}", "wrn28_2-2", 32, 2) for group in (0, 1) for half in "ab"),
        *(("small-a", "conv4-2", 16, 3), ("small-b", "resnet20-2", 16, 3)),
    ]
    assert "small-held-out: 8 training and 8 test images of 2 classes" in done.stdout


def test_target_with_the_built_in_sources(mp: CommandLine, tmp_path: Path) -> None:
    save_archive(tmp_path / "target.npz", classes=3)
    done = fit(mp, tmp_path, "evaluation.data=target.npz")
    assert "digits04-a" in done.stdout and "target: 12 training" in done.stdout


WRITTEN = OmegaConf.load(Path(__file__).resolve().parents[2] / "conf" / "experiment" / "few_images.yaml")


def test_experiment_of_the_package(mp: CommandLine, tmp_path: Path) -> None:
    words = [word for word in TINY if not word.startswith(("tasks.", "image_size"))]
    done = mp(tmp_path, "fit", "+experiment=few_images", *words, "tasks.valid_per_class=3", "meta.batch_size=2")
    assert done.code == 0, done.stderr
    assert (
        json.loads((only_run(tmp_path) / "phi.json").read_text())["settings"]["restart_after"]
        == WRITTEN.meta.restart_after
    )


@pytest.mark.parametrize("first", [True, False])
def test_sweep(mp: CommandLine, tmp_path: Path, first: bool) -> None:
    """In one process, with the launcher of Hydra itself."""
    words = [*TINY, "seed=1,2", "hydra/launcher=basic"]
    words = ["-m", *words] if first else [*words, "-m"]
    done = mp(tmp_path, "fit", *words)
    assert done.code == 0, done.stderr
    assert done.stderr == ""
    runs = [path for path in (tmp_path / "runs" / "sweep-fit").iterdir() if path.is_dir()]
    assert sorted(path.name.partition("-")[0] for path in runs) == ["seed1", "seed2"]
    assert phi_bytes(runs[0]) != phi_bytes(runs[1])


def test_configuration_is_shown(mp: CommandLine, tmp_path: Path) -> None:
    done = mp(tmp_path, "fit", "--cfg", "job", "meta.steps=7")
    assert done.code == 0 and "steps: 7" in done.stdout
    assert not list(tmp_path.iterdir())


def test_help(mp: CommandLine, tmp_path: Path) -> None:
    done = mp(tmp_path, "--help")
    assert done.code == 0 and "VERB key=value" in done.stdout and "fit" in done.stdout


def test_in_a_terminal(tmp_path: Path) -> None:
    """As a person starts it: a real process, a terminal, and a live bar with both losses."""
    words = [word for word in TINY if "progress_bar" not in word]
    command = [sys.executable, "-m", "mp_lightning.meta", "fit", *words]
    primary, secondary = os.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=tmp_path, env=env, stdin=secondary, stdout=secondary, stderr=secondary) as child:
        os.close(secondary)
        seen = b""
        while True:
            try:
                part = os.read(primary, 65536)
            except OSError:  # how Linux says that the other end is closed
                break
            if not part:
                break
            seen += part
    os.close(primary)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())
    assert child.returncode == 0, text
    assert re.search(
        r"meta-training \S+ 2/2 train \d\.\d{3} valid \d\.\d{3} \d+\.\d+ (steps/s|s/step) ETA 0:00:00", text
    ), text
    assert "testing with no phi, seed 1/1" in text
    for word in ("Epoch", "max_steps", "LeafSpec", "litlogger", "workers", "Warning", "deprecated"):
        assert word not in text
