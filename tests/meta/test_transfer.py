"""The comparison on held-out images: what of it is kept, and what is trained again."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_runs import assert_same
from torch import nn

from mp_lightning import attachment_of
from mp_lightning.compare.architecture import Architecture
from mp_lightning.data import ImageSet, batch_indices, image_set, standard_augment
from mp_lightning.meta import transfer
from mp_lightning.meta.transfer import ArmResult, KeptRuns, Target, TransferSettings, compare_transfer, evaluate
from mp_lightning.perturbation import NamedPhi, initial_phi
from mp_lightning.randomness import derived_seed
from mp_lightning.runs import RunFolderError
from mp_lightning.sites import Attachment

SETTINGS = TransferSettings(
    architecture="conv4-2", steps=2, seeds=2, batch_size=4, lr=1e-2, weight_decay=0.0, samples=1
)
CPU = torch.device("cpu")
ARMS: dict[str, NamedPhi | None] = {"final phi": NamedPhi(initial_phi(1), "phi"), "no phi": None}
RUNS = [("final phi", 0), ("final phi", 1), ("no phi", 0), ("no phi", 1)]


def pictures(seed: int) -> ImageSet:
    images = np.random.default_rng(seed).integers(0, 255, (6, 3, 16, 16), dtype=np.uint8)
    return image_set("pictures", images, np.arange(6) % 3)


TARGET = Target(pictures(0), pictures(1), flip=True)


class Killed(Exception):
    """Stands for the end of a process."""


def compare(
    kept: KeptRuns,
    *,
    target: Target = TARGET,
    arms: dict[str, NamedPhi | None] = ARMS,
    settings: TransferSettings = SETTINGS,
    seed: int = 0,
    kill_at: int | None = None,
) -> tuple[list[ArmResult], list[tuple[str, int]]]:
    """The results, and which runs were trained; killed where so many were trained and the last not yet tested."""
    trained: list[tuple[str, int]] = []

    def on_progress(arm: str, number: int, steps: int) -> None:
        if steps == 0:
            trained.append((arm, number))
            if len(trained) == kill_at:
                raise Killed

    return compare_transfer(target, arms, settings, seed, CPU, on_progress, kept), trained


def test_an_interrupted_comparison_continues_with_the_rest(tmp_path: Path) -> None:
    expected, trained = compare(KeptRuns(tmp_path / "whole.json"))
    assert trained == RUNS
    for kill_at in (1, 2, 4):
        path = tmp_path / f"{kill_at}.json"
        with pytest.raises(Killed):
            compare(KeptRuns(path), kill_at=kill_at)
        results, trained = compare(KeptRuns(path))
        assert trained == RUNS[kill_at - 1 :]
        assert results == expected
        assert path.read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_a_finished_comparison_trains_nothing_and_counts_all_its_steps(tmp_path: Path) -> None:
    path, steps = tmp_path / "kept.json", Counter[str]()
    first, _ = compare(KeptRuns(path))
    again = compare_transfer(
        TARGET, ARMS, SETTINGS, 0, CPU, lambda arm, number, done: steps.update({arm: done}), KeptRuns(path)
    )
    assert again == first
    assert steps == {"final phi": 4, "no phi": 4}


def with_other_pixel(images: ImageSet) -> ImageSet:
    changed = images.images.clone()
    changed[-1, -1, -1, -1] ^= 1
    return replace(images, images=changed)


def with_other_label(images: ImageSet) -> ImageSet:
    return replace(images, labels=images.labels.roll(1))


CHANGES: dict[str, Callable[[], dict[str, object]]] = {
    "a pixel to train on": lambda: {"target": replace(TARGET, train=with_other_pixel(TARGET.train))},
    "a pixel to test on": lambda: {"target": replace(TARGET, test=with_other_pixel(TARGET.test))},
    "labels": lambda: {"target": replace(TARGET, test=with_other_label(TARGET.test))},
    "mirroring": lambda: {"target": replace(TARGET, flip=False)},
    "a setting": lambda: {"settings": replace(SETTINGS, lr=2e-2)},
    "the seed": lambda: {"seed": 1},
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_is_trained_again(tmp_path: Path, change: str) -> None:
    path = tmp_path / "kept.json"
    compare(KeptRuns(path))
    changed = CHANGES[change]()
    results, trained = compare(KeptRuns(path), **changed)
    assert trained == RUNS
    assert results == compare(KeptRuns(tmp_path / "other.json"), **changed)[0]


@pytest.mark.parametrize("change", ["a pixel to train on", "a pixel to test on", "labels", "mirroring"])
def test_a_digest_tells_targets_apart(change: str) -> None:
    changed = CHANGES[change]()["target"]
    assert isinstance(changed, Target)
    assert Target(pictures(0), pictures(1), flip=True).digest() == TARGET.digest() != changed.digest()


def test_another_phi_is_trained_again_and_the_other_arms_are_not(tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    compare(KeptRuns(path))
    phi = initial_phi(1)
    phi.scale_weight.view(-1)[-1] += 1e-6
    assert compare(KeptRuns(path), arms={**ARMS, "final phi": NamedPhi(phi, "phi")})[1] == RUNS[:2]
    weaker = NamedPhi(initial_phi(1), "phi", strength=0.5)
    assert compare(KeptRuns(path), arms={**ARMS, "final phi": weaker})[1] == RUNS[:2]
    assert compare(KeptRuns(path))[1] == [], "what was kept before is gone"


@pytest.mark.parametrize("left", ["", "{", "[1, 2]", "null", "\x00\x01"])
def test_a_damaged_file_is_ignored(tmp_path: Path, left: str) -> None:
    path = tmp_path / "kept.json"
    path.write_text(left)
    results, trained = compare(KeptRuns(path))
    assert trained == RUNS
    assert compare(KeptRuns(path)) == (results, [])


def test_bytes_that_are_no_text_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    path.write_bytes(b"\xff\xfe{}")
    assert KeptRuns(path).get("any") is None


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(RunFolderError, match=re.escape(f"run folder '{tmp_path / 'run'}' cannot be written")):
        KeptRuns(tmp_path / "run" / "kept.json").put("any", (1.0, 0.5))


def test_arms_of_one_seed_differ_in_the_perturbation_alone(tmp_path: Path) -> None:
    """Initialisation, batches, augmentation and noise follow from the seed."""
    phi = NamedPhi(initial_phi(1), "phi")
    arms: dict[str, NamedPhi | None] = {"one": phi, "twin": phi, "no phi": None}
    one, twin, without = compare(KeptRuns(tmp_path / "kept.json"), arms=arms)[0]
    assert one.nll == twin.nll and one.accuracy == twin.accuracy
    assert one.nll != without.nll
    assert one.nll[0] != one.nll[1]


@pytest.fixture
def tested(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The networks that come to the test, which is left out."""
    found: list[nn.Module] = []

    def note(model: nn.Module, *rest: object) -> tuple[float, float]:
        found.append(model)
        return 0.0, 0.0

    monkeypatch.setattr(transfer, "evaluate", note)
    return found


