"""The picture of a phi: its numbers, and its response as the formulas give it."""

from pathlib import Path

import matplotlib.image
import pytest
import torch
from matplotlib.figure import Figure

from mp_lightning.meta.phi_picture import draw_phi
from mp_lightning.perturbation import NamedPhi, Phi, initial_phi


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Draws a phi and returns the panels by title, once they are a file."""
    saved: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **options: saved.append(self) or save(self, *args, **options)
    )

    def draw(phi: Phi, strength: float = 1.0):
        draw_phi(NamedPhi(phi, "any", strength=strength), tmp_path / "phi.png")
        assert min(matplotlib.image.imread(tmp_path / "phi.png").shape[:2]) > 400
        return {axis.get_title(): axis for axis in saved[-1].axes}

    return draw


def without_input() -> Phi:
    """A phi whose location is 0 and whose scale is 0.5, whatever it sees."""
    return Phi(*(torch.zeros_like(value) for value in initial_phi(0)))


def test_every_number_of_the_filters_is_written(drawn) -> None:
    phi = initial_phi(3)
    panels = drawn(phi)
    for title, kernel in (("own channel, 2nd layer", phi.op2_identity), ("scale, filter 4", phi.scale_kernels[3])):
        assert [text.get_text() for text in panels[title].texts] == [f"{value:.2f}" for value in kernel.flatten()]
    widths = [bar.get_width() for bar in panels["weights of the scale"].patches]
    assert widths == pytest.approx(phi.scale_weight.tolist())


def test_the_location_is_that_of_a_map_of_one_value(drawn) -> None:
    """alpha = 9 b relu(9 a v) for filters that are a and b everywhere, and their channel alone not zero."""
    phi = without_input()._replace(op1_identity=torch.full((3, 3), 0.1), op2_identity=torch.full((3, 3), -0.2))
    one, every = drawn(phi)["location of the noise"].lines
    expected = [-1.8 * max(0.9 * value, 0.0) for value in one.get_xdata()]
    assert one.get_ydata() == pytest.approx(expected, abs=1e-5)
    assert every.get_ydata() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_the_factor_has_the_strength_in_it(drawn, strength: float) -> None:
    """The multiplier of such a phi is 0.5 softplus(N(0, 1)), whose mean is 0.403."""
    (line,) = drawn(without_input(), strength)[f"factor at strength {strength:g}, noise per element"].lines[:1]
    assert line.get_ydata() == pytest.approx([1 + strength * (0.403 - 1)] * 4, abs=0.01)
