"""The page of ``VERB --help`` names every key and every choice of the configuration as it is now."""

from pathlib import Path

import pytest
from command_line import CommandLine, shared_command_line
from omegaconf import OmegaConf

from mp_lightning.cli.help import WIDTH, read_comments

CONF = Path(__file__).resolve().parents[2] / "conf"


@pytest.fixture(scope="module")
def page() -> str:
    commands: CommandLine = shared_command_line()
    done = commands(Path("/"), "fit", "meta.steps=3", "--help")  # wherever the word stands
    assert done.code == 0 and done.stderr == ""
    return done.stdout


def test_three_examples(page: str) -> None:
    examples = page.partition("examples:\n")[2].partition("\n\n")[0]
    commands = [line.strip() for line in examples.splitlines() if line.startswith("  python")]
    assert len(commands) == 3 and all(line.startswith("python -m mp_lightning.meta fit") for line in commands)
    assert any("trainer.devices=2" in line for line in commands) and any(line.endswith(" -m") for line in commands)


@pytest.mark.parametrize("group", ["meta", "tasks", "evaluation", "trainer"])
def test_every_key_of_a_group_with_its_meaning(page: str, group: str) -> None:
    (file,) = (CONF / group).glob("*.yaml")
    text = file.read_text()
    values = OmegaConf.to_container(OmegaConf.create(text))
    assert isinstance(values, dict) and values
    flat = " ".join(page.split())
    for key in values:
        assert f"  {group}.{key}=" in page
    for meaning in read_comments(text).keys.values():
        assert " ".join(meaning.split()) in flat


def test_every_choice(page: str) -> None:
    for group in ("sources", "experiment", "logger"):
        names = [file.stem for file in (CONF / group).glob("*.yaml")]
        assert names
        for name in names:
            assert (name in page) == (name != "paper_transfer"), "of compare"
    assert "+experiment=paper" in page and "\nsources=cifar" in page and "logger=tensorboard (or csv, wandb)" in page


def test_it_fits_a_terminal(page: str) -> None:
    assert max(map(len, page.splitlines())) <= WIDTH


def test_select_has_a_page() -> None:
    done = shared_command_line()(Path("/"), "select", "-h")
    assert done.code == 0 and "  by=nll" in done.stdout and "experiment" not in done.stdout


def test_comments_belong_to_the_key_below_or_before_them() -> None:
    comments = read_comments("# The file.\na: 1 # one\n# two\n# lines\nb:\n  c: 3\n  d: 4 # inside\n")
    assert comments.file == "The file."
    assert comments.keys == {"a": "one", "b": "two lines", "b.d": "inside"}
