"""theta of one task: how it is learned, and how it is thrown away."""

import random
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import SETTINGS, assert_same, new_module, tiny_tasks
from torch import nn

from mp_lightning.compare.architecture import Architecture
from mp_lightning.errors import ConfigurationError
from mp_lightning.meta.learner import Learner
from mp_lightning.perturbation import NoisePer
from mp_lightning.sites.attachment import NAME


def test_phi_is_learned_at_full_strength_and_with_the_clip_of_the_paper() -> None:
    attachment = new_module().learner("first-a").attachment
    assert (float(attachment.coeff), attachment.clip, attachment.ramp_steps) == (1.0, 100.0, None)


def test_phi_is_learned_at_the_strength_that_is_set() -> None:
    assert float(new_module(replace(SETTINGS, strength=0.75)).learner("first-a").attachment.coeff) == 0.75


def test_theta_learns_from_training_images_and_phi_from_the_others() -> None:
    learner, other = (new_module().learner("first-a") for _ in range(2))
    held_out = other.task.valid
    other.task = replace(other.task, valid=replace(held_out, labels=held_out.labels.flip(0)))
    one, two = learner.step(0), other.step(0)
    assert torch.equal(one.train_loss, two.train_loss)
    assert not torch.equal(one.valid_loss, two.valid_loss)


def test_a_network_that_was_left_in_evaluation_mode_learns_all_the_same() -> None:
    learner, other = (new_module().learner("first-a") for _ in range(2))
    other.model.eval()
    assert_same(list(learner.step(0)), list(other.step(0)))


def test_theta_is_optimized_by_adam_with_its_own_settings() -> None:
    learner = new_module(replace(SETTINGS, theta_lr=0.25, theta_weight_decay=0.125)).learner("second-b")
    (group,) = learner.optimizer.param_groups
    assert isinstance(learner.optimizer, torch.optim.Adam)
    assert (group["lr"], group["weight_decay"], group["betas"]) == (0.25, 0.125, (0.9, 0.999))


def test_a_restarted_network_is_another_one() -> None:
    learner = new_module().learner("first-a")
    first, seed = learner.model.fc.weight.clone(), learner.attachment.seed
    learner.step(0)
    assert learner.optimizer.state_dict()["state"]
    learner.restart()
    assert learner.generation == 1
    assert not torch.equal(learner.model.fc.weight, first)
    assert learner.attachment.seed != seed
    assert not learner.optimizer.state_dict()["state"]


def with_dropout() -> Learner:
    """One whose network draws from torch's generator."""
    learner = new_module().learner("second-a")
    learner.model.fc = nn.Sequential(nn.Dropout(0.5), learner.model.fc)
    return learner


def test_a_step_depends_on_its_number_and_state_alone() -> None:
    """Not on what was drawn before it, by this task or by others."""
    one, other = with_dropout(), with_dropout()
    torch.rand(3)
    first = one.step(0)
    torch.rand(5)
    again = other.step(0)
    assert_same(list(first), list(again))
    assert_same(one.state(), other.state())
    assert not torch.equal(one.step(1).train_loss, other.step(2).train_loss)


def test_a_step_leaves_the_global_generator_and_phi_alone() -> None:
    learner = with_dropout()
    phi = list(learner.attachment.perturbation.parameters())
    state, before = torch.get_rng_state(), [p.detach().clone() for p in phi]
    learner.step(0)
    assert torch.equal(state, torch.get_rng_state())
    assert_same([p.detach() for p in phi], before)
    assert all(p.grad is None for p in phi)


@pytest.mark.parametrize(("generation", "noise_per"), [(0, "element"), (2, "element"), (0, "channel")])
def test_a_learner_goes_on_from_its_state(generation: int, noise_per: NoisePer) -> None:
    settings = replace(SETTINGS, noise_per=noise_per)
    learner = new_module(settings).learner("second-b")
    for _ in range(generation):
        learner.restart()
    learner.step(0)
    twin = new_module(settings).learner("second-b")
    twin.load_state(deepcopy(learner.state()))
    assert twin.attachment.perturbation.noise_per == noise_per
    assert_same(list(twin.step(1)), list(learner.step(1)))
    assert_same(twin.state(), learner.state())


