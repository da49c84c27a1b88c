"""Hyperparameters are chosen on validation images, with an equal budget."""

import dataclasses
from pathlib import Path

import pytest
from small_runs import PHI, Counting, SmallData, experiment, made, plan
from test_store import ROW

from mp_lightning.compare.arms import KINDS, NamedArm, parse_arm
from mp_lightning.compare.comparison import RESULTS, TUNING, carry_out
from mp_lightning.compare.store import Store
from mp_lightning.compare.tuning import Budget, choose, trials, untuned, with_values
from mp_lightning.compare.user_data import UserData


def row(arm: str, accuracy: float, nll: float = 1.0):
    return dataclasses.replace(ROW, arm=arm, accuracy=accuracy, nll=nll)


def test_every_hyperparameter_is_tried_equally_often() -> None:
    tunable = [name for name, kind in KINDS.items() if kind.parameter]
    assert len(tunable) == 7
    for name in tunable:
        tried = trials(name, Budget(3, 2))
        assert len(tried) == 6
        assert {arm.name for arm, _ in tried} == {f"{name}:{value:g}" for value in KINDS[name].values[:3]}
        assert {seed for _, seed in tried} == {10**9, 10**9 + 1}, "none of the comparison's seeds"
    assert trials("dropout", Budget(1, 1)) == []


def test_only_what_has_no_value_is_tuned_and_each_once() -> None:
    arms = [
        parse_arm(text, PHI)
        for text in ("none", "dropout:0.2", "mixup", "metaperturb+mixup", "dropblock", "random_phi")
    ]
    assert untuned(arms) == ["mixup", "dropblock"]


def test_the_best_mean_wins_and_ties_go_to_the_likelihood() -> None:
    rows = [row("dropout:0.3", 0.5), row("dropout:0.3", 0.7), row("dropout:0.1", 0.8), row("dropout:0.1", 0.3)]
    assert choose("dropout", rows, "accuracy").chosen == 0.3
    assert choose("dropout", rows, "accuracy").tried == ((0.1, pytest.approx(0.55)), (0.3, pytest.approx(0.6)))
    tied = [row("dropout:0.3", 0.5, nll=1.2), row("dropout:0.1", 0.5, nll=1.1)]
    assert choose("dropout", tied, "accuracy").chosen == 0.1
    assert choose("dropout", [row("dropout:0.3", 0.9, nll=2.0), row("dropout:0.1", 0.2, nll=1.0)], "nll").chosen == 0.1
    for bad, good in ((0.1, 0.3), (0.3, 0.1)):  # before and after it in the order in which values are tried
        diverged = [row(f"dropout:{bad}", 0.5, nll=float("nan")), row(f"dropout:{good}", 0.4)]
        assert choose("dropout", diverged, "nll").chosen == good
    assert choose("dropout", [], "accuracy").chosen == KINDS["dropout"].values[0]


def test_a_combination_takes_the_values_of_its_parts() -> None:
    tuned = [choose("mixup", [row("mixup:0.2", 0.9), row("mixup:0.4", 0.1)], "accuracy")]
    arm = with_values(parse_arm("metaperturb+mixup", PHI), tuned)
    assert isinstance(arm, NamedArm) and arm.parameters == "alpha=0.2"
    given = with_values(parse_arm("mixup:1", PHI), tuned)
    assert isinstance(given, NamedArm) and given.parameters == "alpha=1"


def test_tuning_never_reads_the_test_images(tmp_path: Path) -> None:
    read: list[str] = []

    class Watched(SmallData):
        def test_dataloader(self):
            read.append("test")
            return super().test_dataloader()

        def val_dataloader(self):
            read.append("valid")
            return super().val_dataloader()

    class StopError(Exception):
        pass

    class UntilComparing(Counting):
        def __call__(self, what: str, runs: int, finished: int):
            if what == "comparing":
                raise StopError
            return self

    what = plan(["dropout"], budget=Budget(2, 1), experiment=experiment(data=UserData(Watched())))
    with pytest.raises(StopError):
        carry_out(what, tmp_path, UntilComparing())
    assert "valid" in read and "test" not in read
    read.clear()
    carry_out(what, tmp_path, Counting())
    assert read.count("test") == 4, "two arms, two seeds, each reads the test images once"


def test_results_hold_the_runs_of_the_comparison_alone(tmp_path: Path) -> None:
    outcome, display = made(plan(["none", "dropout"], budget=Budget(2, 1)), tmp_path)
    assert display.made[:2] == [("dropout:0.1", 10**9), ("dropout:0.03", 10**9)]
    assert [(row.arm, row.seed) for row in outcome.rows] == [("none", 0), ("none", 1), ("dropout", 0), ("dropout", 1)]
    assert outcome.rows[2].parameters == f"p={outcome.tuned[0].chosen:g}"
    assert (tmp_path / RESULTS).read_text().count("\n") == 5 and (tmp_path / TUNING).read_text().count("\n") == 3
    assert Store(tmp_path / RESULTS).rows([]) == []


def test_data_without_a_part_to_validate_on_takes_the_usual_value(tmp_path: Path) -> None:
    class NoValidation(SmallData):
        val_dataloader = __import__("lightning").LightningDataModule.val_dataloader

    what = plan(["dropout"], 1, budget=Budget(3, 1), experiment=experiment(data=UserData(NoValidation())))
    outcome, display = made(what, tmp_path)
    assert outcome.tuned[0].tried == () and outcome.tuned[0].chosen == 0.1
    assert [arm for arm, _ in display.made] == ["none", "dropout"]
