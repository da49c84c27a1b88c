"""The strength follows the training loss where phi asks for it."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mp_lightning.backbones import build_backbone
from mp_lightning.errors import ConfigurationError
from mp_lightning.perturbation import NamedPhi, initial_phi
from mp_lightning.sites import attach
from mp_lightning.sites.fitting import OFF, Fitting


def fitted(full_at, *losses, horizon=10):
    fitting = Fitting(full_at, persistent=False)
    for loss in losses:
        fitting.note(loss, horizon, synchronize=False)
    return fitting


def test_the_factor_is_the_part_of_the_way_down_that_the_loss_has_come():
    """First 2.0 in five batches, then 1.2, looked back over ten batches: by hand."""
    fitting = fitted(0.4, 2, 2, 2, 2, 2, 1.2)
    recent = 2 + (1.2 - 2) / 10
    assert float(fitting.first) == 2 and float(fitting.recent) == pytest.approx(recent)
    assert float(fitting.factor()) == pytest.approx((1 - recent / 2) / (1 - 0.4))


def test_the_first_loss_is_the_mean_of_five_batches():
    fitting = fitted(0.5, 1, 2, 3, 4, 5, 100)
    assert float(fitting.first) == pytest.approx(3)


def test_a_first_loss_far_above_the_others_does_not_count():
    fitting = fitted(0.4, 60, 2, 2, 2, 2, *[2] * 300)
    assert float(fitting.first) == 2 and float(fitting.factor()) == pytest.approx(0, abs=1e-3)


def test_a_first_loss_far_above_the_others_is_forgotten_at_once():
    """Looked back over 50 batches it would hold the recent loss above the first one for more than 150."""
    fitting = fitted(0.4, 60, 2, 2, 2, 2, horizon=50)
    assert float(fitting.recent) == 2
    usual = fitted(0.4, 2.5, 2, 2, 2, 2, horizon=50)
    assert float(usual.recent) == pytest.approx(2 + 0.5 * (1 - 1 / 50) ** 4)


def test_the_mean_of_a_loss_for_each_image_counts():
    fitting = Fitting(0.4, persistent=False)
    fitting.note(torch.tensor([1.0, 3.0], dtype=torch.float64), 10, synchronize=False)
    assert float(fitting.first) == 2


def test_its_state_comes_back():
    fitting, other = fitted(0.4, 2, 2, 1), fitted(OFF)
    other.load_state(fitting.state())
    assert torch.equal(other.factor(), fitting.factor()) and other.follows and other.told
    kept = Fitting(OFF, persistent=True)
    kept.load_state_dict(Fitting(0.3, persistent=True).state_dict())
    assert kept.follows and not kept.told


@pytest.mark.parametrize(
    ("full_at", "loss", "factor"),
    [(0.4, 0.8, 1), (0.4, 0.1, 1), (0.4, 2, 0), (0.4, 9, 0), (0.4, 1.4, 0.5), (OFF, 2, 1)],
)
def test_the_factor_is_between_none_and_all(full_at, loss, factor):
    assert float(fitted(full_at, *[2] * 5, *[loss] * 300).factor()) == pytest.approx(factor, abs=1e-4)


@pytest.mark.parametrize(("share", "factor"), [(0.7, 0), (0.6, 0), (0.55, 0.25), (0.5, 0.5), (0.4, 1), (0.2, 1)])
def test_nothing_acts_above_the_share_below_which_it_is_to_act(share, factor):
    fitting = Fitting(0.4, persistent=False, acts_below=0.6)
    for loss in [2.0] * 5 + [2.0 * share] * 300:
        fitting.note(loss, 10, synchronize=False)
    assert float(fitting.factor()) == pytest.approx(factor, abs=1e-4)


def test_it_looks_back_over_the_horizon_and_at_least_ten_batches():
    for horizon, expected in ((0, 10), (10, 10), (40, 40)):
        fitting = fitted(0.4, *[2] * 5, *[1] * 20, horizon=horizon)
        assert float(fitting.recent) == pytest.approx(1 + (1 - 1 / expected) ** 20)


def test_losses_that_are_not_finite_are_passed_over():
    fitting = fitted(0.4, math.nan, 2, math.inf, 2, 2, 2, 2, 1.2, math.nan)
    assert float(fitting.factor()) == float(fitted(0.4, 2, 2, 2, 2, 2, 1.2).factor())


@pytest.mark.parametrize("losses", [[], [0], [-3, -5, -9]], ids=["none yet", "zero", "below zero"])
def test_without_a_first_loss_above_zero_all_of_it_acts(losses):
    assert float(fitted(0.4, *losses).factor()) == 1


def follower(**options):
    model = build_backbone("conv4", 3, width=4, image_size=16)
    phi = NamedPhi(initial_phi(0), "follows", strength=0.8, full_strength_at=0.5)
    return attach(model, phi, ramp_steps=4, **options)


def test_the_strength_is_that_of_the_ramp_times_the_factor():
    attachment = follower()
    for number in range(1, 7):
        attachment.step(2.0 if number < 6 else torch.tensor(1.0))
        share = attachment.fitting.recent / attachment.fitting.first
        assert float(attachment.coeff) == pytest.approx(0.8 * min(1, number / 4) * float(1 - share) / 0.5)
    assert 0 < float(attachment.coeff) < 0.8
    assert float(follower(full_strength_at=1).fitting.full_strength_at) == 1


def test_without_a_loss_it_warns_once_and_the_ramp_decides():
    attachment = follower()
    with pytest.warns(UserWarning, match=r"the ramp alone decides. Give it, by step\(loss\)") as got:
        for _ in range(5):
            attachment.step()
    told = [one for one in got if "ramp alone" in str(one.message)]
    assert len(told) == 1 and float(attachment.coeff) == pytest.approx(0.8)


def test_phi_says_below_which_loss_it_acts_and_the_user_overrules_it():
    phi = NamedPhi(initial_phi(0), "late", full_strength_at=0.4, acts_below=0.6)

    def shares(**options):
        fitting = attach(build_backbone("conv4", 3, width=4, image_size=16), phi, ramp_steps=4, **options).fitting
        return float(fitting.full_strength_at), float(fitting.acts_below)

    assert shares() == pytest.approx((0.4, 0.6))
    assert shares(acts_below=0.8) == pytest.approx((0.4, 0.8))
    assert shares(full_strength_at=0.7) == pytest.approx((0.7, 1))
    assert shares(full_strength_at=1) == (1, 1)
    for options in ({"acts_below": 0.4}, {"full_strength_at": 0.6, "acts_below": 0.5}):
        with pytest.raises(
            ConfigurationError, match=r"acts_below=0\.[45] cannot be used with full_strength_at=0\.[46]"
        ):
            shares(**options)
    with pytest.raises(
        ConfigurationError, match=r"acts_below=0\.6 cannot be used with full_strength_at=1; .* follows the"
    ):
        shares(full_strength_at=1, acts_below=0.6)  # it would be without effect


def test_a_model_that_is_attached_acts_below_the_same_loss_or_is_refused():
    phi = NamedPhi(initial_phi(0), "late", full_strength_at=0.4, acts_below=0.6)
    model = build_backbone("conv4", 3, width=4, image_size=16)
    attachment = attach(model, phi, ramp_steps=4)
    assert attach(model, phi) is attach(model, acts_below=0.6) is attach(model, full_strength_at=0.4) is attachment
    with pytest.raises(ConfigurationError, match=r"with acts_below=0\.6 and not 0\.8; pass acts_below=0\.6 to keep"):
        attach(model, acts_below=0.8)
    assert "less while the training loss is above 40% of its first value and nothing from 60% on" in (
        attachment.outlook(None)
    )


@pytest.mark.parametrize(
    ("loss", "batches", "said"),
    [
        (2.0, 30, "0% of the strength acts, since the training loss is still at 100% of its first value"),
        (1.3, 300, "0% of the strength acts, since the training loss is still at 65% of its first value"),
        (2.0, 19, None),  # too few to say
        (1.0, 300, None),
        (0.1, 300, None),
    ],
)
def test_a_training_in_which_hardly_any_of_the_strength_acts_ends_with_the_reason(loss, batches, said):
    phi = NamedPhi(initial_phi(0), "late", full_strength_at=0.4, acts_below=0.6)
    attachment = attach(build_backbone("conv4", 3, width=4, image_size=16), phi, ramp_steps=10)
    for value in [2.0] * 5 + [loss] * (batches - 5):
        attachment.count(value, rank=0, world=1)
    found = attachment.idle()
    assert (
        found is None if said is None else found.startswith(said) and "where it cannot fall far, acts_below=1" in found
    )


def test_the_default_waits_for_the_loss_and_then_acts():
    model = build_backbone("conv4", 3, width=4, image_size=16)
    attachment = attach(model, ramp_steps=10)
    images = torch.rand(4, 3, 16, 16)

    def acts() -> bool:
        """Whether two forwards of the same images differ, as the noise of each is its own."""
        with torch.no_grad():
            return not torch.equal(model(images), model(images))

    assert not acts()  # at the beginning of the ramp
    for losses, coeff in (([2.0] * 20, 0.0), ([1.3] * 200, 0.0), ([1.0] * 200, 0.475), ([0.5] * 200, 0.95)):
        for loss in losses:
            attachment.step(loss)
        assert float(attachment.coeff) == pytest.approx(coeff, abs=1e-3) and acts() == (coeff > 0)


class Asks(TorchDispatchMode):
    """Notes operators for which a GPU would have to finish all that it was given before."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "nanmedian", "median", "nonzero", "equal"):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def test_counting_a_batch_waits_for_no_device():
    attachment = attach(build_backbone("conv4", 3, width=4, image_size=16), total_steps=4)
    assert attachment.fitting.follows
    with Asks() as asks:
        for loss in (2.0, 2.0, 1.0):
            attachment.count(torch.tensor(loss), 0, 1)
    assert asks.found == []
    assert int(attachment.fitting.losses) == 3
