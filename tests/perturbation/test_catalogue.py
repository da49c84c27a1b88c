"""The phi that come with the package: their cards say what a user must know, and their files are the ones described."""

import re
import shutil

import pytest
import torch

import mp_lightning
from golden_files import golden_phi, load_golden
from mp_lightning.errors import PhiError
from mp_lightning.perturbation import catalogue, describe_phi, files, list_phi, load_phi, save_phi
from mp_lightning.perturbation.files import BUNDLED, DEFAULT_PHI

NEEDED = ("sources", "data_terms", "architectures", "seed", "settings", "known_limits", "command", "versions", "sha256")


def test_the_default_is_one_of_them_and_both_functions_are_public():
    assert DEFAULT_PHI in mp_lightning.list_phi()
    default = mp_lightning.describe_phi()
    assert default.name == DEFAULT_PHI and default.default
    assert (default.noise_per, default.share_of_sites) == ("channel", pytest.approx(1 / 3))
    assert (default.strength, default.full_strength_at, default.acts_below) == pytest.approx((0.95, 0.4, 0.6))


@pytest.mark.parametrize("name", list_phi())
def test_a_card_tells_all_that_it_must(name):
    described = describe_phi(name)
    assert [key for key in NEEDED if described.card.get(key) in (None, "", [], {})] == []
    assert described.strength == load_phi(name).strength
    text = str(described)
    assert text.startswith(name) and f"strength {described.strength:g}" in text and described.card["sha256"] in text
    assert max(map(len, text.splitlines())) < 140 and repr(described) == text
    assert "/" not in described.card["command"].replace("+experiment", "")  # no folder of the machine that made it


@pytest.mark.parametrize("name", list_phi())
def test_the_published_numbers_are_not_shipped(name):
    published = golden_phi(load_golden("published_phi.npz"), "")
    numbers = torch.cat([value.flatten() for value in load_phi(name).phi])
    theirs = torch.cat([value.flatten() for value in published])
    assert float((numbers - theirs).norm() / theirs.norm()) > 0.1


def test_each_result_of_a_card_is_a_line_of_its_own():
    lines = [line.strip() for line in str(describe_phi()).splitlines()]
    results = describe_phi().card["results"]["against no phi"]
    start = lines.index("against no phi:") + 1
    found = " ".join(lines[start : start + 3 * len(results)])
    assert found.startswith(f"- {' - '.join(results)}"[: len(found)][:400]) and lines[start].startswith(
        "- imagenette, "
    )


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(PhiError, match=f"no phi 'imagenet' comes with the package; name one of .*{DEFAULT_PHI}"):
        describe_phi("imagenet")


def test_a_bundled_file_that_was_changed_is_refused(tmp_path, monkeypatch):
    for path in BUNDLED.glob(f"{DEFAULT_PHI}.*"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(files, "BUNDLED", tmp_path)
    monkeypatch.setattr(catalogue, "BUNDLED", tmp_path)
    assert describe_phi().name == DEFAULT_PHI
    changed = tmp_path / f"{DEFAULT_PHI}.safetensors"
    changed.write_bytes(changed.read_bytes()[:-4] + b"\x00\x00\x80\x3f")
    with pytest.raises(PhiError, match="SHA-256 differs"):
        describe_phi()
    with pytest.raises(PhiError, match="SHA-256 differs"):
        load_phi()


def test_a_phi_of_ones_own_is_described_by_its_card(tmp_path):
    save_phi(tmp_path / "mine.safetensors", load_phi(DEFAULT_PHI), {"kind": "my own", "tasks": 10})
    described = describe_phi(tmp_path / "mine.safetensors")
    assert described.card["kind"] == "my own" and not described.default and described.picture is None
    assert "my own" in str(described) and re.search(r"tasks +10\n", str(described))
    assert describe_phi(None).name == DEFAULT_PHI
    with pytest.raises(PhiError, match="was given a NamedPhi; give a file"):
        describe_phi(load_phi())
