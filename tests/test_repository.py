"""What holds for the repository as a whole: style, types, safe loading, metadata, nothing local in it."""

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]


def run_module(*arguments: str) -> None:
    """Run ``python -m ...`` in the checkout; its output is the failure's message."""
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(arguments)}\n{done.stdout}{done.stderr}"


def test_ruff_finds_nothing() -> None:
    run_module("ruff", "check", "--no-cache", ".")


def test_files_are_formatted() -> None:
    run_module("ruff", "format", "--check", "--no-cache", ".")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_types_are_sound() -> None:
    run_module("mypy")


UNSAFE = {
    *("pickle.load", "pickle.loads", "pickle.Unpickler"),
    *("joblib.load", "dill.load", "dill.loads", "cloudpickle.load", "cloudpickle.loads"),
}


def unsafe_loads(text: str) -> Iterator[tuple[int, str]]:
    """Line and name of each call or import in a source text that can run code from the file it reads."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            # Under a name of its own the call below would go unnoticed.
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if name == "torch.load" or name in UNSAFE:
                    yield node.lineno, name
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            constants = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
            if (
                name in UNSAFE
                or (name == "torch.load" and constants.get("weights_only") is not True)
                or constants.get("allow_pickle")
            ):
                yield node.lineno, name


def test_no_file_can_run_code_when_loaded() -> None:
    found = [
        f"{path.relative_to(CHECKOUT)}:{line}: {name}"
        for path in sorted((CHECKOUT / "src").rglob("*.py"))
        for line, name in unsafe_loads(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("torch.load(f)", 1),
        ("torch.load(f, weights_only=False)", 1),
        ("torch.load(f, weights_only=safe)", 1),
        ("from torch import load", 1),
        ("pickle.loads(b)", 1),
        ("numpy.load(f, allow_pickle=True)", 1),
        ("torch.load(f, map_location='cpu', weights_only=True)", 0),
        ("pickle.dumps(b)", 0),
    ],
)
def test_unsafe_loads_are_recognised(text: str, count: int) -> None:
    assert len(list(unsafe_loads(text))) == count


def test_citation_names_the_paper() -> None:
    text = (CHECKOUT / "CITATION.cff").read_text(encoding="utf-8")
    assert "2006.07540" in text
    assert "MetaPerturb: Transferable Regularizer for Heterogeneous Tasks and Architectures" in text


def test_changelog_has_an_unreleased_section() -> None:
    text = (CHECKOUT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## \[?Unreleased\]?", text, re.MULTILINE)


def test_license_is_whole() -> None:
    text = (CHECKOUT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text


def repository_files() -> list[Path]:
    """Files that git tracks, or would take in: those it does not ignore."""
    if shutil.which("git") is None or not (CHECKOUT / ".git").exists():
        pytest.skip("needs git and a git checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=CHECKOUT, capture_output=True, check=True).stdout.decode()
    return [CHECKOUT / name for name in listed.split("\0") if name and (CHECKOUT / name).is_file()]


# Put together from pieces, or this file would be the first to fail.
LOCAL = [
    *("/" + folder + "/" for folder in ("work", "root", "home", "Users")),
    "--index" + "-url",
    "--extra-index" + "-url",
    "files.python" + "hosted",
]
REGISTRY = re.compile(r"https?://[^\s\"'/]*" + "py" + "pi")


def local_parts(text: str) -> list[str]:
    """What in a text holds on one machine or in one network only."""
    return [part for part in LOCAL if part in text] + REGISTRY.findall(text)


def test_nothing_local_is_in_the_repository() -> None:
    found = [
        f"{path.relative_to(CHECKOUT)}: {part}"
        for path in repository_files()
        for part in local_parts(path.read_text(encoding="utf-8", errors="ignore"))
    ]
    assert not found, "\n".join(found)


def test_local_parts_are_recognised() -> None:
    assert local_parts("cd " + "/ho" + "me/someone/project")
    assert local_parts("htt" + "ps://py" + "pi.example/simple")
    assert not local_parts("https://arxiv.org/abs/2006.07540 network/working.py")


def anchors(page: Path) -> set[str]:
    """What links can name on a page of Markdown: its headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page", [CHECKOUT / "README.md", *(CHECKOUT / "docs").glob("*.md")], ids=lambda page: page.name
)
def test_links_between_pages_lead_somewhere(page):
    for link in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}"
