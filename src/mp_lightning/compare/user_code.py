"""A few characters that tell a user's functions and classes from others of the same names, as far as that goes."""

import hashlib
import logging
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import PurePath
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import lightning as L
import numpy as np
from torch import Tensor

from mp_lightning.compare.plain_values import digest, is_of_a_library, numbers_of, plain


def code_of(classes: Iterable[type]) -> list[Any]:
    """Of the methods and constants of classes and of those that they inherit from, but of libraries."""
    every = dict.fromkeys(base for cls in classes for base in cls.__mro__ if not is_of_a_library(base))
    return [
        [cls.__qualname__, [[name, told] for name, value in vars(cls).items() if (told := _told(name, value))]]
        for cls in every
    ]


def _told(name: str, value: Any) -> Any:
    """What is told of a member of a class; nothing of what Python adds, nor of what may be a cache."""
    function = _function(value)
    if function is not None:
        return _code(function)
    is_constant = isinstance(value, str | int | float | tuple) and not name.startswith("__")
    return [plain(value)] if is_constant else None


def _function(value: Any) -> FunctionType | None:
    """That of a method, of whatever kind, and as it is written where it is compiled."""
    function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    function = getattr(function, "_torchdynamo_orig_callable", function)
    return function if isinstance(function, FunctionType) else None


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
        case str() | PurePath():
            return plain(value)
        case bytes() | int() | float() | complex() | None:
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
            return digest([value])
        case np.ndarray() | np.generic():
            return numbers_of(value)
        case type() | ModuleType():  # not all that is in it
            return getattr(value, "__qualname__", value.__name__)
        case logging.Logger() | L.Trainer():  # through which much is reached that changes
            return type(value).__qualname__
        case list() | tuple():
            return [code(one) for one in value]
        case dict():
            return sorted(([code(key), code(one)] for key, one in value.items()), key=repr)
        case set() | frozenset():
            return sorted((code(one) for one in value), key=repr)
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
