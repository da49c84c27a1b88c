"""The words of a command line: options of Hydra, overrides, and what is wrong with them in one sentence."""

import difflib
import re
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, Quote, QuotedString, ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mp_lightning.errors import ConfigurationError

PROGRAM = "python -m mp_lightning.meta"
CONFIGURATION = "mp_lightning.conf"
HELP = {"--help", "-h"}
SWEEP = {"-m", "--multirun"}
_OPTIONS = {*HELP, *SWEEP, "--resolve", "--version"}
_OPTIONS_WITH_VALUE = {"--cfg", "-c", "--package", "-p"}
_OPTUNA = "hydra/sweeper/optuna"
_KEY = re.compile(r"(\+{0,2}|~)[A-Za-z_][\w/@-]*(\.[\w/@-]+|\[[^]]*\])*")


def split_words(words: list[str]) -> tuple[list[str], list[str]]:
    """Hydra's options and the overrides, wherever they stand; ``command=...`` is left out.

    Raises:
        ConfigurationError: a word is neither.
    """
    options: list[str] = []
    overrides: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word.partition("=")[0] in _OPTIONS_WITH_VALUE:
            options.append(word)
            if "=" not in word and rest:
                options.append(rest.pop(0))
        elif word in _OPTIONS:
            options.append(word)
        elif word.startswith("-"):
            raise ConfigurationError(f"unknown option '{word}'; options are {', '.join(sorted(_OPTIONS))}, --cfg job")
        elif not word.startswith("command="):
            overrides.append(_quoted(word))
    return options, overrides


def _quoted(word: str) -> str:
    """The word as Hydra reads it: what it would not take, such as names with =, ' or letters of a language, in quotes.

    A leading ~/ is the home folder, which shells do not put in after a key with dots.
    """
    key, equals, value = word.partition("=")
    if not equals:
        return word
    parts = [part.strip() for part in value[1:-1].split(",")]
    is_list = re.fullmatch(r"\[[^][{}]*\]", value) is not None and not any(part[:1] in ("'", '"') for part in parts)
    if is_list and not _is_read(value):
        return f"{key}=[{','.join(map(_as_text, parts))}]"
    return word if value[:1] in ("[", "{", "'", '"') else f"{key}={_as_text(value)}"


def _as_text(value: str) -> str:
    if value.startswith("~/"):
        value = str(Path(value).expanduser())
    return value if _is_read(value) else QuotedString(value, Quote.single).with_quotes()


def _is_read(value: str) -> bool:
    try:
        OverridesParser.create().parse_override(f"key={value}")
    except HydraException:
        return False
    return True


def compose(verb: str, overrides: list[str], sweep: bool = False) -> DictConfig:
    """The configuration of a verb with Hydra's own part, as Hydra will compose it.

    Args:
        verb: name of the configuration.
        overrides: words such as ``meta.steps=3``.
        sweep: several values for a key are allowed; the first is taken.

    Raises:
        ConfigurationError: an override cannot be read or does not fit; the message names it.
    """
    read = [_read(word, sweep) for word in overrides]
    words = [word for override in read for word in _single(override)]
    with hydra.initialize_config_module(CONFIGURATION, version_base="1.3"):
        _check_removed(verb, [str(override.key_or_group) for override in read if override.is_delete()])
        try:
            config = _compose(verb, words)
        except Exception as error:  # Hydra raises ValueError, AssertionError and more for what it did not foresee
            raise ConfigurationError(_explain(verb, words)) from error
    intervals = [str(override.input_line) for override in read if override.is_interval_sweep()]
    if intervals and "BasicSweeper" in config.hydra.sweeper._target_:
        raise ConfigurationError(
            f"'{intervals[0]}' needs a sweeper that can search; add hydra/sweeper=optuna, or list the values, a,b,c"
        )
    return config


def run_folder(config: DictConfig) -> Path | None:
    """Where Hydra will put a single run, if that is known already."""
    try:
        folder = OmegaConf.select(config, "hydra.run.dir")
    except OmegaConfBaseException:
        return None
    return Path(str(folder))


