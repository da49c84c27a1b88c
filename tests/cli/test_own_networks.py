"""``fit`` and ``compare`` with a network that the user's own code makes."""

import subprocess
import sys
from pathlib import Path

import pytest
from command_line import TINY, CommandLine
from comparisons import compare, runs, succeed

from mp_lightning.compare.architecture import Architecture
from mp_lightning.errors import ConfigurationError

OWN = """
import torch
from torch import nn

class Net(nn.Sequential):
    def __init__(self, num_classes, channels=4):
        first = nn.Conv2d(3, channels, 3, 2, 1), nn.BatchNorm2d(channels), nn.ReLU()
        second = nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        super().__init__(*first, *second, nn.Flatten(), nn.Linear(4, num_classes))

class Counted(Net):
    def __init__(self, num_classes):
        super().__init__(num_classes, int(torch.linspace(1, 4, 4)[-1]))  # no number on the meta device

def without_classes():
    return Net(2)

class Constant(Net):
    def forward(self, x):
        return super().forward(x).detach()

def number(num_classes):
    return num_classes

def plain(num_classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["own.py:Net", "own.py:Counted"])
def test_a_network_of_the_users_own_is_made_for_the_classes_of_its_data(folder: Path, name: str) -> None:
    architecture = Architecture.parse(name)
    assert str(architecture) == name and architecture.is_of_the_user
    architecture.check(16)
    assert architecture.construct(7, 16)[-1].out_features == 7
    assert architecture.forward_flops(7, 16) > 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own.py:Nett", "there is no 'Nett' in own.py"),
        ("missing.py:Net", "missing.py cannot be imported"),
        ("own.py:without_classes", "failed: TypeError: .* it is called with num_classes=2 alone"),
        ("own.py:Constant", "its output depends on no weight that has a gradient; let some of its layers learn"),
        ("own.py:number", "gave a int; it must give a torch.nn.Module"),
        ("own.py:plain", "no site for a perturbation in Sequential"),
    ],
)
def test_what_cannot_serve_is_refused_before_anything_is_trained(folder: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^architecture '{name}': .*{message}"):
        Architecture.parse(name).check(16)


def test_the_code_of_a_network_tells_it_from_another_of_its_name(folder: Path) -> None:
    before = Architecture.parse("own.py:Net").code
    (folder / "own.py").write_text(OWN + "\n")
    assert before is not None and Architecture.parse("own.py:Net").code != before
    assert Architecture.parse("conv4").code is None and Architecture.parse("torchvision:resnet18").code is None


BLOCKS = """
from torch import nn

class Block(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x):
        return super().forward(x)

def head(num_classes):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(4, num_classes))
"""


@pytest.mark.parametrize("change", [("nn.ReLU", "nn.GELU"), ("forward(x)", "forward(x.relu())"), ("(0.1)", "(0.2)")])
def test_code_that_lies_beside_the_file_of_a_network_tells_it_from_another(
    folder: Path, change: tuple[str, str]
) -> None:
    (folder / "net.py").write_text(
        "from blocks import Block, head\nfrom torch import nn\n\n"
        "def make(num_classes):\n    return nn.Sequential(Block(), head(num_classes))\n"
    )
    code = "from mp_lightning.compare.architecture import Architecture as A; print(A.parse('net.py:make').code)"
    found = []
    for text in (BLOCKS, BLOCKS.replace(*change), BLOCKS):
        (folder / "blocks.py").write_text(text)
        done = subprocess.run([sys.executable, "-Bc", code], cwd=folder, capture_output=True, text=True, check=True)
        found.append(done.stdout)
    assert found[0] == found[2] != found[1]


def test_fit_learns_phi_with_it_and_refuses_to_go_on_with_other_code(mp: CommandLine, folder: Path) -> None:
    words = [*TINY, "tasks.architectures=[own.py:Net,conv4-2]", "hydra.run.dir=run"]
    done = mp(folder, "fit", *words)
    assert done.code == 0, done.stdout + done.stderr
    assert "own.py:Net" in done.stdout and (folder / "run" / "phi.safetensors").exists()
    assert "This run is finished" in mp(folder, "fit", *words).stdout
    (folder / "own.py").write_text(OWN + "\n# changed\n")
    done = mp(folder, "fit", *words)
    assert done.code == 2 and "code of own.py:Net=" in done.stderr and "run.fresh=true" in done.stderr
    assert (folder / "run" / "phi.safetensors").exists()


def test_compare_trains_it(mp: CommandLine, folder: Path) -> None:
    done = succeed(mp, folder, "model=own.py:Net", "arms=[none,metaperturb]")
    assert "own.py:Net" in (folder / "run" / "summary.md").read_text() and runs(folder / "run") == [
        ("none", 0),
        ("metaperturb", 0),
    ]
    (folder / "own.py").write_text(OWN + "\n# changed\n")
    done = compare(mp, folder, "model=own.py:Net", "arms=[none,metaperturb]", "seeds=2")
    assert done.code == 2 and "code of the model=" in done.stderr
    assert runs(folder / "run") == [("none", 0), ("metaperturb", 0)]
