"""The page of ``VERB --help``: what can be set, read from the files of the configuration themselves."""

import json
import re
import textwrap
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from mp_lightning.cli.words import CONFIGURATION, PROGRAM, compose
from mp_lightning.nested import flat

WIDTH = 100
_COLUMN = 36  # where the meaning of a key begins
_EXAMPLES = {
    "fit": {
        "": "images that need no download",
        "data=pictures trainer.devices=2": "your own images, a folder for each class; on two devices",
        "seed=0,1,2 meta.lr=1e-3,3e-4 -m": "a sweep of six runs, in one folder",
    },
    "compare": {
        "": "five arms on real digits with few labels; needs no download",
        "target=pictures model=resnet20 seeds=10": "your own images, a folder for each class",
        "target=cifar10 n_per_class=50,500 arms=[none,mixup,metaperturb+mixup] -m": "two comparisons; + combines arms",
    },
    "select": {
        "sweep=runs/sweep-fit": "the run with the best held-out likelihood",
        "sweep=runs/sweep-fit by=accuracy": "the run with the best held-out accuracy",
        "sweep=runs/sweep-fit to=my-phi.safetensors": "written to a file of your choice",
    },
    "sites": {
        "model=torchvision:resnet50": "also timm:NAME, transformers:NAME",
        "model=my_package.nets:make_net input=1x64x64": "your own function, and the size of its images",
        "model=train.py:Classifier target=student to=plan.yaml": "a part of it; the plan as a file that can be edited",
    },
    "export": {
        "ckpt=trained.ckpt to=model.onnx": "needs mp_lightning[export]",
        "ckpt=trained.ckpt to=model.pt2 mode=fold": "for torch.export.load; with constants",
        "ckpt=trained.ckpt to=model.onnx model=train.py:Classifier": "where the checkpoint does not say it",
    },
}
_OPTIONS = {
    "-m": "run every combination of the values that are given as key=a,b,c; hydra/sweeper=optuna searches "
    "instead, in intervals too: key='interval(a,b)' (needs mp_lightning[sweep])",
    "--cfg job": "show the configuration and do nothing",
    "--help": "show this page",
}
_KEY = re.compile(r"(?P<indent> *)(?P<key>\w+):(?:\s(?P<rest>.*))?")


@dataclass(frozen=True)
class Comments:
    """What the comments of a configuration file say: of the file (the first of them), and of its keys."""

    file: str
    keys: dict[str, str]


def help_page(verb: str, what: str) -> str:
    """The whole page, at most 100 columns wide unless a default is wider.

    Args:
        verb: name of the configuration.
        what: what the verb does.
    """
    folder = files(CONFIGURATION)
    config = compose(verb, [])
    values = flat(cast(dict[str, Any], OmegaConf.to_container(config, resolve=False)))
    own = read_comments((folder / f"{verb}.yaml").read_text(encoding="utf-8"))
    chosen = _defaults(folder / f"{verb}.yaml")
    lines = [f"usage: {PROGRAM} {verb} [key=value ...] [options]", "", *_wrapped(f"{what[0].upper()}{what[1:]}."), ""]
    lines += ["examples:"]
    for words, meaning in _EXAMPLES.get(verb, {}).items():
        lines += [f"  {f'{PROGRAM} {verb} {words}'.rstrip()}", *_wrapped(meaning, "      ")]
    groups: list[str] = []
    shown: set[str] = {"command"}
    for group, choice in chosen.items():
        if choice is None:
            continue
        comments = read_comments((folder / group / f"{choice}.yaml").read_text(encoding="utf-8"))
        prefix = f"{group.replace('/', '.')}."
        inside = [key for key in values if key.startswith(prefix)]
        shown.update(inside)
        groups += ["", _choices(group, choice, _names(folder / group)), *_wrapped(comments.file, "  ")]
        for key in (key for key in inside if not key.endswith("._target_")):
            groups += _setting(key, values[key], comments.keys.get(key.removeprefix(prefix), ""))
    lines += ["", "settings:"]
    of_hydra = [key for key in values if key.startswith("hydra.") and key in own.keys]
    for key in [*[key for key in values if not key.startswith("hydra.") and key not in shown], *of_hydra]:
        lines += _setting(key, values[key], own.keys.get(key, ""))
    lines += [*groups, *_additions(folder, {str(key) for key in config} | set(chosen), chosen)]
    lines += ["", "options:"]
    for option, meaning in _OPTIONS.items():
        lines += _aligned(option, meaning)
    return "\n".join(lines)


