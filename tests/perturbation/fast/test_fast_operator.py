"""The operator: its fake, its autograd rule, what it keeps, and what it refuses."""

import math
import subprocess
import sys
from pathlib import Path

import paths
import pytest
import torch
from torch.autograd import forward_ad

from mp_lightning.errors import ConfigurationError
from mp_lightning.perturbation import MetaPerturb, NoiseKey, Norms, initial_phi
from mp_lightning.perturbation.fast import perturb, record
from mp_lightning.perturbation.mathematics import Moments


def arguments(x, phi=None, eps=None, **setting):
    setting = paths.Setting(**setting)
    phi = paths.strong_phi(0) if phi is None else phi
    return x, phi, paths.running_moments(x.shape[1]), setting.numbers(), eps, setting.call()


def flat(x, phi, running, numbers, eps, call):
    return x, list(phi), list(running), list(numbers), eps, *call


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_operator_is_what_torch_asks_of_one(training, given):
    """Schema, fake, autograd registration and tracing, by torch's own checks."""
    x = torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last).requires_grad_()
    phi = type(paths.strong_phi(0))(*(value.requires_grad_() for value in paths.strong_phi(0)))
    eps = torch.randn(3, 4, 5, 6) if given else None
    torch.library.opcheck(torch.ops.mp_lightning.perturb.default, flat(*arguments(x, phi, eps, training=training)))


def test_record_is_what_torch_asks_of_one():
    moments = torch.rand(4, 3, 4)
    torch.library.opcheck(torch.ops.mp_lightning.record.default, (*moments, 0.1))


def test_keeps_x_and_a_few_numbers_per_channel():
    x = torch.randn(8, 4, 16, 16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        perturb(*arguments(x))
    large = [t for t in kept if t.numel() >= x.numel() // 4]
    assert len(large) == 1 and large[0].data_ptr() == x.data_ptr()


def test_sixteen_bits_are_kept_as_they_came():
    x = torch.randn(8, 4, 16, 16).bfloat16().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        perturb(*arguments(x))
    assert max(kept, key=lambda t: t.numel()).dtype == torch.bfloat16


def count_backward(monkeypatch):
    """What was asked of each backward: (needs_x, needs_phi)."""
    from mp_lightning.perturbation.fast import cpu

    seen = []
    original = cpu.backward
    monkeypatch.setattr(cpu, "backward", lambda *a: (seen.append(a[-2:]), original(*a))[1])
    return seen


def test_computes_no_gradient_that_nobody_asked_for(monkeypatch):
    seen = count_backward(monkeypatch)
    x, phi = torch.randn(3, 2, 5, 5), paths.strong_phi(0)
    trainable = type(phi)(*(value.clone().requires_grad_() for value in phi))
    perturb(*arguments(x.clone().requires_grad_(), phi)).y.sum().backward()
    perturb(*arguments(x, trainable)).y.sum().backward()
    perturb(*arguments(x.clone().requires_grad_(), trainable)).y.sum().backward()
    assert seen == [(True, False), (False, True), (True, True)]
    assert not perturb(*arguments(x, phi)).y.requires_grad


def test_phi_gradient_is_the_same_with_and_without_that_of_x():
    phi = type(paths.strong_phi(0))(*(value.requires_grad_() for value in paths.strong_phi(0)))
    x = torch.randn(3, 4, 6, 6)
    alone = torch.autograd.grad(perturb(*arguments(x, phi)).y.sum(), phi)
    both = torch.autograd.grad(perturb(*arguments(x.clone().requires_grad_(), phi)).y.sum(), phi)
    assert all(torch.equal(a, b) for a, b in zip(alone, both, strict=True))


def test_second_derivative_is_refused_with_the_remedy():
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    y = perturb(*arguments(x)).y
    (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(ConfigurationError, match="path='reference'"):
        gradient.sum().backward()


def test_forward_mode_is_refused_with_the_remedy():
    x = torch.randn(2, 3, 4, 4)
    with forward_ad.dual_level(), pytest.raises(ConfigurationError, match="path='reference'"):
        perturb(*arguments(forward_ad.make_dual(x, x)))


def test_numbers_that_change_after_the_forward_do_not_reach_its_backward():
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    given = arguments(x)
    expected = torch.autograd.grad(perturb(*given).y.sum(), x)[0]
    y = perturb(*given).y
    for number in (*given[3], *given[2]):
        number.add_(1)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)


def test_record_leaves_the_running_moments_alone_where_a_number_is_not_finite():
    running = paths.running_moments(3)
    before = [value.clone() for value in running]
    record(running, Moments(torch.full((3, 4), math.nan), torch.ones(3, 4)), 0.1)
    assert all(torch.equal(a, b) for a, b in zip(running, before, strict=True))
    record(running, Moments(torch.zeros(3, 4), torch.ones(3, 4)), 0.1)
    torch.testing.assert_close(running.mean, 0.9 * before[0])
    torch.testing.assert_close(running.var, 0.9 * before[1] + 0.1)


def test_gpu_records_like_the_cpu():
    gpu = paths.gpu_kernels()
    for measured in (torch.rand(2, 300, 4), torch.full((2, 300, 4), math.inf)):
        on_cpu, on_gpu = paths.running_moments(300), paths.running_moments(300, paths.GPU)
        record(on_cpu, Moments(measured[0], measured[1]), 0.1)
        gpu.record(*on_gpu, *measured.to(paths.GPU), 0.1)
        for a, b in zip(on_cpu, on_gpu, strict=True):
            torch.testing.assert_close(a, b.cpu())


@pytest.mark.parametrize("seed", [0, 7, 2**63 + 5, 2**64 - 1, -3])
def test_net_draws_the_noise_of_any_seed(seed):
    net, x = MetaPerturb(initial_phi(0)), torch.randn(2, 3, 4, 4)
    key, norms = NoiseKey(seed, 1, torch.tensor(2)), Norms(3, 8.0)
    running = net.initial_statistics(3)
    done = net.fused(x, key, running, norms, coeff=torch.ones(()), clip=None, training=False, synchronize=False)
    expected = x * net.multiplier(x, key.draw(x), running, norms)
    torch.testing.assert_close(done.y, expected)


MEMORY = """
import resource, torch
from mp_lightning.perturbation import MetaPerturb, Norms, initial_phi

net = MetaPerturb(initial_phi(0))
pages = lambda place: int(open("/proc/self/statm").read().split()[place]) * resource.getpagesize() // 2**20

def run(channels):
    x, running = torch.zeros(1, channels, 64, 64), net.initial_statistics(channels)
    before = pages(1)
    net.fused(x, None, running, Norms(64, 64.0), coeff=torch.ones(()), clip=None, training=False, synchronize=False)
    return pages(1) - before

run(1)
print(run(512) < 32)  # of maps of 8 MiB, for which it takes 17
print(run(2048) < 32)  # of maps of 32 MiB, for which it takes 68
size = (pages(0) + 400) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (size, size))
try:
    run(8192)
except MemoryError as error:
    print(error)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the memory of a process is read as Linux says it")
def test_memory_that_lacks_is_an_error_and_large_memory_is_given_back():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *kept, said = done.stdout.splitlines()
    assert kept == ["True", "True"]
    assert said.startswith("no memory is left to perturb maps of 8192x64x64 on ")
