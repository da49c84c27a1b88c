"""The networks of torchvision, timm and transformers: as many sites as they have, each on what its activation reads."""

from collections import Counter
from pathlib import Path

import pytest
import torch
import torchvision
from networks import NETWORKS, build

from capture import check_sites_get_what_activations_read
from mp_lightning.sites import find_sites
from mp_lightning.sites.layout import LAST

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"


def test_all_classifiers_of_torchvision_are_here():
    names = {name.partition(":")[2] for name in NETWORKS if name.startswith("torchvision:")}
    assert names == set(torchvision.models.list_models(module=torchvision.models))
    assert len(names) == 80


def test_forty_families_of_timm_are_here():
    assert sum(name.startswith("timm:") for name in NETWORKS) >= 40


def page():
    """docs/compatibility.md, from the numbers that the tests hold."""
    lines = [
        "# Where networks are perturbed",
        "",
        "Sites of every classifier of torchvision, and of a network of each family of timm and transformers that was",
        "tried, as tests/sites/networks.py expects them; tests/sites/test_compatibility.py holds the tensor that each",
        "site gets, bit for bit, against the one that its activation reads. The rules are in",
        "[rules.py](../src/mp_lightning/sites/rules.py), and what becomes of tokens, signals and clips is in",
        "[layout.py](../src/mp_lightning/sites/layout.py). `python -m mp_lightning.meta sites model=NAME` shows the",
        "sites of any of them.",
        "",
        "| network | sites | rule |",
        "|---|---|---|",
    ]
    for name, (rules, _) in NETWORKS.items():
        words = next(iter(rules)) if len(rules) == 1 else ", ".join(f"{n} {rule}" for rule, n in rules.items())
        lines.append(f"| {name} | {sum(rules.values())} | {words} |")
    return "\n".join([*lines, ""])


def test_the_page_is_that_of_the_expected_numbers():
    before = PAGE.read_text() if PAGE.exists() else ""
    PAGE.write_text(page())
    assert before == page(), f"{PAGE.name} was not up to date, and was written anew; commit it"


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_sites_are_where_the_activations_read(name):
    rules, last = NETWORKS[name]
    model, size = build(name)
    plan = find_sites(model.train())
    assert Counter(site.rule for site in plan) == rules
    assert last in (None, sum(site.layout == LAST for site in plan))
    images = torch.rand(2, *size)
    if not name.startswith("torchvision"):
        model.eval()  # some of timm draw numbers by numpy

    def forward():
        torch.manual_seed(0)
        with torch.no_grad():
            model(images)

    check_sites_get_what_activations_read(plan, model, forward)