def read_comments(text: str) -> Comments:
    """The comments of a YAML file whose mappings are written in block style.

    The first block of comments belongs to the file, each later one to the key below it, as does one behind a key.
    """
    about = ""
    keys: dict[str, str] = {}
    pending: list[str] = []
    path: list[tuple[int, str]] = []
    for line in text.splitlines():
        if line.lstrip().startswith("#"):
            comment = line.lstrip(" #")
            pending += [] if comment.startswith("@package") else [comment]
            continue
        match = _KEY.fullmatch(line)
        if match is None:
            continue
        if not keys and not path:
            about, pending = " ".join(pending), []
        indent = len(match["indent"])
        path = [(at, key) for at, key in path if at < indent] + [(indent, match["key"])]
        _, _, behind = f" {match['rest'] or ''}".partition(" #")
        keys[".".join(key for _, key in path)] = " ".join([*pending, *([behind.strip()] if behind.strip() else [])])
        pending = []
    return Comments(about, {key: comment for key, comment in keys.items() if comment})


def _defaults(file: Traversable) -> dict[str, str | None]:
    """The groups of this package from which a configuration takes a part, each with its choice (None: no part yet)."""
    content = OmegaConf.create(file.read_text(encoding="utf-8"))
    assert isinstance(content, DictConfig)
    entries = content.get("defaults", [])
    found: dict[str, str | None] = {}
    for entry in entries:
        for group, choice in entry.items() if OmegaConf.is_dict(entry) else ():
            name = str(group).removeprefix("override ")
            if (files(CONFIGURATION) / name).is_dir():
                found[name] = None if choice is None else str(choice)
    return found


def _additions(folder: Traversable, known: set[str], chosen: dict[str, str | None]) -> list[str]:
    """What can be added: groups of which the configuration has no part yet, and sets of values for keys that it has."""
    lines = []
    for group in sorted(entry.name for entry in folder.iterdir() if entry.is_dir()):
        if chosen.get(group) is not None:
            continue
        for name in _names(folder / group):
            text = (folder / group / f"{name}.yaml").read_text(encoding="utf-8")
            keys = {str(key) for key in OmegaConf.create(text)} - {"defaults"}
            if group in chosen or (keys and keys <= known):
                lines += [
                    "",
                    f"{'' if group in chosen else '+'}{group}={name}",
                    *_wrapped(read_comments(text).file, "  "),
                ]
    return lines


def _names(group: Traversable) -> list[str]:
    return sorted(entry.name.removesuffix(".yaml") for entry in group.iterdir() if entry.name.endswith(".yaml"))


def _choices(group: str, choice: str, names: list[str]) -> str:
    others = ", ".join(name for name in names if name != choice)
    return f"{group}={choice}{f' (or {others})' if others else ''}"


def _setting(key: str, value: Any, meaning: str) -> list[str]:
    return _aligned(f"{key}={_shown(value)}", meaning)


def _aligned(left: str, meaning: str) -> list[str]:
    """One entry, the meaning in a column of its own; below, if the left side is too long."""
    indent = " " * _COLUMN
    wrapped = _wrapped(meaning, indent)
    if len(left) + 4 > _COLUMN or not wrapped:
        return [f"  {left}", *wrapped]
    return [f"  {left}".ljust(_COLUMN) + wrapped[0].lstrip(), *wrapped[1:]]


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_shown, value))}]"
    return value if isinstance(value, str) else json.dumps(value)