def _check_removed(verb: str, keys: list[str]) -> None:
    """Refuse to take away what a verb needs; sources, and options of the trainer and the logger, can be."""
    for key in keys:
        if not key.startswith(("sources", "trainer.", "logger.", "hydra")) and key in _keys(_compose(verb, [])):
            raise ConfigurationError(f"'~{key}' takes a setting away that '{verb}' needs; leave it out")


def _compose(verb: str, words: list[str]) -> DictConfig:
    config = hydra.compose(verb, overrides=words, return_hydra_config=True)
    assert isinstance(config, DictConfig)
    return config


def _read(word: str, sweep: bool) -> Override:
    key = word.partition("=")[0]
    if not _KEY.fullmatch(key) or ("=" not in word and not key.startswith("~")):
        raise ConfigurationError(f"'{word}' cannot be read; write key=value, for example meta.steps=200")
    try:
        override = OverridesParser.create().parse_override(word)
    except HydraException as error:
        raise ConfigurationError(
            f"'{word}' cannot be read; lists are written [a,b]; several values to try, a,b, need -m; a value with "
            f"commas, brackets or the like in it needs quotes inside quotes: \"{key}='...'\""
        ) from error
    if override.is_sweep_override() and not sweep:
        raise ConfigurationError(f"'{word}' names several values; add -m to run one after the other, or write [a,b]")
    return override


def _single(override: Override) -> list[str]:
    """The override with the first of its values; nothing for a pattern, which only the configuration can resolve."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    if override.value_type == ValueType.GLOB_CHOICE_SWEEP:
        return []
    value = override.value()
    first = str(value.start) if isinstance(value, IntervalSweep) else next(override.sweep_string_iterator(), None)
    if first is None:
        raise ConfigurationError(f"'{override.input_line}' names no value; give at least one")
    return [f"{override.get_key_element()}={first}"]


def _explain(verb: str, words: list[str]) -> str:
    """What is wrong with these words, of which at least one is."""
    # A choice of a group may bring the keys that other words set.
    words = sorted(words, key=lambda word: "." in word.partition("=")[0])
    for index, word in enumerate(words):
        try:
            _compose(verb, words[: index + 1])
        except Exception as error:
            return _sentence(verb, word, error, _compose(verb, []))
    return f"these overrides do not go together: {' '.join(words)}"


def _sentence(verb: str, word: str, error: Exception, known: DictConfig) -> str:
    key = word.partition("=")[0].lstrip("+~")
    text = str(error)
    if re.search(r"Could not (override|delete)|is not in struct|Key '.*' not in", text):
        if key == "experiment" and not word.startswith("+"):
            return f"'{word}' is not read without a plus; write +{word}"
        if key == "experiment":
            return f"'{word}' sets keys that {verb} does not have; it is an experiment of another verb"
        near = difflib.get_close_matches(key, _keys(known), n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        return f"unknown key '{key}'; {hint}'{PROGRAM} {verb} --help' shows every key"
    missing = re.search(r"Could not find '([^']+)'", text)
    if missing:
        choices = re.search(r"Available options in '[^']*':\s*((?:\S+\s*?\n?\s*)+?)(?:Config search path|$)", text)
        there = f"; there are: {', '.join(choices.group(1).split())}" if choices else ""
        if missing.group(1) == _OPTUNA:
            there += "; install it with pip install 'mp_lightning[sweep]'"
        return f"'{word}': no configuration '{missing.group(1)}'{there}"
    return f"'{word}' does not fit the configuration ({first_lines(error)}); '{PROGRAM} {verb} --cfg job' shows it"


def _keys(config: DictConfig) -> list[str]:
    def walk(section: Any, prefix: str) -> list[str]:
        found = []
        for key, value in section.items():
            found.append(f"{prefix}{key}")
            if isinstance(value, dict):
                found += walk(value, f"{prefix}{key}.")
        return found

    container = OmegaConf.to_container(config, resolve=False)
    assert isinstance(container, dict)
    own = {key: value for key, value in container.items() if key != "hydra"}
    return [*walk(own, ""), "hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.launcher.jobs"]


def first_lines(error: Exception) -> str:
    """The beginning of an error's message, in one line."""
    return " ".join(str(error).split("\n")[:2]).strip()
