"""Imports run downwards only: a floor never knows the one above it, nor a library it has no need of."""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "mp_lightning"
SOURCE = Path(__file__).resolve().parents[1] / "src" / PACKAGE

# Every module or package directly under mp_lightning, and its floor.
FLOORS = {
    "errors": 0,
    "data": 0,
    "backbones": 0,
    "runs": 0,
    "randomness": 0,
    "conf": 0,
    "quiet": 0,
    "versions": 0,
    "whole": 0,
    "walking": 0,
    "nested": 0,
    "perturbation": 1,
    "sites": 2,
    "callback": 3,
    "mixin": 3,
    "schedule": 3,
    "neighbours": 3,
    "late_layers": 3,
    "reestimation_steps": 3,
    "evaluation_epochs": 3,
    "announcements": 3,
    "site_metrics": 3,
    "checkpoints": 3,
    "restoring": 3,
    "inference": 3,
    "compare": 4,
    "meta": 5,
    "cli": 5,
}
# The package itself re-exports the callback: whoever imports a name from it stands above all floors but the last.
TOP = 5

# Floors 1 to 3 are what a user's training runs: of the ground they see the error classes, and how a file is replaced.
WITHOUT_GROUND = {1, 2, 3}
THEIR_GROUND = {"errors", "whole"}

ALL_LIBRARIES = {
    *("torch", "torchvision", "torchmetrics", "lightning", "safetensors"),
    *("hydra", "omegaconf", "rich", "matplotlib", "numpy", "scipy", "sklearn", "PIL"),
}
LIBRARIES = {
    0: {"torch", "torchvision", "numpy", "scipy", "sklearn", "PIL"},
    1: {"torch", "triton", "safetensors"},
    2: {"torch", "yaml"},
    3: {"torch"},
    4: ALL_LIBRARIES,
    5: ALL_LIBRARIES,
}
# Lightning enters the third floor through the callback alone, so that the mixin and plain loops need no base class.
MORE_LIBRARIES = {
    "backbones": {"timm", "transformers"},
    "callback": {"lightning", "pytorch_lightning"},
    "neighbours": {"lightning"},
    "late_layers": {"lightning"},
    "restoring": {"lightning"},
    "reestimation_steps": {"lightning"},
    "evaluation_epochs": {"lightning"},
    "inference": {"onnxruntime"},
}


@dataclass(frozen=True)
class Import:
    """One imported dotted name and the line it stands on."""

    line: int
    name: str


