"""The images of a target: few of them, drawn by the seed; what cannot be used is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mp_lightning.compare.target import Target, TargetData, TargetFactory, read_target
from mp_lightning.data import image_set, normalize
from mp_lightning.errors import DataError

OPTIONS = {"n_per_class": None, "flip": None, "batch_size": 4}


def save(path: Path, train: list[int], test: list[int] | None) -> str:
    """Images whose pixels tell them apart, with these labels."""
    arrays = {}
    for name, labels in {"train": train, "test": test}.items():
        if labels is not None:
            numbers = 2 * np.arange(len(labels)) + (0 if name == "train" else 100)
            arrays[f"x_{name}"] = np.broadcast_to(numbers[:, None, None], (len(labels), 8, 8)).astype(np.uint8)
            arrays[f"x_{name}"][:, -1, -1] = 255  # darker sets are refused
            arrays[f"y_{name}"] = np.array(labels)
    np.savez(path, **arrays)
    return str(path)


def identities(images: torch.Tensor) -> set[int]:
    return set(images[:, 0, 0, 0].tolist())


def test_each_seed_draws_its_own_images_and_all_have_the_same_test_images(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz", [0] * 20 + [1] * 20, [0, 1])
    target = read_target(path, tmp_path, 8, **{**OPTIONS, "n_per_class": 3})
    first, again, other = (target.drawn(seed) for seed in (0, 0, 1))
    assert torch.bincount(first.labels).tolist() == [3, 3]
    assert identities(first.images) == identities(again.images) != identities(other.images)
    assert identities(target.test.images) == {100, 102}
    whole = read_target(path, tmp_path, 8, **OPTIONS)
    assert whole.drawn(0) is whole.drawn(1) is whole.train


def test_without_test_images_half_of_each_class_is_held_out(tmp_path: Path) -> None:
    target = read_target(save(tmp_path / "a.npz", [0] * 11 + [1] * 4, None), tmp_path, 8, **OPTIONS)
    assert torch.bincount(target.train.labels).tolist() == [6, 2]
    train, test = identities(target.train.images), identities(target.test.images)
    assert not train & test and len(train | test) == 15


def test_validation_images_are_training_images_that_are_not_trained_on() -> None:
    labels = torch.arange(40) % 4
    pixels = torch.arange(40, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8) + 60
    target = Target("t", image_set("t", pixels, labels), image_set("t", pixels + 100, labels), None, False)
    data = TargetFactory(target, 5, 4)(3, validation=True)
    loaders = data.train_evaluation_dataloader(), data.test_dataloader()
    kept, held = (torch.cat([x for x, _ in loader])[:, 0, 0, 0] for loader in loaders)
    assert len(kept) == 32 and len(held) == 8
    assert not set(kept.tolist()) & set(held.tolist())
    assert max(held) < normalize(torch.tensor(160, dtype=torch.uint8)), "no test image"


def test_batches_follow_from_the_seed_and_the_step() -> None:
    labels = torch.arange(12) % 3
    pixels = torch.randint(256, (12, 3, 8, 8), dtype=torch.uint8)
    target = Target("t", image_set("t", pixels, labels), image_set("t", pixels, labels), None, True)

    def batches(seed: int) -> list[torch.Tensor]:
        return [x for x, _ in TargetData(target, seed, 6, 4).train_dataloader()]

    first, again, other = batches(0), batches(0), batches(1)
    assert len(first) == 6 and first[0].shape == (4, 3, 8, 8)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    tested = list(TargetData(target, 0, 6, 4).test_dataloader())
    assert torch.equal(torch.cat([x for x, _ in tested]), normalize(pixels)), "every image, in order, unchanged"


@pytest.mark.parametrize(
    ("train", "test", "options", "message"),
    [
        ([0, 1], [0, 1], {}, r"has 2 training images, fewer than batch_size=4; lower batch_size"),
        ([0] * 9 + [1] * 9, [0, 1], {"n_per_class": 1}, r"has 2 training images, fewer than batch_size=4"),
        ([0] * 9 + [2] * 9, [0, 1, 2], {}, r"no image of 'a' has the label 1: number the classes from 0 without gaps"),
        (
            [0] * 9 + [1] * 2,
            [0, 1],
            {"n_per_class": 3},
            r"class '1' .* has 2 training images, fewer than n_per_class=3",
        ),
        ([0] * 9 + [1], None, {}, r"class '1' of '.*' has 1 images, too few to train and to test on"),
    ],
    ids=["batch", "batch of few", "class missing", "n_per_class", "no test"],
)
def test_a_target_that_cannot_be_used_is_refused(tmp_path: Path, train, test, options, message) -> None:
    path = save(tmp_path / "a.npz", train, test)
    with pytest.raises(DataError, match=message):
        read_target(path, tmp_path, 8, **{**OPTIONS, **options})


def test_the_digest_tells_images_and_labels_apart(tmp_path: Path) -> None:
    paths = [save(tmp_path / f"{i}.npz", [0] * 4 + [1] * 4, test) for i, test in enumerate(([0, 1], [1, 0], [0, 1]))]
    first, other, same = (read_target(path, tmp_path, 8, **OPTIONS).digest() for path in paths)
    assert first == same != other


def test_test_images_that_are_training_images_are_told_of(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(20) % 2
    np.savez(tmp_path / "leak.npz", x_train=images, y_train=labels, x_test=images[:10], y_test=labels[:10])
    with pytest.warns(UserWarning, match=r"10 of the 10 test images of target '.*leak\.npz' are training images"):
        read_target(str(tmp_path / "leak.npz"), tmp_path, 8, n_per_class=None, flip=None, batch_size=4)
