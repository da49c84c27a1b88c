"""Without what Lightning says about each of many runs."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

LOGGERS = ("lightning.pytorch", "lightning.fabric")
# About loaders and logging, to someone who wrote the training.
ADVICE = (r".*does not have many workers.*", r".*isinstance\(treespec, LeafSpec\).*", r".*log_every_n_steps.*")
# What the trainings of a comparison do on purpose.
_ON_PURPOSE = (
    r"You passed in a `val_dataloader` but have no `validation_step`.*",
    r"MetaPerturb: .* of the strength acts.*",
)


@contextmanager
def quiet() -> Iterator[None]:
    """In this context Lightning tells neither devices nor what it advises; warnings of other kinds are shown."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for message in (*ADVICE, *_ON_PURPOSE):
            warnings.filterwarnings("ignore", message=message)
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
