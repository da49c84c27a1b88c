"""Tasks: who shares what with whom, and what a batch depends on."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from mp_lightning.data import ImageSet, image_set
from mp_lightning.errors import ConfigurationError, DataError
from mp_lightning.meta.tasks import Source, Split, Task, make_tasks


def numbered_images(classes: int = 4, per_class: int = 6, name: str = "set", size: int = 8) -> ImageSet:
    """Images that all differ: pixel value of an image, but for one corner, is its number."""
    count = classes * per_class
    images = torch.arange(count, dtype=torch.uint8)[:, None, None, None].repeat(1, 3, size, size)
    images[..., -1, -1] = 255  # darker sets are refused
    return image_set(name, images, torch.arange(classes).repeat_interleave(per_class))


def tasks_of(*sources: ImageSet, architectures=("conv4-4", "resnet20-4"), flip=False, seed=0, **options) -> list[Task]:
    options = {"groups": 1, "classes": None, "train_per_class": None, "valid_per_class": None, **options}
    split = Split(architectures=list(architectures), **options)
    return make_tasks([Source(images, flip, split) for images in sources], seed=seed)


def numbers(images: ImageSet) -> set[int]:
    return set(images.images[:, 0, 0, 0].tolist())


def test_two_tasks_of_a_group_swap_their_halves() -> None:
    a, b = tasks_of(numbered_images())
    assert (a.name, b.name) == ("set-a", "set-b")
    assert numbers(a.train).isdisjoint(numbers(a.valid))
    assert numbers(a.train) | numbers(a.valid) == set(range(24))
    assert (numbers(a.train), numbers(a.valid)) == (numbers(b.valid), numbers(b.train))
    assert a.train.classes == a.valid.classes == b.train.classes
    for half in (a.train, a.valid):
        assert torch.bincount(half.labels).tolist() == [3, 3, 3, 3]


def test_groups_are_consecutive_classes_and_disjoint() -> None:
    tasks = tasks_of(numbered_images(classes=5, per_class=4), groups=2)
    assert [task.name for task in tasks] == ["set-0-a", "set-0-b", "set-1-a", "set-1-b"]
    assert [task.train.classes for task in tasks] == [("0", "1", "2")] * 2 + [("3", "4")] * 2
    assert numbers(tasks[0].train) | numbers(tasks[0].valid) == set(range(12))
    assert numbers(tasks[2].train) | numbers(tasks[2].valid) == set(range(12, 20))
    assert set(tasks[2].train.labels.tolist()) == {0, 1}


def test_classes_limits_each_group() -> None:
    tasks = tasks_of(numbered_images(classes=6, per_class=4), groups=2, classes=2)
    assert [task.train.classes for task in tasks] == [("0", "1")] * 2 + [("3", "4")] * 2
    with pytest.raises(ConfigurationError, match=r"tasks\.classes=1 is too few"):
        tasks_of(numbered_images(), classes=1)


def test_limits_act_on_each_half() -> None:
    a, b = tasks_of(numbered_images(), train_per_class=1, valid_per_class=2)
    for task in (a, b):
        assert torch.bincount(task.train.labels).tolist() == [1] * 4
        assert torch.bincount(task.valid.labels).tolist() == [2] * 4
        assert numbers(task.train).isdisjoint(numbers(task.valid))


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_architectures_are_dealt_out(count: int) -> None:
    names = [f"conv4-{width}" for width in range(1, count + 1)]
    tasks = tasks_of(numbered_images(classes=20, per_class=2), architectures=names, groups=10)
    dealt = [str(task.architecture) for task in tasks]
    assert set(dealt) == set(names), "an architecture that no task has"
    first, second = dealt[::2], dealt[1::2]
    assert all(a != b for a, b in zip(first, second, strict=True)), "both tasks of a group alike"
    for half in (first, second):
        assert all(a != b for a, b in pairwise(half)), "the same half of neighbouring groups alike"


def test_one_architecture_serves_all() -> None:
    assert {str(task.architecture) for task in tasks_of(numbered_images(), architectures=["conv4"])} == {"conv4"}


def test_copies_within_a_source_are_told_of_once() -> None:
    images = numbered_images()
    with pytest.warns(UserWarning, match="2 of the 26 images of 'set' are copies of others there") as told:
        tasks_of(images.subset([*range(24), 0, 5]), groups=2)
    assert len(told) == 1


def test_batches_depend_on_the_step_alone() -> None:
    task, twin = (tasks_of(numbered_images(), flip=True)[0] for _ in range(2))
    device = torch.device("cpu")
    in_order = [task.batch("train", step, 4, 0, device) for step in range(5)]
    for step in (3, 0, 4):
        x, y = twin.batch("train", step, 4, 0, device)
        assert torch.equal(x, in_order[step][0]) and torch.equal(y, in_order[step][1])
    torch.rand(1)
    assert torch.equal(task.batch("train", 2, 4, 0, device)[0], in_order[2][0])
    assert x.shape == (4, 3, 8, 8) and x.dtype == torch.float32 and y.dtype == torch.int64


def test_batches_leave_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    task = tasks_of(numbered_images(size=16), flip=True)[0]
    task.batch("train", 0, 4, 0, torch.device("cpu"))
    task.architecture.build(task.train, 1)
    assert torch.equal(state, torch.get_rng_state())


def test_batches_differ_between_seeds_steps_and_splits() -> None:
    a, b = tasks_of(numbered_images())
    device = torch.device("cpu")
    batches = [
        a.batch("train", 0, 8, 0, device),
        a.batch("train", 1, 8, 0, device),
        a.batch("train", 0, 8, 1, device),
        a.batch("valid", 0, 8, 0, device),
        b.batch("train", 0, 8, 0, device),
    ]
    for i, (x, _) in enumerate(batches):
        for other, _ in batches[i + 1 :]:
            assert not torch.equal(x, other)


def test_augmentation_differs_from_step_to_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of the same images."""
    monkeypatch.setattr("mp_lightning.meta.tasks.batch_indices", lambda *_: torch.arange(4))
    (first, y), (second, same) = (
        tasks_of(numbered_images())[0].batch("train", step, 4, 0, torch.device("cpu")) for step in range(2)
    )
    assert torch.equal(y, same) and not torch.equal(first, second)


