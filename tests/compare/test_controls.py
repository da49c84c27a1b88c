"""Controls and ablations at the sites, in place of phi."""

import warnings

import pytest
import torch
from torch import nn

from lightning_modules import digits, module
from mp_lightning import attach
from mp_lightning.compare.controls import (
    FixedNoise,
    MeanOne,
    NoiseOnly,
    ScaleOnly,
    ShrinkOnly,
    matching_noise,
    set_constants,
)
from mp_lightning.compare.moments import SiteMoments, site_moments
from mp_lightning.compare.site_layers import Identity
from mp_lightning.errors import ConfigurationError
from mp_lightning.perturbation import FusedPerturbation, MetaPerturb, Norms, Perturbation, Phi, initial_phi

NORMS = Norms(8, 16)


def phi():
    """One whose multiplier varies over sites, channels and elements."""
    return Phi(*(20 * value for value in initial_phi(0)))


def attached(perturbation, **options):
    net = module().train()
    return net, attach(net, perturbation=perturbation, clip=None, **options)


def forwards(net, batches=2):
    x, _ = digits()
    return [lambda start=start: net(x[start : start + 32]) for start in range(0, 32 * batches, 32)]


def test_all_are_perturbations():
    for perturbation in (FixedNoise(), ShrinkOnly(), NoiseOnly(phi()), ScaleOnly(phi()), MeanOne(phi())):
        assert isinstance(perturbation, Perturbation)
        if isinstance(perturbation, FusedPerturbation):
            assert not perturbation.fuses(torch.ones(2, 3, 4, 4))  # the fast path computes phi alone


@pytest.mark.parametrize(
    ("mean", "std"), [(0.4, 0.26), (0.63, 0.35), (0.9, 0.05), (1.0, 1.2), (3.0, 0.01), (0.054, 0.087), (0.1, 0.24)]
)
def test_fixed_noise_has_the_moments_that_it_is_given(mean, std):
    torch.manual_seed(0)
    x = torch.zeros(4, 8, 256, 256)
    statistics = {key: torch.tensor(value) for key, value in FixedNoise().constants(mean, std**2).items()}
    drawn = FixedNoise().multiplier(x, torch.randn_like(x), statistics, NORMS).double()
    assert drawn.mean().item() == pytest.approx(mean, rel=0.01)
    assert drawn.std().item() == pytest.approx(std, rel=0.01)
    assert FixedNoise().multiplier(x, None, statistics, NORMS).item() == pytest.approx(mean, rel=0.002)


@pytest.mark.parametrize(("std", "reached"), [(2.0, 2.465 * 0.5), (0.0, 0.0005)])
def test_moments_out_of_reach_are_taken_for_the_nearest_with_a_warning(std, reached):
    with pytest.warns(UserWarning, match="the nearest is taken"):
        scale, location, spread = matching_noise(0.5, std**2)
    torch.manual_seed(0)
    drawn = scale * nn.functional.softplus(location + spread * torch.randn(1_000_000, dtype=torch.float64))
    assert drawn.mean().item() == pytest.approx(0.5, rel=0.01)
    assert drawn.std().item() == pytest.approx(reached, rel=0.02)


@pytest.mark.parametrize(("mean", "var"), [(0.0, 0.1), (-1.0, 0.1), (1.0, -0.1), (float("nan"), 0.1)])
def test_moments_of_no_multiplier_are_refused(mean, var):
    with pytest.raises(ConfigurationError, match="no fixed noise has mean"):
        matching_noise(mean, var)


@pytest.mark.parametrize("noise_per", ["element", "channel"])
def test_fixed_noise_on_a_model_matches_phi_at_every_site(noise_per):
    times = 1 if noise_per == "element" else 40  # it draws fewer numbers in a forward
    net, attachment = attached(MetaPerturb(phi(), noise_per=noise_per))
    target = site_moments(attachment, forwards(net) * times)
    net, control = attached(FixedNoise(noise_per))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        set_constants(control, target)
    found = site_moments(control, forwards(net) * times)
    assert len({round(moments.mean, 3) for moments in target}) == 4  # a constant of its own for each site
    for ours, theirs in zip(found, target, strict=True):
        assert ours.mean == pytest.approx(theirs.mean, rel=0.02)
        assert ours.var == pytest.approx(theirs.var, rel=0.05)


def test_shrink_only_is_the_mean_and_draws_nothing():
    net, control = attached(ShrinkOnly())
    names = control.plan.names
    set_constants(control, [SiteMoments(name, 0.3 + 0.1 * i, 0.2) for i, name in enumerate(names)])
    found = site_moments(control, forwards(net))
    assert [moments.mean for moments in found] == pytest.approx([0.3, 0.4, 0.5, 0.6])
    assert [moments.var for moments in found] == pytest.approx([0.0] * 4, abs=1e-9)
    x, _ = digits()
    assert torch.equal(net(x[:8]), net(x[:8]))


