"""``python -m mp_lightning.meta VERB key=value ...``: from the words to a verb's function, with Hydra underneath."""

import difflib
import importlib
import logging
import re
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mp_lightning.errors import UserError
from mp_lightning.runs import run_name

PROGRAM = "python -m mp_lightning.meta"
VERBS = {"fit": "meta-train a perturbation and write phi.safetensors"}
CONFIGURATION = "mp_lightning.conf"
USER_ERROR = 2
INTERRUPTED = 130


def main(arguments: list[str]) -> None:
    """Run a verb; leaves the process with 0, or 2 and one line on standard error for what the user can mend."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        sys.exit(0 if arguments else USER_ERROR)
    # Ranks that a strategy starts get the recorded overrides back, in which the verb stands as command=VERB.
    verb = arguments[0].removeprefix("command=")
    if verb not in VERBS:
        fail(f"unknown verb '{verb}'; use one of: {', '.join(VERBS)}")
    overrides = [word for word in arguments[1:] if not word.startswith("command=")]
    OmegaConf.register_new_resolver("run_name", _run_name, replace=True)
    if not any(word.startswith("-") for word in overrides):
        _check(verb, overrides)
    sys.argv = [sys.argv[0], f"command={verb}", *overrides]
    hydra.main(version_base="1.3", config_path=f"pkg://{CONFIGURATION}", config_name=verb)(_job)()


def fail(message: str) -> None:
    """Leave the process with one line on standard error."""
    print(f"mp_lightning: {message}", file=sys.stderr)
    sys.exit(USER_ERROR)


def _job(config: DictConfig) -> Any:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    verb = importlib.import_module(f"mp_lightning.cli.{config.command}")
    try:
        return verb.run(config, Path(HydraConfig.get().runtime.output_dir))
    except UserError as error:
        fail(str(error))
    except OmegaConfBaseException as error:
        fail(f"the configuration cannot be read: {_first_line(error)}")
    except KeyboardInterrupt:
        print("\nmp_lightning: interrupted; the same command continues this run", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _run_name(*, _root_: DictConfig) -> str:
    config = OmegaConf.to_container(_root_, resolve=False)
    assert isinstance(config, dict)
    return run_name({str(key): value for key, value in config.items()})


def _check(verb: str, overrides: list[str]) -> None:
    """Compose the configuration once beforehand, so that a wrong key or value ends in one line and not in many."""
    with hydra.initialize_config_module(CONFIGURATION, version_base="1.3"):
        known = hydra.compose(verb)
        try:
            hydra.compose(verb, overrides=[word for word in overrides if not _is_sweep(word)])
        except (HydraException, OmegaConfBaseException) as error:
            fail(_explain(error, known))


def _is_sweep(word: str) -> bool:
    return word.startswith("hydra.") or "hydra/" in word


def _explain(error: Exception, known: DictConfig) -> str:
    text = str(error)
    found = re.search(r"Could not override '([^']+)'", text) or re.search(r"Key '([^']+)' is not in struct", text)
    if found:
        key = found.group(1)
        near = difflib.get_close_matches(key, _keys(known), n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        return f"unknown key '{key}'; {hint}'{PROGRAM} fit --cfg job' shows every key"
    return f"the command line cannot be used: {_first_line(error)}"


def _keys(config: Any, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key, value in OmegaConf.to_container(config, resolve=False).items():  # type: ignore[union-attr]
        name = f"{prefix}{key}"
        keys.append(name)
        if isinstance(value, dict):
            keys += [f"{name}.{inner}" for inner in value]
    return keys


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split("\n")[:2]).strip()


def _usage() -> str:
    verbs = "\n".join(f"  {name:<8} {what}" for name, what in VERBS.items())
    return f"usage: {PROGRAM} VERB key=value ...\n\nverbs:\n{verbs}\n\n'{PROGRAM} fit --cfg job' shows every key."
