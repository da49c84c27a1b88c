"""Weights to fine-tune from: a file of tensors, fitted to a network whose head may have other classes."""

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mp_lightning.checkpoints import KEY, MARKER
from mp_lightning.errors import ConfigurationError
from mp_lightning.sites.attachment import NAME


@dataclass(frozen=True, eq=False)
class Weights:
    """Tensors by name, and the file they come from."""

    tensors: dict[str, Tensor]
    path: str

    def digest(self) -> str:
        """A few characters that tell these tensors from others."""
        digest = hashlib.sha256()
        for name, value in sorted(self.tensors.items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()[:12]


def read_weights(path: str | Path) -> Weights:
    """A safetensors file, or one of torch.save that holds a state_dict or a Lightning checkpoint.

    Nothing is unpickled but tensors and plain values.

    Raises:
        ConfigurationError: the file is missing, cannot be read so, or holds no tensors.
    """
    try:
        content: dict[str, Any] = load_file(path) if str(path).endswith(".safetensors") else _read_torch(path)
    except FileNotFoundError as error:
        raise ConfigurationError(f"weights '{path}' do not exist; give a file with a state_dict") from error
    except (OSError, SafetensorError) as error:
        raise ConfigurationError(f"weights '{path}' cannot be read; give a file with a state_dict") from error
    perturbed = not {KEY, "metaperturb"}.isdisjoint(content)  # of Lightning, or of a loop as in docs/using.md
    for key in ("state_dict", "model"):
        if isinstance(content.get(key), dict):
            content = content[key]
    if perturbed or MARKER in content or any(NAME in str(name).split(".") for name in content):
        raise ConfigurationError(
            f"weights '{path}' were trained with MetaPerturb, without which they are another network; give weights "
            "that were trained without it"
        )
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ConfigurationError(f"weights '{path}' hold no tensors; give a file with a state_dict")
    for name, value in tensors.items():
        if not bool(value.isfinite().all()):
            raise ConfigurationError(f"'{name}' of weights '{path}' is not finite; give weights of a sound training")
    return Weights(tensors, str(path))


def load_weights(net: nn.Module, weights: Weights) -> list[str]:
    """Take over every tensor that fits by name and shape; the last layer may have another shape and stays as it is.

    Returns:
        The names in ``net`` that keep their fresh values.

    Raises:
        ConfigurationError: more than the last layer does not fit.
    """
    own = net.state_dict()
    given = _renamed(weights.tensors, own)
    fitting = {name: value for name, value in given.items() if name in own and value.shape == own[name].shape}
    missing = [name for name in own if name not in fitting and not name.endswith("num_batches_tracked")]
    head = next(reversed([name for name, module in net.named_modules() if isinstance(module, nn.Linear)]), None)
    strange = [name for name in missing if head is None or name.rpartition(".")[0] != head]
    if strange:
        there = next(iter(given))
        raise ConfigurationError(
            f"weights '{weights.path}' do not fit this network: {len(strange)} of its tensors are missing or of "
            f"another shape, such as '{strange[0]}' (the file has '{there}' and others); give weights of the same "
            "architecture, or choose another model="
        )
    net.load_state_dict(fitting, strict=False)
    return missing


def _read_torch(path: str | Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch raises many kinds for a damaged or foreign file
        raise ConfigurationError(
            f"weights '{path}' cannot be read with weights_only=True; save a state_dict, or safetensors"
        ) from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"weights '{path}' hold a {type(content).__name__}; give a file with a state_dict")
    return content


def _renamed(tensors: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under names without what wrappers, such as a LightningModule, put before them."""
    ends = {name: [end for end in own if name.endswith(f".{end}")] for name in tensors}
    prefixes = Counter(name.removesuffix(end) for name, found in ends.items() for end in found)
    best, fitting = max(prefixes.items(), key=lambda item: item[1], default=("", 0))
    if fitting <= sum(name in own for name in tensors):
        return tensors
    return {name.removeprefix(best): value for name, value in tensors.items() if name.startswith(best)}
