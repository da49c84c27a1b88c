"""A few characters that tell a user's module, data and functions from others of the same names, as far as that goes."""

import hashlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import PurePath
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from mp_lightning.compare.first_look import FirstBatches

_LIBRARIES = frozenset(
    (
        *("builtins", "abc", "torch", "torchvision", "torchmetrics", "lightning", "pytorch_lightning"),
        *("lightning_fabric", "timm", "transformers", "mp_lightning"),
    )
)


def fingerprint(module: L.LightningModule, found: FirstBatches, data: Any) -> dict[str, str]:
    """Digests of a module with its optimizers' and schedulers' settings, of first batches, and of the user's code.

    What cannot be read without a trainer is left out.

    Args:
        module: of seed 0.
        found: of seed 0.
        data: the datamodule, or the function that makes it, as it was given.
    """
    values = [*module.state_dict().items(), *_optimizers(module)]
    classes = [type(part) for part in (*module.modules(), found.data)]
    made_by = [] if isinstance(data, L.LightningDataModule) else [identity(data)]
    return {
        "module": _digest(values),
        "data": _digest([found.train, found.test]),
        "code": hashlib.sha256(repr([*made_by, *_code_of(classes)]).encode()).hexdigest()[:12],
    }


def _code_of(classes: Iterable[type]) -> list[Any]:
    """Of the methods of classes and of those that they inherit from, but of libraries."""
    every = dict.fromkeys(base for cls in classes for base in cls.__mro__ if _is_of_the_user(base))
    return [
        [cls.__qualname__, [[name, _code(_function(value))] for name, value in vars(cls).items() if _function(value)]]
        for cls in every
    ]


def _function(value: Any) -> FunctionType | None:
    """That of a method, of whatever kind."""
    function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    return function if isinstance(function, FunctionType) else None


def _is_of_the_user(cls: type) -> bool:
    return cls.__module__.partition(".")[0] not in _LIBRARIES


def identity(function: Callable[..., Any]) -> str:
    """Qualified name of a function, or of the class of what is called as one, and a digest of its code.

    The digest is of instructions and constants, defaults and what the function holds of its surroundings, but not of
    other functions and globals that it names; another version of Python may give another one.
    """
    named = function.func if isinstance(function, partial) else function
    name = getattr(named, "__qualname__", type(named).__qualname__)
    return f"{name} {hashlib.sha256(repr(_code(function)).encode()).hexdigest()[:12]}"


def _code(value: Any, within: frozenset[int] = frozenset()) -> Any:
    """What ``repr`` tells of a value or its code, without addresses in memory.

    Args:
        value: any.
        within: ids of the values that it is a part of; one that holds itself is told as such there.
    """
    if id(value) in within:
        return "itself"
    code = partial(_code, within=within | {id(value)})
    match value:
        case str() | bytes() | int() | float() | complex() | None:
            return value
        case CodeType():
            return value.co_code, value.co_names, code(value.co_consts)
        case FunctionType():
            held = [_content(cell) for cell in value.__closure__ or ()]
            return code([value.__code__, value.__defaults__, value.__kwdefaults__, held])
        case MethodType():
            return code([value.__func__, value.__self__])
        case partial():
            return code([value.func, value.args, value.keywords])
        case Tensor():
            return _digest([value])
        case np.ndarray() | np.generic():
            return str(value.dtype), value.shape, code(value.tolist())
        case type() | ModuleType():  # not all that is in it
            return getattr(value, "__qualname__", value.__name__)
        case list() | tuple():
            return [code(one) for one in value]
        case dict():
            return [(key, code(one)) for key, one in value.items()]
        case set() | frozenset():
            return sorted(repr(code(one)) for one in value)
        case PurePath():
            return str(value)
    called = vars(type(value)).get("__call__")
    state = getattr(value, "__dict__", {})
    if isinstance(called, FunctionType):
        return [type(value).__qualname__, *code([called, state])]
    return [type(value).__qualname__, *([code(state)] if state else [])]


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # of a name that is assigned later
        return None


def _optimizers(module: L.LightningModule) -> list[Any]:
    try:
        found = [leaf for leaf in tree_leaves(module.configure_optimizers()) if hasattr(leaf, "state_dict")]
    except Exception:  # it may ask the trainer, which is not there yet
        return []
    optimizers = [one for one in found if hasattr(one, "param_groups")]
    schedulers = [one for one in found if one not in optimizers]
    return [
        *([type(one).__name__, *map(_plain_values, one.param_groups)] for one in optimizers),
        *([type(one).__name__, _plain_values(one.state_dict())] for one in schedulers),
    ]


def _plain_values(values: dict[str, Any]) -> list[tuple[str, Any]]:
    return sorted((key, value) for key, value in values.items() if key != "params")


def _digest(values: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for leaf in tree_leaves(list(values)):
        if is_lazy(leaf):  # has no numbers yet
            continue
        if isinstance(leaf, Tensor):
            digest.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(leaf, str | int | float | bool | None):
            digest.update(repr(leaf).encode())
    return digest.hexdigest()[:12]
