"""Files that run without this package give what the model gives."""

import copy
import math
import warnings
from functools import partial

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.convnext import CNBlockConfig

from mp_lightning import ConfigurationError, attach, reestimate_batch_norm
from mp_lightning.backbones import build_backbone
from mp_lightning.inference import Fold, Mean, export, exportable
from mp_lightning.inference.exporting import _difference
from mp_lightning.sites import attachment_of

attach = partial(attach, sites=1)  # at all sites, whatever the default phi comes with

NETWORKS = {
    "ResNet18": lambda: torchvision.models.resnet18(num_classes=5),
    "MobileNetV3": lambda: torchvision.models.mobilenet_v3_small(num_classes=5),
    "ConvNeXt": lambda: torchvision.models.ConvNeXt(
        [CNBlockConfig(16, 32, 1), CNBlockConfig(32, 64, 2), CNBlockConfig(64, None, 1)], num_classes=5
    ),
    "ViT": lambda: torchvision.models.VisionTransformer(32, 8, 3, 2, 16, 32, num_classes=5),
}


def trained(name="ResNet18", mode="mean"):
    """Attached, with statistics that differ from those of a fresh model, and re-estimated for the mode."""
    torch.manual_seed(0)
    model = NETWORKS[name]()
    for part in model.modules():
        if isinstance(part, nn.Linear):  # torchvision's heads may start at zero
            nn.init.normal_(part.weight, std=0.01)
    attachment = attach(model, ramp_steps=2, full_strength_at=1)
    images = torch.rand(8, 3, 32, 32)
    for _ in range(3):
        model(images)
        attachment.step()
    reestimate_batch_norm(attachment, [lambda: model(images)], fold=mode == "fold")
    attachment.inference = Fold() if mode == "fold" else Mean()
    return model.eval()