def test_weights_that_a_learner_gave_stay_as_they_were() -> None:
    learner = new_module().learner("first-a")
    weights = learner.state()["theta"]
    before = deepcopy(weights)
    learner.step(0)
    assert_same(weights, before)
    assert not torch.equal(learner.state()["theta"]["fc.weight"], before["fc.weight"])


def test_a_learner_perturbs_its_share_of_the_sites() -> None:
    whole, half = (new_module(replace(SETTINGS, share_of_sites=share)).learner("second-b") for share in (1.0, 0.5))
    names = whole.attachment.plan.names
    assert len(names) > 1 and half.attachment.plan.names == names[len(names) // 2 :]
    assert any(gradient.abs().sum() > 0 for gradient in half.step(0).gradients)


def test_watching_changes_no_number_and_sees_every_site() -> None:
    blind, watched = (new_module().learner("first-b").step(0, watch) for watch in (False, True))
    assert blind.observed is None and watched.observed is not None
    assert torch.equal(blind.train_loss, watched.train_loss)
    # The readable path, which is watched, computes the same function with other roundings.
    torch.testing.assert_close(blind.valid_loss, watched.valid_loss)
    torch.testing.assert_close(blind.gradients, watched.gradients, rtol=1e-3, atol=1e-6)
    sites = len(new_module().learner("first-b").attachment.plan)
    assert {quantity: len(values) for quantity, values in watched.observed.items()} == {
        "scale": sites,
        "noise": sites,
        "multiplier": sites,
    }
    for s, z, product in zip(*(watched.observed[name] for name in ("scale", "noise", "multiplier")), strict=True):
        assert 0 < s < 1 and z > 0
        assert product == pytest.approx(s * z, rel=0.05)


OWN = """
import random
import numpy as np
from torch import nn

class Net(nn.Sequential):
    def __init__(self, num_classes):
        first = nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU()
        second = nn.Conv2d(4, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        super().__init__(*first, *second, nn.Flatten(), nn.Linear(4, num_classes))

class Partly(Net):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self[0].requires_grad_(False)
        self[7].unused = nn.Linear(2, 2)

class Drawing(Net):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.factor = 1 + random.random()

    def forward(self, x):
        return super().forward(x) * self.factor * np.random.rand()

class Detached(Net):
    def forward(self, x):
        for layer in list(self)[:-1]:
            x = layer(x)
        return self[-1](x.detach())
"""


def own_learner(folder: Path, name: str) -> Learner:
    """One of a network that the user's own code makes."""
    (folder / "own.py").write_text(OWN)
    architecture = f"{folder / 'own.py'}:{name}"
    Architecture.parse(architecture).check(16)
    return new_module(tasks=tiny_tasks(architectures=[architecture])).learner("first-a")


def test_weights_that_are_frozen_or_not_used_stay_as_they_are(tmp_path: Path) -> None:
    learner = own_learner(tmp_path, "Partly")
    before = deepcopy(dict(learner.model.named_parameters()))
    step = learner.step(0)
    assert any(gradient.abs().sum() > 0 for gradient in step.gradients)
    kept = {name for name, value in learner.model.named_parameters() if torch.equal(value, before[name])}
    theta = {name for name in kept if not name.startswith(NAME)}
    assert theta == {"0.weight", "0.bias", "7.unused.weight", "7.unused.bias"}
    twin = own_learner(tmp_path, "Partly")
    twin.load_state(deepcopy(learner.state()))
    assert_same(list(twin.step(1)), list(learner.step(1)))


def test_a_network_may_draw_from_the_generators_of_python_and_numpy(tmp_path: Path) -> None:
    """In its constructor and in its forward; a continued run draws the same."""
    steps = []
    for seed in range(2):
        random.seed(seed)
        np.random.seed(seed)
        steps.append(list(own_learner(tmp_path, "Drawing").step(0)))
    assert_same(*steps)


def test_a_network_that_phi_does_not_reach_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"^architecture '.*own.py:Detached': its output does not depend on"):
        own_learner(tmp_path, "Detached").step(0)
