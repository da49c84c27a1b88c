"""The benchmarks run, keep what they measured, and refuse what they do not know."""

import argparse
import csv
import json
import subprocess
import sys
import warnings
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks import (
    difference,
    end_site,
    headline,
    positive_control,
    prove,
    results_page,
    results_picture,
    validation_targets,
    variants,
)
from benchmarks.measure import interleaved
from benchmarks.table import Table

from mp_lightning import MetaPerturbCallback, attach, attachment_of
from mp_lightning.backbones import build_backbone
from mp_lightning.cli.words import compose
from mp_lightning.compare.architecture import Architecture
from mp_lightning.compare.arms import parse_arm
from mp_lightning.compare.classifier import ClassifierFactory, Optimization
from mp_lightning.compare.controls import FixedNoise
from mp_lightning.compare.results import Row
from mp_lightning.compare.store import Store
from mp_lightning.perturbation import load_phi

CHECKOUT = Path(__file__).resolve().parents[1]


def run(*arguments, expect=0):
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == expect, done.stderr
    return done.stdout + done.stderr


def rows(path):
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# Python ") and "threads" in lines[0]
    return list(csv.DictReader(lines[1:]))


SMALL = ["--rounds", "2", "--batch", "4"]


@pytest.mark.slow
def test_overhead_writes_one_row_for_each_arm_and_continues(tmp_path):
    out = tmp_path / "overhead.csv"
    command = ["benchmarks.overhead", "--models", "conv4", "--out", str(out), *SMALL]
    printed = run(*command)
    found = rows(out)
    assert [row["arm"] for row in found] == [
        "plain",
        "dropout2d",
        "dropout",
        "dropblock",
        "reference",
        "fast",
        "default",
    ]
    assert found[0]["ratio"] == "1.000" and all(float(row["floor_ms"]) > 0 for row in found)
    assert "byte floor" in printed and "| fast |" in printed
    content = out.read_text()
    run(*command)
    assert out.read_text() == content


@pytest.mark.slow
def test_inference_and_meta_step_write_their_arms(tmp_path):
    run("benchmarks.inference", "--models", "conv4", "--samples", "2", "--out", str(tmp_path / "i.csv"), *SMALL)
    assert [row["arm"] for row in rows(tmp_path / "i.csv")] == ["plain", "mc", "reference", "mean", "fold"]
    run("benchmarks.meta_step", "--models", "conv4", "--out", str(tmp_path / "m.csv"), *SMALL)
    assert [row["arm"] for row in rows(tmp_path / "m.csv")] == ["plain", "reference", "fast"]


@pytest.mark.parametrize("name", ["overhead", "inference", "meta_step"])
def test_an_unknown_model_lists_the_known_ones(name):
    printed = run(f"benchmarks.{name}", "--models", "alexnet", expect=2)
    assert "'alexnet' is unknown; use some of conv4" in printed and "Traceback" not in printed


def test_ratios_are_those_of_a_round():
    work = torch.randn(200, 200)
    timings = interleaved([lambda: work @ work, lambda: [work @ work for _ in range(3)]], 5, torch.device("cpu"))
    assert timings[0].ratios == [1.0] * 5
    for ratio, own, first in zip(timings[1].ratios, timings[1].milliseconds, timings[0].milliseconds, strict=True):
        assert ratio == pytest.approx(own / first)


def test_a_table_with_other_columns_is_left_alone(tmp_path):
    path = tmp_path / "table.csv"
    Table(path, ["a", "b"], "heading").add([{"a": "1", "b": "2"}])
    with pytest.raises(SystemExit, match="other columns"):
        Table(path, ["a", "c"], "heading")
    assert Table(path, ["a", "b"], "heading").has({"a": "1"})


