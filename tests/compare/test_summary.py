"""Verdicts on simulated comparisons: rarely wrong, found where planted, refused where nothing was tested."""

import dataclasses
import json
import math
from collections.abc import Sequence

import numpy as np
import pytest
from simulated import drawn, row

from mp_lightning.compare.results import METRICS, Row
from mp_lightning.compare.statistics import holm
from mp_lightning.compare.summary import VERDICT_METRICS, Summary, summarize
from mp_lightning.errors import ConfigurationError

STORES = 200
# Five seeds whose noise has the mean 0: what is added to them is the mean difference.
NOISE = [-0.004, 0.002, -0.001, 0.005, -0.002]
OTHER_NOISE = [0.003, -0.005, 0.001, -0.002, 0.003]


def words(summary: Summary) -> list[str]:
    return [verdict.word for arm in summary.arms.values() for verdict in arm.verdicts.values()]


def word(summary: Summary, arm: str, metric: str = "accuracy") -> str:
    return summary.arms[arm].verdicts[metric].word


def runs(arm: str, gain: float, seeds: int = 5, noise: Sequence[float] = NOISE) -> list[Row]:
    """Runs that differ from 80 % by the gain and the noise, and from an NLL of 0.7 by minus half of both."""
    changes = [gain + noise[seed % len(noise)] for seed in range(seeds)]
    return [row(arm, seed, 0.8 + change, 0.7 - change / 2) for seed, change in enumerate(changes)]


def none(seeds: int = 5, train_accuracy: float = 1.0) -> list[Row]:
    return [row("none", seed, train_accuracy=train_accuracy) for seed in range(seeds)]


@pytest.mark.parametrize("arms", [1, 4])
def test_none_against_none_gives_a_verdict_in_at_most_5_per_cent(arms: int) -> None:
    """On the metric of the comparison, in each of three times 200; on either metric, in as many as can be by chance."""
    by_metric, by_any = [], []
    for seed in range(3):
        generator = np.random.default_rng(seed)
        summaries = [summarize(drawn(generator, arms)) for _ in range(STORES)]
        assert all(len(words(summary)) == 2 * arms for summary in summaries)
        judged = [{arm.verdicts["accuracy"].word for arm in one.arms.values() if arm.verdicts} for one in summaries]
        by_metric.append(sum(found != {"no evidence"} for found in judged))
        by_any.append(sum(set(words(summary)) != {"no evidence"} for summary in summaries))
    assert max(by_metric) <= 0.05 * STORES
    # Of 6000 such comparisons 4.7 % (1 arm) and 4.9 % (4 arms) have one; two standard errors of 600 are 1.8 %.
    assert sum(by_any) <= 0.068 * 3 * STORES


@pytest.mark.parametrize("arms", [1, 4])
def test_two_points_are_found(arms: int) -> None:
    generator = np.random.default_rng(0)
    found = [word(summarize(drawn(generator, arms, {"arm0": (0.02, 0.0)})), "arm0") for _ in range(STORES)]
    assert found.count("helps") >= 0.9 * STORES
    assert "harms" not in found


def test_verdicts_have_their_numbers() -> None:
    rows = [*none(), *runs("metaperturb", 0.021), *runs("dropout", -0.03, noise=OTHER_NOISE), *runs("mixup", 0.001)]
    assert summarize(rows).headline == [
        "metaperturb helps: accuracy +2.1 points against none "
        "(95 % interval +1.7 to +2.5, p < 0.001 corrected for 3 arms and 2 metrics, 5 seeds).",
        "dropout harms: accuracy -3.0 points against none "
        "(95 % interval -3.4 to -2.6, p < 0.001 corrected for 3 arms and 2 metrics, 5 seeds).",
        "mixup: no evidence: accuracy +0.1 points against none "
        "(95 % interval -0.3 to +0.5, p = 1.00 corrected for 3 arms and 2 metrics, 5 seeds); "
        "5 seeds could have seen a difference of 1.0 points.",
    ]


