"""What plain values hold, told alike in every process: of settings, attributes and tensors."""

import hashlib
import os
import re
from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from pathlib import PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

_LIBRARIES = frozenset(
    (
        *("builtins", "abc", "torch", "torchvision", "torchmetrics", "lightning", "pytorch_lightning"),
        *("lightning_fabric", "timm", "transformers", "mp_lightning"),
    )
)
_ADDRESS = re.compile("0x[0-9a-fA-F]{6,}")
# Tensors and parts, which are told otherwise, and hooks, which are counted through the process.
_KEPT_BY_TORCH = vars(nn.Module()).keys() - {"training"}


def digest(values: Iterable[Any]) -> str:
    """Of the tensors and plain values in nested collections; anything else in them is left out."""
    found = hashlib.sha256()
    for leaf in tree_leaves(list(values)):
        if isinstance(leaf, Tensor):
            if is_lazy(leaf) or leaf.is_meta or leaf.layout != torch.strided:  # the first two have no numbers
                continue
            found.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(leaf, str | int | float | bool | None):
            found.update(repr(leaf).encode())
    return found.hexdigest()[:12]


def layers_of(module: nn.Module) -> list[Any]:
    """Names, classes and plain attributes of a module's parts in their order, and which parameters learn."""
    parts = [
        [name, type(part).__qualname__, plain({k: v for k, v in vars(part).items() if _is_own(k)})]
        for name, part in module.named_modules(remove_duplicate=False)
    ]
    return [parts, [name for name, parameter in module.named_parameters() if parameter.requires_grad]]


def _is_own(name: str) -> bool:
    """Of an attribute of a part; torch.compile adds some that are addresses."""
    return name not in _KEPT_BY_TORCH and not name.startswith("_torchdynamo")


def numbers_of(array: np.ndarray | np.generic) -> list[Any]:
    """What an array holds, by a digest."""
    if array.dtype.hasobject:
        return [str(array.dtype), array.shape, plain(array.tolist())]
    content = np.ascontiguousarray(array).tobytes()
    return [str(array.dtype), array.shape, hashlib.sha256(content).hexdigest()[:12]]


def plain(value: Any, within: frozenset[int] = frozenset()) -> Any:
    """Numbers, text and tensors, in collections as well; of anything else the name of its class.

    Nothing in it depends on where a process keeps what it holds, nor on the order of sets and dictionaries. Absolute
    paths are not told, as the same files may lie elsewhere.

    Args:
        value: any.
        within: ids of the collections that it is a part of; one that holds itself is told as such there.
    """
    if id(value) in within:
        return "itself"
    inner = partial(plain, within=within | {id(value)})
    match value:
        case Enum():
            return [type(value).__qualname__, value.name]
        case np.generic():
            return value.item()
        case bool() | int() | float() | complex() | bytes() | None:
            return value
        case str():
            return "an absolute path" if os.path.isabs(value) else _ADDRESS.sub("", value)
        case PurePath():
            return inner(str(value))
        case Tensor() | nn.Parameter():
            return digest([value])
        case np.ndarray():
            return numbers_of(value)
        case FunctionType():
            return [value.__qualname__, *_instructions(value)]
        case type() | BuiltinFunctionType():
            return value.__qualname__
        case partial():
            return [inner(value.func), inner(value.args), inner(value.keywords)]
        case list() | tuple():
            return [inner(one) for one in value]
        case set() | frozenset():
            return sorted((inner(one) for one in value), key=repr)
        case Namespace() | SimpleNamespace():
            return inner(vars(value))
        case Mapping():
            try:
                return sorted(([inner(key), inner(one)] for key, one in value.items()), key=repr)
            except Exception:  # one of another kind than dict may compute what it gives
                return type(value).__qualname__
    if is_dataclass(value):
        return [type(value).__qualname__, inner({one.name: getattr(value, one.name, None) for one in fields(value)})]
    return type(value).__qualname__


def _instructions(function: FunctionType) -> list[Any]:
    """Of a function that is no library's, which another version of that may write otherwise."""
    if is_of_a_library(function):
        return []
    code = function.__code__
    return [code.co_code, code.co_names, plain([value for value in code.co_consts if not isinstance(value, CodeType)])]


def is_of_a_library(value: type | FunctionType) -> bool:
    """Whether a class or function comes from one of those that networks and data are made with."""
    return (value.__module__ or "").partition(".")[0] in _LIBRARIES
