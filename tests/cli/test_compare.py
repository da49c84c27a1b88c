"""``compare`` from the command line: what it says, what it leaves, and the comparisons that lie in ``conf/``."""

import json
from pathlib import Path

import hydra
import pytest
import torch
from command_line import CommandLine
from comparisons import IMAGES, compare, runs, succeed, table
from images_on_disk import save_archive
from omegaconf import DictConfig, OmegaConf

from mp_lightning.cli.compare_settings import CompareSettings, read
from mp_lightning.compare.architecture import Architecture
from mp_lightning.compare.classifier import Optimization
from mp_lightning.compare.tuning import Budget
from mp_lightning.runs import run_name

ARMS = ["none", "dropout", "fixed_noise", "metaperturb"]


def composed(*overrides: str) -> DictConfig:
    with hydra.initialize_config_module("mp_lightning.conf", version_base="1.3"):
        config = hydra.compose("compare", list(overrides))
    assert isinstance(config, DictConfig)
    return config


def settings(*overrides: str) -> CompareSettings:
    return read(composed(*overrides))


def test_what_it_says_and_leaves(mp: CommandLine, tmp_path: Path) -> None:
    done = succeed(mp, tmp_path, "phi=null")
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert lines[0].startswith("Target images: 4 classes, all of 40 training images, 40 test images of 16 pixels")
    assert lines[2].startswith("fixed_noise, metaperturb: in ")
    assert lines[2].endswith("of the strength acts; 1200 reach all of it.")
    run = tmp_path / "run"
    verdicts = json.loads((run / "summary.json").read_text())["headline"]
    assert verdicts and lines[-len(verdicts) :] == verdicts, "the verdict is the last that is said"
    assert lines[-len(verdicts) - 1].startswith("Verdict") and max(map(len, lines[:-1])) < 200
    assert any(line.startswith("Written to ") and "/run: report.html" in line for line in lines)
    assert runs(run) == [(arm, 0) for arm in ARMS]
    rows = table(run / "results.csv")
    assert {(row["target"], row["model"], row["device"]) for row in rows} == {("images", "conv4-2", "cpu")}
    assert [row["inference"] for row in rows] == ["plain", "plain", "mean", "mean"]
    tried = [(row["arm"], row["seed"]) for row in table(run / "tuning.csv")]
    assert [seed for _, seed in tried] == ["1000000000", "1000000000"] and all(
        arm.startswith("dropout:") for arm, _ in tried
    )
    assert rows[1]["parameters"] in {f"p={arm.partition(':')[2]}" for arm, _ in tried}
    assert {path.name for path in run.iterdir()} >= {
        *("results.csv", "tuning.csv", "summary.json", "summary.md", "report.html", "settings.json", "details"),
        *("scores.png", "curves.png", "reliability.png", "multiplier.png"),
    }
    page = (run / "report.html").read_text()
    command = "python -m mp_lightning.meta compare image_size=16"
    assert command in page and command in (run / "summary.md").read_text()


def test_what_is_there_is_kept_and_only_the_rest_is_made(mp: CommandLine, tmp_path: Path) -> None:
    words = ["arms=[none,label_smoothing:0.1]", "seeds=1"]
    succeed(mp, tmp_path, *words)
    run, first = tmp_path / "run", [("none", 0), ("label_smoothing:0.1", 0)]
    kept = (run / "results.csv").read_bytes()
    done = succeed(mp, tmp_path, "arms=[none,metaperturb,label_smoothing:0.1]", "seeds=2")
    assert "comparing: 2 of 6 runs are there already" in done.stdout
    assert (run / "results.csv").read_bytes().startswith(kept)
    added = [("metaperturb", 0), ("none", 1), ("metaperturb", 1), ("label_smoothing:0.1", 1)]
    assert runs(run) == first + added
    before = (run / "results.csv").read_bytes()
    done = succeed(mp, tmp_path, *words)
    assert (run / "results.csv").read_bytes() == before and "metaperturb" not in done.stdout
    succeed(mp, tmp_path, *words, "run.fresh=true")
    assert runs(run) == first
    assert (run / "previous-1" / "results.csv").read_bytes() == before
    assert (run / "previous-1" / "report.html").exists()


def test_the_folder_follows_from_the_settings() -> None:
    """But not from seeds and arms, of which more can be added."""

    def name(*overrides: str) -> str:
        whole = OmegaConf.to_container(composed(*overrides))
        assert isinstance(whole, dict)
        return run_name({str(key): value for key, value in whole.items()})

    assert {name("seeds=9"), name("arms=[none]"), name("jobs=1", "accelerator=cpu", "data_root=x")} == {name()}
    others = ["lr=0.01", "target=cifar10", "metric=nll", "tuning.seeds=2", "phi=my.safetensors", "precision=bf16-mixed"]
    assert len({name(), *map(name, others)}) == 1 + len(others)


def test_runs_are_those_of_the_images_wherever_these_lie(mp: CommandLine, tmp_path: Path) -> None:
    """As on another machine, to which the table of results was brought."""
    words = ["arms=[none,label_smoothing:0.1]", "seeds=1"]
    succeed(mp, tmp_path, *words)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / IMAGES).rename(tmp_path / "elsewhere" / IMAGES)
    (tmp_path / "brought").mkdir()
    (tmp_path / "run" / "results.csv").rename(tmp_path / "brought" / "results.csv")
    done = succeed(mp, tmp_path, *words, f"target=elsewhere/{IMAGES}", "hydra.run.dir=brought")
    assert "comparing: 2 of 2 runs are there already" in done.stdout


