"""Weights to fine-tune from, whatever wrapped them; only the head may be another."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mp_lightning.backbones import build_backbone
from mp_lightning.compare.weights import load_weights, read_weights
from mp_lightning.errors import ConfigurationError


def net(classes: int = 3, width: int = 2):
    return build_backbone("conv4", classes, width=width, image_size=16)


def wrapped(state: dict, prefix: str) -> dict:
    return {f"{prefix}{name}": value for name, value in state.items()}


@pytest.mark.parametrize("kind", ["state_dict", "checkpoint", "compiled", "safetensors", "with others", "of a module"])
def test_weights_are_found_however_they_were_saved(tmp_path: Path, kind: str) -> None:
    source = net()
    state = source.state_dict()
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pt")
    match kind:
        case "safetensors":
            save_file(state, path)
        case "checkpoint":
            torch.save({"state_dict": wrapped(state, "net."), "epoch": 3}, path)
        case "compiled":
            torch.save(wrapped(state, "module._orig_mod."), path)
        case "of a module":
            torch.save({"state_dict": wrapped(state, "backbone.")}, path)
        case "with others":
            torch.save({**wrapped(state, "model."), "teacher.weight": torch.zeros(2)}, path)
        case _:
            torch.save(state, path)
    target = net(classes=5)
    fresh = load_weights(target, read_weights(path))
    assert fresh == ["fc.weight", "fc.bias"]
    for name, value in target.state_dict().items():
        assert name in fresh or torch.equal(value, state[name]), name
    same = net()
    assert load_weights(same, read_weights(path)) == []
    assert torch.equal(same.fc.weight, source.fc.weight)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    torch.save(net(width=4).state_dict(), tmp_path / "w.pt")
    message = r"w\.pt' do not fit this network: \d+ of its tensors .* such as '.*the file has 'conv_layers.* and others"
    with pytest.raises(ConfigurationError, match=message):
        load_weights(net(), read_weights(tmp_path / "w.pt"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.pt", None, "do not exist"),
        ("w.pt", b"nothing", "cannot be read with weights_only=True"),
        ("w.safetensors", b"nothing", "cannot be read"),
        ("numbers.pt", {"epoch": 3}, "hold no tensors"),
        ("list.pt", [1, 2], "hold a list"),
        ("nan.pt", {"a": torch.tensor([float("nan")])}, "'a' of weights .* is not finite"),
        ("mixin.pt", {"state_dict": {"net._metaperturb.coeff": torch.ones(())}}, "were trained with MetaPerturb"),
        ("callback.pt", {"mp_lightning": {}, "state_dict": {"a": torch.ones(2)}}, "were trained with MetaPerturb"),
        ("loop.pt", {"metaperturb": {}, "model": {"a": torch.ones(2)}}, "were trained with MetaPerturb"),
    ],
)
def test_files_without_weights_are_refused(tmp_path: Path, name: str, content, message: str) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ConfigurationError, match=message):
        read_weights(path)
