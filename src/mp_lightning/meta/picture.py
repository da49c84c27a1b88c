"""One picture of a meta-training run: the losses of each task, noise and scale of each site."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mp_lightning.meta.history import History


def draw_training(history: History, path: Path, architectures: Mapping[str, str]) -> None:
    """Write ``path`` (.png): losses above, scale and noise below, one column a task, over the meta-steps.

    Args:
        history: the run's table.
        path: the picture.
        architectures: of each task by its name, for the titles.
    """
    table = history.read()
    tasks = [name.removesuffix("/train_loss") for name in table if name.endswith("/train_loss")]
    figure = Figure(figsize=(max(6.0, 3.1 * len(tasks)), 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, len(tasks), squeeze=False, sharex=True, sharey="row")
    steps = table["step"]
    for column, task in enumerate(tasks):
        top, middle, bottom = axes[:, column]
        top.set_title(f"{task}\n{architectures[task]}", fontsize="medium")
        top.plot(steps, table[f"{task}/train_loss"], label="training half")
        top.plot(steps, table[f"{task}/valid_loss"], label="validation half")
        bottom.set_xlabel("meta-step")
        for axis, quantity in ((middle, "scale"), (bottom, "noise")):
            sites = [name for name in table if name.startswith(f"{task}/site") and name.endswith(f"/{quantity}")]
            sites.sort(key=lambda name: int(name.removeprefix(f"{task}/site").partition("/")[0]))
            for number, name in enumerate(sites):
                # Depth is shown by colour: from the first site (dark) to the last (light).
                shade = 0.85 * number / max(1, len(sites) - 1)
                ends = number in (0, len(sites) - 1)
                axis.plot(
                    steps,
                    table[name],
                    color=(shade, 0.45 * shade + 0.1, 0.55),
                    label=f"site {number}" if ends else None,
                )
    axes[0, 0].set_ylabel("loss (nats)")
    axes[1, 0].set_ylabel("mean scale s")
    axes[2, 0].set_ylabel("mean noise z")
    axes[0, 0].legend(frameon=False, fontsize="small")
    for axis in axes[1]:
        axis.legend(frameon=False, fontsize="small")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    figure.savefig(path, dpi=110)
