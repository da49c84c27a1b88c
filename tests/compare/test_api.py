"""``mp_lightning.compare`` with a user's own LightningModule and DataModule."""

import inspect
import json
import re
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console
from small_runs import PHI, Small, SmallData
from torch.utils.data import DataLoader

import mp_lightning
from mp_lightning.compare.given import OWN_SETTINGS
from mp_lightning.compare.summary import VERDICT_METRICS
from mp_lightning.errors import ConfigurationError, DataError
from mp_lightning.perturbation import load_phi
from mp_lightning.runs import RunFolderError

ONE_EPOCH = {"max_epochs": 1, "accelerator": "cpu", "limit_val_batches": 0}


class Validated(Small):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))


def compare(tmp_path: Path, **options: Any) -> tuple[mp_lightning.Comparison, str]:
    """A small comparison, and what was printed."""
    defaults: dict[str, Any] = {
        "trainer": ONE_EPOCH,
        "arms": ["none", "metaperturb"],
        "seeds": 2,
        "phi": PHI,
        "samples": 2,
        "folder": tmp_path / "found",
    }
    text = StringIO()
    factory, data = options.pop("module_factory", Small), options.pop("datamodule", SmallData())
    found = mp_lightning.compare(factory, data, **{**defaults, **options}, console=Console(file=text, width=400))
    return found, text.getvalue()


def test_a_users_module_and_data_are_compared(tmp_path: Path) -> None:
    found, text = compare(tmp_path, module_factory=Validated, trainer={"max_epochs": 2, "accelerator": "cpu"})
    assert [(row.arm, row.seed) for row in found.rows] == [
        *(("none", 0), ("none", 1)),
        *(("metaperturb", 0), ("metaperturb", 1)),
    ]
    assert {(row.target, row.model) for row in found.rows} == {("SmallData", "Validated")}
    inference = inspect.signature(mp_lightning.MetaPerturbCallback).parameters["inference"].default
    assert [row.inference for row in found.rows] == ["plain", "plain", inference, inference], "what users get is tested"
    assert str(found).startswith("underfitted")
    for name in ("results.csv", "report.html", "summary.md", "summary.json"):
        assert (found.folder / name).stat().st_size > 100
    assert text.rstrip().splitlines()[-1].strip() == str(found)


@pytest.mark.slow
def test_networks_that_compile_themselves_whole_are_compared(tmp_path: Path) -> None:
    class Compiled(Small):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.compile(self.net, backend="eager", fullgraph=True)  # type: ignore[assignment]

    torch._dynamo.reset()
    found, _ = compare(tmp_path, module_factory=Compiled, seeds=1)
    assert [row.arm for row in found.rows] == ["none", "metaperturb"]


def test_how_much_of_the_strength_acted_is_said_before_the_verdict_and_in_the_report(tmp_path: Path) -> None:
    phi = replace(load_phi(PHI), full_strength_at=0.4)  # of which a run of one epoch sees the beginning
    found, text = compare(tmp_path, phi=phi, seeds=1)
    said = re.findall(r"metaperturb acted at (\d+)% of its strength when training ended", text)
    assert len(said) == 1 and int(said[0]) < 50
    assert text.index("metaperturb acted at") < text.index("Verdict in")
    for name in ("report.html", "summary.md"):
        assert f"metaperturb acted at {said[0]}% of its strength" in (found.folder / name).read_text("utf-8").replace(
            "\N{NO-BREAK SPACE}", " "
        )


def test_the_same_call_makes_nothing_again_and_other_settings_are_refused(tmp_path: Path) -> None:
    first, _ = compare(tmp_path)
    again, text = compare(tmp_path)
    assert again.rows == first.rows and "1/4" not in text
    more, _ = compare(tmp_path, seeds=3, arms=["none", "metaperturb", "mixup:0.2"])
    assert more.rows[:2] == first.rows[:2] and len(more.rows) == 9
    with pytest.raises(RunFolderError, match=r"holds a run with trainer\.max_epochs=1, not 2"):
        compare(tmp_path, trainer={**ONE_EPOCH, "max_epochs": 2})
    with pytest.raises(RunFolderError, match=r"holds a run with lr=null, not 0\.1"):
        compare(tmp_path, settings={"lr": 0.1})


def test_data_can_be_drawn_by_the_seed(tmp_path: Path) -> None:
    seeds: list[int] = []

    def draw(seed: int) -> SmallData:
        seeds.append(seed)
        return SmallData()

    compare(tmp_path, datamodule=draw, arms=["none"])
    assert set(seeds) == {0, 1}