def row(arm, seed, accuracy, nll):
    numbers = dict.fromkeys([field.name for field in fields(Row)], 0.5)
    words = {"target": "imagenette", "model": "conv4", "settings": "1", "parameters": "", "inference": "mean"}
    given = {"arm": arm, "seed": seed, "accuracy": accuracy, "nll": nll, "train_accuracy": 1.0, "device": "cpu"}
    return Row(**{**numbers, **words, **given})


def kept(tmp_path, **arms):
    """A file as benchmarks.prove keeps it: rows of five seeds for each arm, at its accuracy."""
    path, proof = tmp_path / "compare.csv", prove.PROOFS[0]
    folder = tmp_path / "runs" / proof.name
    folder.mkdir(parents=True)
    made = [
        row(name.replace("_with_", ":"), seed, accuracy + 0.001 * seed * (number + 1), 1.0 + 0.01 * number * seed)
        for number, (name, accuracy) in enumerate(arms.items())
        for seed in range(5)
    ]
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*asdict(made[0]), "gap"])
        writer.writeheader()
        writer.writerows({**asdict(one), "gap": one.gap} for one in made)
    prove.keep(proof, tmp_path / "runs", path)
    return path, proof


FIVE = [(0, 1.0), (1, 1.1), (2, float("nan")), (3, 1.2), (4, 1.3)]
ARMS_KEPT = {
    "none": 0.5,
    "fixed_noise_with_new": 0.55,
    "metaperturb_with_published.safetensors": 0.4,
    "metaperturb_with_new": 0.55,
}


def test_results_are_kept_once_and_grow(tmp_path):
    path, proof = kept(tmp_path, **ARMS_KEPT)
    content = path.read_text()
    assert content.count("\n") == 21 and content.startswith("comparison,target,")
    prove.keep(proof, tmp_path / "runs", path)
    assert path.read_text() == content
    results = tmp_path / "runs" / proof.name / "results.csv"
    last = results.read_text().splitlines()[-1]
    results.write_text(results.read_text() + last.replace("metaperturb:new,4", "metaperturb:new,5") + "\n")
    prove.keep(proof, tmp_path / "runs", path)
    assert path.read_text().startswith(content) and path.read_text().count("\n") == 22


def test_a_run_folder_that_was_lost_goes_on_from_the_kept_rows(tmp_path):
    path, proof = kept(tmp_path, **ARMS_KEPT)
    results = tmp_path / "runs" / proof.name / "results.csv"
    before = list(Store(results)._rows.values())
    moments = results.with_name("moments-0123.json")
    moments.write_text("measured once")
    prove.keep(proof, tmp_path / "runs", path)
    moments.write_text("measured again")
    prove.keep(proof, tmp_path / "runs", path)  # the rows that are kept are of the first ones
    results.unlink()
    moments.unlink()
    prove.bring_back(proof, tmp_path / "runs", path)
    assert list(Store(results)._rows.values()) == before and len(before) == 20
    assert moments.read_text() == "measured once"
    content = results.read_text()
    prove.bring_back(proof, tmp_path / "runs", path)
    assert results.read_text() == content
    prove.bring_back(prove.PROOFS[1], tmp_path / "runs", path)
    assert not (tmp_path / "runs" / prove.PROOFS[1].name).exists()


def test_a_run_folder_is_given_the_rows_of_some_arms_that_it_lacks(tmp_path):
    path, proof = kept(tmp_path, **ARMS_KEPT)
    results = tmp_path / "runs" / proof.name / "results.csv"
    whole = {(row.arm, row.seed) for row in Store(results)._rows.values()}
    first, second, *_ = sorted({arm for arm, _ in whole})
    results.unlink()
    for arms in ([first], [first, second]):
        prove.bring_back(proof, tmp_path / "runs", path, arms)
        found = [(row.arm, row.seed) for row in Store(results)._rows.values()]
        assert set(found) == {one for one in whole if one[0] in arms} and len(found) == len(set(found))


