"""Moments of phi's multiplier, which controls are matched to."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_runs import PHI, Small, SmallData, experiment
from torch.utils.data import DataLoader

from mp_lightning.compare.calibration import (
    matched_moments,
    moments_digest,
    read_moments,
    write_moments,
)
from mp_lightning.compare.moments import SiteMoments
from mp_lightning.compare.user_data import UserData
from mp_lightning.perturbation import initial_phi, load_phi, phi_digest
from mp_lightning.runs import RunFolderError
from mp_lightning.sites import attachment_of, find_sites


def test_moments_are_those_of_a_multiplier_of_phi_at_every_site(tmp_path: Path) -> None:
    found = matched_moments(experiment(), PHI, tmp_path)
    assert [site for site, _, _ in found] == list(find_sites(Small()).names)
    # Of a phi before meta-training the scale is about 0.5 and the noise softplus(N(0, 1)): 0.806, deviation 0.521.
    assert found[0].mean == pytest.approx(0.403, rel=0.05)
    assert found[0].var ** 0.5 == pytest.approx(0.5 * 0.521, rel=0.05)


def test_they_are_measured_once_for_each_phi_and_again_if_the_file_is_damaged(tmp_path: Path) -> None:
    made: list[int] = []

    def factory() -> Small:
        made.append(1)
        return Small()

    what = experiment(module_factory=factory)
    first = matched_moments(what, PHI, tmp_path)
    assert matched_moments(what, PHI, tmp_path) == first and len(made) == 1
    other = load_phi(initial_phi(9))
    assert phi_digest(other) != phi_digest(PHI)
    uses = [{}, {"strength": 0.5}, {"share_of_sites": 0.5}, {"noise_per": "channel"}, {"full_strength_at": 0.5}]
    uses += [{"full_strength_at": 0.5, "acts_below": 0.8}]
    assert len({phi_digest(replace(PHI, **use)) for use in uses}) == len(uses)
    matched_moments(what, other, tmp_path)
    assert len(made) == 2 and len(list(tmp_path.iterdir())) == 2
    path = tmp_path / f"moments-{phi_digest(PHI)}.json"
    for damage in ("{", "[]", json.dumps({"sites": [1]})):
        path.write_text(damage)
        assert matched_moments(what, PHI, tmp_path) == first


def test_the_pilot_run_is_that_of_the_arm_and_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    """As long, and with the strength of that batch: a phi may do something else when a network has learned."""
    strengths: list[float] = []

    class Long(SmallData):
        def train_dataloader(self):
            return DataLoader(self.train, batch_size=1, sampler=[0] * 70, num_workers=0)

    class Noting(Small):
        def training_step(self, batch, batch_idx):
            strengths.append(float(attachment_of(self).coeff))
            return super().training_step(batch, batch_idx)

    told: list[int] = []
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    what = experiment(module_factory=Noting, data=UserData(Long()))
    matched_moments(what, PHI, tmp_path, lambda: nullcontext(told.append))
    assert torch.equal(torch.rand(3), expected)
    assert len(strengths) == sum(told) == 140, "both epochs"
    assert strengths[28] == pytest.approx(0.5) and strengths[56:] == [1.0] * 84, "a ramp over 40 % of them"


def test_moments_are_those_of_a_network_that_has_learned(tmp_path: Path) -> None:
    found = []
    for epochs in (1, 6):
        (tmp_path / str(epochs)).mkdir()
        what = experiment()
        what = replace(what, trainer={**what.trainer, "max_epochs": epochs})
        found.append(matched_moments(what, load_phi("tiny-imagenet-5"), tmp_path / str(epochs)))
    (short,), (longer,) = found
    assert short.site == longer.site and short.mean != pytest.approx(longer.mean, rel=1e-3)


def test_moments_that_were_measured_after_a_hundred_steps_are_measured_again(tmp_path: Path) -> None:
    """As they were before; a multiplier that shrinks later on was matched by one that does not."""
    first = matched_moments(experiment(), PHI, tmp_path)
    path = tmp_path / f"moments-{phi_digest(PHI)}.json"
    path.write_text(json.dumps({"phi": "given phi", "steps": 100, "sites": [["conv", 9.0, 9.0]]}))
    assert matched_moments(experiment(), PHI, tmp_path) == first


def test_moments_that_were_written_and_read_are_the_same_to_the_last_digit(tmp_path: Path) -> None:
    moments = [SiteMoments("net.2", 1 / 3, 0.1 + 0.2), SiteMoments("net.5", 1e-17, 0.0)]
    write_moments(tmp_path / "moments.json", "mine", moments)
    found = read_moments(tmp_path / "moments.json")
    assert found == moments and moments_digest(found) == moments_digest(moments)
    assert moments_digest(moments) != moments_digest(moments[::-1])
    assert read_moments(tmp_path / "absent.json") is None


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="cannot be written"):
        matched_moments(experiment(), PHI, tmp_path / "absent")