def test_a_lower_nll_helps() -> None:
    summary = summarize([*none(), *runs("metaperturb", 0.03), *runs("dropout", -0.03)], metric="nll")
    assert [word(summary, arm, "nll") for arm in ("metaperturb", "dropout")] == ["helps", "harms"]
    assert summary.headline[0].startswith("metaperturb helps: NLL -0.015 nats against none (95 % interval -0.017 to")
    assert summary.headline[1].startswith("dropout harms: NLL +0.015 nats against none (95 % interval +0.013 to")


def test_what_leads_to_a_verdict_is_corrected_together_and_all_else_by_metric() -> None:
    generator = np.random.default_rng(0)
    summary = summarize(drawn(generator, 3))
    arms = [arm for name, arm in summary.arms.items() if name != "none"]
    together = [arm.against_baseline[metric] for metric in VERDICT_METRICS for arm in arms]
    assert [one.p for one in together] == holm([one.difference.p for one in together])
    assert {(one.arms, one.metrics) for one in together} == {(3, 2)}
    alone = [arm.against_baseline["mean_nll"] for arm in arms]
    assert [one.p for one in alone] == holm([one.difference.p for one in alone])
    assert {(one.arms, one.metrics) for one in alone} == {(3, 1)}
    assert set(arms[0].verdicts) == set(VERDICT_METRICS)
    assert set(arms[0].against_baseline) == set(arms[0].estimates) == set(METRICS)


@pytest.mark.parametrize("gain", [0.2, -0.2])
@pytest.mark.parametrize("seeds", [2, 3, 4])
def test_fewer_than_five_seeds_give_no_verdict(seeds: int, gain: float) -> None:
    for noise in (NOISE, [0.0]):
        summary = summarize([*none(), *runs("metaperturb", gain, seeds, noise)])
        assert words(summary) == ["no evidence", "no evidence"]
        assert f"metaperturb: no evidence: accuracy {'+' if gain > 0 else '-'}" in summary.headline[0]
        assert summary.headline[0].endswith(f"{seeds} seeds); five seeds are needed for a verdict.")


def test_nothing_can_be_said_of_one_seed() -> None:
    (sentence,) = summarize([*none(), *runs("metaperturb", 0.2, 1)]).headline
    assert sentence == (
        "metaperturb: no evidence: accuracy +19.6 points against none; nothing can be said of one seed, five are "
        "needed for a verdict."
    )


def test_nothing_was_tested_where_none_does_not_overfit() -> None:
    arms = [*runs("metaperturb", 0.2), *runs("dropout", 0.0)]
    summary = summarize([*none(train_accuracy=0.9896), *arms])
    assert summary.underfitted
    assert set(words(summary)) == {"underfitted"}
    assert summary.headline == [
        "underfitted: a regularizer was not tested (none reaches 98.9 % of its training images; 99 % is needed): train "
        "longer, or on fewer images."
    ]
    assert word(summarize([*none(train_accuracy=0.99), *arms]), "metaperturb") == "helps"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_run_that_diverged_is_said(value: float) -> None:
    rows = [*none(), *runs("metaperturb", 0.02), *runs("dropout", 0.02)]
    rows[7] = dataclasses.replace(rows[7], nll=value)
    summary = summarize(rows, metric="nll")
    assert [word(summary, "metaperturb", metric) for metric in VERDICT_METRICS] == ["helps", "diverged"]
    assert summary.headline[0] == "metaperturb: diverged: NLL of metaperturb is not finite in 1 of its 5 runs."
    assert word(summary, "dropout", "nll") == "helps"


def test_a_baseline_that_diverged_is_said() -> None:
    rows = [*none(), *runs("metaperturb", 0.02), *runs("dropout", 0.02, 4)]
    rows[4] = dataclasses.replace(rows[4], nll=math.nan)
    summary = summarize(rows, metric="nll")
    assert summary.headline[0] == "metaperturb: diverged: NLL of none is not finite in 1 of its 5 runs."
    assert summary.headline[1].endswith("five seeds are needed for a verdict.")  # the fifth of none is not its concern


def test_a_baseline_that_diverged_is_not_called_underfitted() -> None:
    rows = [dataclasses.replace(row, nll=math.nan, accuracy=0.1) for row in none(train_accuracy=0.1)]
    summary = summarize([*rows, *runs("metaperturb", 0.02)])
    assert word(summary, "metaperturb", "nll") == "diverged"
    assert summary.headline == ["metaperturb: diverged: NLL of none is not finite in 5 of its 5 runs."]