def test_a_run_of_other_settings_does_not_stand_beside_the_kept_one(tmp_path):
    path, proof = kept(tmp_path, **ARMS_KEPT)
    content = path.read_text()
    results = tmp_path / "runs" / proof.name / "results.csv"
    other = results.read_text().replace("none,0,1,", "none,0,2,")
    results.write_text(other + other.splitlines()[-1].replace("metaperturb:new,4", "metaperturb:new,5") + "\n")
    with pytest.raises(
        SystemExit, match=r"has arm none, seed 0 of .* made with other settings than in .* 1 others are"
    ):
        prove.keep(proof, tmp_path / "runs", path)
    assert path.read_text().startswith(content) and path.read_text().count("\n") == content.count("\n") + 1


def test_controls_whose_moments_are_lost_are_not_made_beside_their_rows(tmp_path):
    """They would be matched to others, and be refused when all is computed."""
    path, proof = kept(tmp_path, **ARMS_KEPT)
    given = argparse.Namespace(runs=tmp_path / "elsewhere", out=path)
    arms = ["none", "fixed_noise:new", "shrink_only:new", "random_phi", "metaperturb:new"]
    assert prove._without_moments(proof, given, arms) == ["fixed_noise:new"]
    kept_moments = prove._moments(proof, path) / "moments-0123.json"
    kept_moments.parent.mkdir(parents=True)
    kept_moments.write_text('{"phi": "older"}')
    assert prove._without_moments(proof, given, arms) == ["fixed_noise:new"]
    kept_moments.with_name("moments-4567.json").write_text('{"phi": "new"}')
    assert prove._without_moments(proof, given, arms) == []


def test_a_file_of_something_else_is_no_table(tmp_path):
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit, match=r"is no table of benchmarks\.prove"):
        results_page.read(tmp_path / "a.csv")


def test_the_page_of_results_judges_the_bundled_phi_and_knows_its_controls(tmp_path):
    path, proof = kept(tmp_path, **ARMS_KEPT)
    out = tmp_path / "docs" / "results.md"
    run("benchmarks.results_page", "--rows", str(path), "--out", str(out))
    text = out.read_text()
    assert f"## {proof}" in text
    (headline,) = [line for line in text.splitlines() if line.startswith("**metaperturb:new helps: ")]
    assert "accuracy +5.6 points against none" in headline
    assert "not better than the best control" in headline and "fixed_noise:new" in headline
    assert "**metaperturb:published" not in text
    assert "| `metaperturb:published.safetensors` | -" in text and " | harms | " in text


@pytest.mark.parametrize(("phi", "drawn"), [(prove.DEFAULT_PHI, True), ("tiny-imagenet-1", False)])
def test_the_page_has_a_picture_where_there_is_a_verdict_on_the_default_phi(tmp_path, phi, drawn):
    path, _ = kept(tmp_path, none=0.5, **{f"metaperturb_with_{phi}": 0.6})
    run("benchmarks.results_page", "--rows", str(path), "--out", str(tmp_path / "results.md"))
    assert ("(results.png)" in (tmp_path / "results.md").read_text()) == drawn
    assert (tmp_path / "results.png").exists() == drawn


def test_a_run_that_diverged_does_not_spoil_the_picture(tmp_path):
    made = [row(arm, seed, 0.5, nll) for arm in ("none", f"metaperturb:{prove.DEFAULT_PHI}") for seed, nll in FIVE]
    summary = results_page.judged(made)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of axes whose ends are the same
        written = results_picture.write(
            {"target, 5 images a class of 32 pixels, conv4, 1 step": summary}, tmp_path / "a.png"
        )
    assert written


def test_results_that_are_not_there_are_named(tmp_path):
    printed = run("benchmarks.results_page", "--rows", str(tmp_path / "none.csv"), expect=2)
    assert "none.csv' does not exist; make it with python -m benchmarks.prove" in printed