def test_fine_tuning_starts_from_the_weights_that_are_given(mp: CommandLine, tmp_path: Path) -> None:
    """All but the head, which has more classes."""
    torch.manual_seed(1)
    net = Architecture.parse("conv4-2").construct(num_classes=9, image_size=16)
    torch.save({"state_dict": {f"net.{name}": value for name, value in net.state_dict().items()}}, tmp_path / "w.ckpt")
    first = """
import torch
from mp_lightning.compare import classifier
start = classifier.Classifier.on_train_start
def starting(self):
    torch.save(self.net.state_dict(), "first.pt")
    return start(self)
classifier.Classifier.on_train_start = starting
"""
    succeed(mp, tmp_path, "weights=w.ckpt", "arms=[none]", first=first)
    begun = torch.load(tmp_path / "first.pt", weights_only=True)
    heads = [name for name, value in net.state_dict().items() if value.shape != begun[name].shape]
    assert 1 <= len(heads) <= 2 and all(begun[name].shape[0] == 4 for name in heads)
    for name, value in net.state_dict().items():
        assert name in heads or torch.equal(begun[name], value), name
    # The same path with other weights is another comparison.
    torch.save({name: value + 1 for name, value in net.state_dict().items()}, tmp_path / "w.ckpt")
    done = compare(mp, tmp_path, "weights=w.ckpt", "arms=[none]")
    assert done.code == 2 and "tensors of weights=" in done.stderr and "run.fresh=true" in done.stderr


def test_sixteen_bits(mp: CommandLine, tmp_path: Path) -> None:
    succeed(mp, tmp_path, "arms=[none,metaperturb]", "precision=bf16-mixed", "hydra.run.dir=half")
    succeed(mp, tmp_path, "arms=[none,metaperturb]", "hydra.run.dir=whole")
    half, whole = (table(tmp_path / name / "results.csv") for name in ("half", "whole"))
    losses = [(float(a["train_nll"]), float(b["train_nll"])) for a, b in zip(half, whole, strict=True)]
    assert all(a != b and a == pytest.approx(b, abs=0.3) for a, b in losses), losses


@pytest.mark.slow
def test_a_sweep_over_targets_leaves_a_folder_for_each(mp: CommandLine, tmp_path: Path) -> None:
    for name, classes in (("a", 3), ("b", 4)):
        save_archive(tmp_path / f"{name}.npz", classes, per_class=20)
    words = ["image_size=16", "model=conv4-2", "steps=3", "batch_size=8", "samples=1", "jobs=1", "seeds=2"]
    done = mp(tmp_path, "compare", *words, "arms=[none,metaperturb]", "target=a.npz,b.npz", "-m")
    assert done.code == 0 and done.stderr == "", done
    folders = [path.parent for path in (tmp_path / "runs" / "sweep-compare").rglob("results.csv")]
    assert len(folders) == 2
    assert {row["target"] for path in folders for row in table(path / "results.csv")} == {"a", "b"}
    for path in folders:
        assert len(runs(path)) == 4 and (path / "report.html").exists()
        assert len({row["target"] for row in table(path / "results.csv")}) == 1
    assert "Job 0 (target=a.npz)" in done.stdout and "Job 1 (target=b.npz)" in done.stdout


def test_the_default_comparison() -> None:
    given = settings()
    assert [arm.name for arm in given.arms] == ["none", "dropout", "dropblock", "fixed_noise", "metaperturb"]
    assert (given.target, given.n_per_class, given.seeds, given.weights) == ("digits", 10, 5, None)
    assert settings("target=cifar10").n_per_class is None and settings("n_per_class=null").n_per_class is None
    assert given.budget.values > 1 and given.metric == "accuracy"


def test_the_published_protocol_number_by_number() -> None:
    """Section 4 of the paper and the authors' code."""
    given = settings("+experiment=paper_transfer")
    assert given.optimization == Optimization(
        steps=10_000, batch_size=128, lr=1e-3, weight_decay=5e-4, milestones=[0.4, 0.7, 0.9], lr_factor=0.3
    )
    assert (given.target, given.n_per_class, given.image_size, given.weights) == ("stl10", None, 32, None)
    assert given.architecture == Architecture("resnet20")
    assert (given.inference, given.samples, given.ramp) == ("mc", 100, True)
    assert given.trainer["precision"] == "32-true"
    names = [arm.name for arm in given.arms]
    assert names[0] == "none" and {"information_dropout", "dropblock", "manifold_mixup", "metaperturb"} <= set(names)
    assert {"fixed_noise", "shrink_only"} <= set(names), "the controls are not in the paper, but belong to it"
    assert given.budget == Budget(values=3, seeds=1) and given.seeds >= 5


def test_help_names_every_key_and_three_examples(mp: CommandLine) -> None:
    done = mp(Path("/"), "compare", "--help")
    assert done.code == 0 and done.stderr == ""
    examples = done.stdout.partition("examples:\n")[2].partition("\n\n")[0]
    commands = [line.strip() for line in examples.splitlines() if line.startswith("  python")]
    assert len(commands) == 3 and all(line.startswith("python -m mp_lightning.meta compare") for line in commands)
    for line in commands:
        overrides = [word for word in line.split()[4:] if word != "-m"]
        settings(*(word if "[" in word else word.partition(",")[0] for word in overrides))  # of several the first
    for key in ("target", "n_per_class", "weights", "arms", "seeds", "inference", "tuning.values", "jobs", "run.fresh"):
        assert f"  {key}=" in done.stdout
    assert "+experiment=paper_transfer" in done.stdout
    assert "manifold_mixup" in done.stdout and "mean_one" in done.stdout
