"""Inference by constants: what they are, where they act, and how they are kept."""

import copy
import warnings

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mp_lightning import (
    Fold,
    Mean,
    MetaPerturbCallback,
    attach,
    attachment_of,
    exportable,
    reestimate_batch_norm,
)
from mp_lightning.backbones import build_backbone
from mp_lightning.errors import ConfigurationError, SiteError
from mp_lightning.perturbation import initial_phi


def strong_phi():
    return type(initial_phi(0))(*(20 * value for value in initial_phi(0)))


def trained(norm=True):
    """A perturbed network after some forwards of training, and the batches."""
    torch.manual_seed(0)
    model = build_backbone("conv4", 5, width=4)
    if not norm:
        for layer in model.conv_layers:
            layer.bn = nn.GroupNorm(2, 4)
    attachment = attach(model, strong_phi())
    batches = [torch.randn(8, 3, 32, 32) for _ in range(3)]
    for x in batches:
        model(x)
    return model, attachment, batches


def forwards(model, batches):
    return [lambda x=x: model(x) for x in batches]


@pytest.mark.parametrize("norm", [True, False])
def test_constants_are_the_expected_multipliers_on_training_batches(norm):
    model, attachment, batches = trained(norm)
    seen = []
    multiplier = attachment.perturbation.multiplier

    def watch(x, eps, statistics, norms):
        m = multiplier(x, eps, statistics, norms)
        seen.append((eps, m.detach()))
        return m

    attachment.perturbation.multiplier = watch
    reestimate_batch_norm(attachment, forwards(model, batches), fold=True)
    assert len(seen) == 12 and all(eps is None for eps, _ in seen)  # by the second pass constants act already
    for index, site in enumerate(attachment.sites):
        means = torch.stack([m.mean(dim=(0, 2, 3)) for _, m in seen[index::4]]).mean(dim=0)
        torch.testing.assert_close(attachment.estimates.constants[site.spec.name], means)


def test_constants_are_estimated_where_batch_norm_normalizes_by_the_batch():
    model, attachment, batches = trained()
    by_hand = copy.deepcopy(model)
    twin = attachment_of(by_hand)
    twin.sampling, twin.path, seen = False, "reference", []
    multiplier = twin.perturbation.multiplier
    twin.perturbation.multiplier = lambda *args: (seen.append(multiplier(*args)), seen[-1])[1]
    by_hand.eval()
    for layer in by_hand.conv_layers:
        layer.bn.train()
    with torch.no_grad():
        for x in batches:
            by_hand(x)
    reestimate_batch_norm(attachment, forwards(model, batches), fold=True)
    for index, site in enumerate(attachment.sites):
        means = torch.stack([m.mean(dim=(0, 2, 3)) for m in seen[index::4]]).mean(dim=0)
        torch.testing.assert_close(attachment.estimates.constants[site.spec.name], means)


def test_multiplies_by_the_constants_and_nothing_else():
    model, attachment, batches = trained()
    reestimate_batch_norm(attachment, forwards(model, batches), fold=True)
    attachment.inference = Fold()
    ins, outs = [], []
    for site in attachment.sites:
        site.register_forward_pre_hook(lambda module, args: ins.append(args[0]))
        site.register_forward_hook(lambda module, args, output: outs.append(output))
    with torch.no_grad():
        model.eval()(batches[0])
    for site, x, y in zip(attachment.sites, ins, outs, strict=True):
        torch.testing.assert_close(y, x * attachment.estimates.constants[site.spec.name].view(1, -1, 1, 1))
    assert not attachment.folding and attachment.sampling


def test_batch_norm_is_estimated_under_the_constants():
    """The second batch norm sees what the first site's constants leave, the plain average over the batches."""
    model, attachment, batches = trained()
    reestimate_batch_norm(attachment, forwards(model, batches), fold=True)
    attachment.inference, seen = Fold(), []
    conv = model.conv_layers[1].conv
    # Batch norm in between normalizes by the batch while it is estimated.
    handle = conv.register_forward_hook(lambda module, args, output: seen.append(output.mean(dim=(0, 2, 3))))
    model.eval()
    model.conv_layers[0].bn.train()
    with torch.no_grad():
        for x in batches:
            model(x)
    handle.remove()
    name = next(n for n, m in model.named_modules() if m is model.conv_layers[1].bn)
    estimated = attachment.estimates.buffers[f"{name}.running_mean"]
    torch.testing.assert_close(estimated, torch.stack(seen).mean(dim=0), rtol=1e-4, atol=1e-5)


