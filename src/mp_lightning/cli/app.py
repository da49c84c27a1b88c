"""``python -m mp_lightning.meta VERB key=value ...``: from the words to a verb's function, with Hydra underneath."""

import importlib
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mp_lightning.cli import interruption
from mp_lightning.cli.help import help_page
from mp_lightning.cli.output import error_line
from mp_lightning.cli.words import CONFIGURATION, HELP, PROGRAM, SWEEP, compose, first_lines, run_folder, split_words
from mp_lightning.errors import UserError
from mp_lightning.quiet import ADVICE, LOGGERS
from mp_lightning.runs import run_name, unusable

VERBS = {
    "fit": "meta-train a perturbation and write phi.safetensors",
    "compare": "train arms side by side and say with intervals whether any of them helps",
    "select": "name the best run of a sweep and write its phi, with a card that lists the others",
    "sites": "show where a model would be perturbed and what that costs; write the plan to a file",
    "export": "write a trained model as ONNX or by torch.export, without anything that draws noise",
}
_ONCE = {"select", "sites", "export"}  # verbs of which a sweep makes no sense
USER_ERROR = 2
_FULL_ERROR = "HYDRA_FULL_ERROR"
_FORMAT = warnings.formatwarning
# Of Lightning and torch about what the commands here do on purpose.
_NO_CONCERN_OF_THE_USER = (
    *ADVICE,
    r".*resuming from a checkpoint that ended before the epoch ended.*",
    r".*GPU available but not used.*",
    r".*`tensorboardX` has been removed.*",
)


def main(arguments: list[str]) -> None:
    """Run a verb; leaves the process with 0, or 2 and one line on standard error for what the user can mend."""
    if not arguments or arguments[0] in HELP:
        print(_usage())
        if not arguments:
            fail(f"no verb given; use one of: {', '.join(VERBS)}")
        sys.exit(0)
    # Ranks that a strategy starts get the recorded overrides back, in which the verb stands as command=VERB.
    verb = arguments[0].removeprefix("command=")
    if verb not in VERBS:
        fail(f"unknown verb '{verb}'; use one of: {', '.join(VERBS)}")
    if not HELP.isdisjoint(arguments):
        print(help_page(verb, VERBS[verb]))
        sys.exit(0)
    OmegaConf.register_new_resolver("run_name", _run_name, replace=True)
    what = "run" if SWEEP.isdisjoint(arguments) else "sweep"
    interruption.listen(what)
    with _told_in_a_line(what):
        options, overrides = split_words(arguments[1:])
        if "--resolve" in options and not any(option.startswith(("--cfg", "-c")) for option in options):
            fail("--resolve shows the configuration with its references resolved; write it beside --cfg job")
        # Hydra reads overrides only where they stand in one row, and an option may take the word after it.
        sys.argv = [sys.argv[0], f"command={verb}", *overrides, *options]
        start = hydra.main(version_base="1.3", config_path=f"pkg://{CONFIGURATION}", config_name=verb)(_job)
        if SWEEP.isdisjoint(options):
            if not options:
                _try_out(verb, overrides)
            start()
        else:
            _sweep(verb, overrides, start)


def fail(message: str) -> NoReturn:
    """Leave the process with one line on standard error."""
    print(error_line(message), file=sys.stderr)
    sys.exit(USER_ERROR)


def _try_out(verb: str, overrides: list[str]) -> None:
    """Read the configuration once beforehand, so that what is wrong ends in one line and leaves no folder behind."""
    config = compose(verb, overrides)
    with _told_in_a_line("run"):
        _module(verb).read(config)
    folder = run_folder(config)
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fail(str(unusable(folder, error)))


def _sweep(verb: str, overrides: list[str], start: Callable[[], Any]) -> None:
    """Run a sweep; what a sweeper raises, which may be of another package, ends in one line as well."""
    if verb in _ONCE:
        fail(f"{verb} runs once; leave out -m and give one value for each key")
    config = compose(verb, overrides, sweep=True)
    folder = Path(str(config.hydra.sweep.dir))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"sweep folder '{folder}' cannot be written ({error.strerror}); choose another with hydra.sweep.dir=")
    # What sweepers log about failed jobs is said in the line at the end.
    for name in ("hydra_plugins", "optuna.storages", "optuna.study"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    wanted = os.environ.get(_FULL_ERROR)
    os.environ[_FULL_ERROR] = "1"  # otherwise Hydra prints a traceback and leaves
    try:
        start()
    except UserError:
        raise
    except Exception as error:
        if wanted == "1" or interruption.came():
            raise
        fail(f"the sweep stopped: {first_lines(error) or type(error).__name__}; {_FULL_ERROR}=1 shows where")
    if verb == "fit":
        print(f"Compare the runs: {PROGRAM} select sweep={shlex.quote(str(folder))}")


def _job(config: DictConfig) -> Any:
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _NO_CONCERN_OF_THE_USER:
        warnings.filterwarnings("ignore", message=message)
    warnings.formatwarning = _in_a_line
    with _told_in_a_line("run"):
        return _module(config.command).run(config, Path(HydraConfig.get().runtime.output_dir))


@contextmanager
def _told_in_a_line(what: str) -> Iterator[None]:
    """What the user can mend, or stopped, ends the process with one line.

    Within Hydra's job too, since Hydra would print a traceback.
    """
    try:
        yield
    except KeyboardInterrupt:
        interruption.end(what)
    except Exception as error:
        if interruption.came():
            interruption.end(what)
        if isinstance(error, OmegaConfBaseException):
            fail(f"the configuration cannot be read: {str(error).partition(chr(10))[0]}; '--cfg job' shows it")
        if not isinstance(error, UserError):
            raise
        if error.on_every_rank and interruption.rank() > 0:
            sys.exit(USER_ERROR)
        fail(str(error))


def _in_a_line(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: Any = None) -> str:
    """A warning of this package without the place in its code, and others as ever."""
    if Path(filename).is_relative_to(Path(__file__).parents[1]):
        return f"Warning: {' '.join(str(message).split())}\n"  # not as an error is told, which sweeps look for
    return _FORMAT(message, category, filename, lineno, line)


def _module(verb: str) -> Any:
    return importlib.import_module(f"mp_lightning.cli.{verb}")


def _run_name(*, _root_: DictConfig) -> str:
    config = OmegaConf.to_container(_root_, resolve=False)
    assert isinstance(config, dict)
    return run_name({str(key): value for key, value in config.items()})


def _usage() -> str:
    verbs = "\n".join(f"  {name:<8} {what}" for name, what in VERBS.items())
    return f"usage: {PROGRAM} VERB key=value ...\n\nverbs:\n{verbs}\n\n'{PROGRAM} VERB --help' shows every key."
