"""Counter-based noise: known answers, normality, and what its key promises."""

import pytest
import torch

from mp_lightning.perturbation import NoiseKey, gaussian_noise
from mp_lightning.perturbation.noise import philox4x32

SHAPE = torch.Size((4, 3, 5, 5))


def noise(positions=(0, 1, 2, 3), *, shape=SHAPE, seed=1, stream=2, forward=3):
    return gaussian_noise(shape, torch.tensor(positions), seed=seed, stream=stream, forward=torch.tensor(forward))


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (0x00000000, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (0xFFFFFFFF, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    ],
)
def test_known_answers_of_random123(word, expected):
    """Philox4x32 with 7 rounds, from the known-answer file that comes with the authors' library."""
    counter = torch.full((1,), word, dtype=torch.int64)
    assert tuple(int(w) for w in philox4x32((counter,) * 4, (word, word))) == expected


def test_is_standard_normal():
    sample = noise(range(64), shape=torch.Size((64, 16, 16, 16))).double().flatten()
    n = len(sample)
    assert abs(sample.mean()) < 4 / n**0.5
    assert abs(sample.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((sample**3).mean()) < 4 * (15 / n) ** 0.5
    assert abs((sample**4).mean() - 3) < 4 * (96 / n) ** 0.5
    for lag in (1, 2, 3, 4, 16, 256):
        assert abs((sample[lag:] * sample[:-lag]).mean()) < 4.5 / n**0.5


def test_same_key_same_numbers_and_the_global_generator_is_untouched():
    before = torch.random.get_rng_state()
    first = noise()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(noise(), first)


@pytest.mark.parametrize("change", [{"seed": 2}, {"seed": 1 | 1 << 40}, {"stream": 3}, {"forward": 4}])
def test_each_part_of_the_key_matters(change):
    assert (noise(**change) - noise()).abs().mean() > 0.5


def test_a_sample_gets_its_noise_wherever_it_stands():
    whole = noise((0, 1, 2, 3))
    assert torch.equal(noise((2, 0), shape=torch.Size((2, 3, 5, 5))), whole[[2, 0]])


@pytest.mark.parametrize("shape", [(0, 3, 5, 5), (2, 3, 0, 5), (2, 0, 5, 5)])
def test_nothing_gets_no_noise(shape):
    for per in ("element", "channel"):
        x = torch.zeros(shape)
        assert (x + NoiseKey(1, 2, torch.tensor(3)).draw(x, per)).shape == shape


def test_one_number_for_each_channel_of_a_sample():
    key, x = NoiseKey(1, 2, torch.tensor(3), rank=1, world=2), torch.zeros(2, 6, 5, 5, dtype=torch.float64)
    eps = key.draw(x, "channel")
    assert eps.dtype == x.dtype
    expected = noise((1, 3), shape=torch.Size((2, 6)))
    assert torch.equal(eps, expected.double()[..., None, None])
    assert torch.equal(key.draw(x), noise((1, 3), shape=x.shape).double())