def test_is_bounded():
    model, attachment, batches = trained()
    attachment.clip = 0.05
    reestimate_batch_norm(attachment, forwards(model, batches), fold=True)
    attachment.inference, outs = Fold(), []
    attachment.sites[0].register_forward_hook(lambda module, args, output: outs.append(output))
    model.eval()(batches[0])
    assert float(outs[0].detach().max()) == pytest.approx(0.05)


def test_before_estimation_and_after_more_training_samples_are_averaged_with_one_warning():
    model, attachment, batches = trained()
    attachment.inference = Fold(samples=2)
    model.eval()
    with pytest.warns(UserWarning, match="constants were not estimated.*fold=True"):
        model(batches[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(batches[0])
    reestimate_batch_norm(attachment, forwards(model, batches), fold=True)
    assert torch.equal(model(batches[0]), model(batches[0]))
    model.train()(batches[0])
    assert attachment.estimates is None


def test_batch_norm_estimated_under_constants_serves_no_inference_by_expectation():
    model, attachment, batches = trained()
    reestimate_batch_norm(attachment, forwards(model, batches), fold=True)
    attachment.inference = Mean(samples=2)
    with pytest.warns(UserWarning, match="batch norm was not re-estimated"):
        model.eval()(batches[0])
    reestimate_batch_norm(attachment, forwards(model, batches))
    assert attachment.estimates.constants is None
    assert torch.equal(model(batches[0]), model(batches[0]))


def test_without_a_batch_nothing_is_left_behind():
    model, attachment, _ = trained()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigurationError, match="without a training batch"):
        reestimate_batch_norm(attachment, [], fold=True)
    assert attachment.estimates is None and attachment.observed is None
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = build_backbone("conv4", 3, width=4, image_size=16)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        self.log("loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def test_callback_folds_at_the_end_of_fit_and_checkpoints_bring_it_back(tmp_path):
    torch.manual_seed(0)
    data = DataLoader(TensorDataset(torch.randn(24, 3, 16, 16), torch.arange(24) % 3), batch_size=8)
    module = Module()
    trainer = L.Trainer(
        max_epochs=2,
        callbacks=[MetaPerturbCallback(inference="fold", full_strength_at=1)],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, data)
    attachment = attachment_of(module)
    assert set(attachment.estimates.constants) == {site.spec.name for site in attachment.sites}
    assert isinstance(attachment.inference, Fold)
    trainer.test(module, data, verbose=False)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    restored = MetaPerturbCallback.restore(Module(), tmp_path / "last.ckpt")
    x = torch.randn(4, 3, 16, 16)
    assert torch.equal(restored.net(x), module.eval().net(x))
    assert isinstance(attachment_of(restored).inference, Fold)


class Two(nn.Module):
    """A network that is used, and one that is not."""

    def __init__(self):
        super().__init__()
        self.used, self.other = build_backbone("conv4", 5, width=4), build_backbone("conv4", 5, width=4)

    def forward(self, x):
        return self.used(x) if x.isfinite().all() else self.other(x)


def test_a_network_of_which_another_is_trained_is_exported_by_the_constants_that_there_are():
    both, batches = Two(), [torch.randn(8, 3, 32, 32) for _ in range(3)]
    attachment = attach(both, strong_phi(), ramp_steps=0)
    both(batches[0])
    reestimate_batch_norm(attachment, forwards(both, batches), fold=True)
    assert len(attachment.estimates.constants) == 4 and len(attachment.plan) == 8
    plain = exportable(both, "fold")
    attachment.inference = Fold()
    torch.testing.assert_close(plain(batches[0]), both.eval()(batches[0]))
    with pytest.raises(SiteError, match=r"site 'other\..*' has no constant, as no batch reached it"):
        plain.other(batches[0])
