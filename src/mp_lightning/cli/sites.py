"""``sites``: where a model would be perturbed, by which rule, and what each site costs on this machine."""

from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from rich.markup import escape
from rich.table import Table
from torch import nn

from mp_lightning.backbones import list_backbones
from mp_lightning.backbones.anyone import build_network
from mp_lightning.cli.model_options import read_image, required
from mp_lightning.cli.options import check, check_top_level
from mp_lightning.cli.site_costs import SiteCost, measure
from mp_lightning.compare.console import for_tables, make_console
from mp_lightning.errors import ConfigurationError, one_line
from mp_lightning.perturbation import NamedPhi, check_fraction, load_phi
from mp_lightning.sites import SitePlan, choose_sites
from mp_lightning.sites.choice import is_share
from mp_lightning.sites.recording import NoImageFits, images_of
from mp_lightning.sites.tracing import image_shape

_WIDTH = 200  # of the table, where the output is not a terminal
_KEYS = ("command", "model", "input", "target", "sites", "phi", "batch_size", "device", "to")


@dataclass(frozen=True)
class Request:
    """What ``sites`` reads from its configuration, checked."""

    model: str
    image: tuple[int, ...] | None
    target: str | None
    sites: str | float | list[str] | None
    phi: NamedPhi
    batch_size: int
    device: torch.device
    to: Path | None


def read(config: DictConfig) -> Request:
    """The settings of a configuration.

    Raises:
        ConfigurationError: a key is unknown, or a value is missing or cannot be used; the message names it.
        PhiError: phi cannot be read.
    """
    check_top_level(config, _KEYS)
    to = check(config.to, str | None, "to")
    if to is not None and Path(to).suffix not in (".yaml", ".yml"):
        raise ConfigurationError(f"to={to} cannot be used; give a file name that ends in .yaml")
    return Request(
        model=required(config, "model", "torchvision:resnet18"),
        image=read_image(config.input),
        target=check(config.target, str | None, "target"),
        sites=_patterns(config),
        phi=load_phi(check(config.phi, str | None, "phi")),
        batch_size=check(config.batch_size, int, "batch_size"),
        device=_device(check(config.device, str | None, "device")),
        to=None if to is None else Path(to),
    )


def run(config: DictConfig, path: Path) -> None:
    """Print the table, and write the plan if asked to.

    Raises:
        ConfigurationError: the model cannot be built, or does not take such images.
        SiteError: it has no site, or the plan does not fit, or cannot be written.
    """
    given = read(config)
    model = build_network(given.model)
    with images_of(None if given.image is None else given.image[-1]):
        plan = choose_sites(model, given.phi.share_of_sites if given.sites is None else given.sites, given.target)
    image = given.image or _guess_image(model, given.model)
    costs, plain_ms = measure(model.to(given.device), plan, given.phi, (given.batch_size, *image), given.device)
    console = make_console()
    size = "x".join(map(str, image))
    console.print(f"{escape(given.model)}, {given.batch_size} images of {size}, on {given.device}: {plan.size}\n")
    for_tables(console, _WIDTH).print(_table(plan, costs))
    total = sum(cost.milliseconds for cost in costs.values())
    console.print(
        f"\nA training step without perturbation takes {plain_ms:.1f} ms here (median); the sites add {total:.1f} ms, "
        f"or {100 * total / plain_ms:.0f} %."
    )
    if (missed := [site.name for site in plan if site.name not in costs]) != []:
        console.print(
            f"{len(missed)} of {len(plan)} sites were not reached by a forward of {escape(given.model)}, where nothing "
            "would be perturbed unless training calls those parts."
        )
    if given.to is not None:
        plan.save(given.to)
        console.print(
            f"Written to [bold]{escape(str(given.to))}[/bold]; give it back with sites={escape(str(given.to))}"
        )


def _table(plan: SitePlan, costs: dict[str, SiteCost]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", show_footer=True)
    milliseconds = sum(cost.milliseconds for cost in costs.values())
    megabytes = sum(cost.megabytes for cost in costs.values())
    table.add_column("site", footer="total", overflow="fold")
    table.add_column("rule", no_wrap=True)
    for heading, footer in (
        ("channels", ""),
        ("size", ""),
        ("ms a step", f"{milliseconds:.2f}"),
        ("MB", f"{megabytes:.1f}"),
    ):
        table.add_column(heading, footer=footer, justify="right", no_wrap=True)
    for site in plan:
        cost = costs.get(site.name)
        shown = (
            ("not reached", "", "")
            if cost is None
            else ("x".join(map(str, cost.size)), f"{cost.milliseconds:.2f}", f"{cost.megabytes:.1f}")
        )
        table.add_row(escape(site.name), site.rule.partition(":")[0], str(site.channels), *shown)
    return table


def _guess_image(model: nn.Module, name: str) -> tuple[int, ...]:
    """The size of the images that the model takes.

    Raises:
        ConfigurationError: it takes none of those that were tried.
    """
    if name in list_backbones():
        return (3, 32, 32)
    try:
        return image_shape(model)
    except NoImageFits as error:
        raise ConfigurationError(
            f"model={name} takes none of the images that were tried ({error}); give the size of one, input=3x224x224"
        ) from error


def _patterns(config: DictConfig) -> str | float | list[str] | None:
    value = config.sites
    if value is None or isinstance(value, str):
        return value
    if is_share(value):
        check_fraction(value, "sites")
        return value
    if OmegaConf.is_list(value) and all(isinstance(pattern, str) for pattern in value):
        return [str(pattern) for pattern in value]
    raise ConfigurationError(
        f"sites={value} cannot be used; give a YAML file, a share such as 0.5, a name or pattern, or a list of them"
    )


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=name).item()
        return torch.device(name)
    except Exception as error:  # of many kinds
        raise ConfigurationError(
            f"device={name} cannot be used ({one_line(error, 100)}); give cpu, cuda or the like"
        ) from error
