"""The pictures of a comparison: what they show, and that they can be read."""

import math
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import pytest
from drawn_details import FIVE, THIRTEEN, drawn_comparison
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from simulated import row

from mp_lightning.compare import pictures as module
from mp_lightning.compare.panels import (
    draw_curves,
    draw_multipliers,
    draw_reliability,
    draw_scores,
    pooled,
    short,
    styles,
)
from mp_lightning.compare.pictures import pictures, svg, write_png
from mp_lightning.compare.results import Details, Row, SiteMultiplier
from mp_lightning.compare.summary import summarize
from mp_lightning.compare.texts import acted_texts


def axes() -> Axes:
    figure = Figure()
    FigureCanvasAgg(figure)
    return figure.subplots()


def scores(rows: list[Row], metric: str = "accuracy") -> Axes:
    summary, where = summarize(rows), axes()
    estimates = {name: arm.estimates[metric] for name, arm in summary.arms.items()}
    draw_scores(where, metric, rows, estimates, styles(list(summary.arms), "none"), "none")
    return where


def texts(where: Axes) -> list[str]:
    return [text.get_text() for text in where.texts]


def test_each_arm_has_a_look_of_its_own() -> None:
    looks = styles(THIRTEEN, "none")
    assert list(looks) == list(THIRTEEN)
    assert len(set(looks.values())) == 13
    assert [arm for arm, look in looks.items() if look.colour == looks["none"].colour] == ["none"]
    assert looks["dropout"] == styles(["dropout", "none"], "none")["dropout"], "the baseline takes a colour"


def test_a_dot_for_each_seed_and_a_line_at_the_baseline() -> None:
    values = {"none": [0.78, 0.80, 0.82], "dropout": [0.83, 0.84, 0.85]}
    where = scores([row(arm, seed, value) for arm, own in values.items() for seed, value in enumerate(own)])
    drawn = [float(x) for line in where.lines for x in line.get_xdata()]
    for value in (78, 80, 82, 83, 84, 85):
        assert value == pytest.approx(min(drawn, key=lambda x: abs(x - value)))
    assert list(where.lines[0].get_xdata()) == pytest.approx([80, 80])
    assert [label.get_text() for label in where.get_yticklabels()] == ["none", "dropout"]
    low, high = where.get_xlim()
    assert low < 80 - 4.97 and high > 85, "the interval of none, 80 ± 4.97, is cut off"


def test_values_that_are_not_finite_are_counted() -> None:
    rows = [row(arm, seed, nll=0.7 + 0.01 * seed) for arm in FIVE for seed in range(5)]
    rows[7] = replace(rows[7], nll=math.nan)
    where = scores(rows, "nll")
    assert texts(where) == ["1 not finite"]
    assert all(math.isfinite(limit) for limit in where.get_xlim())


def test_one_arm_that_is_far_off_does_not_flatten_the_others() -> None:
    rows = [row(arm, seed, nll=0.7 + 0.01 * seed) for arm in FIVE for seed in range(5)]
    where = scores([*rows, *(row("mixup", seed, nll=5000.0) for seed in range(5))], "nll")
    assert where.get_xlim()[1] < 1.5
    assert [line.get_marker() for line in where.lines].count(">") == 5


def test_a_curve_is_the_mean_over_the_seeds() -> None:
    where = axes()
    details = {
        ("none", 0): Details(curve=[(8, 2.0), (16, 1.0)]),
        ("none", 1): Details(curve=[(8, 3.0), (16, math.nan)]),
        ("other", 0): Details(),
    }
    draw_curves(where, details, styles(["none", "other"], "none"))
    (line,) = where.lines
    assert list(line.get_xdata()) == [8, 16]
    assert list(line.get_ydata()) == [2.5, 1.0]
    assert where.get_yscale() == "log"


def test_bins_are_pooled_by_their_images() -> None:
    first = [(0, 0.0, 0.0), (10, 0.5, 0.4), (30, 0.9, 1.0)]
    second = [(0, 0.0, 0.0), (30, 0.6, 0.6), (0, 0.0, 0.0)]
    (middle, upper) = pooled([first, [], second])
    assert middle == pytest.approx((40, 0.575, 0.55))
    assert upper == pytest.approx((30, 0.9, 1.0))
    assert pooled([[(5, math.nan, 0.5)]]) == []


