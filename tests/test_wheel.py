"""The wheel alone, without the checkout, holds and runs everything that the README promises."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]

# The smallest meta-training that still goes through every stage.
OVERRIDES = ["meta.steps=2", "evaluation.steps=2", "trainer.enable_progress_bar=false", "hydra.run.dir=run"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def succeed(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Run a command that must succeed; returns what it printed."""
    done = subprocess.run(
        list(command), cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    output = done.stdout.decode(errors="replace")
    assert done.returncode == 0, f"{' '.join(map(str, command))} ended with {done.returncode}\n{output}"
    return output


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: setuptools leaves its build folder beside the sources."""
    copy = tmp_path_factory.mktemp("checkout") / "copy"
    leave = shutil.ignore_patterns(".git", ".venv", ".*_cache", "__pycache__", "*.egg-info")
    top = {"build", "dist", "runs", "multirun", "outputs"}
    shutil.copytree(
        CHECKOUT, copy, ignore=lambda at, names: leave(at, names) | (top if Path(at) == CHECKOUT else set())
    )
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation")
    succeed(*pip, "-w", folder, copy, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the unpacked wheel and nothing else."""
    target = tmp_path_factory.mktemp("installed")
    succeed(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, wheel, cwd=target)
    return target


def environment(target: Path) -> dict[str, str]:
    """An environment where ``target`` comes before an editable install and the current folder is never searched."""
    return {**os.environ, "PYTHONPATH": str(target), "PYTHONSAFEPATH": "1"}


def test_wheel_holds_every_file_and_no_tests(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = [path for kind in ("*.py", "*.cpp", "*.h") for path in (CHECKOUT / "src").rglob(kind)]
    expected = {path.relative_to(CHECKOUT / "src").as_posix() for path in sources}
    expected |= {
        f"mp_lightning/{path.relative_to(CHECKOUT).as_posix()}" for path in (CHECKOUT / "conf").rglob("*.yaml")
    }
    expected |= {"mp_lightning/py.typed", "mp_lightning/conf/__init__.py"}
    assert expected <= names, f"not in the wheel: {sorted(expected - names)}"

    folders = {name.split("/")[0] for name in names}
    assert folders <= {"mp_lightning", "hydra_plugins"} | {name for name in folders if name.endswith(".dist-info")}
    assert not [name for name in names if "tests/" in name]
    assert [name for name in names if name.endswith(".dist-info/licenses/LICENSE")]


def test_wheel_holds_the_configuration_and_the_bundled_phi(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if Path(name).match("mp_lightning/conf/*.yaml")]
    for kind in ("safetensors", "json"):
        assert [name for name in names if Path(name).match(f"mp_lightning/perturbation/bundled/*.{kind}")]


def test_installed_wheel_meta_trains(installed: Path, tmp_path: Path) -> None:
    env = environment(installed)
    where = succeed(sys.executable, "-c", "import mp_lightning; print(mp_lightning.__file__)", cwd=tmp_path, env=env)
    assert Path(where.strip().splitlines()[-1]).is_relative_to(installed)

    printed = succeed(sys.executable, "-m", "mp_lightning.meta", "fit", *OVERRIDES, cwd=tmp_path, env=env)
    assert "slower reference path" not in printed
    assert list((tmp_path / "run").rglob("phi.safetensors"))
