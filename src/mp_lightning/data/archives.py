"""NumPy archives, of which nothing is unpickled."""

from pathlib import Path

import numpy as np

from mp_lightning.errors import DataError


def read_archive(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an ``.npz`` file by name.

    Raises:
        DataError: the file is no archive, or damaged, or holds Python objects.
        OSError: the file cannot be opened.
    """
    # Opened here, because numpy leaves open an archive that it cannot read.
    with path.open("rb") as file:
        try:
            archive = np.load(file, allow_pickle=False)
        # A file that is anything else makes numpy raise whatever its readers of zip, npy and pickle raise.
        except Exception as error:
            raise DataError(f"'{path}' is not a readable .npz archive: save it with numpy.savez_compressed") from error
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise DataError(f"'{path}' is a single array, not an .npz archive: save it with numpy.savez_compressed")
        return {key: _read_member(path, archive, key) for key in archive.files}


def _read_member(path: Path, archive: np.lib.npyio.NpzFile, key: str) -> np.ndarray:
    try:
        array = archive[key]
    except Exception as error:
        pickled = "allow_pickle" in str(error)
        fault = "holds Python objects, which are not read" if pickled else "is damaged"
        raise DataError(
            f"array '{key}' of '{path}' {fault}: save numbers for images and labels, and text for names of classes"
        ) from error
    return np.asarray(array)