def test_one_run_that_diverged_is_the_only_one() -> None:
    (row,) = (dataclasses.replace(row, nll=math.nan) for row in runs("metaperturb", 0.02, 1))
    (sentence,) = summarize([*none(1), row], metric="nll").headline
    assert sentence == "metaperturb: diverged: NLL of metaperturb is not finite in its only run."


def test_99_per_cent_of_the_training_images_are_enough_as_float32_holds_them() -> None:
    """0.96 and four times 1 are 0.992, but 0.96, 1, 1 and 1 are 0.99, of which float32 leaves a little less."""
    reached = [float(np.float32(0.96)), 1.0, 1.0, 1.0]
    rows = [dataclasses.replace(row, train_accuracy=share) for row, share in zip(none()[:4], reached, strict=True)]
    assert not summarize([*rows, *runs("metaperturb", 0.02, seeds=4)]).underfitted


def test_only_seeds_that_both_have_are_compared() -> None:
    seven = [row("none", seed, 0.8 + seed / 100) for seed in range(7)]
    six = [row("metaperturb", seed, 0.81 + seed / 100 + seed / 1000) for seed in range(6)]
    arm = summarize([seven[0], *seven[2:], *reversed(six)]).arms["metaperturb"]
    found = arm.against_baseline["accuracy"].difference
    assert (found.n, arm.estimates["accuracy"].n, arm.seeds) == (5, 6, [0, 1, 2, 3, 4, 5])
    assert found.mean == pytest.approx(0.01 + (0 + 2 + 3 + 4 + 5) / 5 / 1000)


def test_arms_without_a_common_seed_are_not_compared() -> None:
    rows = [*none(2), *runs("metaperturb", 0.02, 4)[2:]]
    assert summarize(rows).headline == [
        "metaperturb: no evidence: metaperturb has no finished seed in common with none."
    ]


def test_the_best_control_is_named_by_metric() -> None:
    rows = [
        *none(),
        *runs("metaperturb", 0.03),
        *runs("shrink_only", 0.0),
        *runs("random_phi", 0.01, noise=OTHER_NOISE),
    ]
    rows = [dataclasses.replace(one, nll=0.5) if one.arm == "shrink_only" else one for one in rows]
    summary = summarize(rows)
    arm = summary.arms["metaperturb"]
    assert {name: one.other for name, one in arm.against_control.items() if name in VERDICT_METRICS} == {
        "accuracy": "random_phi",
        "nll": "shrink_only",
    }
    assert arm.against_control["accuracy"].arms == 1
    for control in ("shrink_only", "random_phi"):
        assert summary.arms[control].control and not summary.arms[control].against_control
        assert set(summary.arms[control].against_baseline) == set(METRICS)
    assert len(summary.headline) == 1
    assert "It is better than the best control: accuracy +2.0 points against random_phi (95 %" in summary.headline[0]


def test_a_gain_that_a_control_has_too_is_said() -> None:
    rows = [*none(), *runs("metaperturb", 0.03), *runs("fixed_noise", 0.031, noise=OTHER_NOISE)]
    (sentence,) = summarize(rows).headline
    assert sentence.startswith("metaperturb helps: accuracy +3.0 points against none (")
    assert "). It is not better than the best control: accuracy -0.1 points against fixed_noise (95 %" in sentence
    (sentence,) = summarize([row for row in rows if row.arm != "fixed_noise" or row.seed < 3]).headline
    assert sentence.endswith("3 seeds); five seeds are needed.")
    (sentence,) = summarize([row for row in rows if row.arm != "fixed_noise" or row.seed < 1]).headline
    assert sentence.endswith("It has 1 seed in common with the best control, fixed_noise: too few to compare.")