@pytest.mark.slow
def test_a_part_of_a_module_is_exported_to_onnx(tmp_path):
    """What is counted belongs to the module, and is no part of the graph."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    net = build_backbone("conv4", 5, width=4)
    module = nn.Sequential(net, nn.Softmax(1))
    attachment = attach(module, ramp_steps=0, full_strength_at=1)
    images = torch.rand(8, 3, 32, 32)
    module(images)
    reestimate_batch_norm(attachment, [lambda: module(images)])
    attachment.inference = Mean()
    assert export(net, tmp_path / "part.onnx", images) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["mean", "fold"])
@pytest.mark.parametrize("name", NETWORKS)
def test_onnx_gives_the_output_of_the_model(name, mode, tmp_path):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = trained(name, mode)
    path = tmp_path / "model.onnx"
    assert export(model, path, torch.rand(2, 3, 32, 32), mode) < 1e-4
    images = torch.rand(5, 3, 32, 32)  # as many as one likes
    with torch.no_grad():
        expected = model(images)
    session = onnxruntime.InferenceSession(path)
    (output,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    assert torch.allclose(torch.from_numpy(output), expected, atol=1e-4, rtol=0)
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert ("Softplus" in kinds) == (mode == "mean")  # of the perturbation alone
    assert not any(kind.startswith("Random") for kind in kinds)
    sites = len(attachment_of(model).plan)
    assert kinds.count("Clip") >= sites


@pytest.mark.parametrize("mode", ["mean", "fold"])
def test_torch_export_gives_the_output_of_the_model(mode, tmp_path):
    model = trained(mode=mode)
    path = tmp_path / "to" / "model.pt2"
    assert export(model, path, torch.rand(2, 3, 32, 32), mode) < 1e-4
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
    program = torch.export.load(path)
    assert torch.allclose(program.module()(images), expected, atol=1e-4, rtol=0)
    assert not program.graph_signature.buffers_to_mutate
    targets = [str(node.target) for node in program.run_decompositions().graph.nodes]
    assert any("aten.abs" in target for target in targets) == (mode == "mean")  # of the perturbation alone
    assert [entry.name for entry in path.parent.iterdir()] == ["model.pt2"]


def test_fold_leaves_one_multiplication_by_constants_at_each_site(tmp_path):
    model = trained(mode="fold")
    plain = torchvision.models.resnet18(num_classes=5).eval()
    images = torch.rand(2, 3, 32, 32)

    def operations(module):
        program = torch.export.export(module, (images,)).run_decompositions()
        return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]

    folded, bare = operations(exportable(model, "fold")), operations(plain)
    added = {kind: folded.count(kind) - bare.count(kind) for kind in set(folded)}
    added = {kind: count for kind, count in added.items() if count}
    assert added == {"aten.mul.Tensor": 8, "aten.view.default": 8, "aten.clamp.default": 8}


def test_the_model_is_left_as_it_was():
    model = trained()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        before = model(images)
    state = copy.deepcopy(model.state_dict())
    frozen = exportable(model, "mean")
    with torch.no_grad():
        assert torch.allclose(frozen(images), before, atol=1e-5)
        assert torch.equal(model(images), before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert int(attachment_of(frozen).evaluations) == 0 or frozen is not model
    model.train()
    assert not torch.equal(model(images), model(images))  # and it can be trained on


class DrawsWithNumbers(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = torchvision.models.resnet18(num_classes=5)

    def forward(self, x):
        return self.net(x) * float(x.sum())


@pytest.mark.parametrize(
    ("make", "path", "mode", "message"),
    [
        (lambda: trained(), "m.onnx", "mc", "mode=mc cannot be exported, as it draws noise"),
        (lambda: trained(), "m.onnx", "fold", "mode=fold needs constants"),
        (lambda: trained(mode="fold"), "m.onnx", "mean", "batch norm was estimated for mode=fold"),
        (lambda: trained(), "m.tflite", "mean", r"to=.*m\.tflite cannot be used; give a file name that ends in \.onnx"),
        (lambda: torchvision.models.resnet18(), "m.onnx", "mean", "ResNet has no perturbation attached"),
    ],
)
def test_what_cannot_be_exported_says_why(make, path, mode, message, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        export(make(), tmp_path / path, torch.rand(2, 3, 32, 32), mode)
    assert not list(tmp_path.iterdir())


def test_a_model_that_was_trained_on_must_be_reestimated():
    model = trained()
    model.train()(torch.rand(4, 3, 32, 32))
    with pytest.raises(ConfigurationError, match="batch norm was not re-estimated since the model was trained"):
        exportable(model, "mean")


def test_a_forward_that_torch_cannot_follow_is_one_line(tmp_path):
    model = DrawsWithNumbers()
    attachment = attach(model, ramp_steps=0)
    reestimate_batch_norm(attachment, [lambda: model(torch.rand(4, 3, 32, 32))])
    attachment.inference = Mean()
    with pytest.raises(ConfigurationError, match="DrawsWithNumbers cannot be exported") as caught:
        export(model.eval(), tmp_path / "m.pt2", torch.rand(2, 3, 32, 32))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


class FixesItsBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = torchvision.models.resnet18(num_classes=5)

    def forward(self, x):
        y = self.net(x)
        return torch.cat([part for part in y.chunk(2)]) if len(y) % 2 == 0 else y


def test_a_batch_that_is_fixed_is_said(tmp_path):
    model = FixesItsBatch()
    attachment = attach(model, ramp_steps=0)
    reestimate_batch_norm(attachment, [lambda: model(torch.rand(4, 3, 32, 32))])
    attachment.inference = Mean()
    with pytest.raises(ConfigurationError, match="for exactly 2 images only, as its forward reads their number"):
        export(model.eval(), tmp_path / "m.pt2", torch.rand(2, 3, 32, 32))


class ManyOutputs(nn.Module):
    """Logits of which one is masked out, a NaN, flags and whole numbers."""

    def __init__(self):
        super().__init__()
        self.net = build_backbone("conv4", 3, width=4)
        self.register_buffer("mask", torch.tensor([0.0, 0.0, -math.inf]))

    def forward(self, x):
        y = self.net(x)
        return y + self.mask, {"nan": y * math.nan, "flags": y > 0, "none": None}, y.argmax(1)


def small(make=ManyOutputs):
    model = make()
    attachment = attach(model, ramp_steps=0, full_strength_at=1)
    images = torch.rand(8, 3, 32, 32)
    model(images)
    reestimate_batch_norm(attachment, [lambda: model(images)])
    attachment.inference = Mean()
    return model.eval()


@pytest.mark.parametrize("suffix", [".pt2", pytest.param(".onnx", marks=pytest.mark.slow)])
def test_outputs_that_are_not_finite_are_compared_as_well(suffix, tmp_path):
    if suffix == ".onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)
    assert export(small(), tmp_path / f"m{suffix}", torch.rand(2, 3, 32, 32)) < 1e-4


@pytest.mark.parametrize(
    ("found", "wanted", "difference"),
    [
        ([1.0, math.nan, -math.inf], [1.0, math.nan, -math.inf], 0),
        ([1.0, -math.inf], [1.001, -math.inf], 1e-3),
        ([1.0, math.nan], [1.0, 2.0], math.inf),
        ([1.0, 2.0], [1.0, math.nan], math.inf),
        ([1.0, math.inf], [1.0, -math.inf], math.inf),
        ([True, False], [True, True], 1),
        ([3, 4], [3, 2], 2),
        ([], [], 0),
    ],
)
def test_the_difference_of_any_numbers(found, wanted, difference):
    outputs = ([torch.zeros(2), torch.tensor(of)] for of in (found, wanted))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert _difference(*outputs) == pytest.approx(difference, rel=1e-4)
    said = [str(warning.message) for warning in caught]
    assert len(said) == (difference > 0.01) and all("of the exported file is up to" in text for text in said)


def test_a_path_may_start_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    export(small(), "~/to/m.pt2", torch.rand(2, 3, 32, 32))
    assert (tmp_path / "to" / "m.pt2").is_file()


@pytest.mark.parametrize(
    ("model", "path", "dtype", "message"),
    [
        ("a", "m.pt2", torch.float32, "export was given a str; give a torch.nn.Module"),
        (None, None, torch.float32, "path= is a NoneType; give a file name"),
        (None, "m.pt2", torch.float64, r"images of 3x32x32 do not pass through ManyOutputs as torch\.float64 "),
        (None, "m.pt2", torch.float16, r"images of 3x32x32 do not pass through ManyOutputs as torch\.float16 "),
    ],
)
def test_arguments_of_another_kind_are_told_by_name(model, path, dtype, message, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        export(model or small(), path and tmp_path / path, torch.rand(2, 3, 32, 32).to(dtype))
