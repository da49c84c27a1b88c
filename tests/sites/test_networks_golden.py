"""Whole networks of the authors, pass by pass: the sites lie where theirs do, and everything around them agrees."""

import pytest
import torch

from golden_files import assert_close_to_golden, golden_phi
from mp_lightning.backbones import build_backbone
from mp_lightning.perturbation import MetaPerturb
from mp_lightning.sites import attach

LATER_PASSES = 60


class GivenNoise(MetaPerturb):
    """The perturbation net with noise from a file, one array for each site in order of execution."""

    def give(self, eps):
        self.eps, self.calls = eps, 0

    def noise(self, x, phi, eps):
        given = self.eps[self.calls % len(self.eps)]
        self.calls += 1
        return super().noise(x, phi, given)


def arrays(content, prefix):
    return {
        key.removeprefix(prefix): torch.from_numpy(value) for key, value in content.items() if key.startswith(prefix)
    }


@pytest.mark.parametrize("name", ["resnet20", "conv4"])
def test_network_agrees_with_golden(golden, name):
    content = golden(f"net_{name}.npz")
    # In float64: on some processors the float32 convolutions differ enough to turn a ReLU or a maximum over.
    x, y = torch.from_numpy(content["x"]).double(), torch.from_numpy(content["y"])
    model = build_backbone(name, 10).double()
    model.load_state_dict(arrays(content, "state."))
    perturbation = GivenNoise(golden_phi(golden("published_phi.npz"), ""))
    eps = {key: value.double() for key, value in arrays(content, "eps.").items()}
    perturbation.give([eps[str(index)] for index in range(len(eps))])
    attachment = attach(model, perturbation=perturbation, clip=None)
    assert len(attachment.sites) == len(eps)

    logits = model(x)
    loss = torch.nn.functional.cross_entropy(logits, y)
    loss.backward()
    assert_close_to_golden(logits.detach(), content["logits_train"], "logits_train")
    assert_close_to_golden(loss.detach(), content["loss"], "loss")
    norms = {key: parameter.grad.norm() for key, parameter in model.named_parameters()}
    expected = arrays(content, "gradnorm.")
    assert set(norms) == set(expected)
    # Of all parameters together: the gradient of a bias in front of a batch norm is zero but for rounding.
    order = sorted(norms)
    assert_close_to_golden(
        torch.stack([norms[key] for key in order]), torch.stack([expected[key] for key in order]), "gradnorm"
    )

    with torch.no_grad():
        for _ in range(LATER_PASSES):
            model(x)
    after = arrays(content, "after.")
    for key, buffer in model.named_buffers():
        if key in after:
            assert_close_to_golden(buffer.double(), after[key].double(), f"after.{key}")
    assert sum(key.endswith("running_var") for key in model.state_dict()) == sum(
        key.endswith("running_var") and not key.startswith("site.") for key in after
    )
    # The published code multiplies the variance by B / (B - 1), although it is unbiased already. Ours does not.
    doubled = len(x) / (len(x) - 1)
    start = (1 - 0.1) ** (1 + LATER_PASSES)  # of the initial variance, 1, that is left
    for index, site in enumerate(attachment.sites):
        mean, var = after[f"site.{index}.running_mean"], after[f"site.{index}.running_var"]
        assert_close_to_golden(site.mean, mean, f"mean of site {index}")
        assert_close_to_golden(site.var, (var - start) / doubled + start, f"variance of site {index}")
        site.mean.copy_(mean)
        site.var.copy_(var)
    model.eval()
    with torch.no_grad():
        assert_close_to_golden(model(x), content["logits_eval"], "logits_eval")
