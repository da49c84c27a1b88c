"""The picture at the end of meta-training: what it shows, and that it can be read."""

import math
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from histories import course, description, history_of
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mp_lightning.meta.picture import draw_training

Tasks = dict[str, dict[str, Any]]


@pytest.fixture
def draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Draws a table and returns the figure, once it is a file."""
    saved: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **options: saved.append(self) or save(self, *args, **options)
    )

    def _draw(columns: Mapping[str, list[float]], tasks: Tasks) -> Figure:
        path = tmp_path / "training.png"
        draw_training(history_of(columns, tmp_path), path, tasks)
        height, width, _ = matplotlib.image.imread(path).shape
        assert 700 <= width <= 1700 and 250 <= height <= 2000
        return saved[-1]

    return _draw


def some_tasks(count: int, *architectures: str, name: str = "tiny-imagenet-200-{}") -> Tasks:
    return {name.format(i): description(architectures[i % len(architectures)], 40) for i in range(count)}


def panel(figure: Figure, title: str) -> Axes:
    (found,) = [axis for axis in figure.axes if axis.get_title() == title]
    return found


def test_each_task_has_its_two_losses_and_what_a_guess_would_cost(draw) -> None:
    tasks = some_tasks(2, "conv4-16", "resnet20")
    columns = course(tasks)
    axis = panel(draw(columns, tasks), "tiny-imagenet-200-1\nresnet20")
    drawn = {line.get_label(): list(line.get_ydata()) for line in axis.lines}
    assert drawn["train loss"] == columns["tiny-imagenet-200-1/train_loss"]
    assert drawn["valid loss"] == columns["tiny-imagenet-200-1/valid_loss"]
    assert drawn["every class equally likely"] == [math.log(40)] * 2
    assert list(axis.lines[0].get_xdata()) == columns["step"]


def test_multipliers_are_averaged_over_the_tasks_of_an_architecture(draw) -> None:
    tasks = some_tasks(3, "conv4-16", "resnet20")
    columns = course(tasks, sites=4)
    columns["tiny-imagenet-200-2/site1/multiplier"] = [1.0] * 30
    figure = draw(columns, tasks)
    lines = panel(figure, "mean multiplier\nconv4-16").lines
    assert len(lines) == 4
    expected = [(value + 1) / 2 for value in columns["tiny-imagenet-200-0/site1/multiplier"]]
    assert list(lines[1].get_ydata()) == pytest.approx(expected)
    assert len({line.get_color() for line in lines}) == 4
    other = panel(figure, "mean multiplier\nresnet20")
    assert list(other.lines[1].get_ydata()) == pytest.approx(columns["tiny-imagenet-200-1/site1/multiplier"])
    assert other.get_ylim() == lines[0].axes.get_ylim(), "panels that cannot be compared"


def test_the_gradient_of_phi_is_drawn_on_a_logarithmic_axis(draw) -> None:
    tasks = some_tasks(1, "conv4-16")
    axis = panel(draw(course(tasks), tasks), "norm of the gradient of phi")
    assert axis.get_yscale() == "log"
    assert list(axis.lines[0].get_ydata()) == course(tasks)["phi/gradient_norm"]


@pytest.mark.parametrize(
    ("absent", "panels"), [("phi/", 2 + 1), ("/multiplier", 2 + 1), ("_loss", 2 + 2), ("/", 2)], ids=str
)
def test_what_a_table_does_not_hold_is_left_out(draw, absent: str, panels: int) -> None:
    tasks = some_tasks(2, "conv4-16")
    columns = {name: values for name, values in course(tasks).items() if absent not in name}
    assert len(draw(columns, tasks).axes) == panels


def test_a_run_of_one_step_shows_points(draw) -> None:
    tasks = some_tasks(1, "conv4-16")
    axis = panel(draw(course(tasks, rows=1), tasks), "tiny-imagenet-200-0\nconv4-16")
    assert axis.lines[0].get_marker() == "."


def test_a_table_without_rows_is_a_picture_without_curves(draw) -> None:
    tasks = some_tasks(1, "conv4-16")
    figure = draw(course(tasks, rows=0), tasks)
    assert not any(len(line.get_xdata()) for line in figure.axes[0].lines[:2])


@pytest.mark.parametrize("loss", [1000.0, math.inf, math.nan])
def test_one_loss_that_shoots_up_does_not_flatten_all_others(draw, loss: float) -> None:
    tasks = some_tasks(1, "conv4-16")
    columns = course(tasks)
    columns["tiny-imagenet-200-0/valid_loss"][4] = loss
    _, top = panel(draw(columns, tasks), "tiny-imagenet-200-0\nconv4-16").get_ylim()
    assert math.log(40) < top < 3 * math.log(40)


LONG = "timm:mobilenetv4_conv_small_050.e3000_r224_in1k"


@pytest.mark.parametrize("count", [1, 4, 10, 20])
def test_no_text_is_cut_off_or_hidden(draw, count: int) -> None:
    names = "an-image-folder-whose-name-is-long-and-has-a-$-{}"
    tasks = some_tasks(count, "conv4-16", LONG, "resnet20", "torchvision:resnet18", name=names)
    figure = draw(course(tasks, sites=9), tasks)
    boxes = [axis.get_tightbbox() for axis in figure.axes]  # with titles and labels
    boxes += [legend.get_window_extent() for part in figure.subfigs for legend in part.legends]
    assert len(boxes) > count + 2
    for box in boxes:
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    first_lines = {axis.get_title().partition("\n")[0] for axis in figure.axes[:count]}
    assert len(first_lines) == count, "tasks whose shortened names are the same"
