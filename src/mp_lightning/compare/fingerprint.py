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
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from mp_lightning.compare.pairing import seed_all
from mp_lightning.compare.run import Experiment, fresh_module, setup_seed


def fingerprint(experiment: Experiment) -> dict[str, str]:
    """Digests of the module of seed 0 with its optimizers' and schedulers' settings, and of the first batches.

    What cannot be read without a trainer is left out. The global generators are left as they were.

    Raises:
        UserError: the module cannot be made.
    """
    with isolate_rng():
        module = _digest([*fresh_module(experiment, 0).state_dict().items(), *_optimizers(fresh_module(experiment, 0))])
        seed_all(setup_seed(0))
        return {"module": module, "data": _digest(_first_batches(experiment))}


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


def _first_batches(experiment: Experiment) -> list[Any]:
    try:
        data = experiment.data(0)
        data.prepare_data()
        found = []
        for stage, hook in (("fit", "train_dataloader"), ("test", "test_dataloader")):
            data.setup(stage)
            found += [next(iter(loader)) for loader in tree_leaves(getattr(data, hook)())]
        return found
    except Exception:  # as a run will say, or because the trainer is asked
        return []


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
