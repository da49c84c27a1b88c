"""The two halves of a joint step: what each changes, what it leaves alone, and whether phi's gradient is right."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mp_lightning.backbones import build_backbone
from mp_lightning.meta.step import batch_norm_in_evaluation, gradients_for, phi_gradient, theta_step
from mp_lightning.perturbation import MetaPerturb, Phi
from mp_lightning.perturbation.fast import cpu
from mp_lightning.perturbation.phi import SHAPES
from mp_lightning.sites import attach
from mp_lightning.sites.attachment import NAME


def random_phi(dtype: torch.dtype) -> Phi:
    """Numbers large enough that all parts of the net bend."""
    generator = torch.Generator().manual_seed(5)
    return Phi(**{f: 0.3 * torch.randn(shape, generator=generator, dtype=dtype) for f, shape in SHAPES.items()})


class Setting:
    """A perturbed conv4 with its optimizers and two batches."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.net = MetaPerturb(random_phi(dtype), trainable=True)
        self.model = build_backbone("conv4", 3, width=4, image_size=16).to(dtype).train()
        self.attachment = attach(self.model, perturbation=self.net, seed=3)
        self.phi = list(self.net.parameters())
        self.theta = [p for name, p in self.model.named_parameters() if not name.startswith(NAME)]
        self.optimizer = torch.optim.Adam(self.theta, lr=1e-2)
        self.x, self.y = torch.randn(6, 3, 16, 16, dtype=dtype), torch.tensor([0, 1, 2, 0, 1, 2])

    def buffers(self, kind: str) -> dict[str, torch.Tensor]:
        """Copies of batch norm's buffers, or of the running statistics of the sites."""
        names = ("running_mean", "running_var", "num_batches_tracked") if kind == "batch norm" else (".mean", ".var")
        return {name: b.clone() for name, b in self.model.named_buffers() if name.endswith(names)}


