"""Moments of the multiplier at the sites of a model."""

import pytest
import torch
from restored import trace

from lightning_modules import digits, module
from mp_lightning import attach, attachment_of
from mp_lightning.compare.moments import site_moments
from mp_lightning.perturbation import MetaPerturb, Phi, initial_phi


def multipliers_by_hand(net, batches):
    """Every multiplier of every site, one flat tensor for each, from what goes in and comes out."""
    attachment = attachment_of(net)
    found = {}

    def note(site, args, y):
        found.setdefault(site.spec.name, []).append((y / args[0]).flatten())

    handles = [site.register_forward_hook(note) for site in attachment.sites]
    for x in batches:
        net(x)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(values).double() for name, values in found.items()}


def attached(**options):
    net = module().train()
    phi = Phi(*(20 * value for value in initial_phi(0)))
    return net, attach(net, perturbation=MetaPerturb(phi), clip=None, seed=3, **options)


def test_they_are_those_of_all_elements_over_all_forwards():
    x, _ = digits()
    batches = [x[:8], x[8:40]]
    net, attachment = attached(path="reference")
    expected = multipliers_by_hand(net, batches)
    net, attachment = attached()  # the same noise once more
    found = site_moments(attachment, [lambda x=x: net(x) for x in batches])
    assert [moments.site for moments in found] == attachment.plan.names
    for name, mean, var in found:
        assert mean == pytest.approx(expected[name].mean().item(), rel=1e-4)
        assert var == pytest.approx(expected[name].var().item(), rel=1e-2)


def test_the_ramp_does_not_count():
    x, _ = digits()
    net, attachment = attached()
    attachment.ramp_over(100)
    assert float(attachment.coeff) == 0
    assert all(0.1 < mean < 0.9 and var > 0.01 for _, mean, var in site_moments(attachment, [lambda: net(x[:8])]))


def test_expected_noise_has_less_variance():
    x, _ = digits()
    net, attachment = attached()
    noisy = site_moments(attachment, [lambda: net(x[:8])])
    attachment.sampling = False
    net.eval()
    expected = site_moments(attachment, [lambda: net(x[:8])])
    assert all(still.var < 0.5 * moving.var for still, moving in zip(expected, noisy, strict=True))


def test_everything_is_restored_also_after_an_exception():
    x, _ = digits()
    net, attachment = attached()
    before = trace(net)

    def fail():
        net(x[:4])
        raise RuntimeError("a user's error")

    with pytest.raises(RuntimeError, match="a user's error"):
        site_moments(attachment, [fail])
    assert trace(net) == before and attachment.path == "auto"
    site_moments(attachment, [lambda: net(x[:4])])
    assert trace(net) == before and attachment.path == "auto"


def test_sites_that_are_not_reached_are_left_out():
    x, _ = digits()
    net, attachment = attached()
    first = attachment.plan.names[0]

    class Enough(Exception):
        pass

    def stop(site, args):
        raise Enough

    def forward():
        with pytest.raises(Enough):
            net(x[:4])

    handle = attachment.sites[1].register_forward_pre_hook(stop)
    found = site_moments(attachment, [forward])
    handle.remove()
    assert [moments.site for moments in found] == [first]
    assert site_moments(attachment, []) == []
