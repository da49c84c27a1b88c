"""Networks of a file of the user's own."""

import pickle
import sys

import pytest

from mp_lightning.backbones.anyone import find_object
from mp_lightning.errors import ConfigurationError

NET = "from torch import nn\n\n\nclass Net(nn.Linear):\n    def __init__(self):\n        super().__init__(2, 2)\n"


def test_a_file_may_import_another_that_lies_beside_it(tmp_path):
    (tmp_path / "beside_it.py").write_text("WIDTH = 3\n")
    (tmp_path / "of_mine.py").write_text(
        "from torch import nn\nfrom beside_it import WIDTH\nnet = nn.Linear(WIDTH, 1)\n"
    )
    path = list(sys.path)
    assert find_object(f"{tmp_path / 'of_mine.py'}:net").in_features == 3
    assert sys.path == path


def test_a_folder_that_python_looks_in_already_stays_where_it_was(tmp_path, monkeypatch):
    (tmp_path / "of_mine_too.py").write_text("from torch import nn\nnet = nn.Linear(3, 1)\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    path = list(sys.path)
    find_object(f"{tmp_path / 'of_mine_too.py'}:net")
    assert sys.path == path


@pytest.mark.parametrize("name", ["json", "net_of_its_own"])
def test_a_network_of_a_file_can_be_pickled_whatever_the_file_is_called(tmp_path, name):
    (tmp_path / f"{name}.py").write_text(NET)
    made = find_object(f"{tmp_path / name}.py:Net")()
    assert pickle.loads(pickle.dumps(made)).in_features == 2
    import json

    assert hasattr(json, "dumps")


def test_a_file_that_cannot_be_run_leaves_nothing_behind(tmp_path):
    (tmp_path / "broken_one.py").write_text("raise RuntimeError('no')\n")
    with pytest.raises(ConfigurationError, match=r"cannot be imported \(RuntimeError: no\)"):
        find_object(f"{tmp_path / 'broken_one.py'}:net")
    assert "broken_one" not in sys.modules
