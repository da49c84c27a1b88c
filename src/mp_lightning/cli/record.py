"""What was asked for, kept in a run's folder where Hydra keeps it, but once the folder is known to be this run's."""

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from mp_lightning.runs import ASKED, unusable
from mp_lightning.whole import write_text


def record(config: DictConfig, path: Path) -> None:
    """Write the configuration and the overrides into the run folder ``path``.

    Raises:
        RunFolderError: it cannot be written.
    """
    folder = path / ASKED
    try:
        folder.mkdir(exist_ok=True)
        write_text(folder / "config.yaml", OmegaConf.to_yaml(config))
        write_text(folder / "overrides.yaml", OmegaConf.to_yaml(HydraConfig.get().overrides.task))
    except OSError as error:
        raise unusable(path, error) from error
