"""What tests of the command line share: a warm process that runs commands, and pictures on the disk."""

import pytest
from command_line import CommandLine, shared_command_line
from several_processes import save_pictures


@pytest.fixture(scope="session")
def mp() -> CommandLine:
    """Runs ``python -m mp_lightning.meta``."""
    return shared_command_line()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The words for two sources of unequal length, four tasks, and a target."""
    return save_pictures(tmp_path_factory.mktemp("pictures"))
