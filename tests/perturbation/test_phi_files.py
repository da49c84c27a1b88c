"""phi files: what is written comes back, and what is not a phi gets one clear line."""

import json
import math
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mp_lightning.errors import ConfigurationError, PhiError
from mp_lightning.perturbation import MetaPerturb, NamedPhi, Phi, initial_phi, list_phi, load_phi, phi_digest, save_phi


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "phi.safetensors"
    save_phi(path, initial_phi(3), {"seed": 3})
    return path


def mine(**meant_for):
    return NamedPhi(initial_phi(3), "x", **meant_for)


def test_round_trip(saved):
    loaded = load_phi(saved)
    assert all(torch.equal(a, b) for a, b in zip(loaded.phi, initial_phi(3), strict=True))
    assert loaded.card["seed"] == 3
    assert len(loaded.card["sha256"]) == 64


def test_a_file_in_the_home_folder_is_found(saved, monkeypatch):
    monkeypatch.setenv("HOME", str(saved.parent))
    assert load_phi("~/phi.safetensors").card["seed"] == 3


def test_card_is_optional(saved):
    saved.with_suffix(".json").unlink()
    assert load_phi(saved).card == {}


def test_strength_comes_back_and_that_of_the_paper_leaves_82_numbers(saved, tmp_path):
    assert load_phi(saved).strength == 1
    assert sum(value.numel() for value in load_file(saved).values()) == 82
    save_phi(tmp_path / "weaker.safetensors", mine(strength=0.7), {})
    assert load_phi(tmp_path / "weaker.safetensors").strength == 0.7
    assert sum(value.numel() for value in load_file(tmp_path / "weaker.safetensors").values()) == 83


