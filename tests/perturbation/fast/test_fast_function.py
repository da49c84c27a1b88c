"""The fast paths compute the reference's function and its gradients, whatever the shape and the order in memory."""

import math

import numpy as np
import paths
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, currently_in_test_context, given, settings
from hypothesis import strategies as st

from golden_files import assert_close_to_golden, golden_phi
from mp_lightning.perturbation import Phi

FLOAT32, SIXTEEN_BITS = 1e-5, 2e-2
MARGIN = 1e-6  # below it float32 may fall on the other side of a ReLU

LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": lambda x: torch.stack([x, x], dim=2).flatten(1, 2)[:, ::2],
}


def draw(shape, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x, gy = torch.randn(2, *shape, generator=generator)
    return x.to(dtype), gy.to(dtype)


def check(path, shape, layout="contiguous", seed=0, dtype=torch.float32, tolerance=FLOAT32, **setting):
    x, gy = draw(shape, seed, dtype)
    setting, phi = paths.Setting(**setting), paths.strong_phi(seed)
    expected, margin = paths.in_float64(x, gy, phi, setting)
    if currently_in_test_context():
        assume(margin > MARGIN)
    elif dtype == torch.float32:
        assert margin > MARGIN, "choose another seed"
    given_x = LAYOUTS[layout](x)
    found = paths.PATHS[path](given_x, gy, phi, setting)
    paths.assert_same(found, expected, tolerance)
    assert found.y.dtype == dtype and found.y.stride() == torch.empty_like(given_x).stride()
    if dtype == torch.float32:
        assert int(found.hits.sum()) == int(expected.hits)


SHAPES = {"batch": st.integers(1, 5), "height": st.integers(1, 9), "width": st.integers(1, 19)}
OPTIONS = {
    "layout": st.sampled_from(sorted(LAYOUTS)),
    "training": st.booleans(),
    "sampled": st.booleans(),
    "per_channel": st.booleans(),
    "coeff": st.sampled_from([0.0, 0.3, 1.0]),
    "clip": st.sampled_from([0.5, 100.0, math.inf]),
    "seed": st.integers(0, 1000),
}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(channels=st.integers(1, 20), **SHAPES, **OPTIONS)
def test_cpu_equals_float64_reference(batch, channels, height, width, **options):
    check("cpu", (batch, channels, height, width), **options)


@pytest.mark.slow
@settings(  # without shrinking, which takes minutes in the interpreter
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.filter_too_much],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
@given(channels=st.integers(1, 6), **{**SHAPES, "width": st.integers(1, 7)}, **OPTIONS)
def test_gpu_equals_float64_reference(batch, channels, height, width, **options):
    check("gpu", (batch, channels, height, width), **options)


@pytest.mark.parametrize("path", paths.PATHS)
@pytest.mark.parametrize(
    ("shape", "seed"),
    [((2, 2048, 1, 1), 0), ((3, 1, 17, 18), 0), ((2, 70, 5, 5), 1), ((1, 3, 1, 40), 0), ((3, 7, 40, 1), 0)],
)
def test_many_channels_one_channel_single_rows_and_columns(path, shape, seed):
    # Sums of thousands of terms that cancel leave less of float32 than 1e-5 of what remains.
    check(path, shape, seed=seed, clip=1.5, tolerance=2e-5 if shape[1] == 2048 else FLOAT32)


@pytest.mark.parametrize("path", paths.PATHS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_sixteen_bits(path, layout, sampled, training):
    dtypes = [torch.bfloat16] if path == "cpu" else [torch.bfloat16, torch.float16]
    for dtype in dtypes:
        options = {"sampled": sampled, "training": training, "layout": layout}
        check(path, (3, 5, 6, 7), dtype=dtype, tolerance=SIXTEEN_BITS, **options)


@pytest.mark.parametrize("path", paths.PATHS)
def test_samples_of_another_process_have_its_noise(path):
    check(path, (2, 3, 5, 5), rank=1, world=3)


@pytest.mark.parametrize("path", paths.PATHS)
@pytest.mark.parametrize("shape", [(3, 1, 5, 5), (2, 5, 4, 7), (2, 70, 3, 3), (2, 3, 33, 33)])
def test_noise_of_whole_channels(path, shape):
    check(path, shape, per_channel=True, rank=1, world=2)


@pytest.mark.parametrize("path", paths.PATHS)
def test_synchronized_statistics_without_processes_are_the_local_ones(path):
    check(path, (4, 3, 5, 5), synchronize=True)


@pytest.mark.parametrize("path", paths.PATHS)
def test_deterministic(path):
    x, gy = draw((4, 8, 9, 9), 0)
    first, second = (paths.PATHS[path](x, gy, paths.strong_phi(0), paths.Setting(clip=1.0)) for _ in range(2))
    for a, b in zip((*first[:2], *first.gphi), (*second[:2], *second.gphi), strict=True):
        assert torch.equal(a, b)


def test_cpu_gives_the_same_bits_on_any_number_of_threads():
    x, gy = draw((5, 8, 9, 9), 0)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(paths.on_cpu(x, gy, paths.strong_phi(0), paths.Setting(clip=1.0)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(results[0].y, other.y) and torch.equal(results[0].gx, other.gx)
        assert all(torch.equal(a, b) for a, b in zip(results[0].gphi, other.gphi, strict=True))


@pytest.mark.parametrize("path", paths.PATHS)
@pytest.mark.parametrize("number", range(5))
def test_golden_call(golden, path, number):
    z = golden(f"perturb_{number}.npz")
    if path == "gpu" and paths.GPU.type == "cpu" and z["x"].size > 5_000:
        pytest.skip("takes 20 s in Triton's interpreter; the smaller golden calls run in it")
    phi, x = golden_phi(z, "phi_"), torch.from_numpy(z["x"])
    setting = paths.Setting(
        coeff=float(z["coeff"]),
        clip=math.inf if math.isnan(z["clip"]) else float(z["clip"]),
        channel_norm=float(z["channel_norm"]),
        input_size=float(z["spatial_norm"]),
        given=torch.from_numpy(z["eps"]),
    )
    found = paths.PATHS[path](x, torch.from_numpy(z["cotangent"]), phi, setting)
    assert_close_to_golden(found.y.cpu(), z["out_train"], "output in training")
    assert_close_to_golden(found.gx.cpu(), z["grad_x"], "gradient of x")
    for field, gradient in golden_phi(z, "grad_phi_")._asdict().items():
        assert_close_to_golden(getattr(found.gphi, field).cpu(), gradient, f"gradient of {field}")


@pytest.mark.parametrize("path", paths.PATHS)
def test_not_a_number_spreads_to_its_own_statistics(path):
    x, gy = draw((3, 4, 5, 5), 0)
    x[1, 2, 3, 3] = math.nan
    found = paths.PATHS[path](x, gy, paths.strong_phi(0), paths.Setting())
    assert found.mean[2].isnan().all() and found.mean[[0, 1, 3]].isfinite().all()
    assert found.y[1].isnan().any()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("path", paths.PATHS)
def test_at_strength_0_anything_is_left_as_it_is(path):
    x, gy = draw((2, 3, 5, 5), 0)
    x[0, 1, 2, 2], x[1, 0, 0, 0], x[1, 2, 3, 3] = math.inf, -math.inf, math.nan
    for training in (True, False):
        found = paths.PATHS[path](x, gy, paths.strong_phi(0), paths.Setting(training, coeff=0.0, clip=1.0))
        assert torch.equal(found.y.cpu().nan_to_num(9, 8, 7), x.nan_to_num(9, 8, 7))
        assert int(found.hits.sum()) == 0


@pytest.mark.parametrize("path", paths.PATHS)
def test_the_gradient_of_the_expected_noise_is_right_at_any_location(path):
    """Of x so large that the polynomial, followed to there, overflows."""
    one = torch.zeros(3, 3)
    one[1, 1] = 1
    phi = Phi(one, 0 * one, one, 0 * one, torch.zeros(4, 3, 3), torch.zeros(10))
    for size in (1e3, 1e10, 1e15):
        x = torch.full((2, 1, 1, 1), size)
        found = paths.PATHS[path](x, torch.ones_like(x), phi, paths.Setting(False, sampled=False, coeff=1.0))
        # y = x * alpha / 2 where alpha is x itself
        torch.testing.assert_close(found.gx.cpu(), x)


def test_a_grid_of_the_gpu_has_no_more_tiles_than_it_can(monkeypatch):
    gpu = paths.gpu_kernels()
    for shape in ((1, 64, 1024, 1024), (2, 64, 4096, 256), (1, 3, 8192, 8192)):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.empty(shape, device="meta").to(memory_format=layout)
            maps = gpu._Maps(x)
            assert max(maps.over_all[1:]) <= 65_535
            assert maps.tiles * maps.blocks["BP"] >= maps.pixels
    monkeypatch.setattr(gpu, "_TILES", 1)
    check("gpu", (1, 2, 17, 16))


@pytest.mark.skipif(paths.GPU.type == "cuda", reason="untouched memory is none on the CPU only")
def test_the_statistics_of_the_gpu_reach_beyond_32_bits():
    """The last of 130 samples of so many channels that what is before it has more than 2**31 numbers."""
    paths.gpu_kernels()
    from mp_lightning.perturbation.fast.gpu import statistics

    batch, channels = 130, 2**22
    partial, responses = (torch.from_numpy(np.zeros((batch, channels, 4), np.float32)) for _ in range(2))
    partial[:, :4] = 2
    mean, var, scale = torch.zeros(4, 4), torch.ones(4, 4), torch.zeros(4)
    numbers, one = torch.zeros(3, dtype=torch.float64), torch.ones(())
    statistics.scale_pass[(1,)](
        *(partial, mean, var, torch.zeros(10), one, one, torch.tensor(0), mean, var, scale, responses, numbers),
        *(batch, channels, 1, 1, 1, 1.0),
        **{"TRAINING": True, "BB": 128, "BC": 4},
    )
    assert torch.equal(mean, torch.full((4, 4), 2.0)) and torch.equal(var, torch.zeros(4, 4))
    assert torch.equal(responses[-1, :4], torch.full((4, 4), 2.0))
    gscale, gresponses, gweight = partial.view(-1)[: batch * channels], responses, torch.zeros(1, 10)
    gscale.zero_().view(batch, channels)[:, :4] = 1
    statistics.scale_backward[(1,)](
        *(gscale, mean, var, torch.full((4,), 0.5), torch.ones(10), responses, numbers + 1, gresponses, gweight),
        *(batch, channels, 1, 1, 1.0),
        **{"TRAINING": True, "BB": 128, "BC": 4},
    )
    assert float(gweight[0, 0]) == 2 * 4 * batch / 4  # mean 2, four channels, s * (1 - s) = 1 / 4
    torch.testing.assert_close(gresponses[-1, :4], torch.full((4, 4), 0.25))
