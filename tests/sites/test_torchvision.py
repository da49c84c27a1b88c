"""Every classifier of torchvision: as many sites as its architecture has, each on what its activation reads."""

from pathlib import Path

import pytest
import torch
import torchvision

from capture import Unchanged, inputs_at, seen_by_sites
from mp_lightning.sites import attach, find_sites
from mp_lightning.sites.discovery import PLAIN, PRE_ACTIVATION, RESIDUAL, UNNORMALIZED

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"

# Residual blocks; inverted residuals with a shortcut and blocks of transformers; normalized convolutions; convolutions.
EXPECTED = {
    RESIDUAL: {
        **{"resnet18": 8, "resnet34": 16, "resnet50": 16, "resnet101": 33, "resnet152": 50},
        **{"resnext50_32x4d": 16, "resnext101_32x8d": 33, "resnext101_64x4d": 33},
        **{"wide_resnet50_2": 16, "wide_resnet101_2": 33},
        **{"regnet_x_400mf": 22, "regnet_x_800mf": 16, "regnet_x_1_6gf": 18, "regnet_x_3_2gf": 25},
        **{"regnet_x_8gf": 23, "regnet_x_16gf": 22, "regnet_x_32gf": 23},
        **{"regnet_y_400mf": 16, "regnet_y_800mf": 14, "regnet_y_1_6gf": 27, "regnet_y_3_2gf": 21},
        **{"regnet_y_8gf": 17, "regnet_y_16gf": 18, "regnet_y_32gf": 20, "regnet_y_128gf": 27},
    },
    PRE_ACTIVATION: {
        **{"efficientnet_b0": 9, "efficientnet_b1": 16, "efficientnet_b2": 16, "efficientnet_b3": 19},
        **{"efficientnet_b4": 25, "efficientnet_b5": 32, "efficientnet_b6": 38, "efficientnet_b7": 48},
        **{"efficientnet_v2_s": 35, "efficientnet_v2_m": 51, "efficientnet_v2_l": 73},
        **{"mnasnet0_5": 10, "mnasnet0_75": 10, "mnasnet1_0": 10, "mnasnet1_3": 10},
        **{"mobilenet_v2": 10, "mobilenet_v3_small": 6, "mobilenet_v3_large": 10},
        **{"convnext_tiny": 18, "convnext_small": 36, "convnext_base": 36, "convnext_large": 36},
        **{"swin_t": 12, "swin_s": 24, "swin_b": 24, "swin_v2_t": 12, "swin_v2_s": 24, "swin_v2_b": 24},
        **{"vit_b_16": 12, "vit_b_32": 12, "vit_l_16": 24, "vit_l_32": 24, "vit_h_14": 32},
        "maxvit_t": 33,
    },
    PLAIN: {
        **{"vgg11_bn": 8, "vgg13_bn": 10, "vgg16_bn": 13, "vgg19_bn": 16},
        **{"densenet121": 59, "densenet161": 79, "densenet169": 83, "densenet201": 99},
        **{"shufflenet_v2_x0_5": 37, "shufflenet_v2_x1_0": 37, "shufflenet_v2_x1_5": 37, "shufflenet_v2_x2_0": 37},
        **{"googlenet": 57, "inception_v3": 94},  # without their auxiliary classifiers, which act in training alone
    },
    UNNORMALIZED: {
        **{"alexnet": 5, "vgg11": 8, "vgg13": 10, "vgg16": 13, "vgg19": 16},
        **{"squeezenet1_0": 1 + 3 * 8, "squeezenet1_1": 1 + 3 * 8},
    },
}
BUILDERS = [(name, count, rule) for rule, counts in EXPECTED.items() for name, count in counts.items()]
_SIZES = {"alexnet": 63, "googlenet": 128, "inception_v3": 299, "maxvit_t": 224}


def build(name):
    """The network and the side of its images in pixels."""
    size, settings = _SIZES.get(name, 64), {}
    if name in ("googlenet", "inception_v3"):
        settings = {"init_weights": False}
    elif name.startswith("vit"):
        size = 2 * int(name.rpartition("_")[2])
        settings = {"image_size": size}
    return torchvision.models.get_model(name, weights=None, **settings), size


def test_all_builders_are_here():
    assert sorted(name for name, _, _ in BUILDERS) == sorted(torchvision.models.list_models(module=torchvision.models))


def page():
    """docs/compatibility.md, from the numbers that the tests hold."""
    lines = [
        "# Where networks are perturbed",
        "",
        "Sites of each classifier of torchvision, as tests/sites/test_torchvision.py expects them; there, the tensor",
        "that each site gets is also held, bit for bit, against the one that its activation reads. The rules are in",
        "[discovery.py](../src/mp_lightning/sites/discovery.py), and what becomes of tokens, signals and clips is in",
        "[layout.py](../src/mp_lightning/sites/layout.py).",
        "",
        "| network | sites | rule |",
        "|---|---|---|",
    ]
    return "\n".join([*lines, *(f"| {name} | {count} | {rule} |" for name, count, rule in BUILDERS), ""])


def test_the_page_is_that_of_the_expected_numbers():
    before = PAGE.read_text() if PAGE.exists() else ""
    PAGE.write_text(page())
    assert before == page(), f"{PAGE.name} was not up to date, and was written anew; commit it"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count", "rule"), BUILDERS)
def test_sites_are_where_the_activations_read(name, count, rule):
    model, size = build(name)
    plan = find_sites(model.train())
    assert (len(plan), {site.rule for site in plan}) == (count, {rule})
    images = torch.rand(2, 3, size, size)

    def forward():
        torch.manual_seed(0)
        with torch.no_grad():
            model(images)

    expected = inputs_at(plan, model, forward)
    seen = seen_by_sites(attach(model, perturbation=Unchanged(), clip=None), forward)
    assert seen.keys() == expected.keys() == set(plan.names)
    assert all(torch.equal(seen[name], expected[name]) for name in plan.names)
