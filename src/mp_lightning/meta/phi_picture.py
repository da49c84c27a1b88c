"""One picture of a phi: its filters, what its scale weighs, and how it responds to feature maps."""

from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from mp_lightning.perturbation import MetaPerturb, NamedPhi, Norms, Phi
from mp_lightning.perturbation.mathematics import noise_location

_CHANNELS, _SIDE, _BATCH = 32, 32, 32  # of the maps that stand for those of a network
_VALUES = torch.linspace(-3, 3, 61)
_WEIGHTS = [*(f"mean {i}" for i in range(1, 5)), *(f"variance {i}" for i in range(1, 5)), "channels", "size"]
_SIZES = (1.0, 0.5, 0.25, 0.125)
_OWN, _ALL, _BAND = "tab:blue", "tab:orange", "tab:green"


def draw_phi(phi: NamedPhi, path: Path) -> None:
    """Write ``path`` (.png).

    Above: the four filters of the noise and the four of the scale. Below: the weights of the scale; where the noise of
    an element is centred, when its channel, or every channel, has one value everywhere; and the factor that acts on
    maps of independent N(0, 1) elements, its mean and standard deviation, by the size of the map.
    """
    phi = replace(phi, phi=Phi(*(value.detach().float().cpu() for value in phi.phi)))
    figure = Figure(figsize=(8.0, 6.4), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06))
    FigureCanvasAgg(figure)
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=[1.5, 1])[:, 0]
    _draw_filters(above, phi.phi)
    weights, location, factor = below.subplots(1, 3)
    for axis in (weights, location, factor):
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize="small")
    _draw_weights(weights, phi.phi)
    _draw_location(location, phi.phi)
    _draw_factor(factor, phi)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _draw_filters(part: SubFigure, phi: Phi) -> None:
    noise = {
        "own channel, 1st layer": phi.op1_identity,
        "mean of channels, 1st": phi.op1_all,
        "own channel, 2nd layer": phi.op2_identity,
        "mean of channels, 2nd": phi.op2_all,
    }
    scale = {f"scale, filter {number}": kernel for number, kernel in enumerate(phi.scale_kernels, start=1)}
    filters = {**noise, **scale}
    largest = max(float(kernel.abs().max()) for kernel in filters.values()) or 1.0
    for axis, (name, kernel) in zip(part.subplots(2, 4).flat, filters.items(), strict=True):
        axis.imshow(kernel.numpy(), cmap="RdBu_r", vmin=-largest, vmax=largest)
        axis.set_title(name, fontsize=8.5)
        axis.set_xticks([])
        axis.set_yticks([])
        for (row, column), value in zip(torch.cartesian_prod(*2 * [torch.arange(3)]), kernel.flatten(), strict=True):
            dark = abs(float(value)) > 0.6 * largest
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color="w" if dark else "k")


def _draw_weights(axis: Axes, phi: Phi) -> None:
    axis.barh(range(len(_WEIGHTS)), phi.scale_weight.tolist(), color="0.45")
    axis.set_yticks(range(len(_WEIGHTS)), _WEIGHTS, fontsize=7)
    axis.invert_yaxis()
    axis.axvline(0, color="0.3", linewidth=0.7)
    axis.set_title("weights of the scale", fontsize=9)


@torch.no_grad()
def _draw_location(axis: Axes, phi: Phi) -> None:
    for label, channels, colour in (("this channel", 1, _OWN), ("every channel", _CHANNELS, _ALL)):
        x = torch.zeros(len(_VALUES), _CHANNELS, 9, 9)
        x[:, :channels] = _VALUES.view(-1, 1, 1, 1)
        axis.plot(_VALUES.tolist(), noise_location(x, phi)[:, 0, 4, 4].tolist(), color=colour, label=label)
    axis.set_title("location of the noise", fontsize=9)
    axis.set_xlabel("value before the activation", fontsize="small")
    axis.legend(fontsize=7, frameon=False)


@torch.no_grad()
def _draw_factor(axis: Axes, phi: NamedPhi) -> None:
    net, generator = MetaPerturb(phi.phi), torch.Generator().manual_seed(0)
    means, stds = [], []
    for size in _SIZES:
        side = round(size * _SIDE)
        x, eps = torch.randn(2, _BATCH, _CHANNELS, side, side, generator=generator)
        used, _ = net.measure(x, net.initial_statistics(_CHANNELS))
        factor = 1 + phi.strength * (net.multiplier(x, eps, used, Norms(_CHANNELS, _SIDE)) - 1)
        means.append(float(factor.mean()))
        stds.append(float(factor.std()))
    places = range(len(_SIZES))
    axis.errorbar(places, means, stds, color=_BAND, marker="o", capsize=3)
    axis.set_xticks(places, [f"{size:g}" for size in _SIZES])
    axis.set_ylim(bottom=min(0.0, *(mean - std for mean, std in zip(means, stds, strict=True))))
    axis.set_title(f"factor at strength {phi.strength:g}, noise per {phi.noise_per}", fontsize=8)
    axis.set_xlabel("size of the map / size of the input", fontsize="small")