def same(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> list[bool]:
    assert before and before.keys() == after.keys()
    return [torch.equal(before[name], after[name]) for name in before]


def test_theta_step_changes_theta_only() -> None:
    setting = Setting()
    phi, theta = copy.deepcopy(setting.phi), copy.deepcopy(setting.theta)
    theta_step(setting.model, setting.optimizer, setting.x, setting.y)
    assert all(p.grad is None for p in setting.phi)
    assert all(torch.equal(a, b) for a, b in zip(phi, setting.phi, strict=True))
    # A bias in front of batch norm has no gradient but rounding, which Adam turns into a step all the same.
    assert not any(torch.equal(a, b) for a, b in zip(theta, setting.theta, strict=True))


def test_theta_step_gives_the_loss_before_the_step() -> None:
    setting = Setting()
    before = copy.deepcopy(setting.model)
    loss = theta_step(setting.model, setting.optimizer, setting.x, setting.y)
    assert loss.shape == () and not loss.requires_grad
    torch.testing.assert_close(loss, F.cross_entropy(before(setting.x), setting.y).detach())


def test_theta_step_twice_does_not_accumulate_gradients() -> None:
    setting = Setting()
    theta_step(setting.model, setting.optimizer, setting.x, setting.y)
    twin = copy.deepcopy(setting.model)
    theta_step(setting.model, setting.optimizer, setting.x, setting.y)
    F.cross_entropy(twin(setting.x), setting.y).backward()
    torch.testing.assert_close(setting.model.fc.weight.grad, twin.fc.weight.grad)


def test_each_half_costs_the_gradients_of_its_own_part_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting()
    asked = []
    backward = cpu.backward
    monkeypatch.setattr(cpu, "backward", lambda *a: (asked.append(a[-2:]), backward(*a))[1])
    theta_step(setting.model, setting.optimizer, setting.x, setting.y)
    assert asked == [(True, False)] * 4  # of x, of phi; from the last site to the first
    asked.clear()
    phi_gradient(setting.model, setting.phi, setting.x, setting.y)
    assert asked == [(True, True)] * 3 + [(False, True)]  # nothing in front of the first site


def test_gradients_for_gives_back_what_it_froze_even_after_an_error() -> None:
    setting = Setting()
    setting.model.fc.bias.requires_grad_(False)
    before = [p.requires_grad for p in setting.model.parameters()]
    with pytest.raises(ZeroDivisionError), gradients_for(setting.model, setting.phi):
        assert [p for p in setting.model.parameters() if p.requires_grad] == setting.phi
        raise ZeroDivisionError
    assert [p.requires_grad for p in setting.model.parameters()] == before


def test_phi_gradient_leaves_theta_batch_norm_and_phi_alone() -> None:
    setting = Setting()
    theta, phi, norm = copy.deepcopy(setting.theta), copy.deepcopy(setting.phi), setting.buffers("batch norm")
    loss, gradients = phi_gradient(setting.model, setting.phi, setting.x, setting.y)
    assert loss.shape == () and not loss.requires_grad
    assert all(same(norm, setting.buffers("batch norm")))
    assert all(torch.equal(a, b) for a, b in zip(theta, setting.theta, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(phi, setting.phi, strict=True))
    assert all(p.grad is None for p in (*setting.theta, *setting.phi))
    assert [g.shape for g in gradients] == [p.shape for p in setting.phi]
    assert all(bool(g.abs().sum() > 0) for g in gradients)


def test_phi_gradient_updates_the_statistics_of_every_site() -> None:
    setting = Setting()
    before = setting.buffers("sites")
    phi_gradient(setting.model, setting.phi, setting.x, setting.y)
    assert len(before) == 2 * len(setting.attachment.sites) and not any(same(before, setting.buffers("sites")))


def test_phi_gradient_normalizes_by_the_running_statistics() -> None:
    setting = Setting()
    alone, _ = phi_gradient(setting.model, setting.phi, setting.x, setting.y)
    setting.attachment.forwards.zero_()  # the same noise again
    again, _ = phi_gradient(setting.model, setting.phi, setting.x, setting.y)
    assert torch.equal(alone, again)
    setting.attachment.forwards.zero_()
    for name, buffer in setting.model.named_buffers():
        if name.endswith("running_mean"):
            buffer.add_(1.0)
    shifted, _ = phi_gradient(setting.model, setting.phi, setting.x, setting.y)
    assert not torch.allclose(alone, shifted)


@pytest.mark.parametrize("raises", [False, True])
def test_modes_are_restored(raises: bool) -> None:
    setting = Setting()
    frozen = setting.model.conv_layers[1].bn.eval()  # batch norm that its owner froze stays so
    modes = {name: m.training for name, m in setting.model.named_modules()}
    if raises:
        with pytest.raises(RuntimeError):
            phi_gradient(setting.model, setting.phi, setting.x[:, :2], setting.y)
    else:
        phi_gradient(setting.model, setting.phi, setting.x, setting.y)
    assert {name: m.training for name, m in setting.model.named_modules()} == modes
    assert not frozen.training


def test_only_batch_norm_is_in_evaluation_mode() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(), nn.BatchNorm3d(2), nn.InstanceNorm2d(2)).train()
    with batch_norm_in_evaluation(model):
        assert [m.training for m in model] == [False, True, False, True]


def test_meta_gradient_matches_finite_differences() -> None:
    """At fixed theta and noise, in float64, each of the 82 derivatives through the whole network."""
    setting = Setting(torch.float64)
    assert len(setting.attachment.sites) == 4 and sum(p.numel() for p in setting.phi) == 82

    def loss() -> float:
        setting.attachment.forwards.zero_()  # the same noise every time
        value, _ = phi_gradient(setting.model, setting.phi, setting.x, setting.y)
        return float(value)

    theta_step(setting.model, setting.optimizer, setting.x, setting.y)
    setting.attachment.forwards.zero_()
    _, gradients = phi_gradient(setting.model, setting.phi, setting.x, setting.y)
    h = 1e-5
    numeric = []
    for parameter in setting.phi:
        flat = parameter.detach().view(-1)
        for index in range(flat.numel()):
            value = float(flat[index])
            flat[index] = value + h
            above = loss()
            flat[index] = value - h
            numeric.append((above - loss()) / (2 * h))
            flat[index] = value
    analytic = torch.cat([g.flatten() for g in gradients])
    expected = torch.tensor(numeric, dtype=torch.float64)
    assert analytic.dtype == torch.float64
    relative = (analytic - expected).abs() / expected.abs().clamp(min=1e-6)
    assert relative.max() < 1e-4, f"number {int(relative.argmax())} is off by {relative.max():.1e}"
    assert (expected.abs() > 1e-6).all(), "a derivative so small that the comparison says nothing"


def test_meta_gradient_knows_the_noise() -> None:
    """The check above would be empty if the noise did not matter."""
    setting = Setting(torch.float64)
    first, _ = phi_gradient(setting.model, setting.phi, setting.x, setting.y)
    second, _ = phi_gradient(setting.model, setting.phi, setting.x, setting.y)
    assert first != second
