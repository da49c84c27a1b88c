"""The fast paths as the tests call them, and the reference in float64 that they are held against."""

import math
from typing import NamedTuple

import pytest
import torch

from mp_lightning.perturbation import Phi, gaussian_noise, initial_phi
from mp_lightning.perturbation import mathematics as maths
from mp_lightning.perturbation.fast import Call, Numbers, available, perturb

# Triton's kernels run on a GPU if there is one, else interpreted on the CPU (see conftest.py).
GPU = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SEED, STREAM, FORWARD = 5, (1 << 31) + 7, 3


class Result(NamedTuple):
    y: torch.Tensor
    gx: torch.Tensor
    gphi: Phi
    mean: torch.Tensor
    var: torch.Tensor
    hits: torch.Tensor


class Setting(NamedTuple):
    """One call, whatever computes it."""

    training: bool = True
    sampled: bool = True
    coeff: float = 0.7
    clip: float = math.inf
    channel_norm: float = 64.0
    input_size: float = 32.0
    rank: int = 0
    world: int = 1
    given: torch.Tensor | None = None
    synchronize: bool = False
    per_channel: bool = False

    @property
    def bound(self) -> float:
        """What does not act bounds nothing."""
        return self.clip if self.coeff else math.inf

    def call(self) -> Call:
        key = (SEED, STREAM, self.rank, self.world)
        plain = (self.training, self.sampled, self.synchronize, self.per_channel)
        return Call(self.channel_norm, self.clip, key, *plain)

    def numbers(self, device="cpu") -> Numbers:
        return Numbers(
            torch.tensor(self.coeff, device=device),
            torch.tensor(self.input_size, device=device),
            torch.tensor(FORWARD, device=device),
        )


def strong_phi(seed: int) -> Phi:
    """phi thirty times as large as at the start, so that every number matters."""
    return Phi(*(30 * value for value in initial_phi(seed)))


def running_moments(channels: int, device="cpu") -> maths.Moments:
    generator = torch.Generator().manual_seed(channels)
    moments = torch.rand(2, channels, 4, generator=generator).to(device)
    return maths.Moments(moments[0], moments[1])


def on_cpu(x, gy, phi, setting) -> Result:
    """By way of the operator, autograd included."""
    assert available("cpu", x.dtype), "the tests of the fast path need a C++ compiler"
    return _by_operator(x, gy, phi, setting)


def gpu_kernels():
    """The module of the GPU path; skips where it cannot run, on a GPU or interpreted."""
    gpu = pytest.importorskip("mp_lightning.perturbation.fast.gpu", reason="Triton is not installed")
    ones = torch.ones(4, 1, 4, device=GPU)
    try:
        gpu.record(*ones, 0.1)
    except Exception as error:
        if "only 0-dimensional arrays" not in str(error):
            raise
        pytest.skip("the interpreter of this version of Triton does not work with this version of NumPy")
    return gpu


def on_gpu(x, gy, phi, setting) -> Result:
    """By the operator on a GPU; interpreted, the two functions behind it are called."""
    if GPU.type == "cuda":
        return _by_operator(x.to(GPU), gy.to(GPU), phi, setting)
    gpu, call = gpu_kernels(), setting.call()
    out = gpu.forward(x, phi, running_moments(x.shape[1]), setting.numbers(), setting.given, call)
    gx, gphi = gpu.backward(gy, x, phi, out, setting.given, call, True, True)
    return Result(out.y, gx, gphi, out.mean, out.var, out.hits)


def _by_operator(x, gy, phi, setting) -> Result:
    x = x.detach().requires_grad_()
    phi = Phi(*(value.to(x.device).requires_grad_() for value in phi))
    running = running_moments(x.shape[1], x.device)
    given = None if setting.given is None else setting.given.to(x.device)
    out = perturb(x, phi, running, setting.numbers(x.device), given, setting.call())
    gradients = torch.autograd.grad(out.y, (x, *phi), gy)
    return Result(out.y.detach(), gradients[0], Phi(*gradients[1:]), out.mean, out.var, out.hits)


PATHS = {"cpu": on_cpu, "gpu": on_gpu}


def in_float64(x, gy, phi, setting) -> tuple[Result, float]:
    """The reference, and how far its numbers stay away from where a ReLU or the bound would turn over."""
    dtype = x.dtype
    x, gy = x.detach().double().requires_grad_(), gy.double()
    phi = Phi(*(value.detach().double().requires_grad_() for value in phi))
    positions = torch.arange(len(x)) * setting.world + setting.rank
    eps = setting.given
    if eps is None:
        key = {"seed": SEED, "stream": STREAM, "forward": torch.tensor(FORWARD)}
        eps = gaussian_noise(x.shape[:2] if setting.per_channel else x.shape, positions, **key)
        eps = eps[..., None, None] if setting.per_channel else eps
    moments = maths.Moments(*(value.double() for value in running_moments(x.shape[1])))
    if setting.training:
        responses = maths.pooled_responses(x, phi.scale_kernels)
        measured = maths.batch_moments(responses)
        moments = maths.Moments(responses.mean(dim=0), moments.var) if measured is None else measured
    s = maths.scale(moments, phi, x.shape[1] / setting.channel_norm, x.shape[2] / setting.input_size)
    alpha = maths.noise_location(x, phi)
    z = maths.noise(alpha, eps.double()) if setting.sampled else maths.expected_noise(alpha)
    y = maths.apply_multiplier(x, s * z, setting.coeff, setting.bound)
    wanted = (x, *phi) if setting.training else (x, *phi[:4], phi.scale_weight)
    gradients = list(torch.autograd.grad(y, wanted, gy))
    if not setting.training:
        gradients.insert(5, torch.zeros(4, 3, 3))
    with torch.no_grad():
        bound = x * (1 + setting.coeff * (s * z - 1)) - setting.bound
        edges = [maths.equivariant(x, phi.op1_identity, phi.op1_all), alpha, bound]
        edges += [maths._filter(x, kernel) for kernel in phi.scale_kernels] if setting.training else []
        margin = min(float(edge[edge != 0].abs().min()) if (edge != 0).any() else math.inf for edge in edges)
    hits = (y.detach().to(dtype) >= setting.bound).sum() if not setting.training else torch.zeros(())
    return Result(y.detach(), gradients[0], Phi(*gradients[1:]), moments.mean, moments.var, hits), margin


def assert_same(found: Result, expected: Result, tolerance: float) -> None:
    """max|difference| <= tolerance * max|expected|, for phi's gradient over all of its 82 numbers together."""
    for name in ("y", "gx", "gphi", "mean", "var"):
        actual, wanted = getattr(found, name), getattr(expected, name)
        if name == "gphi":
            actual, wanted = (torch.cat([value.flatten().cpu() for value in phi]) for phi in (actual, wanted))
        assert actual.shape == wanted.shape
        difference = (actual.detach().cpu().double() - wanted.detach()).abs().max()
        scale = wanted.detach().abs().max()
        assert difference <= tolerance * scale, f"{name}: off by {difference:.3e} of {scale:.3e}"