def test_without_phi_a_network_is_trained_by_adam_on_what_the_seed_draws(
    tmp_path: Path, tested: list[nn.Module]
) -> None:
    """With weight decay, and nothing mirrored where the target says so."""
    target = replace(TARGET, flip=False)
    settings = replace(SETTINGS, steps=3, seeds=1, weight_decay=0.1)
    compare(KeptRuns(tmp_path / "kept.json"), target=target, arms={"no phi": None}, settings=settings)
    seed = derived_seed(0, "transfer", 0)
    expected = Architecture.parse("conv4-2").build(target.train, derived_seed(seed, "theta"))
    optimizer = torch.optim.Adam(expected.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(3):
        chosen = batch_indices(6, 4, step, derived_seed(seed, "batches"))
        generator = torch.Generator().manual_seed(derived_seed(seed, "augmentation", step))
        optimizer.zero_grad()
        x = standard_augment(target.train.images[chosen], generator, flip=False)
        F.cross_entropy(expected(x), target.train.labels[chosen]).backward()
        optimizer.step()
    (trained,) = tested
    assert_same(trained.state_dict(), expected.state_dict())


def test_phi_hears_of_every_step_and_its_samples_are_averaged_in_evaluation(
    tmp_path: Path, tested: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: list[float] = []
    monkeypatch.setattr(Attachment, "step", lambda self, loss: losses.append(loss.item()))
    settings = replace(SETTINGS, steps=3, seeds=1, samples=5)
    compare(KeptRuns(tmp_path / "kept.json"), settings=settings)
    assert len(losses) == 3 and all(loss > 0 for loss in losses)
    assert [model.training for model in tested] == [False, False]
    assert getattr(attachment_of(tested[0]).inference, "samples", None) == 5
    assert attachment_of(tested[1]) is None


def test_what_a_network_draws_follows_from_the_seed_and_the_step(
    tmp_path: Path, tested: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is drawn between the steps."""
    build = Architecture.build
    seeds: list[int] = []

    def with_dropout(self: Architecture, images: ImageSet, seed: int) -> nn.Module:
        model = build(self, images, seed)
        model.fc = nn.Sequential(nn.Dropout(0.5), model.fc)
        model.fc.register_forward_pre_hook(lambda *_: seeds.append(torch.initial_seed()))
        return model

    monkeypatch.setattr(Architecture, "build", with_dropout)
    settings = replace(SETTINGS, seeds=1)
    for draws in (1, 3):
        kept = KeptRuns(tmp_path / f"{draws}.json")
        compare_transfer(TARGET, {"no phi": None}, settings, 0, CPU, lambda *_, n=draws: torch.rand(n), kept)
    assert_same(tested[0].state_dict(), tested[1].state_dict())
    assert seeds[:2] == seeds[2:] and seeds[0] != seeds[1]


def test_the_spread_over_seeds_is_that_of_a_sample() -> None:
    assert "NLL 2.000 +- 1.414 " in str(ArmResult("phi", [1.0, 3.0], [0.5, 0.5]))


def test_evaluation_is_the_mean_over_all_images() -> None:
    """Also where the last batch is smaller than the others."""
    rows = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 3.0], [1.0, 0.0, 0.0]])

    class Known(torch.nn.Module):
        """Gives these rows, in turn, from the first in every batch."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return rows[torch.arange(len(x)) % 3]

    nll, accuracy = evaluate(Known(), pictures(2), CPU, batch_size=4)
    given, labels = rows[[0, 1, 2, 0, 0, 1]], torch.tensor([0, 1, 2, 0, 1, 2])
    assert nll == pytest.approx(-float(torch.log_softmax(given, dim=1)[torch.arange(6), labels].mean()))
    assert accuracy == pytest.approx(3 / 6)
