"""Generated textures."""

import pytest
import torch
import torch.nn.functional as F

from mp_lightning.backbones import build_backbone
from mp_lightning.data import batch_indices, generate_textures, normalize
from mp_lightning.errors import ConfigurationError


def test_the_same_arguments_give_the_same_images_and_another_seed_others() -> None:
    first, again, other = (generate_textures(3, 4, 16, seed) for seed in (5, 5, 6))
    assert torch.equal(first.images, again.images)
    assert first.classes == again.classes
    assert not torch.equal(first.images, other.images)


@pytest.mark.parametrize(("num_classes", "size"), [(2, 8), (10, 32), (23, 20)])
def test_every_class_has_its_images_and_its_own_name(num_classes: int, size: int) -> None:
    textures = generate_textures(num_classes, 3, size, seed=0, name="made")
    assert textures.name == "made"
    assert textures.images.shape == (3 * num_classes, 3, size, size)
    assert textures.labels.bincount().tolist() == [3] * num_classes
    assert len(set(textures.classes)) == num_classes


def test_mean_colours_do_not_tell_the_classes_apart() -> None:
    textures = generate_textures(5, 400, 16, seed=0)
    colours = textures.images.float().mean(dim=(2, 3))
    centres = torch.stack([colours[textures.labels == label].mean(dim=0) for label in range(5)])
    nearest = torch.cdist(colours, centres).argmin(dim=1)
    # Chance is 0.2; a few kinds are a little lighter or darker than the others.
    assert (nearest == textures.labels).float().mean() < 0.4


@pytest.mark.parametrize("wrong", [(1, 5, 32), (3, 0, 32), (3, 5, 7)])
def test_numbers_out_of_range_are_refused(wrong: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigurationError, match="out of range"):
        generate_textures(*wrong, seed=0)


def test_a_small_network_overfits_few_images_and_still_learns_something() -> None:
    few, rest = generate_textures(10, 80, 32, seed=0).few_per_class(30, seed=0)
    torch.manual_seed(0)
    net = build_backbone("conv4", 10, width=16)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for step in range(250):
        batch = batch_indices(len(few), 32, step, seed=0)
        loss = F.cross_entropy(net(normalize(few.images[batch])), few.labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval()
    with torch.no_grad():
        train, test = (
            (net(normalize(part.images)).argmax(dim=1) == part.labels).float().mean().item() for part in (few, rest)
        )
    assert train > 0.97
    assert 0.55 < test < 0.85
