"""A few characters that tell a user's module, data and code from others of the same names, as far as that goes."""

import hashlib
from collections.abc import Callable
from typing import Any

import lightning as L
from torch.utils._pytree import tree_leaves

from mp_lightning.compare.first_look import FirstBatches
from mp_lightning.compare.plain_values import digest, layers_of, plain
from mp_lightning.compare.user_code import code_of, identity


def fingerprint(
    module: L.LightningModule, found: FirstBatches, data: Any, factory: Callable[[], L.LightningModule]
) -> dict[str, str]:
    """Digests of a module with its optimizers' and schedulers' settings, of first batches, and of the user's code.

    What cannot be read without a trainer is left out.

    Args:
        module: of seed 0.
        found: of seed 0.
        data: the datamodule, or the function that makes it, as it was given.
        factory: what made the module.
    """
    values = [*module.state_dict().items(), *_optimizers(module), repr(layers_of(module))]
    classes = [type(part) for part in (*module.modules(), found.data)]
    made_by = [identity(factory), *([] if isinstance(data, L.LightningDataModule) else [identity(data)])]
    return {
        "module": digest(values),
        "data": digest([found.train, found.test]),
        "code": _digest_of_text([*made_by, *code_of(classes)]),
    }


def described(callback: L.Callback) -> str:
    """The class of a trainer's callback, with a digest of its plain attributes and of code of a user's."""
    return f"{type(callback).__name__} {_digest_of_text([plain(vars(callback)), code_of([type(callback)])])}"


def _digest_of_text(told: Any) -> str:
    return hashlib.sha256(repr(told).encode()).hexdigest()[:12]


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
