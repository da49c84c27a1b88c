"""``sites``: a line a site with its cost, the plan as a file, and one line for what cannot be used."""

import re
from pathlib import Path

import pytest
from command_line import CommandLine, Done

from mp_lightning.backbones import build_backbone
from mp_lightning.sites import SitePlan, find_sites

OWN = """
import dataclasses
import torch
from torch import nn
from mp_lightning.backbones import build_backbone

class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.student = build_backbone("resnet20", 3, width=4)
        self.teacher = build_backbone("conv4", 3, width=4, image_size=16)

    def forward(self, x):
        return {"out": self.student(x), "features": [self.teacher(x)]}

def broken():
    raise ValueError("no such weights")

class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, words):
        return self.net(words.image)

@dataclasses.dataclass
class Output:
    logits: torch.Tensor

class Wrapped(Pair):
    def forward(self, x):
        return Output(self.student(x))

number = 3

def made(num_classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, num_classes, 1))

class Other(Pair):
    def forward(self, x):
        return self.teacher(x)
"""


def sites(mp: CommandLine, folder: Path, *words: str, code: int = 0) -> Done:
    done = mp(folder, "sites", *words)
    assert done.code == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path


def test_sites_that_no_forward_reaches_are_told(mp: CommandLine, folder: Path) -> None:
    done = sites(mp, folder, "model=own.py:Other", "input=3x16x16", "sites=1", "target=student")
    assert "9 of 9 sites were not reached by a forward of own.py:Other" in done.stdout


def test_the_table_has_the_sites_their_sizes_and_costs(mp: CommandLine, folder: Path) -> None:
    done = sites(mp, folder, "model=resnet20", "batch_size=2", "sites=1")
    plan = find_sites(build_backbone("resnet20", 10))
    found = re.findall(r"^(\S+) +residual +(\d+) +(\d+x\d+) +(\d+\.\d\d) +(\d+\.\d)$", done.stdout, re.MULTILINE)
    assert [(name, int(channels)) for name, channels, *_ in found] == [(site.name, site.channels) for site in plan]
    assert [size for _, _, size, *_ in found] == ["32x32"] * 3 + ["16x16"] * 3 + ["8x8"] * 3
    total = re.search(r"^total +([\d.]+) +([\d.]+)$", done.stdout, re.MULTILINE)
    assert total is not None
    assert float(total[1]) == pytest.approx(sum(float(ms) for *_, ms, _ in found), abs=0.1) and float(total[1]) > 0
    assert re.search(r"without perturbation takes [\d.]+ ms here \(median\); the sites add [\d.]+ ms", done.stdout)
    assert "2 images of 3x32x32" in done.stdout
    assert [path.name for path in folder.iterdir()] == ["own.py"]


def test_a_part_of_the_users_own_model_and_its_plan_as_a_file(mp: CommandLine, folder: Path) -> None:
    words = "model=own.py:Pair", "target=student", "input=3x16x16", "batch_size=2"
    done = sites(mp, folder, *words, "sites=1", "to=plans/plan.yaml")
    assert "Written to plans/plan.yaml" in done.stdout and "teacher" not in done.stdout
    plan = SitePlan.load(folder / "plans" / "plan.yaml")
    assert len(plan) == 9 and all(name.startswith("student.") for name in plan.names)
    SitePlan(list(plan)[:2]).save(folder / "plan.yaml")
    assert "2 sites" in sites(mp, folder, *words, "sites=plan.yaml").stdout
    assert "3x16x16, on cpu: 1 site\n" in sites(mp, folder, "model=own.py:made", "input=3x16x16", "device=cpu").stdout
    assert "5 sites" in sites(mp, folder, *words, "sites=0.5").stdout
    assert "own:Pair, 2 images of 3x16x16" in sites(mp, folder, *(["model=own:Pair", *words[1:]])).stdout


@pytest.mark.parametrize("name", ["torchvision:squeezenet1_1", "timm:test_vit", "transformers:resnet"])
def test_networks_of_libraries(mp: CommandLine, folder: Path, name: str) -> None:
    pytest.importorskip(name.partition(":")[0])
    done = sites(mp, folder, f"model={name}", "batch_size=1")
    assert re.search(rf"{name}, 1 images of 3x\d+x\d+, on \w+: [1-9]\d* sites", done.stdout)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "model is missing; give one, for example model=torchvision:resnet18"),
        (["model=resnet19"], "network 'resnet19' is unknown; give torchvision:NAME"),
        (["model=torchvision:resnet19"], "torchvision has no classification network 'resnet19': did you mean resnet18"),
        (["model=transformers:vitt"], "transformers has no classification network 'vitt': did you mean vit"),
        (["model=own.py:Triple"], "network 'own.py:Triple': there is no 'Triple' in own.py"),
        (["model=own.py:broken"], "network 'own.py:broken' failed: ValueError: no such weights"),
        (["model=own.py:number"], "network 'own.py:number' is a int; name a function or class"),
        (["model=other.py:Pair"], "other.py cannot be imported (FileNotFoundError"),
        (["model=own.py:Text"], "model=own.py:Text takes none of the images that were tried (AttributeError"),
        (["model=own.py:Wrapped", "input=3x16x16"], "the model gives a Output, of which no cost can be measured"),
        (["model=conv4", "input=3x32x"], "input=3x32x cannot be used; give the size of one image, such as 3x224x224"),
        (["model=conv4", "input=4x32x32"], "ConvNet does not take images of 4x32x32 (RuntimeError"),
        (["model=conv4", "target=student"], "target='student' is no part of ConvNet"),
        (["model=conv4", "sites=[relu9]"], "sites=relu9: no activation of ConvNet fits"),
        (["model=conv4", "sites=1.5"], "sites=1.5 cannot be used; give a number above 0 and at most 1"),
        (["model=conv4", "sites=plan.yaml"], "plan 'plan.yaml' cannot be read (No such file"),
        (["model=conv4", "to=plan.txt"], "to=plan.txt cannot be used; give a file name that ends in .yaml"),
        (["model=conv4", "to=own.py/plan.yaml"], "plan 'own.py/plan.yaml' cannot be written"),
        (["model=conv4", "device=moon"], "device=moon cannot be used"),
        (["model=conv4", "batch_size=0"], "batch_size=0 cannot be used; give a positive whole number"),
        (["model=conv4", "phi=nowhere"], "nowhere"),
        (["modl=conv4"], "unknown key 'modl'; did you mean 'model'?"),
        (["model=conv4,resnet20", "-m"], "sites runs once; leave out -m"),
    ],
)
def test_what_cannot_be_used_is_one_line(mp: CommandLine, folder: Path, words: list[str], message: str) -> None:
    done = sites(mp, folder, *words, code=2)
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
