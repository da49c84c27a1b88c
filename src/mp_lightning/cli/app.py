"""``python -m mp_lightning.meta VERB key=value ...``: from the words to a verb's function, with Hydra underneath."""

import importlib
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mp_lightning.cli.words import CONFIGURATION, PROGRAM, compose, run_folder, split_words
from mp_lightning.errors import UserError
from mp_lightning.runs import run_name, unusable

VERBS = {"fit": "meta-train a perturbation and write phi.safetensors"}
USER_ERROR = 2
INTERRUPTED = 130
# Advice of Lightning and torch about what the commands here do on purpose.
_NO_CONCERN_OF_THE_USER = (
    r".*isinstance\(treespec, LeafSpec\).*",
    r".*does not have many workers.*",
    r".*resuming from a checkpoint that ended before the epoch ended.*",
    r".*GPU available but not used.*",
    r".*`tensorboardX` has been removed.*",
    r".*log_every_n_steps.*",
)


def main(arguments: list[str]) -> None:
    """Run a verb; leaves the process with 0, or 2 and one line on standard error for what the user can mend."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        if not arguments:
            fail(f"no verb given; use one of: {', '.join(VERBS)}")
        sys.exit(0)
    # Ranks that a strategy starts get the recorded overrides back, in which the verb stands as command=VERB.
    verb = arguments[0].removeprefix("command=")
    if verb not in VERBS:
        fail(f"unknown verb '{verb}'; use one of: {', '.join(VERBS)}")
    OmegaConf.register_new_resolver("run_name", _run_name, replace=True)
    try:
        options, overrides = split_words(arguments[1:])
        if not options:
            _try_out(verb, overrides)
        elif "-m" in options or "--multirun" in options:
            compose(verb, overrides, sweep=True)
        # Hydra reads overrides only where they stand in one row.
        sys.argv = [sys.argv[0], *options, f"command={verb}", *overrides]
        hydra.main(version_base="1.3", config_path=f"pkg://{CONFIGURATION}", config_name=verb)(_job)()
    except UserError as error:
        fail(str(error))
    except KeyboardInterrupt:
        _interrupted()


def fail(message: str) -> None:
    """Leave the process with one line on standard error."""
    print(f"mp_lightning: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(USER_ERROR)


def _try_out(verb: str, overrides: list[str]) -> None:
    """Read the configuration once beforehand, so that what is wrong ends in one line and leaves no folder behind."""
    config = compose(verb, overrides)
    _guarded(lambda: _module(verb).read(config))
    folder = run_folder(config)
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fail(str(unusable(folder, error)))


def _job(config: DictConfig) -> Any:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in _NO_CONCERN_OF_THE_USER:
        warnings.filterwarnings("ignore", message=message)
    return _guarded(lambda: _module(config.command).run(config, Path(HydraConfig.get().runtime.output_dir)))


def _guarded(function: Any) -> Any:
    """The function's result; what the user can mend ends the process with one line."""
    try:
        return function()
    except UserError as error:
        fail(str(error))
    except OmegaConfBaseException as error:
        fail(
            f"the configuration cannot be read: {str(error).partition(chr(10))[0]}; '{PROGRAM} fit --cfg job' shows it"
        )
    except KeyboardInterrupt:
        _interrupted()


def _interrupted() -> None:
    print("mp_lightning: interrupted; the same command continues this run", file=sys.stderr)
    sys.exit(INTERRUPTED)


def _module(verb: str) -> Any:
    return importlib.import_module(f"mp_lightning.cli.{verb}")


def _run_name(*, _root_: DictConfig) -> str:
    config = OmegaConf.to_container(_root_, resolve=False)
    assert isinstance(config, dict)
    return run_name({str(key): value for key, value in config.items()})


def _usage() -> str:
    verbs = "\n".join(f"  {name:<8} {what}" for name, what in VERBS.items())
    return f"usage: {PROGRAM} VERB key=value ...\n\nverbs:\n{verbs}\n\n'{PROGRAM} fit --cfg job' shows every key."
