"""Compiles the CPU kernels, once for each processor and compiler, into the user's cache folder.

They are plain C functions on pointers, compiled for the very processor at hand: installing the package needs no build
step, and as nothing of torch's headers is involved it takes a few seconds.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Generator
from pathlib import Path

SOURCES = Path(__file__).parent / "native"
_MAIN = "perturb.cpp"
_FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-shared", "-fPIC")
# In this order, until one compiles: Apple's Clang knows no OpenMP, and some processors no -march=native.
_OPTIONAL_FLAGS = (("-march=native", "-fopenmp"), ("-march=native",), ("-fopenmp",), ())


class BuildError(Exception):
    """The kernels cannot be compiled here; the message says why and what helps."""


def load_library() -> ctypes.CDLL:
    """The compiled kernels, from the cache where it has them.

    Raises:
        BuildError: there is no C++ compiler, or it fails.
    """
    compiler = _compiler()
    name = f"perturb-{_key(compiler)}.so"
    with contextlib.closing(_cache_folders()) as folders:
        for folder in folders:
            library = folder / name
            try:
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                if not library.is_file():
                    _compile(compiler, library)
                return ctypes.CDLL(str(library))
            except OSError:  # not writable, or on a volume that forbids to run programs
                continue
    raise BuildError(
        "no folder could be written for the compiled kernels; set MP_LIGHTNING_CACHE to one that allows programs to run"
    )


def _compiler() -> list[str]:
    chosen = os.environ.get("CXX")
    for command in [chosen] if chosen else ["c++", "g++", "clang++"]:
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return words
    missing = f"CXX={chosen} was not found" if chosen else "no C++ compiler was found"
    raise BuildError(f"{missing}; install g++ or clang++, or name one in CXX")


def _cache_folders() -> Generator[Path, None, None]:
    chosen = os.environ.get("MP_LIGHTNING_CACHE")
    if chosen:
        yield Path(chosen)
        return
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    yield Path(base) / "mp_lightning"
    # New for every process, so that nobody else can have put a library there; what is loaded from it stays loaded.
    with contextlib.suppress(OSError), tempfile.TemporaryDirectory(prefix="mp_lightning-") as own:
        yield Path(own)


def _key(compiler: list[str]) -> str:
    """What the library depends on: sources, compiler, and the processor, since homes are shared between machines."""
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        if source.is_file():
            digest.update(source.read_bytes())
    digest.update(repr((_FLAGS, _OPTIONAL_FLAGS, platform.machine(), platform.system())).encode())
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=False)
    digest.update(" ".join(compiler).encode() + version.stdout)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text().splitlines()
        features = {line for line in lines if line.startswith(("flags", "Features", "model name"))}
        digest.update("\n".join(sorted(features)).encode())
    return digest.hexdigest()[:20]


def _compile(compiler: list[str], library: Path) -> None:
    """Write ``library`` whole or not at all; other processes may be doing the same."""
    handle, partial = tempfile.mkstemp(dir=library.parent, suffix=".so")
    os.close(handle)
    errors = ""
    try:
        for optional in _OPTIONAL_FLAGS:
            command = [*compiler, *_FLAGS, *optional, str(SOURCES / _MAIN), "-o", partial]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                os.replace(partial, library)
                return
            errors = errors or done.stderr
    finally:
        Path(partial).unlink(missing_ok=True)
    reason = next((line for line in errors.splitlines() if "error" in line), errors.strip()[:200])
    raise BuildError(f"'{' '.join(compiler)}' could not compile the kernels ({reason}); name another compiler in CXX")
