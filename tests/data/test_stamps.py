"""Whether images on disk were changed."""

import os
from pathlib import Path

from mp_lightning.data.stamps import stamps


def test_images_behind_links_are_among_those_that_may_change(tmp_path: Path) -> None:
    """A folder whose classes are links, one of them to the folder itself."""
    (tmp_path / "elsewhere").mkdir()
    folder = tmp_path / "birds"
    folder.mkdir()
    (folder / "wren").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "broken").symlink_to(tmp_path / "nowhere")
    source = str(folder)
    before = stamps([source])
    (tmp_path / "elsewhere" / "1.png").write_bytes(b"image")
    after = stamps([source])
    assert before[source][:2] == [0, 0] and after[source][:2] == [1, 5]
    os.utime(tmp_path / "elsewhere" / "1.png", ns=(0, 10**18))
    assert stamps([source])[source] == [1, 5, 10**18]