def test_every_proof_is_its_own_and_one_that_compare_takes(tmp_path):
    """Two proofs of one name would share a run folder, and two of one description the page's section."""
    for told in (lambda proof: proof.name, lambda proof: proof.short, str):
        assert len({told(proof) for proof in prove.PROOFS}) == len(prove.PROOFS)
    for proof in prove.PROOFS:
        config = compose("compare", proof.words(tmp_path))
        Architecture.parse(config.model).check(config.image_size)
        assert config.target == str(tmp_path / f"{proof.target}.npz") and config.inference == "mean"
        assert (config.weights is None) == ("fine-tuned" not in str(proof))
    for arm in prove.ARMS:
        parse_arm(arm.replace(prove.PUBLISHED, prove.DEFAULT_PHI), load_phi())


def test_rows_survive_a_comparison_that_is_interrupted(tmp_path, monkeypatch):
    path, proof = kept(tmp_path, **ARMS_KEPT)
    path.unlink()
    results = tmp_path / "runs" / proof.name / "results.csv"
    finished = results.rename(results.with_name("finished"))

    def interrupted(*_, **__):
        finished.rename(results)
        raise KeyboardInterrupt

    monkeypatch.setattr(prove.subprocess, "run", interrupted)
    folders = ["--data", str(tmp_path), "--runs", str(tmp_path / "runs"), "--out", str(path)]
    monkeypatch.setattr("sys.argv", ["prove", *folders, "--only", proof.name])
    with pytest.raises(KeyboardInterrupt):
        prove.main()
    assert path.read_text().count("\n") == 21


def images(path, train, test):
    """A file of images, each of one value, so that it is known which is which."""
    labels, test_labels = np.repeat([0, 1], train), np.repeat([0, 1], test)
    values = 100 + np.arange(len(labels) + len(test_labels))
    x = values.astype(np.uint8)[:, None, None, None] * np.ones((1, 32, 32, 3), np.uint8)
    np.savez(path, x_train=x[: len(labels)], y_train=labels, x_test=x[len(labels) :], y_test=test_labels)


def test_no_training_image_of_the_validation_target_is_a_test_image(tmp_path):
    images(tmp_path / "clothing.npz", [7, 90], [1, 2])
    validation_targets.write_target("clothing50", tmp_path)
    with np.load(tmp_path / "clothing50.npz") as content:
        parts = {key: content[key] for key in content.files}
    assert np.bincount(parts["y_train"]).tolist() == [3, 45] and np.bincount(parts["y_test"]).tolist() == [5, 47]
    seen = [parts[f"x_{part}"][:, 0, 0, 0].tolist() for part in ("train", "test")]
    assert sorted(seen[0] + seen[1]) == list(range(100, 200)) and seen[1][:3] == [197, 198, 199]


def test_the_ten_classes_of_tiny_imagenet_are_none_of_a_source(tmp_path):
    """Images of one value, their class, of which the first ten of each file are learned from."""
    for first in range(0, 200, 40):
        labels = np.repeat(np.arange(first, first + 40), 4)
        x = labels[:, None, None, None].astype(np.uint8) * np.ones((1, 2, 2, 3), np.uint8)
        path = tmp_path / f"tiny_imagenet_{first:03}_{first + 39:03}.npz"
        np.savez(path, x_train=x[labels % 2 == 0], y_train=labels[labels % 2 == 0], x_test=x, y_test=labels)
    seen: list[int] = []
    for number in range(15):
        validation_targets.write_target(f"tiny10_{number}", tmp_path)
        with np.load(tmp_path / f"tiny10_{number}.npz") as content:
            x, y, test = content["x_train"][:, 0, 0, 0], content["y_train"], content["y_test"]
        assert sorted(set(y.tolist())) == sorted(set(test.tolist())) == list(range(10))
        assert all(len(set(x[y == label].tolist())) == 1 for label in range(10))
        seen += sorted(set(x.tolist()))
    assert sorted(seen) == [label for label in range(200) if label % 40 >= 10]
    validation_targets.write_target("tiny100", tmp_path)
    with np.load(tmp_path / "tiny100.npz") as content:
        assert (content["x_train"][:, 0, 0, 0] == 2 * content["y_train"]).all() and set(content["y_test"]) == {
            *range(100)
        }


