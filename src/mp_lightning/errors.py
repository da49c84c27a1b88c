"""Errors that a user can act on.

Every message is one sentence that names the culprit (the bad value, the file, the module) and the remedy.
The command line prints that sentence and exits with a non-zero code; a Python caller sees an ordinary exception.
"""


class UserError(Exception):
    """Something that the user gave cannot be used. ``str(error)`` is one line: culprit, then remedy.

    Attributes:
        on_every_rank: all processes of a run raise it alike, so that one of them is enough to say it.
    """

    on_every_rank = False


class PhiError(UserError):
    """A phi file is missing, damaged, of the wrong shape, or not finite."""


class SiteError(UserError):
    """A model offers no usable site, or a plan does not fit the model."""


class DataError(UserError):
    """Images are missing, empty, or not usable for classification."""


class ConfigurationError(UserError):
    """An option is unknown, missing, or out of range."""


def one_line(error: BaseException, most: int = 300) -> str:
    """The message of any error on one line, of at most so many characters, to be a part of ours."""
    return " ".join(str(error).split())[:most]