def test_hyperparameters_are_tuned_on_the_users_validation_images(tmp_path: Path) -> None:
    found, text = compare(tmp_path, arms=["none", "dropout"], seeds=1, tuning_values=2)
    assert [value for value, _ in found.tuned[0].tried] == [0.1, 0.03]
    assert "2/2  dropout:0.03" in text
    assert found.rows[1].parameters == f"p={found.tuned[0].chosen:g}"


def test_the_number_of_classes_comes_from_the_data_or_the_call(tmp_path: Path) -> None:
    class Unknown(SmallData):
        num_classes = None

    with pytest.raises(ConfigurationError, match=r"arm .mixup:0\.2. needs the number of classes; pass num_classes="):
        compare(tmp_path, datamodule=Unknown(), arms=["mixup:0.2"], seeds=1)
    assert not (tmp_path / "found" / "results.csv").exists()
    found, _ = compare(tmp_path, datamodule=Unknown(), arms=["mixup:0.2"], seeds=1, num_classes=3)
    assert [row.arm for row in found.rows] == ["none", "mixup:0.2"]


class NoTest(L.LightningDataModule):
    train_dataloader = SmallData.train_dataloader
    setup = SmallData.setup


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trainer": {}}, "trainer= does not say when a run ends; give one of max_epochs, max_steps"),
        ({"trainer": {**ONE_EPOCH, "devices": 2}}, "devices=2; each run is on one device, several at a time by jobs="),
        ({"inference": "fold"}, "inference='fold' is unknown; use one of mc, mean"),
        ({"seeds": 0}, "seeds=0: give a whole number above 0"),
        ({"metric": "ece"}, "metric='ece' is unknown; use one of accuracy, nll"),
        ({"datamodule": NoTest()}, "NoTest has no test_dataloader"),
        ({"datamodule": lambda seed: [1]}, "datamodule is a list, not a LightningDataModule"),
        ({"arms": ["dropuot"]}, "'dropuot' is unknown; use one of"),
        ({"tuning_values": 5}, "tuning_values=5"),
        ({"trainer": None}, "trainer=None: give the arguments of lightning.Trainer as a dictionary"),
        ({"trainer": {"max_epochs": -1}}, "trainer= does not say when a run ends; give one of max_epochs, max_steps"),
        ({"trainer": {"max_steps": 0}}, "trainer= has max_steps=0; give a whole number above 0"),
        ({"seeds": True}, "seeds=True: give a whole number above 0"),
        ({"num_classes": "3"}, "num_classes='3': give a whole number of classes"),
        ({"output": "logit"}, "output='logit' is unknown; use one of logits, probabilities, log_probabilities"),
        ({"arms": "metaperturb"}, "arms='metaperturb': give a list"),
        ({"arms": None}, "arms=None: give a list"),
        ({"arms": []}, "arms=[] names no arm; give a list"),
        ({"trainer": {"fast_dev_run": True}}, "trainer= has fast_dev_run=True, which is not taken; for a short run"),
        ({"arms": [mp_lightning.Arm("", lambda seed: [])]}, "arm '' has no name"),
        ({"arms": [mp_lightning.Arm(3, lambda seed: [])]}, "arm 3 has no name"),
        ({"target": 5}, "target=5: give a name, as text"),
        ({"model": 7}, "model=7: give a name, as text"),
        ({"settings": ["a"]}, "settings=['a']: give a dictionary"),
        ({"settings": {"data": "v1"}}, "settings= has 'data', which the comparison sets by itself; call it otherwise"),
        ({"settings": {"inference": "x"}}, "settings= has 'inference'"),
        ({"datamodule": [1]}, "datamodule is a list; give a LightningDataModule"),
    ],
)
def test_what_cannot_be_used_is_refused_before_a_folder_is_made(tmp_path: Path, options, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        compare(tmp_path, **options)
    assert message in str(caught.value)
    assert not (tmp_path / "found").exists()


def test_every_setting_of_a_comparison_is_known_as_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the user's of the same name would stand in its place."""
    found, _ = compare(
        tmp_path,
        arms=["none"],
        seeds=1,
        metric="nll",
        output="logits",
        trainer={**ONE_EPOCH, "reload_dataloaders_every_n_epochs": 1},
        predict=scores,
    )
    kept = json.loads((found.folder / "settings.json").read_text())
    assert kept.keys() == OWN_SETTINGS


def scores(module: L.LightningModule, batch: Any) -> Any:
    return module(batch[0]), batch[1]


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (
            lambda seed: 1 / 0,
            r"arm 'mine': its callbacks\(seed\) failed with ZeroDivisionError: division by zero; mend it",
        ),
        (lambda seed: [3], r"arm 'mine': its callbacks\(seed\) gives a int; give a list of callbacks of Lightning"),
    ],
)
def test_an_own_arm_that_makes_no_callbacks_is_refused_before_a_run(tmp_path: Path, callbacks, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        compare(tmp_path, arms=["none", mp_lightning.Arm("mine", callbacks)])
    assert not (tmp_path / "found" / "results.csv").exists()


@pytest.mark.parametrize("callbacks", [lambda seed: None, lambda seed: Noise(0.1)])
def test_an_own_arm_may_give_what_lightning_takes(tmp_path: Path, callbacks) -> None:
    found, _ = compare(tmp_path, arms=["none", mp_lightning.Arm("mine", callbacks)], seeds=1)
    assert [row.arm for row in found.rows] == ["none", "mine"]


@pytest.mark.parametrize("output", ["probabilities", "log_probabilities"])
def test_scores_that_are_not_what_was_said_are_no_probabilities(tmp_path: Path, output: str) -> None:
    with pytest.raises(ConfigurationError, match=f"the scores of Small are no {output}, as those of an image do not"):
        compare(tmp_path, arms=["none"], seeds=1, output=output)


def test_the_default_folder_follows_from_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, _ = compare(tmp_path, folder=None, arms=["none"], seeds=1)
    more, _ = compare(tmp_path, folder=None, arms=["none"], seeds=2)
    other, _ = compare(tmp_path, folder=None, arms=["none"], seeds=1, settings={"lr": 1})
    assert first.folder == more.folder != other.folder
    assert first.folder.parent == Path("runs")


def test_every_argument_is_described() -> None:
    described = mp_lightning.compare.__doc__ or ""
    for name in inspect.signature(mp_lightning.compare).parameters:
        assert f"{name}:" in described or f"{name}," in described or f", {name}" in described, name


class Noise(L.Callback):
    """What moves the parameters after each batch."""

    def __init__(self, size: float) -> None:
        self.size = size

    def on_train_batch_end(self, trainer: Any, module: L.LightningModule, *rest: Any) -> None:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += self.size


def test_an_arm_that_was_changed_is_made_again(tmp_path: Path) -> None:
    def run(arm: mp_lightning.Arm) -> dict[str, float]:
        found, _ = compare(tmp_path, arms=["none", arm], seeds=1)
        return {row.arm: row.nll for row in found.rows}

    first = run(mp_lightning.Arm("mine", lambda seed: [Noise(0.0)]))
    assert run(mp_lightning.Arm("mine", lambda seed: [Noise(0.0)])) == first
    changed = run(mp_lightning.Arm("mine", lambda seed: [Noise(0.5)]))
    assert changed["none"] == first["none"] and changed["mine"] != first["mine"]


def test_another_scheduler_is_another_comparison(tmp_path: Path) -> None:
    def factory(gamma: float) -> Any:
        class Scheduled(Small):
            def configure_optimizers(self) -> Any:
                optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
                return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma)]

        return Scheduled

    compare(tmp_path, module_factory=factory(1.0), arms=["none"], seeds=1)
    with pytest.raises(RunFolderError, match=r"holds a run with .*module=.*folder=, or start anew with fresh=True"):
        compare(tmp_path, module_factory=factory(0.5), arms=["none"], seeds=1)