def test_variants_of_a_phi_are_files_that_differ_in_what_was_asked_for(tmp_path):
    phi = load_phi("tiny-imagenet-5")
    varied = {"strength": [phi.strength, 0.5], "full_strength_at": [phi.full_strength_at, 1.0]}
    arms = variants.write_arms(phi, "tiny-imagenet-5", varied, tmp_path)
    assert arms[:2] == ["none", "metaperturb:tiny-imagenet-5"] and len(arms) == 5
    found = [load_phi(tmp_path / arm.removeprefix("metaperturb:")) for arm in arms[2:]]
    assert [(one.strength, one.full_strength_at) for one in found] == [
        (pytest.approx(strength), at) for strength, at in [(phi.strength, 1.0), (0.5, phi.full_strength_at), (0.5, 1.0)]
    ]
    assert all(
        (one.noise_per, one.share_of_sites) == (phi.noise_per, pytest.approx(phi.share_of_sites)) for one in found
    )
    assert all(torch.equal(mine, its) for one in found for mine, its in zip(one.phi, phi.phi, strict=True))


def test_variants_are_compared_and_kept(tmp_path):
    images(tmp_path / "tiny.npz", [20, 20], [10, 10])
    out = tmp_path / "selection.csv"
    small = ["--target=tiny", "--n-per-class=8", "--model=conv4-4", "--steps=3", "--batch-size=4", "--jobs=1"]
    where = ["--data", str(tmp_path), "--runs", str(tmp_path / "runs"), "--out", str(out)]
    run("benchmarks.variants", *where, *small, "--strength=0.5")
    with out.open(newline="") as file:
        kept = list(csv.DictReader(file))
    assert [one["arm"] for one in kept] == ["none", f"metaperturb:{prove.DEFAULT_PHI}_strength-0.5.safetensors"]
    assert kept[0]["comparison"].startswith("tiny, 8 images a class of 32 pixels, conv4-4, 3 steps of 4, Adam 0.003")


def test_the_end_of_a_network_is_an_arm_and_the_default_has_it():
    make = ClassifierFactory(Architecture.parse("wrn28_2-2"), 3, 16, Optimization(2, 4, 1e-3, 0.0))
    sites = {arm.name: arm.callbacks(0)[0].sites for arm in end_site.arms(make)[1:]}
    assert sites["tail"] == ["net.relu"] and len(sites["inner"]) == 4
    module = make()
    MetaPerturbCallback().attach(module)
    assert list(attachment_of(module).plan.names) == sites["inner+tail"] == sites["inner"] + sites["tail"]


def test_a_file_that_is_no_target_is_named(tmp_path):
    np.savez(tmp_path / "clothing.npz", x=np.zeros(3))
    printed = run("benchmarks.variants", "--data", str(tmp_path), "--runs", str(tmp_path / "runs"), expect=2)
    assert "clothing.npz' is no npz file with x_train" in printed and "Traceback" not in printed
    assert not (tmp_path / "clothing50.npz").exists()


@pytest.mark.parametrize(
    ("wrong", "named"), [(("--strength", "2"), "strength"), (("--phi", "nope"), "nope"), ((), "clothing.npz")]
)
def test_what_cannot_be_compared_is_named(tmp_path, wrong, named):
    printed = run("benchmarks.variants", "--data", str(tmp_path), "--runs", str(tmp_path / "runs"), *wrong, expect=2)
    assert named in printed.splitlines()[-1] and "Traceback" not in printed


