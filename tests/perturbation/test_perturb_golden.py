"""One call of g_phi against the golden numbers: forward, all gradients, statistics, evaluation."""

import math

import pytest
import torch

from golden_files import assert_close_to_golden, golden_phi
from mp_lightning.perturbation import MetaPerturb, Norms, Phi
from mp_lightning.perturbation import mathematics as maths
from mp_lightning.sites.site import MOMENTUM


@pytest.mark.parametrize("number", range(5))
def test_golden_call(golden, number):
    z = golden(f"perturb_{number}.npz")
    net = MetaPerturb(golden_phi(z, "phi_"), trainable=True)
    x = torch.tensor(z["x"], requires_grad=True)
    eps = torch.tensor(z["eps"])
    norms = Norms(float(z["channel_norm"]), float(z["spatial_norm"]))
    clip = None if math.isnan(z["clip"]) else float(z["clip"])
    coeff = float(z["coeff"])
    running = net.initial_statistics(x.shape[1])

    used, measured = net.measure(x, running)
    y = maths.apply_multiplier(x, net.multiplier(x, eps, used, norms), coeff, clip)
    assert_close_to_golden(maths.noise_location(x, net.phi).detach(), z["alpha"], "alpha")
    assert_close_to_golden(y.detach(), z["out_train"], "output in training")

    (y * torch.tensor(z["cotangent"])).sum().backward()
    assert_close_to_golden(x.grad, z["grad_x"], "gradient of x")
    for field, golden_gradient in golden_phi(z, "grad_phi_")._asdict().items():
        assert_close_to_golden(getattr(net, field).grad, golden_gradient, f"gradient of {field}")

    assert measured is not None
    mean = running["mean"].lerp(measured["mean"], MOMENTUM)
    assert_close_to_golden(mean, z["running_mean"], "running mean")
    # On purpose: the published code multiplies the unbiased variance by B / (B - 1) once more; we record it as it is.
    batch = len(x)
    var_twice_corrected = running["var"].lerp(measured["var"] * batch / (batch - 1), MOMENTUM)
    assert_close_to_golden(var_twice_corrected, z["running_var"], "running variance")

    statistics = {"mean": torch.tensor(z["running_mean"]), "var": torch.tensor(z["running_var"])}
    scale = net.scale(x, net.phi, statistics, norms).flatten().detach()
    assert_close_to_golden(scale, z["scale_eval"], "scale in evaluation")
    y = maths.apply_multiplier(x, net.multiplier(x, eps, statistics, norms), coeff, clip)
    assert_close_to_golden(y.detach(), z["out_eval"], "output in evaluation")


def test_golden_published_phi_has_82_numbers(golden):
    phi = golden_phi(golden("published_phi.npz"), "")
    assert isinstance(phi, Phi)
    assert sum(value.numel() for value in phi) == 82