def imports_of(path: Path, root: Path) -> Iterator[Import]:
    """All imports of a file as absolute dotted names, wherever in the file they stand."""
    package = (PACKAGE, *path.relative_to(root).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield Import(node.lineno, f"{base}.{alias.name}")
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            name = node.args[0].value
            # A relative name needs a second argument to mean something; an absolute one is all that hides an import.
            if called in {"import_module", "__import__"} and isinstance(name, str) and not name.startswith("."):
                yield Import(node.lineno, name)


def unit_of(path: Path, root: Path) -> str:
    """The module or package directly under the root that holds this file; empty for the root's ``__init__.py``."""
    first = path.relative_to(root).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def objection(unit: str, name: str) -> str | None:
    """Why ``unit`` may not import ``name``; None when it may."""
    floor = FLOORS[unit]
    library, *rest = name.split(".")
    if library != PACKAGE:
        allowed = LIBRARIES[floor] | MORE_LIBRARIES.get(unit, set())
        if library in sys.stdlib_module_names or library in allowed:
            return None
        return f"floor {floor} may import the standard library and {', '.join(sorted(allowed))}"
    target = rest[0] if rest and rest[0] in FLOORS else ""
    above = FLOORS.get(target, TOP)
    if above > floor:
        what = target or "the top package"
        return f"{unit} is on floor {floor}, {what} on floor {above}: imports run downwards only"
    if floor in WITHOUT_GROUND and above == 0 and target not in THEIR_GROUND:
        return f"floor {floor} may import of the ground {' and '.join(sorted(THEIR_GROUND))} alone"
    return None


def violations(root: Path) -> list[str]:
    """What breaks the order of the floors under ``root``, one message each."""
    found = []
    for path in sorted(root.rglob("*.py")):
        unit = unit_of(path, root)
        if not unit:
            continue
        shown = f"{PACKAGE}/{path.relative_to(root).as_posix()}"
        if unit not in FLOORS:
            found.append(f"{shown}: '{unit}' has no floor: give it one in FLOORS of {Path(__file__).name}")
            continue
        for imported in imports_of(path, root):
            reason = objection(unit, imported.name)
            if reason:
                found.append(f"{shown}:{imported.line}: import of {imported.name}: {reason}")
    return found


def test_imports_run_downwards_only() -> None:
    assert any(SOURCE.rglob("*.py"))
    found = violations(SOURCE)
    assert not found, "\n" + "\n".join(found)


UPWARD = {
    "absolute": ("perturbation/net.py", "import torch\nfrom mp_lightning.sites.site import Site\n", 2),
    "plain": ("perturbation/net.py", "import mp_lightning.sites.site\n", 1),
    "from the top": ("sites/site.py", "from mp_lightning import callback\n", 1),
    "re-exported": ("sites/site.py", "from mp_lightning import MetaPerturbCallback\n", 1),
    "relative": ("sites/site.py", "from ..callback import MetaPerturbCallback\n", 1),
    "relative, deep": ("sites/a/b.py", "from ...meta import tasks\n", 1),
    "relative, of a module": ("sites/site.py", "from .. import callback\n", 1),
    "relative, in __init__": ("data/__init__.py", "from ..perturbation import phi\n", 1),
    "in a function": ("inference/fold.py", "def f() -> None:\n    from ..compare import arms\n", 2),
    "for types only": (
        "mixin.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .meta import tasks\n",
        3,
    ),
    "by name": ("compare/arms.py", "import importlib\nimportlib.import_module('mp_lightning.meta')\n", 2),
    "ground from floor 2": ("sites/site.py", "from ..backbones import resnet\n", 1),
    "lightning outside the callback": ("mixin.py", "import lightning as L\n", 1),
    "a library of a higher floor": ("perturbation/files.py", "import numpy.random\n", 1),
    "an undeclared library": ("cli/main.py", "import pandas\n", 1),
}


@pytest.mark.parametrize(("place", "text", "line"), UPWARD.values(), ids=UPWARD.keys())
def test_planted_import_is_caught(tmp_path: Path, place: str, text: str, line: int) -> None:
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_text(text, encoding="utf-8")
    found = violations(tmp_path)
    assert len(found) == 1
    assert found[0].startswith(f"{PACKAGE}/{place}:{line}: import of ")


def test_downward_imports_pass(tmp_path: Path) -> None:
    files = {
        "__init__.py": "from .callback import MetaPerturbCallback\nfrom .meta import tasks\n",
        "callback.py": "import lightning\nimport torch.nn\nfrom . import sites\nfrom .perturbation import phi\n",
        "sites/__init__.py": "from __future__ import annotations\nfrom . import site\nfrom ..errors import SiteError\n",
        "compare/arms.py": "from ..data import digits\nfrom mp_lightning import callback, inference\n",
        "meta/tasks.py": "import hydra, rich\nfrom ..cli import main\nfrom mp_lightning import MetaPerturbCallback\n",
    }
    for place, text in files.items():
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text(text, encoding="utf-8")
    assert violations(tmp_path) == []


def test_unknown_module_must_be_given_a_floor(tmp_path: Path) -> None:
    (tmp_path / "helpers.py").write_text("import torch\n", encoding="utf-8")
    (found,) = violations(tmp_path)
    assert "mp_lightning/helpers.py" in found and "give it one" in found
