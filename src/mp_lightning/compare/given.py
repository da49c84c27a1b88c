"""What ``mp_lightning.compare`` is given, checked before anything is computed with it."""

from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

from mp_lightning.compare.arms import Arm
from mp_lightning.compare.summary import VERDICT_METRICS
from mp_lightning.compare.tuning import MOST_VALUES
from mp_lightning.errors import ConfigurationError
from mp_lightning.inference.mc import OUTPUTS
from mp_lightning.sites.arguments import check_one_of, whole_number

_ENDS = ("max_epochs", "max_steps")
# What the settings of a comparison are called that are not the user's own.
OWN_SETTINGS = frozenset(
    (
        *("target", "model", "trainer", "inference", "samples", "output", "reloaded", "predict"),
        *("module", "data", "code", "metric", "tuning"),
    )
)


def check_trainer(trainer: Any) -> None:
    """Refuse arguments of a trainer by which a run would not end, or not be on one device.

    Raises:
        ConfigurationError: names the argument.
    """
    if not isinstance(trainer, Mapping):
        raise ConfigurationError(f"trainer={trainer!r}: give the arguments of lightning.Trainer as a dictionary")
    if trainer.get("fast_dev_run"):
        raise ConfigurationError(
            f"trainer= has fast_dev_run={trainer['fast_dev_run']!r}, which is not taken; for a short run give "
            "max_epochs=1 and limit_train_batches"
        )
    ends = {key: trainer[key] for key in _ENDS if trainer.get(key) is not None}
    for key, value in ends.items():
        if isinstance(value, bool) or not isinstance(value, Real) or value == 0:
            raise ConfigurationError(f"trainer= has {key}={value!r}; give a whole number above 0")
    if not any(value > 0 for value in ends.values()):
        raise ConfigurationError(f"trainer= does not say when a run ends; give one of {', '.join(_ENDS)}")
    part = trainer.get("limit_test_batches")
    if part is not None and not (isinstance(part, float) and part == 1):  # 1 is a batch, 1.0 all of them
        raise ConfigurationError(
            "trainer= has limit_test_batches, while all test images of the data are classified; leave it out"
        )
    if trainer.get("overfit_batches"):
        raise ConfigurationError(
            "trainer= has overfit_batches, which takes the test images from training; give data of few images"
        )
    devices = trainer.get("devices", 1)
    if devices not in (1, "1") and not (isinstance(devices, list) and len(devices) == 1):
        raise ConfigurationError(
            f"trainer= has devices={devices}; each run is on one device, several at a time by jobs="
        )


def list_of_arms(arms: Any) -> list[str | Arm]:
    """Arms that have names, in a list.

    Raises:
        ConfigurationError: names what was given.
    """
    if isinstance(arms, str) or not isinstance(arms, Iterable):
        raise ConfigurationError(f"arms={arms!r}: give a list, such as arms=['none', 'metaperturb']")
    listed = list(arms)
    if not listed:
        raise ConfigurationError("arms=[] names no arm; give a list, such as arms=['none', 'metaperturb']")
    for arm in listed:
        name = arm.name if isinstance(arm, Arm) else arm
        if not isinstance(name, str) or not name:
            raise ConfigurationError(f"arm {name!r} has no name; give text, or mp_lightning.Arm(name, function)")
    return listed


def check_names(**names: Any) -> None:
    """Refuse what tables cannot show.

    Raises:
        ConfigurationError: a name is no text.
    """
    for key, name in names.items():
        if name is not None and not isinstance(name, str):
            raise ConfigurationError(f"{key}={name!r}: give a name, as text")


def check_settings(settings: Any) -> None:
    """Refuse settings of the user's that would stand for others of the comparison.

    Raises:
        ConfigurationError: they are no dictionary, or one has a name that is taken.
    """
    if settings is None:
        return
    if not isinstance(settings, Mapping):
        raise ConfigurationError(f"settings={settings!r}: give a dictionary of names and plain values")
    for name in settings:
        if name in OWN_SETTINGS:
            raise ConfigurationError(f"settings= has '{name}', which the comparison sets by itself; call it otherwise")


def check_choices(metric: Any, inference: Any, output: Any) -> None:
    """Refuse what is not among the choices that there are.

    Raises:
        ConfigurationError: lists them.
    """
    check_one_of(metric, "metric", VERDICT_METRICS)
    check_one_of(inference, "inference", ("mc", "mean"))
    if output is not None:
        check_one_of(output, "output", OUTPUTS)


def check_numbers(tuning_values: Any, num_classes: Any, **positive: Any) -> list[int]:
    """Refuse numbers that cannot be used.

    Args:
        tuning_values: 1 to 4.
        num_classes: None where it is not given.
        positive: the others, by name.

    Returns:
        The others as numbers of Python.

    Raises:
        ConfigurationError: names the argument.
    """
    if num_classes is not None:
        whole_number(num_classes, "num_classes", 1, "of classes")
    if isinstance(tuning_values, bool) or tuning_values not in range(1, MOST_VALUES + 1):
        raise ConfigurationError(f"tuning_values={tuning_values!r} cannot be used; give 1 to {MOST_VALUES}")
    return [whole_number(number, name, 1, "above 0") for name, number in positive.items()]
