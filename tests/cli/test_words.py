"""Words of a command line: what Hydra would not read is read as what was meant, or told in one line."""

from pathlib import Path

import pytest
from command_line import TINY, CommandLine
from test_bad_input import assert_refused

from mp_lightning.cli.words import compose, split_words


@pytest.mark.parametrize(
    "name", ["ü.npz", "it's.npz", "a(1).npz", "a#b&c.npz", "a=b.npz", "lr=1e-3/ü's.npz", "plain.npz", "a b.npz"]
)
def test_names_of_files_need_no_quotes_of_hydra(name: str) -> None:
    _, (one, several, arms) = split_words([f"data={name}", f"data=[{name},{name}]", f"arms=[none,metaperturb:{name}]"])
    assert compose("fit", [one]).data == name
    assert list(compose("fit", [several]).data) == [name, name]
    assert list(compose("compare", [arms]).arms) == ["none", f"metaperturb:{name}"]


def test_a_leading_tilde_is_the_home_folder() -> None:
    _, words = split_words(["hydra.run.dir=~/runs", "data=[~/a.npz,b.npz]"])
    config = compose("fit", words)
    assert config.hydra.run.dir == str(Path.home() / "runs")
    assert list(config.data) == [str(Path.home() / "a.npz"), "b.npz"]


@pytest.mark.parametrize(
    "word", ["seed=1,2", "meta.lr=interval(0,1)", 'data="a,b.npz"', "data=[a,'b=c']", "~trainer.x"]
)
def test_what_hydra_reads_is_left_as_it_is(word: str) -> None:
    assert split_words([word])[1] == [word]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["fit", "experiment=paper"], "'experiment=paper' is not read without a plus; write +experiment=paper"),
        (["compare", "+experiment=paper"], "sets keys that compare does not have; it is an experiment of another verb"),
        (["fit", "--resolve"], "write it beside --cfg job"),
        (["fit", "--hydra-help"], "unknown option '--hydra-help'"),
        (["fit", "~logger._target_"], "logger: None is no logger of Lightning; choose logger=tensorboard"),
        (["fit", "logger._target_=builtins.dict"], "logger: builtins.dict is no logger of Lightning"),
        (["sites", "model=ends.py:net"], "network 'ends.py:net' failed: SystemExit: 5"),
        (["sites", "model=ends_at_once.py:net"], "ends_at_once.py cannot be imported (SystemExit: 3)"),
    ],
)
def test_a_slip_is_told_in_one_line(mp: CommandLine, tmp_path: Path, words: list[str], part: str) -> None:
    (tmp_path / "ends.py").write_text("import sys\n\ndef net():\n    sys.exit(5)\n")
    (tmp_path / "ends_at_once.py").write_text("raise SystemExit(3)\n")
    assert_refused(mp, tmp_path, words, part)


def test_a_refused_command_leaves_the_record_of_the_run_that_is_there(mp: CommandLine, tmp_path: Path) -> None:
    words = [*TINY, "hydra.run.dir=run"]
    assert mp(tmp_path, "fit", *words, "seed=5").code == 0
    kept = {path.name: path.read_text() for path in (tmp_path / "run" / ".hydra").iterdir()}
    assert "seed: 5" in kept["config.yaml"] and "seed=5" in kept["overrides.yaml"]
    assert_refused(mp, tmp_path, ["fit", *words, "seed=6"], "holds a run with seed=5, not 6")
    assert {path.name: path.read_text() for path in (tmp_path / "run" / ".hydra").iterdir()} == kept