def test_batches_of_the_splits_are_drawn_apart() -> None:
    """Also from as many images."""
    task = tasks_of(numbered_images())[0]
    task = replace(task, valid=task.train)
    (x, _), (other, _) = (task.batch(split, 0, 8, 0, torch.device("cpu")) for split in ("train", "valid"))
    assert not torch.equal(x, other)


def test_sources_of_as_many_images_are_halved_differently() -> None:
    one, _, other, _ = tasks_of(numbered_images(name="one"), numbered_images(name="other"))
    assert numbers(one.train) != numbers(other.train)


def test_split_follows_the_seed() -> None:
    halves = [numbers(tasks_of(numbered_images(), seed=seed)[0].train) for seed in (0, 0, 1)]
    assert halves[0] == halves[1] != halves[2]


def test_too_few_classes_are_refused() -> None:
    with pytest.raises(
        DataError, match=r"'set' has 5 classes to learn from, without any that are held out, too few for tasks.groups=3"
    ):
        tasks_of(numbered_images(classes=5), groups=3)


def test_a_class_that_cannot_be_halved_is_refused() -> None:
    with pytest.raises(DataError, match=r"class '\d' of 'set' has 1 images, too few for two halves"):
        tasks_of(numbered_images(per_class=1))


def test_more_images_than_there_are_cannot_be_asked_for() -> None:
    with pytest.raises(DataError, match=r"has 3 images in one of its two halves, not tasks\.train_per_class=4; lower"):
        tasks_of(numbered_images(), train_per_class=4)


def test_two_sources_of_one_name_are_refused() -> None:
    with pytest.raises(DataError, match="two sources are called 'twin'; give the files"):
        tasks_of(numbered_images(name="twin"), numbered_images(name="other"), numbered_images(name="twin"))


def test_no_architecture_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"tasks\.architectures is empty"):
        tasks_of(numbered_images(), architectures=[])


def test_description_tells_other_images_apart() -> None:
    images = numbered_images()
    a, b = tasks_of(images)
    changed = tasks_of(images.subset([*range(23), 0]))[0]
    assert a.description() == tasks_of(images)[0].description()
    assert len({task.description()["digest"] for task in (a, b, changed)}) == 3


def test_description_tells_other_images_to_validate_on_and_mirroring_apart() -> None:
    task, other = tasks_of(numbered_images())
    changed = [replace(task, valid=other.valid), replace(task, flip=True)]
    assert all(one.description() != task.description() for one in changed)


def test_classes_limits_every_group() -> None:
    tasks = tasks_of(numbered_images(classes=6, per_class=2), groups=2, classes=2)
    assert [task.train.num_classes for task in tasks] == [2] * 4
    assert numbers(tasks[0].train) | numbers(tasks[0].valid) == {0, 1, 2, 3}
    assert numbers(tasks[2].train) | numbers(tasks[2].valid) == {6, 7, 8, 9}


def test_a_source_that_is_called_like_a_group_of_another_is_refused() -> None:
    """Their tasks would share a name, and one of them would never be learned from."""
    split = Split(2, None, ["conv4-4"], None, None)
    sources = [Source(numbered_images(name="set"), False, split)]
    sources.append(Source(numbered_images(name="set-0"), False, replace(split, groups=1)))
    with pytest.raises(DataError, match="2 tasks are called 'set-0-a'"):
        make_tasks(sources, seed=0)