def test_a_combination_stands_beside_the_control_that_is_combined_alike() -> None:
    """Beside the control alone it would be credited with what it is combined with."""
    arms = {"fixed_noise:a": 0.01, "metaperturb:a+mixup": 0.05, "dropout:0.1+fixed_noise:a": 0.09, "mixup": 0.03}
    rows = [*none(), *(row for arm, gain in arms.items() for row in runs(arm, gain))]
    alike = "mixup + fixed_noise:a"
    controls = ["fixed_noise:a", "dropout:0.1+fixed_noise:a", alike]
    without = summarize(rows, controls=controls)
    assert not without.arms["metaperturb:a+mixup"].against_control
    summary = summarize([*rows, *runs(alike, 0.04, noise=OTHER_NOISE)], controls=controls)
    assert summary.arms["metaperturb:a+mixup"].against_control["nll"].other == alike
    assert summary.arms["mixup"].against_control["nll"].other == "fixed_noise:a"
    assert not summary.arms[alike].against_control
    assert [sentence.split()[0] for sentence in summary.headline] == ["metaperturb:a+mixup", "mixup"]
    assert "accuracy +1.0 points against mixup + fixed_noise:a" in summary.headline[0]


def test_the_best_control_is_one_that_can_be_compared() -> None:
    """One seed of a control that seems better is no reason to leave five of another aside."""
    rows = [*none(), *runs("metaperturb", 0.03), *runs("shrink_only", 0.01), *runs("fixed_noise", 0.02, seeds=1)]
    assert summarize(rows).arms["metaperturb"].against_control["accuracy"].other == "shrink_only"


def test_an_arm_is_not_called_worse_than_the_best_of_several_controls() -> None:
    """The best one was chosen by its mean on these very seeds, for which no p value is corrected."""
    (sentence,) = summarize([*none(), *runs("metaperturb", 0.02), *runs("fixed_noise", 0.04)]).headline
    assert sentence.startswith("metaperturb helps: accuracy +2.0 points against none (")
    assert "). It is not better than the best control: accuracy -2.0 points against fixed_noise (95 %" in sentence


def test_a_control_that_diverged_is_not_the_best() -> None:
    rows = [*none(), *runs("metaperturb", 0.03), *runs("fixed_noise", 0.0), *runs("shrink_only", 0.02)]
    rows = [dataclasses.replace(one, nll=-math.inf) if one.arm == "shrink_only" else one for one in rows]
    assert summarize(rows).arms["metaperturb"].against_control["nll"].other == "fixed_noise"


def test_headline_is_of_the_arms_in_focus() -> None:
    rows = [*none(), *runs("metaperturb", 0.03), *runs("dropout", 0.0), *runs("fixed_noise", 0.0)]
    assert [text.split(":")[0].split()[0] for text in summarize(rows).headline] == ["metaperturb", "dropout"]
    assert [text.split()[0] for text in summarize(rows, focus=["metaperturb"]).headline] == ["metaperturb"]
    assert summarize(rows, focus=["mixup"]).headline == ["mixup: no evidence: none of its runs is finished."]
    assert summarize(rows, controls=["dropout"], focus=["none"]).headline[1].startswith("fixed_noise: no evidence")


def test_what_is_missing_is_said() -> None:
    assert summarize([]).headline == ["no evidence: no run is finished."]
    assert summarize(none()).headline == ["no evidence: only none has finished runs, and there is no arm to compare."]
    summary = summarize(runs("metaperturb", 0.03))
    assert summary.headline == ["metaperturb: no evidence: no run of none is finished, which it is compared with."]
    assert words(summary) == ["no evidence", "no evidence"] and not summary.underfitted


def test_summary_is_plain_json() -> None:
    rows = [*none(), *runs("metaperturb", 0.02)]
    rows[6] = dataclasses.replace(rows[6], nll=math.inf, step_ms=math.nan)
    content = summarize(rows).to_dict()
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert content["arms"]["metaperturb"]["estimates"]["nll"] == {"n": 5, "mean": None, "low": None, "high": None}
    assert content["arms"]["metaperturb"]["verdicts"]["accuracy"]["word"] == "helps"


def test_rows_of_no_one_comparison_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="'flowers' with 'conv4' stand beside rows of 'digits'"):
        summarize([*none(), row("none", 5, target="flowers")])
    with pytest.raises(ConfigurationError, match="arm 'none' has two rows of seed 1"):
        summarize([*none(), row("none", 1)])
    with pytest.raises(ConfigurationError, match="metric 'brier' leads to no verdict; use one of accuracy, nll"):
        summarize(none(), metric="brier")
