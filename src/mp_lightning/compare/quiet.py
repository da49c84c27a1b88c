"""Without what Lightning says about each of many runs."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_LOGGERS = ("lightning.pytorch", "lightning.fabric")
# Advice about loaders, logging and settings of the callback, to someone who wrote the training.
_ADVICE = (
    *(r".*does not have many workers.*", r".*isinstance\(treespec, LeafSpec\).*", r".*log_every_n_steps.*"),
    *(r"You passed in a `val_dataloader` but have no `validation_step`.*", r"MetaPerturb: .* of the strength acts.*"),
)


@contextmanager
def quiet() -> Iterator[None]:
    """In this context Lightning tells neither devices nor what it advises; warnings of other kinds are shown."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for message in _ADVICE:
            warnings.filterwarnings("ignore", message=message)
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