@pytest.mark.parametrize("what", [None, "tiny-imagenet-5", {}])
def test_only_a_phi_is_written(tmp_path, what):
    with pytest.raises(ConfigurationError, match=f"a Phi or a NamedPhi, not a {type(what).__name__}"):
        save_phi(tmp_path / "phi.safetensors", what, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("strength", [0, -0.5, 1.01, math.nan, "0.5", True])
def test_a_strength_out_of_range_is_not_written(tmp_path, strength):
    with pytest.raises(ConfigurationError, match=f"strength of phi 'x'={strength} cannot be used; give a number above"):
        save_phi(tmp_path / "phi.safetensors", mine(strength=strength), {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "meant_for",
    [
        {"strength": 1 / 3},
        {"strength": 0.123456789},
        {"strength": 1 - 1e-9},
        {"share_of_sites": 2 / 3, "strength": 0.1},
    ],
)
def test_a_phi_is_the_same_after_it_was_written_and_read(tmp_path, meant_for):
    phi = mine(**meant_for)
    save_phi(tmp_path / "phi.safetensors", phi, {})
    loaded = load_phi(tmp_path / "phi.safetensors")
    assert phi_digest(loaded) == phi_digest(phi)
    assert (loaded.strength, loaded.share_of_sites) == (phi.strength, phi.share_of_sites)


@pytest.mark.parametrize(
    ("meant_for", "message"),
    [
        ({"strength": 1e-50}, "strength of phi 'x'=0.0 cannot be used"),
        ({"full_strength_at": 0.4, "acts_below": 0.40000001}, "acts_below of phi 'x'=0.4 cannot be used"),
    ],
)
def test_what_a_file_cannot_hold_is_not_written(tmp_path, meant_for, message):
    with pytest.raises(ConfigurationError, match=message):
        save_phi(tmp_path / "phi.safetensors", mine(**meant_for), {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("phi", "message"),
    [
        (Phi(*(value.numpy() for value in initial_phi(0))), "'op1_identity' is a ndarray; give a tensor"),
        (NamedPhi(initial_phi(0)._asdict(), "x"), "phi 'x' holds a dict instead of a Phi"),
    ],
)
def test_numbers_that_are_no_tensors_are_refused(phi, message):
    with pytest.raises(PhiError, match=message):
        load_phi(phi)


def test_a_net_takes_the_numbers_alone():
    with pytest.raises(ConfigurationError, match="not a NamedPhi; of a NamedPhi give its phi"):
        MetaPerturb(load_phi())


def damage_missing(path):
    path.unlink()


def damage_truncated(path):
    path.write_bytes(path.read_bytes()[:100])


def damage_pickle(path):
    path.write_bytes(pickle.dumps({"op1_identity": [1.0]}))


def damage_empty(path):
    path.write_bytes(b"")


def damage_changed_after_its_card(path):
    content = path.read_bytes()
    path.write_bytes(content[:-4] + b"\x00\x00\x80\x3f")


def rewrite(path, **changes):
    path.with_suffix(".json").unlink()
    save_file({**initial_phi(0)._asdict(), **changes}, path)


def damage_shape(path):
    rewrite(path, op1_all=torch.zeros(5, 5))


def damage_not_finite(path):
    rewrite(path, scale_weight=torch.full((10,), float("nan")))


def damage_names(path):
    rewrite(path, another=torch.zeros(1))


def damage_strength(value):
    def damage(path):
        rewrite(path, strength=torch.tensor(value))

    return damage


def damage_share(value):
    def damage(path):
        rewrite(path, share_of_sites=torch.tensor(value))

    return damage


def damage_noise(value):
    def damage(path):
        rewrite(path, noise_per_channel=torch.tensor(value))

    return damage


def damage_card(path):
    path.with_suffix(".json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_missing, "does not exist"),
        (damage_truncated, "not a whole safetensors file"),
        (damage_pickle, "not a whole safetensors file"),
        (damage_empty, "not a whole safetensors file"),
        (damage_changed_after_its_card, "SHA-256 differs"),
        (damage_shape, "'op1_all' is \\(5, 5\\)"),
        (damage_not_finite, "'scale_weight' holds numbers that are not finite"),
        (damage_names, "holds another"),
        *((damage_strength(bad), "'strength' is not a single number above 0") for bad in (0.0, 1.5, math.nan, [0.5])),
        *(
            (damage_share(bad), "'share_of_sites' is not a single number above 0")
            for bad in (0.0, 2.0, math.nan, [0.5])
        ),
        *((damage_noise(bad), "'noise_per_channel' is not 0 or 1") for bad in (0.5, math.nan, [1.0])),
        (damage_card, "not readable JSON"),
    ],
)
def test_bad_file_is_named_in_one_line(saved, damage, reason):
    damage(saved)
    with pytest.raises(PhiError, match=reason) as caught:
        load_phi(saved)
    assert str(saved.with_suffix("")) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_default_is_bundled_trained_and_says_what_it_is():
    phi = load_phi()
    assert phi.name in list_phi()
    assert phi.card["steps"] > 0
    assert phi.card["status"] in str(phi) and "early" in phi.card["status"]
    assert "python -m mp_lightning.meta fit" in phi.card["command"]
    assert json.dumps(phi.card)
    assert max(value.abs().max() for value in phi.phi) > 0.1  # a random phi stays below 0.05


def test_what_noise_is_drawn_for_comes_back(saved, tmp_path):
    assert load_phi(saved).noise_per == "element"
    card = save_phi(tmp_path / "other.safetensors", mine(strength=0.7, noise_per="channel"), {})
    loaded = load_phi(tmp_path / "other.safetensors")
    assert (loaded.noise_per, loaded.strength, loaded.card) == ("channel", 0.7, card)
    with pytest.raises(ConfigurationError, match="noise_per of phi 'x'=row is unknown; use one of element, channel"):
        save_phi(tmp_path / "phi2.safetensors", mine(noise_per="row"), {})
    assert not (tmp_path / "phi2.safetensors").exists()


def test_the_loss_from_which_all_of_the_strength_acts_comes_back(saved, tmp_path):
    assert load_phi(saved).full_strength_at == 1
    card = save_phi(tmp_path / "other.safetensors", mine(full_strength_at=0.4), {})
    loaded = load_phi(tmp_path / "other.safetensors")
    assert (loaded.full_strength_at, loaded.strength, loaded.card) == (pytest.approx(0.4), 1, card)
    with pytest.raises(ConfigurationError, match="full_strength_at of phi 'x'=0 cannot be used"):
        save_phi(tmp_path / "phi2.safetensors", mine(full_strength_at=0), {})
    with pytest.raises(ConfigurationError, match="full_strength_at of phi 'x'=2 cannot be used"):
        load_phi(NamedPhi(initial_phi(3), "x", full_strength_at=2))
    assert not (tmp_path / "phi2.safetensors").exists()


def test_the_loss_below_which_it_acts_comes_back(saved, tmp_path):
    assert load_phi(saved).acts_below == 1
    path = tmp_path / "other.safetensors"
    card = save_phi(path, mine(full_strength_at=0.4, acts_below=0.6), {})
    assert (load_phi(path).acts_below, card["acts_below"]) == (pytest.approx(0.6), pytest.approx(0.6))
    with pytest.raises(ConfigurationError, match=r"acts_below of phi 'x'=0.4 cannot be used with full_strength_at=0.4"):
        save_phi(path, mine(full_strength_at=0.4, acts_below=0.4), {})
    rewrite(path, full_strength_at=torch.tensor(0.4), acts_below=torch.tensor(0.3))
    with pytest.raises(PhiError, match="'acts_below' is not above 'full_strength_at'"):
        load_phi(path)


def test_the_share_of_the_sites_comes_back(saved, tmp_path):
    assert load_phi(saved).share_of_sites == 1
    card = save_phi(tmp_path / "other.safetensors", mine(share_of_sites=0.3), {})
    loaded = load_phi(tmp_path / "other.safetensors")
    assert (loaded.share_of_sites, loaded.strength, loaded.card) == (0.3, 1, card)
    with pytest.raises(ConfigurationError, match="share_of_sites of phi 'x'=2 cannot be used"):
        save_phi(tmp_path / "phi2.safetensors", mine(share_of_sites=2), {})
    with pytest.raises(ConfigurationError, match="share_of_sites of phi 'x'=0 cannot be used"):
        load_phi(NamedPhi(initial_phi(3), "x", share_of_sites=0))
    assert not (tmp_path / "phi2.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"strength": torch.tensor(0.5 + 0j)}, "'strength' is not a single number"),
        ({"noise_per_channel": torch.tensor(1 + 0j)}, "'noise_per_channel' is not 0 or 1"),
        ({"op1_all": torch.full((3, 3), 1e300, dtype=torch.float64)}, "'op1_all' holds numbers that are not finite"),
    ],
)
def test_numbers_that_cannot_be_used_as_they_are_stored_are_refused(saved, changes, reason):
    rewrite(saved, **changes)
    with pytest.raises(PhiError, match=reason):
        load_phi(saved)


def test_numbers_of_eight_bits_are_read(saved):
    rewrite(saved, op1_all=torch.full((3, 3), 0.5).to(torch.float8_e4m3fn))
    assert torch.equal(load_phi(saved).phi.op1_all, torch.full((3, 3), 0.5))


@pytest.mark.parametrize(
    ("name", "card", "reason"),
    [("phi.json", {}, "ends in .safetensors"), ("phi.safetensors", {"made by": object()}, "cannot be written as JSON")],
)
def test_what_cannot_be_written_leaves_the_old_file_alone(tmp_path, name, card, reason):
    before = save_phi(tmp_path / "phi.safetensors", initial_phi(0), {})
    content = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigurationError, match=reason):
        save_phi(tmp_path / name, initial_phi(1), card)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == content and before["sha256"]


