"""The mathematics against a float64 reference written from the formulas, and its invariances."""

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mp_lightning.perturbation import MetaPerturb, Norms, Phi, initial_phi
from mp_lightning.perturbation import mathematics as maths

NORMS = Norms(64, 32)


def strong_phi(seed: int, dtype: torch.dtype = torch.float64) -> Phi:
    """phi thirty times as large as at the start, so that every number matters."""
    return Phi(*(30 * value.to(dtype) for value in initial_phi(seed)))


def perturb(x, eps, phi, coeff=1.0, clip=100.0):
    net = MetaPerturb(phi)
    used, _ = net.measure(x, net.initial_statistics(x.shape[1]))
    return maths.apply_multiplier(x, net.multiplier(x, eps, used, NORMS), coeff, clip)


@pytest.mark.parametrize("trainable", [True, False])
def test_the_numbers_that_were_given_are_copied(trainable):
    phi = initial_phi(0)
    before = [value.clone() for value in phi]
    with torch.no_grad():
        for value in MetaPerturb(phi, trainable=trainable).phi:
            value.add_(1)
    assert all(torch.equal(a, b) for a, b in zip(phi, before, strict=True))


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(2, 4),
    channels=st.integers(1, 6),
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    coeff=st.floats(0, 1),
    clip=st.sampled_from([0.5, 100.0]),
    seed=st.integers(0, 1000),
)
def test_equals_float64_reference(batch, channels, height, width, coeff, clip, seed):
    generator = torch.Generator().manual_seed(seed)
    x, eps = torch.randn(2, batch, channels, height, width, generator=generator, dtype=torch.float64)
    phi = strong_phi(seed)
    expected = reference.perturb(
        x.numpy(), eps.numpy(), {k: v.numpy() for k, v in phi._asdict().items()}, 64, 32, coeff, clip
    )
    np.testing.assert_allclose(perturb(x, eps, phi, coeff, clip).numpy(), expected, rtol=1e-10, atol=1e-12)


def test_gradcheck_of_x_and_all_82_numbers():
    generator = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 3, 2, 4, 3, generator=generator, dtype=torch.float64)
    phi = strong_phi(1)

    def function(x, *numbers):
        phi = Phi(*numbers)
        moments = maths.batch_moments(maths.pooled_responses(x, phi.scale_kernels))
        s = maths.scale(moments, phi, 2 / 64, 4 / 32)
        z = maths.noise(maths.noise_location(x, phi), eps)
        return maths.apply_multiplier(x, s * z, 0.7, 100.0)

    inputs = [value.clone().requires_grad_() for value in (x, *phi)]
    assert torch.autograd.gradcheck(function, inputs)


def test_at_strength_0_anything_is_left_as_it_is():
    x = torch.tensor([1.0, torch.inf, -torch.inf, -2.0]).view(1, 1, 1, 4)
    multiplier = torch.tensor([torch.nan, torch.inf, 1.0, -torch.inf]).view(1, 1, 1, 4)
    for coeff in (0.0, torch.tensor(0.0)):
        assert torch.equal(maths.apply_multiplier(x, multiplier, coeff, None), x)


def test_the_gradient_of_the_expected_noise_is_right_at_any_location():
    size = torch.tensor([21.0, 25, 1e4, 1e10, 1e20])
    alpha = torch.cat([-size, size]).requires_grad_()
    (gradient,) = torch.autograd.grad(maths.expected_noise(alpha).sum(), alpha)
    torch.testing.assert_close(gradient, torch.tensor([0.0] * 5 + [1.0] * 5), atol=1e-4, rtol=0)


def test_permuting_channels_permutes_the_output():
    generator = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 4, 7, 5, 6, generator=generator, dtype=torch.float64)
    order = torch.randperm(7, generator=generator)
    phi = strong_phi(2)
    torch.testing.assert_close(perturb(x[:, order], eps[:, order], phi), perturb(x, eps, phi)[:, order])


@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (2, 4096, 1, 2), (3, 5, 1, 9), (2, 3, 11, 4)])
def test_any_channels_and_any_size(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    y = perturb(x, torch.zeros(shape), strong_phi(0, torch.float32))
    assert y.shape == x.shape
    assert torch.isfinite(y).all()


def test_channels_last_gives_the_same():
    generator = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 4, 8, 6, 5, generator=generator)
    phi = strong_phi(0, torch.float32)
    torch.testing.assert_close(perturb(x.to(memory_format=torch.channels_last), eps, phi), perturb(x, eps, phi))


def test_synchronised_moments_without_processes_are_the_local_ones():
    responses = torch.rand(5, 3, 4)
    torch.testing.assert_close(maths.batch_moments(responses, True), maths.batch_moments(responses, False))


def test_batch_of_one_uses_the_running_variance_and_records_nothing():
    net = MetaPerturb(strong_phi(0, torch.float32))
    running = net.initial_statistics(3)
    x = torch.rand(1, 3, 4, 4)
    used, measured = net.measure(x, running)
    assert measured is None
    assert torch.equal(used["var"], running["var"])
    torch.testing.assert_close(used["mean"], maths.pooled_responses(x, net.phi.scale_kernels)[0])


def test_expected_noise_against_quadrature():
    nodes, weights = np.polynomial.hermite_e.hermegauss(64)
    alpha = np.linspace(-20, 20, 20001)
    expected = (np.logaddexp(0, alpha[:, None] + nodes) * weights).sum(axis=1) / weights.sum()
    error = np.abs(maths.expected_noise(torch.from_numpy(alpha)).numpy() - expected).max()
    assert error < 2e-5  # what the docstring promises; users were promised 1e-4
    in_single = maths.expected_noise(torch.from_numpy(alpha).float()).numpy()
    assert np.abs(in_single - expected).max() < 1e-4


def test_initial_phi_shrinks_to_about_four_tenths():
    """At the start s is 1/2 and z is E[softplus(N(0, 1))] = 0.806, so the multiplier is 0.403."""
    net = MetaPerturb(initial_phi(0))
    x = torch.randn(64, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    eps = torch.randn(64, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    used, _ = net.measure(x, net.initial_statistics(8))
    assert net.multiplier(x, eps, used, NORMS).mean().item() == pytest.approx(0.403, abs=0.01)