def test_the_positive_control_is_matched_where_features_pass_the_activation():
    """By a perturbation that is 2 where features are positive and 0 elsewhere, with noise of deviation 0.5 there."""
    torch.manual_seed(0)
    model = build_backbone("conv4", 3, width=4, image_size=16)

    class Doubling(FixedNoise):
        def multiplier(self, x, eps, statistics, norms):
            positive = (x > 0).to(x.dtype)
            return positive * (2 if eps is None else 2 + 0.5 * eps)

    attachment = attach(model, perturbation=Doubling(), sites=1, ramp_steps=0)
    images = torch.rand(1024, 3, 16, 16)
    found = positive_control.positive_moments(attachment, [lambda: model(images)] * 3)
    assert [site for site, _, _ in found] == list(attachment.plan.names)
    for _, mean, var in found:
        assert mean == pytest.approx(2, abs=0.02) and var == pytest.approx(0.25, rel=0.05)
    assert "multiplier" not in vars(attachment.perturbation)


def test_the_difference_of_two_arms_is_told_by_comparison_and_in_their_mean():
    arms = (f"metaperturb:{prove.DEFAULT_PHI}", f"fixed_noise:{prove.SAME_NUMBERS}")
    only = ("--only", "imagenette-conv4,cifar10-conv4")
    said = run("benchmarks.difference", *arms, *only, "--mean", "--from-seed", "5").splitlines()
    assert [line.split(",")[0].split(":")[0] for line in said] == ["imagenette", "cifar10", "mean"] * 2
    assert all(line.endswith("10 seeds") for line in said)
    first, second, mean = (float(line.split(": ")[1].split()[0]) for line in said[:3])
    assert mean == pytest.approx((first + second) / 2, abs=0.011)
    assert len(run("benchmarks.difference", *arms, *only).splitlines()) == 4
    refused = run("benchmarks.difference", *arms, *only, "--from-seed", "14", expect=2)
    assert "no comparison has both in two seeds" in refused


def test_a_mean_is_of_the_seeds_that_all_comparisons_have():
    rows = {
        name: [row(arm, seed, 0.5 + (arm == "a") * seed / 100, 1.0) for arm in "ab" for seed in seeds]
        for name, seeds in {"t": (1, 2, 3), "u": (2, 3, 4)}.items()
    }
    *_, mean = difference.lines(rows, "a", "b", in_mean=True)[:3]
    assert mean.startswith("mean: +2.50 (") and mean.endswith(", 2 seeds")


def test_the_tables_and_the_card_of_the_default_phi_say_what_the_kept_rows_say():
    comparisons = results_page.read(prove.RESULTS)
    for page, table in ((headline.README, headline.readme_table), (headline.PAGE, headline.page_table)):
        text = page.read_text(encoding="utf-8")
        assert headline.replaced(text, table(comparisons), page.name) == text, "run python -m benchmarks.headline"
    told = json.loads(headline.CARD.read_text(encoding="utf-8"))["results"]
    assert {**told, **headline.card_results(comparisons)} == told, "run python -m benchmarks.headline"


def test_a_difference_is_told_of_the_seeds_that_both_arms_have():
    rows = [row("a", seed, 0.5 + seed / 100, 1.0) for seed in range(4)] + [
        row("b", seed, 0.4, 1.5) for seed in range(3)
    ]
    accuracy, nll = headline.both(rows, "a", "b")
    assert (accuracy.n, accuracy.mean) == (3, pytest.approx(11)) and nll.mean == pytest.approx(-0.5)
    assert headline.words("t, net", "a", "b", rows) == "t, net: +11.0 (+8.5 to +13.5), -0.50 (-0.50 to -0.50), 3 seeds"
    assert headline.both(rows[:2] + rows[4:], "a", "b") is None


def test_arms_that_no_comparison_has_together_are_refused(tmp_path):
    assert "; its arms are dropblock, dropout" in run("benchmarks.difference", "none", "nothing", expect=2)
    (tmp_path / "none.csv").write_text(prove.RESULTS.read_text().splitlines()[0] + "\n")
    said = run("benchmarks.difference", "dropout", "none", "--rows", str(tmp_path / "none.csv"), expect=2)
    assert "none at all" in said