def test_without_constants_controls_are_like_a_phi_at_its_initialization():
    net, attachment = attached(MetaPerturb(initial_phi(0)))
    target = site_moments(attachment, forwards(net))
    for control in (FixedNoise(), ShrinkOnly()):
        net, attachment = attached(control)
        for ours, theirs in zip(site_moments(attachment, forwards(net)), target, strict=True):
            assert ours.mean == pytest.approx(theirs.mean, rel=0.05)


def test_without_constants_fixed_noise_evaluates_by_the_mean_of_what_it_draws():
    statistics, x = FixedNoise().initial_statistics(8), torch.zeros(4, 8, 256, 256)
    drawn = FixedNoise().multiplier(
        x, torch.randn(x.shape, generator=torch.Generator().manual_seed(0)), statistics, NORMS
    )
    assert FixedNoise().multiplier(x, None, statistics, NORMS).item() == pytest.approx(drawn.mean().item(), rel=0.01)


@pytest.mark.parametrize("noise_per", ["element", "channel"])
def test_fixed_noise_draws_for_elements_or_for_whole_channels(noise_per):
    net, attachment = attached(FixedNoise(noise_per))
    seen = []
    attachment.all_sites()[0].register_forward_hook(lambda _, inputs, output: seen.append(output / inputs[0]))
    with torch.no_grad():
        net(digits()[0][:2])
    of_maps = seen[0].flatten(2).std(dim=2)
    assert (of_maps < 1e-4).all() if noise_per == "channel" else (of_maps > 0.1).all()


@pytest.mark.parametrize("sampled", [True, False])
def test_noise_only_times_scale_only_is_phi(sampled):
    torch.manual_seed(0)
    x = torch.randn(4, 8, 6, 6)
    eps = torch.randn_like(x) if sampled else None
    whole, noise, scale = MetaPerturb(phi()), NoiseOnly(phi()), ScaleOnly(phi())
    statistics, _ = whole.measure(x, whole.initial_statistics(8))
    z = noise.multiplier(x, eps, noise.measure(x, noise.initial_statistics(8))[0], NORMS)
    s = scale.multiplier(x, eps, scale.measure(x, scale.initial_statistics(8))[0], NORMS)
    assert z.shape == x.shape and s.shape == (1, 8, 1, 1) and s.std() > 0
    torch.testing.assert_close(z * s, whole.multiplier(x, eps, statistics, NORMS))


def test_ablations_run_at_the_sites_and_keep_what_they_need():
    for perturbation, kept in ((NoiseOnly(phi()), set()), (ScaleOnly(phi()), {"mean", "var"})):
        net, attachment = attached(perturbation)
        for forward in forwards(net):
            forward().sum().backward()
        site = attachment.sites[0]
        assert set(site.statistics) == kept
        assert all(not torch.equal(v, perturbation.initial_statistics(8)[k]) for k, v in site.statistics.items())


def test_mean_one_leaves_means_alone():
    net, attachment = attached(MetaPerturb(phi()))
    target = site_moments(attachment, forwards(net))
    net, control = attached(MeanOne(phi()))
    set_constants(control, target)
    assert all(moments.mean < 0.8 for moments in target)
    found = site_moments(control, forwards(net))
    assert [moments.mean for moments in found] == pytest.approx([1.0] * 4, rel=0.05)
    recorded = control.sites[0].statistics
    assert recorded["divisor"].item() == pytest.approx(target[0].mean)
    assert not torch.equal(recorded["mean"], torch.zeros_like(recorded["mean"]))


def test_constants_are_saved_with_the_attachment():
    _, control = attached(FixedNoise())
    set_constants(control, [SiteMoments(name, 0.6, 0.1) for name in control.plan.names])
    _, again = attached(FixedNoise())
    again.load_state(control.state())
    assert torch.equal(again.sites[2].location, control.sites[2].location) and again.sites[2].location != 0


def test_what_cannot_be_set_is_named():
    _, control = attached(FixedNoise())
    with pytest.raises(ConfigurationError, match="'nowhere'"):
        set_constants(control, [SiteMoments("nowhere", 0.5, 0.1)])
    for perturbation in (NoiseOnly(phi()), Identity()):
        _, other = attached(perturbation)
        with pytest.raises(ConfigurationError, match=f"'{perturbation.name}' has no constants"):
            set_constants(other, [])
