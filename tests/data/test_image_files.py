"""Image files, read by several threads."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mp_lightning.data import image_files, load_images
from mp_lightning.errors import DataError


def write_greys(root: Path, greys: list[int]) -> list[Path]:
    paths = []
    for place, grey in enumerate(greys):
        path = root / ("a" if place < 4 else "b") / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4), grey, dtype=np.uint8)).save(path)
        paths.append(path)
    return paths


def test_images_keep_the_order_of_the_paths_over_several_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_files, "_FILES_AT_ONCE", 3)
    greys = [7, 3, 250, 0, 99, 14, 6]
    seen: list[tuple[str, int, int]] = []
    loaded = image_files.read_image_files(
        write_greys(tmp_path, greys), None, "greys", lambda *progress: seen.append(progress)
    )
    assert loaded.shape == (7, 3, 4, 4)
    assert loaded[:, 0, 0, 0].tolist() == loaded[:, 2, 3, 3].tolist() == greys
    assert seen == [("reading greys", done, 7) for done in (0, 3, 6, 7)]


def test_a_file_that_is_missing_in_a_later_batch_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "_FILES_AT_ONCE", 2)
    paths = write_greys(tmp_path, [1, 2, 3, 4])
    paths[3].unlink()
    with pytest.raises(DataError, match=r"image '.*3\.png' is missing"):
        image_files.read_image_files(paths, 2, "greys", lambda *progress: None)


def test_progress_is_told_for_a_folder_of_the_user(tmp_path: Path) -> None:
    write_greys(tmp_path, [1, 2, 3, 4, 5])
    seen: list[tuple[str, int, int]] = []
    load_images(tmp_path, on_progress=lambda *progress: seen.append(progress))
    assert seen == [(f"reading {tmp_path}", 0, 5), (f"reading {tmp_path}", 5, 5)]