def test_another_metric_has_a_default_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    places = [
        compare(tmp_path, folder=None, arms=["none"], seeds=1, **{"metric": m})[0].folder for m in VERDICT_METRICS
    ]
    assert len({*places}) == 2


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_labels_may_be_of_any_whole_numbers(tmp_path: Path, dtype: torch.dtype) -> None:
    class Labels(SmallData):
        def test_dataloader(self) -> Any:
            return DataLoader([(x, torch.tensor(y, dtype=dtype)) for x, y in self.test], 6)

    found, _ = compare(tmp_path, datamodule=Labels(), arms=["none"], seeds=1)
    assert 0 <= found.rows[0].accuracy <= 1


def test_a_label_of_no_class_is_named(tmp_path: Path) -> None:
    class Labels(SmallData):
        def test_dataloader(self) -> Any:
            return DataLoader([(x, y + 100) for x, y in self.test], 6)

    with pytest.raises(DataError, match=r"label 10\d is none of the \d+ classes that Small gives scores of"):
        compare(tmp_path, datamodule=Labels(), arms=["none"], seeds=1)


def test_a_part_of_the_test_images_is_not_asked_for_in_vain(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="limit_test_batches"):
        compare(tmp_path, trainer={**ONE_EPOCH, "limit_test_batches": 1})


def test_checkpoints_are_written_where_a_callback_of_the_trainer_writes_them(tmp_path: Path) -> None:
    trainer = {**ONE_EPOCH, "callbacks": [ModelCheckpoint(tmp_path / "kept")]}
    found, _ = compare(tmp_path, trainer=trainer, seeds=1)
    assert len(found.rows) == 2 and len(list((tmp_path / "kept").glob("*.ckpt"))) == 2
