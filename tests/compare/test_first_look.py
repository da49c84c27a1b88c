"""What no run could use is refused before anything is trained."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from small_runs import CLASSES, Small, SmallData
from test_api import compare
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from mp_lightning.errors import ConfigurationError, DataError, UserError

PREDICT = r"pass predict=, a function from the module and a batch to scores"


class Trains(Small):
    """Fails the test when it is trained."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        raise AssertionError("nothing is trained")


class ByHand(Trains):
    automatic_optimization = False


class OneLogit(Trains):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)[:, :1]


class Flat(Trains):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)[:, 0]


class WithFeatures(Trains):
    def forward(self, x: Tensor) -> Any:
        return self.net(x), x


class FewClasses(Trains):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)[:, : CLASSES - 1]


class Dictionaries(SmallData):
    def test_dataloader(self) -> Any:
        return DataLoader([{"image": torch.zeros(3, 6, 6), "label": 0}], batch_size=1)


class TwoTests(SmallData):
    def test_dataloader(self) -> Any:
        return [super().test_dataloader()] * 2


class Stream(IterableDataset[tuple[Tensor, int]]):
    def __iter__(self) -> Any:
        return iter([(torch.randn(3, 6, 6), number % CLASSES) for number in range(8)])


class Streamed(SmallData):
    def train_dataloader(self) -> Any:
        return DataLoader(Stream(), batch_size=4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"module_factory": OneLogit},
            ConfigurationError,
            rf"scores of OneLogit are \(2, 1\) .*two or more.*{PREDICT}",
        ),
        ({"module_factory": Flat}, ConfigurationError, rf"the scores of Flat are \(2,\) torch.float32, .*{PREDICT}"),
        ({"module_factory": WithFeatures}, ConfigurationError, f"scores of WithFeatures are a tuple, .*{PREDICT}"),
        ({"module_factory": FewClasses}, DataError, "label 2 is none of the 2 classes that FewClasses gives scores of"),
        ({"datamodule": Dictionaries()}, ConfigurationError, "a batch is a dict, not images and labels; pass predict="),
        (
            {"datamodule": TwoTests()},
            ConfigurationError,
            "test_dataloader gives several loaders, of which one is needed",
        ),
        ({"datamodule": Streamed()}, ConfigurationError, r"train_dataloader has no length.*trainer=\{'max_steps': "),
        (
            {"module_factory": ByHand, "trainer": {"max_steps": 3, "accelerator": "cpu"}},
            ConfigurationError,
            r"max_steps=3, .* ByHand optimizes by hand, .*give trainer=\{'max_epochs': \.\.\.\} in its place",
        ),
        (
            {"module_factory": Small()},
            ConfigurationError,
            r"module_factory is a Small; give a function.*lambda: Small\(",
        ),
        (
            {"trainer": {"max_epochs": 1, "overfit_batches": 1}},
            ConfigurationError,
            "trainer= has overfit_batches, which takes the test images from training",
        ),
    ],
)
def test_what_no_run_could_use_is_refused_before_training(
    tmp_path: Path, options: dict[str, Any], error: type[UserError], message: str
) -> None:
    with pytest.raises(error, match=message):
        compare(tmp_path, **{"module_factory": Trains, **options})


def test_what_the_look_cannot_compute_is_left_to_the_runs(tmp_path: Path) -> None:
    class OneHot(SmallData):
        """Whose hook makes class numbers of what its loaders give."""

        def test_dataloader(self) -> Any:
            return DataLoader([(x, torch.eye(CLASSES)[y]) for x, y in self.test], batch_size=6)  # type: ignore[attr-defined]

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch if batch[1].dim() == 1 else (batch[0], batch[1].argmax(dim=1))

    class AsksTheTrainer(Small):
        def forward(self, x: Tensor) -> Tensor:
            assert isinstance(self.trainer, L.Trainer)
            return super().forward(x)

    assert len(compare(tmp_path, datamodule=OneHot(), arms=["none"], seeds=1)[0].rows) == 1
    found, _ = compare(tmp_path, module_factory=AsksTheTrainer, arms=["none"], seeds=1, folder=tmp_path / "other")
    assert len(found.rows) == 1


@pytest.mark.parametrize(
    ("arm", "use"),
    [
        ("dropout", "seed 1000000000, by which hyperparameters are tuned"),
        ("fixed_noise", "seed 2000000000, by which phi is measured for its controls"),
    ],
)
def test_data_of_a_few_seeds_are_refused_where_other_seeds_are_needed(tmp_path: Path, arm: str, use: str) -> None:
    folds = [SmallData(), SmallData()]
    with pytest.raises(
        ConfigurationError, match=rf"failed with {use} \(IndexError: .*\); let it take any whole number"
    ):
        compare(tmp_path, module_factory=Trains, datamodule=lambda seed: folds[seed], arms=["none", arm])


@pytest.mark.parametrize("nothing", [None, []])
def test_a_val_dataloader_that_gives_no_loader_is_no_validation(tmp_path: Path, nothing: Any) -> None:
    class WithoutValidation(SmallData):
        def val_dataloader(self) -> Any:
            return nothing

    found, _ = compare(tmp_path, datamodule=WithoutValidation(), arms=["none", "dropout"], seeds=1, tuning_values=2)
    assert not found.tuned[0].tried and [row.arm for row in found.rows] == ["none", "dropout"]