def test_reliability_shows_bins_that_hold_images_and_says_the_error_of_the_table() -> None:
    where = axes()
    rows, details = drawn_comparison(("none",), seeds=2)
    rows = [replace(rows[0], ece=0.11), replace(rows[1], ece=0.14)]
    assert pictures(summarize(rows), rows, details)[-1].panels[0].title == "none\nECE 0.125"
    draw_reliability(where, [details["none", 0]], styles(["none"], "none")["none"])
    assert len(where.collections[0].get_offsets()) == 14, "an empty bin is shown"


def test_the_multiplier_of_each_site_is_averaged_over_the_seeds() -> None:
    where = axes()
    sites = [[SiteMultiplier("a", mean, 0.1), SiteMultiplier("b", 0.8, 0.1)] for mean in (0.2, 0.4)]
    details = {("none", 0): Details(), **{("phi", seed): Details(multiplier=own) for seed, own in enumerate(sites)}}
    details["last", 0] = Details(multiplier=sites[0][1:])
    draw_multipliers(where, details, styles(["none", "phi", "last"], "none"), ["a", "b"])
    both, last = (container[0] for container in where.containers)
    assert list(both.get_ydata()) == pytest.approx([0.3, 0.8])
    assert [round(x) for x in both.get_xdata()] == [1, 2]
    assert [round(x) for x in last.get_xdata()] == [2], "an arm at the last sites only stands at the first"


def test_an_arm_that_acted_at_a_part_of_its_strength_is_named_with_the_mean_over_its_seeds() -> None:
    details = {("none", 0): Details(), ("whole", 0): Details(acted=1.0), ("one", 0): Details(acted=0.5)}
    details |= {("phi", seed): Details(acted=share) for seed, share in enumerate((0.2, 0.4))}
    more = "; longer runs, and a training loss that falls further, reach more."
    assert acted_texts(details) == [
        f"one acted at 50% of its strength when training ended{more}",
        f"phi acted at 30% of its strength when training ended (mean of 2 seeds){more}",
    ]


def test_pictures_without_content_are_left_out() -> None:
    rows, details = drawn_comparison(("none", "dropout"))
    assert [one.name for one in pictures(summarize(rows), rows, details)] == ["scores", "curves", "reliability"]
    assert [one.name for one in pictures(summarize(rows), rows, {})] == ["scores"]


@pytest.mark.parametrize("arms", [THIRTEEN, ("none", "a-$-name-that-is-far-too-long-for-any-$-picture")], ids=len)
def test_no_text_is_cut_off(arms: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Figure] = []

    class Kept(Figure):
        def __init__(self, *args, **options) -> None:
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr(module, "Figure", Kept)
    rows, details = drawn_comparison(arms, sites=16)
    drawn = pictures(summarize(rows), rows, details)
    for picture in drawn:
        write_png(picture, tmp_path / f"{picture.name}.png")
        height, width, _ = matplotlib.image.imread(tmp_path / f"{picture.name}.png").shape
        assert 500 <= width <= 1600 and 200 <= height <= 1600
    assert len(made) == len(drawn)
    for figure in made:
        boxes = [where.get_tightbbox() for where in figure.axes]
        boxes += [legend.get_window_extent() for part in figure.subfigs for legend in part.legends]
        for box in boxes:
            assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
            assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1


def test_a_panel_in_a_page_is_small_and_has_the_ink_of_its_text() -> None:
    rows, details = drawn_comparison()
    panels = [panel for picture in pictures(summarize(rows), rows, details) for panel in picture.panels]
    assert svg(panels[0]) == svg(panels[0]), "the same panel gives another text"
    for panel in panels[1:-3]:
        text = svg(panel)
        assert text.startswith("<svg") and text.endswith("</svg>\n")
        assert len(text) < 300_000
        assert "currentColor" in text
        assert "http" not in text


def test_names_that_are_cut_alike_are_cut_later() -> None:
    names = [f"metaperturb:runs/fit-seed0-{digest}/phi.safetensors" for digest in ("aaaa", "bbbb")]
    found = short(["none", *names, names[0].replace("fit", "a-much-longer-name-of-fit")])
    assert found["none"] == "none" and len(set(found.values())) == 4
    assert all("..." in found[name] for name in names)
