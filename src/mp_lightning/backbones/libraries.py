"""Networks of torchvision, timm and transformers by their names. Weights are drawn afresh: nothing is downloaded."""

import difflib
import importlib
from collections.abc import Iterable

import torchvision
from torch import nn

from mp_lightning.errors import ConfigurationError

LIBRARIES = ("torchvision", "timm")
# With auxiliary heads a forward of training gives several logits. Without the second option these two warn.
_ONE_HEAD = {"aux_logits": False, "init_weights": True}


def build_library_network(library: str, name: str, num_classes: int, in_channels: int) -> nn.Module:
    """Build a network of a library with freshly drawn weights, from torch's global generator.

    Args:
        library: one of ``LIBRARIES``; timm is an optional package.
        name: of a classification network as that library calls it, such as 'resnet18'.
        num_classes: outputs of the head.
        in_channels: channels of the images; torchvision's networks take three.

    Raises:
        ConfigurationError: the library is absent or has no such network, or the network takes no such images.
    """
    return (_from_timm if library == "timm" else _from_torchvision)(name, num_classes, in_channels)


def _from_torchvision(name: str, num_classes: int, in_channels: int) -> nn.Module:
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise _unknown("torchvision", name, known, "torchvision.models.list_models(module=torchvision.models)")
    if in_channels != 3:
        raise ConfigurationError(
            f"torchvision:{name} takes images of 3 channels, not in_channels={in_channels}: repeat or drop channels"
        )
    options = _ONE_HEAD if name in ("googlenet", "inception_v3") else {}
    net: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)
    return net


def _from_timm(name: str, num_classes: int, in_channels: int) -> nn.Module:
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise ConfigurationError(f"timm:{name} needs the package timm ({error}): pip install timm") from error
    known = timm.list_models()
    # Other names, such as those of a hub, would be looked for on the network.
    if name not in known and name not in timm.list_pretrained():
        raise _unknown("timm", name, known, "timm.list_models()")
    net: nn.Module = timm.create_model(name, pretrained=False, num_classes=num_classes, in_chans=in_channels)
    return net


def build_transformers_network(kind: str) -> nn.Module:
    """An image classifier of transformers by its kind, such as 'vit', with the settings that the kind has by default.

    Raises:
        ConfigurationError: transformers is absent or has no such kind.
    """
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise ConfigurationError(
            f"transformers:{kind} needs the package transformers ({error}): pip install transformers"
        ) from error
    mapping = transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    kinds = {config.model_type: config for config in mapping}
    if kind not in kinds:
        raise _unknown("transformers", kind, kinds, "transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING")
    net: nn.Module = transformers.AutoModelForImageClassification.from_config(kinds[kind]())
    return net


def _unknown(library: str, name: str, known: Iterable[str], listing: str) -> ConfigurationError:
    close = difflib.get_close_matches(name, known, n=5)
    guess = f"did you mean {' or '.join(close)}? " if close else ""
    return ConfigurationError(f"{library} has no classification network '{name}': {guess}{listing} lists all names")