@pytest.mark.parametrize("place", ["absent/phi.safetensors", "folder.safetensors"])
def test_a_place_that_cannot_be_written_to_is_named_and_nothing_is_left(tmp_path, place):
    (tmp_path / "folder.safetensors").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigurationError, match=r"cannot be written \((No such file|Is a directory).*; give a place"):
        save_phi(tmp_path / place, initial_phi(0), {})
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("refused", [".json", ".safetensors"])
def test_phi_and_its_card_are_replaced_together_or_not_at_all(tmp_path, monkeypatch, refused):
    path = tmp_path / "phi.safetensors"
    save_phi(path, initial_phi(0), {"seed": 0})
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    write = Path.write_bytes

    def full(self, content):
        if refused in self.name:
            raise OSError(28, "No space left on device")
        return write(self, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ConfigurationError, match="No space left on device"):
        save_phi(path, initial_phi(1), {"seed": 1})
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert load_phi(path).card["seed"] == 0


@pytest.mark.parametrize("text", ['{"birds": 3}', "[1]", "no JSON"])
def test_a_json_file_that_is_no_card_is_not_replaced(tmp_path, text):
    (tmp_path / "phi.json").write_text(text)
    with pytest.raises(ConfigurationError, match=r"would replace .*phi\.json', which is something else; remove that"):
        save_phi(tmp_path / "phi.safetensors", initial_phi(0), {})
    assert [file.name for file in tmp_path.iterdir()] == ["phi.json"]
    assert (tmp_path / "phi.json").read_text() == text


def test_a_card_is_a_dictionary(tmp_path):
    with pytest.raises(ConfigurationError, match="is a NoneType; give a dictionary"):
        save_phi(tmp_path / "phi.safetensors", initial_phi(0), None)


def test_a_folder_in_place_of_its_phi_is_told_the_file(tmp_path):
    with pytest.raises(PhiError, match=r"is a folder; give the file in it, such as '.*phi\.safetensors'"):
        load_phi(tmp_path)


@pytest.mark.parametrize("name", ["~nobody-of-this-name/a.safetensors", f"{'long' * 100}.safetensors"])
def test_names_of_which_the_system_makes_nothing_are_files_that_are_not_there(name):
    with pytest.raises(PhiError, match="does not exist"):
        load_phi(name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_phi_is_told_by_its_numbers_whatever_they_are_kept_in(dtype):
    phi = Phi(*(value.bfloat16().float() for value in initial_phi(0)))
    other = Phi(*(value.to(dtype) for value in phi))
    assert (
        phi_digest(NamedPhi(other, "a")) == phi_digest(NamedPhi(phi, "b")) != phi_digest(NamedPhi(initial_phi(1), "c"))
    )
