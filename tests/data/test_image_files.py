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


def read(image: Image.Image, path: Path, **how: object) -> list[list[list[int]]]:
    """The pixels (H, W, 3) of an image once it is saved and read."""
    image.save(path, **how)
    return image_files.read_image_files([path], None, "one", lambda *progress: None)[0].permute(1, 2, 0).tolist()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
def test_what_is_transparent_becomes_white(tmp_path: Path, mode: str) -> None:
    """Black, drawn on black without opacity: all would be black."""
    black, grey, white = [0] * 3, [127] * 3, [255] * 3
    if mode in ("RGBA", "LA"):
        image = Image.fromarray(np.array([[[0, 0, 0, 255], [0, 0, 0, 0], [0, 0, 0, 128]]], np.uint8)).convert(mode)
        assert read(image, tmp_path / "a.png") == [[black, white, grey]]
        return
    image, see_through = Image.new("P", (2, 1)), 1
    image.putpalette([0, 0, 0, 9, 9, 9])
    image.putpixel((1, 0), 1)
    if mode != "P":
        image, see_through = image.convert(mode), 9 if mode == "L" else (9, 9, 9)
    assert read(image, tmp_path / "a.png", transparency=see_through) == [[black, white]]


def test_opaque_pixels_keep_their_colours(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 5, 4), dtype=np.uint8)
    pixels[..., 3] = 255
    assert read(Image.fromarray(pixels), tmp_path / "a.png") == pixels[..., :3].tolist()


def test_photographs_stand_upright(tmp_path: Path) -> None:
    image, exif = Image.new("RGB", (2, 1), "white"), Image.Exif()
    image.putpixel((0, 0), (0, 0, 0))
    exif[0x0112] = 6  # turn it clockwise by 90 degrees
    assert read(image, tmp_path / "a.png", exif=exif) == [[[0] * 3], [[255] * 3]]
    assert read(image, tmp_path / "b.png", exif=b"Exif\x00\x00damaged") == [[[0] * 3, [255] * 3]]


def test_progress_is_told_for_a_folder_of_the_user(tmp_path: Path) -> None:
    write_greys(tmp_path, [1, 2, 3, 4, 5])
    seen: list[tuple[str, int, int]] = []
    load_images(tmp_path, on_progress=lambda *progress: seen.append(progress))
    assert seen == [(f"reading {tmp_path}", 0, 5), (f"reading {tmp_path}", 5, 5)]


def test_a_folder_is_called_by_its_name_also_where_it_is_where_one_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_greys(tmp_path / "greys", [1, 2, 3, 4, 5])
    monkeypatch.chdir(tmp_path / "greys")
    assert load_images(".")[0].name == load_images(tmp_path / "greys")[0].name == "greys"
