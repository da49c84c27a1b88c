"""Compiling the CPU kernels: once, whole or not at all, and with a remedy where it cannot be done."""

import os
import subprocess
import sys
import tempfile

import pytest

from mp_lightning.perturbation.fast import build


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MP_LIGHTNING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_compiles_once(cache, monkeypatch):
    build.load_library()
    (library,) = cache.iterdir()
    before = library.stat().st_mtime_ns
    monkeypatch.setattr(build, "_compile", lambda *arguments: pytest.fail("compiled again"))
    build.load_library()
    assert library.stat().st_mtime_ns == before


def test_missing_compiler_is_named(cache, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match=r"CXX=no-such-compiler was not found; install g\+\+ or clang\+\+"):
        build.load_library()


def test_no_compiler_at_all(cache, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(cache))
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler was found"):
        build.load_library()


def test_failing_compiler_leaves_nothing_behind(cache, monkeypatch):
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(build.BuildError, match="'false' could not compile"):
        build.load_library()
    assert list(cache.iterdir()) == []


def test_unwritable_cache_is_named(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.touch()  # no folder can be made of it
    monkeypatch.setenv("MP_LIGHTNING_CACHE", str(blocked))
    with pytest.raises(build.BuildError, match="MP_LIGHTNING_CACHE"):
        build.load_library()


def test_home_that_cannot_be_written_is_no_obstacle(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.delenv("MP_LIGHTNING_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "own"))
    (tmp_path / "own").mkdir()
    assert build.load_library().mp_pool_float32
    assert list((tmp_path / "own").iterdir()) == []


def test_a_cache_that_works_makes_no_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("MP_LIGHTNING_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "own"))
    (tmp_path / "own").mkdir()
    build.load_library()
    assert len(list((tmp_path / "cache" / "mp_lightning").iterdir())) == 1
    assert list((tmp_path / "own").iterdir()) == []


SCRIPT = """
import torch, warnings
from mp_lightning import attach
from mp_lightning.backbones import build_backbone

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for path in {paths}:
        torch.manual_seed(0)
        model = build_backbone("conv4", 3, width=4)
        attach(model, path=path)
        for _ in range(3):
            y = model(torch.ones(2, 3, 32, 32))
        print(float(y.sum()))
print([str(w.message) for w in caught if "MetaPerturb" in str(w.message)])
"""


def run(paths, **environment):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(paths=paths)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_without_a_compiler_the_reference_computes_the_same_and_it_is_said_once(tmp_path):
    *values, said = run(["auto", "auto", "reference"], CXX="no-such-compiler", MP_LIGHTNING_CACHE=str(tmp_path))
    assert values[0] == values[1] == values[2]
    assert said.count("the slower reference path computes the perturbation, since CXX=no-such-compiler") == 1
    assert "path='reference' chooses it without this warning" in said


def test_path_reference_needs_no_compiler_and_says_nothing(tmp_path):
    *_, said = run(["reference"], CXX="no-such-compiler", MP_LIGHTNING_CACHE=str(tmp_path))
    assert said == "[]"
