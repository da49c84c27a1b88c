"""Anyone's network by what its user calls it: ours, a library's, or that of a function in the user's own code."""

import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from mp_lightning.backbones.build import build_backbone, list_backbones
from mp_lightning.backbones.libraries import LIBRARIES, build_transformers_network
from mp_lightning.errors import ConfigurationError, one_line

CLASSES = 10  # where any number will do
FORMS = "torchvision:NAME, timm:NAME, transformers:NAME, package.module:factory or file.py:factory"


def build_network(name: str) -> nn.Module:
    """Build a network with freshly drawn weights, or whatever the user's own function gives.

    Args:
        name: 'torchvision:resnet50', 'timm:NAME', 'transformers:vit' (a kind of model, by its configuration), one of
            :func:`~mp_lightning.backbones.list_backbones`, or 'package.module:factory' or 'file.py:factory', where the
            factory is a function without arguments, a class that needs none, or a module. One that must be given
            ``num_classes``, as for ``fit`` and ``compare``, is given 10.

    Raises:
        ConfigurationError: there is no such network, or building it failed; the message says which and why.
    """
    library, _, rest = name.partition(":")
    if library == "transformers":
        return build_transformers_network(rest)
    if library in LIBRARIES or name in list_backbones():
        return build_backbone(name, 1000 if library in LIBRARIES else CLASSES)
    made = find_object(name)
    if not isinstance(made, nn.Module):
        if not callable(made):
            raise ConfigurationError(
                f"network '{name}' is a {type(made).__name__}; name a function or class that makes one"
            )
        arguments = {"num_classes": CLASSES} if _asks_for_classes(made) else {}
        made = make(name, made, arguments, "name a function that needs no arguments, or num_classes alone")
    return made


def _asks_for_classes(factory: Callable[..., Any]) -> bool:
    try:
        asked = inspect.signature(factory).parameters.get("num_classes")
    except (TypeError, ValueError):  # of what is no Python
        return False
    return asked is not None and asked.default is inspect.Parameter.empty


def make(name: str, factory: Callable[..., Any], arguments: dict[str, Any], remedy: str) -> nn.Module:
    """What a user's function or class makes.

    Raises:
        ConfigurationError: it fails, which ``remedy`` may mend, or makes no module.
    """
    try:
        made = factory(**arguments)
    except (Exception, SystemExit) as error:  # the user's code raises anything, or ends the process
        raise ConfigurationError(
            f"network '{name}' failed: {type(error).__name__}: {one_line(error)}; {remedy}"
        ) from error
    if not isinstance(made, nn.Module):
        raise ConfigurationError(f"network '{name}' gave a {type(made).__name__}; it must give a torch.nn.Module")
    return made


def find_object(name: str) -> Any:
    """What 'package.module:name' or 'file.py:name' stands for.

    Raises:
        ConfigurationError: it cannot be imported.
    """
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise ConfigurationError(f"network '{name}' is unknown; give {FORMS}, or one of {', '.join(list_backbones())}")
    found: Any = _module(place, name)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ConfigurationError(f"network '{name}': there is no '{part}' in {place}")
        found = getattr(found, part)
    return found


def source_digest(name: str) -> str | None:
    """A digest of the file that 'package.module:name' or 'file.py:name' lies in, as far as there is one.

    Raises:
        ConfigurationError: it cannot be imported.
    """
    place, _, _ = name.rpartition(":")
    path = getattr(_module(place, name), "__file__", None)
    if path is None or not Path(path).is_file():
        return None
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def _module(place: str, name: str) -> ModuleType:
    try:
        return _from_file(Path(place).resolve()) if place.endswith(".py") else importlib.import_module(place)
    except (Exception, SystemExit) as error:  # the user's code raises anything, or ends the process
        raise ConfigurationError(
            f"network '{name}': {place} cannot be imported ({type(error).__name__}: {one_line(error)}); give {FORMS}"
        ) from error


@functools.cache  # so that all networks of a run are of the same code
def _from_file(path: Path) -> ModuleType:
    """The module of a file, which may import others that lie beside it, as where Python runs it."""
    name = path.stem
    if getattr(sys.modules.get(name), "__file__", None) != str(path) and name in sys.modules:
        name = f"{name}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"  # another module is called like it
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no file of Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where classes look for their own module
    beside = [] if str(path.parent) in sys.path else [str(path.parent)]
    sys.path += beside
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        for added in beside:
            sys.path.remove(added)
    return module
