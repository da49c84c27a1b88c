"""What would favour one arm, or take one comparison for another, and does not."""

import copy
import json
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from small_runs import CLASSES, PHI, Augmented, Small, SmallData, experiment, made, plan
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, random_split

import mp_lightning
from mp_lightning import MetaPerturbCallback, MetaPerturbMixin, MonteCarlo
from mp_lightning.compare.arms import Arm
from mp_lightning.compare.comparison import check_plan
from mp_lightning.compare.run import RunError
from mp_lightning.compare.user_code import identity
from mp_lightning.compare.user_data import UserData
from mp_lightning.errors import ConfigurationError
from mp_lightning.runs import RunFolderError
from mp_lightning.sites import attach, attachment_of


@pytest.mark.parametrize("arm", ["none", "dropout:0.5", "gaussian:1", "information_dropout", "mixup", "metaperturb"])
def test_batch_norm_of_every_arm_is_that_of_the_mode_it_is_tested_in(tmp_path: Path, arm: str) -> None:
    """A network whose second batch norm stands behind a site: noise there moves its statistics."""
    seen: list[tuple[float, float]] = []

    class Deep(Small):
        def __init__(self) -> None:
            super().__init__()
            layer = torch.nn.Conv2d(4, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.ReLU()
            self.net = torch.nn.Sequential(*self.net[:3], *layer, *self.net[3:])

    class Looking(SmallData):
        def train_dataloader(self) -> Any:
            return DataLoader(self.train, batch_size=12)  # one batch, so that an average is exact

        def setup(self, stage: str) -> None:
            super().setup(stage)
            self.test = self.train  # what is tested is what was estimated on

    def predict(module: Deep, batch: Any) -> Any:
        norm = module.net[4]
        if not norm.training and not module.training:
            given: list[torch.Tensor] = []
            handle = norm.register_forward_pre_hook(lambda m, args: given.append(args[0]))
            scores = module(batch[0])
            handle.remove()
            mean = torch.stack(given).mean(dim=(0, 1, 3, 4))
            seen.append((float((mean - norm.running_mean).abs().max()), float(mean.abs().max())))
            return scores, batch[1]
        return module(batch[0]), batch[1]

    what = experiment(module_factory=Deep, data=UserData(Looking()), predict=predict, samples=50)
    made(plan(["none", arm] if arm != "none" else ["none"], 1, experiment=what), tmp_path)
    # The images are augmented anew each time, by shifts of up to 0.1.
    assert seen and max(distance for distance, _ in seen) < 0.15, seen


@pytest.mark.parametrize("arm", ["metaperturb", "fixed_noise", "mine"])
def test_expected_noise_is_what_a_network_is_tested_by(tmp_path: Path, arm: str) -> None:
    """A callback that acts when training ends must have done so before, in whatever order the callbacks come."""
    trained: list[Small] = []
    x, y = torch.randn(6, 3, 6, 6, generator=torch.Generator().manual_seed(2)), torch.arange(6) % CLASSES

    class Fixed(SmallData):
        def test_dataloader(self) -> Any:
            return DataLoader(TensorDataset(x, y), batch_size=6)

    def factory() -> Small:
        trained.append(Small())
        return trained[-1]

    mine = Arm("mine", lambda seed: [MetaPerturbCallback(PHI, seed=seed)])
    arms = [mine if arm == "mine" else arm]
    what = experiment(module_factory=factory, inference="mean", data=UserData(Fixed()))
    outcome, _ = made(plan(["none", *arms], 1, experiment=what), tmp_path)
    module = trained[-1].eval()
    with torch.no_grad():
        assert outcome.rows[-1].nll == pytest.approx(float(cross_entropy(module(x), y)), rel=1e-5)
        assert torch.equal(module(x), module(x)), "no noise is drawn"


def test_samples_are_averaged_where_a_network_is_tested_by_them(tmp_path: Path) -> None:
    seen: list[Any] = []

    def predict(module: Small, batch: Any) -> Any:
        attachment = attachment_of(module)
        if attachment is not None and module.trainer.testing:
            seen.append(attachment.inference)
        return module(batch[0]), batch[1]

    made(plan(["none", "metaperturb"], 1, experiment=experiment(predict=predict, samples=7)), tmp_path)
    assert isinstance(seen[0], MonteCarlo) and seen[0].samples == 7


def test_frozen_batch_norm_is_left_alone(tmp_path: Path) -> None:
    found: list[torch.Tensor] = []

    class Frozen(Small):
        def on_train_start(self) -> None:
            self.net[1].requires_grad_(False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not self.training:
                found.append(self.net[1].running_mean.clone())
            return super().forward(x)

    class Keep(Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            kept.append(pl_module.net[1].running_mean.clone())

    kept: list[torch.Tensor] = []
    what = plan([Arm("mine", lambda seed: [Keep()])], 1, experiment=experiment(module_factory=Frozen))
    made(what, tmp_path)
    assert isinstance(Frozen().net[1], _BatchNorm)
    assert torch.equal(found[-1], kept[-1])


def compare(tmp_path: Path, datamodule: Any = None, factory: Any = Small, **options: Any) -> mp_lightning.Comparison:
    trainer = {"max_epochs": 1, "accelerator": "cpu", "limit_val_batches": 0}
    defaults = {"arms": ["none"], "seeds": 1, "phi": PHI, "trainer": trainer, "folder": tmp_path / "found"}
    return mp_lightning.compare(factory, datamodule or SmallData(), **{**defaults, **options})


def test_other_data_another_network_or_another_optimizer_is_another_comparison(tmp_path: Path) -> None:
    class Other(SmallData):
        def setup(self, stage: str) -> None:
            super().setup(stage)
            self.train = Augmented(12, 5)

    class Faster(Small):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.2)

    class Wider(Small):
        def __init__(self) -> None:
            super().__init__()
            self.more = torch.nn.Linear(2, 2)

    Other.__name__ = "SmallData"
    Faster.__name__ = Wider.__name__ = "Small"
    compare(tmp_path)
    compare(tmp_path)  # the same goes on
    for options, what in (
        ({"datamodule": Other()}, "data="),
        ({"factory": Faster}, "module="),
        ({"factory": Wider}, "module="),
    ):
        with pytest.raises(RunFolderError, match=f"holds a run with .*{what}"):
            compare(tmp_path, **options)


def test_generators_of_loaders_do_not_carry_over_from_run_to_run(tmp_path: Path) -> None:
    first: list[torch.Tensor] = []

    class Own(SmallData):
        def __init__(self) -> None:
            super().__init__()
            self.generator = torch.Generator().manual_seed(0)

        def train_dataloader(self) -> Any:
            return DataLoader(self.train, batch_size=4, shuffle=True, generator=self.generator)

    class Noting(Small):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.global_step == 0:
                first.append(batch[0].clone())
            return super().training_step(batch, batch_idx)

    what = experiment(module_factory=Noting, data=UserData(Own()))
    made(plan(["none", "dropout:0.1", "metaperturb"], 1, experiment=what), tmp_path)
    assert len(first) >= 3 and all(torch.equal(first[0], batch) for batch in first[1:3])


def test_a_random_split_is_the_same_before_training_and_before_the_test(tmp_path: Path) -> None:
    splits: list[list[int]] = []

    class Split(SmallData):
        def setup(self, stage: str) -> None:
            self.train, self.test = random_split(Augmented(12, 0), [8, 4])
            splits.append(list(self.train.indices))

        val_dataloader = L.LightningDataModule.val_dataloader

    made(plan(["none"], 1, experiment=experiment(data=UserData(Split()))), tmp_path)
    assert len(splits) == 2 and splits[0] == splits[1]


def test_seeds_suit_any_generator_and_an_error_of_the_data_is_a_sentence(tmp_path: Path) -> None:
    def draw(seed: int) -> SmallData:
        np.random.default_rng(seed)
        np.random.RandomState(seed)
        return SmallData()

    compare(tmp_path, draw, arms=["none", "dropout", "fixed_noise"], tuning_values=2)


@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_what_a_users_data_raises_is_told_with_its_run(tmp_path: Path, error: type[BaseException]) -> None:
    def broken(seed: int) -> SmallData:
        if seed:
            raise error("no such seed")
        return SmallData()

    with pytest.raises(RunError, match=rf"arm 'none', seed 1 failed: {error.__name__}: no such seed"):
        compare(tmp_path, broken, seeds=2)


def test_callbacks_that_watch_validation_go_with_the_controls(tmp_path: Path) -> None:
    class Validated(Small):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", cross_entropy(self(batch[0]), batch[1]))

    trainer = {"max_epochs": 2, "accelerator": "cpu", "callbacks": EarlyStopping("val_loss")}
    found = compare(tmp_path, factory=Validated, arms=["none", "fixed_noise"], trainer=trainer)
    assert [row.arm for row in found.rows] == ["none", "fixed_noise"]


def test_hooks_of_a_datamodule_act_on_test_images_as_on_those_of_training(tmp_path: Path) -> None:
    """Images that are shifted by 7 on their way to the device are never seen as they lie in the loader."""
    seen: list[float] = []

    class Shifting(SmallData):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch[0] + 7, batch[1]

    class Looking(Small):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(float(x.mean()))
            return super().forward(x)

    what = experiment(module_factory=Looking, data=UserData(Shifting()))
    made(plan(["none", "fixed_noise"], 1, experiment=what), tmp_path)
    assert seen and min(seen) > 6, min(seen)


def test_a_datamodule_may_give_its_loader_in_a_list(tmp_path: Path) -> None:
    class Listed(SmallData):
        def train_dataloader(self) -> Any:
            return [super().train_dataloader()]

    class Unpacking(Small):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return super().training_step(batch[0] if isinstance(batch[0], list) else batch, batch_idx)

    what = experiment(module_factory=Unpacking, data=UserData(Listed()))
    outcome, _ = made(plan(["none", "fixed_noise"], 1, experiment=what), tmp_path)
    assert [row.arm for row in outcome.rows] == ["none", "fixed_noise"]


def test_layers_that_find_out_their_size_are_compared(tmp_path: Path) -> None:
    class Lazy(Small):
        def __init__(self) -> None:
            super().__init__()
            self.net[-1] = torch.nn.LazyLinear(CLASSES)

    assert len(compare(tmp_path, factory=Lazy, arms=["none", "metaperturb"]).rows) == 2


def test_callbacks_of_a_module_may_ask_its_trainer(tmp_path: Path) -> None:
    class Asking(Small):
        def configure_callbacks(self) -> Any:
            return [Callback()] if self.trainer.max_epochs else []

    assert len(compare(tmp_path, factory=Asking, arms=["none", "metaperturb"]).rows) == 2


class Endless(IterableDataset[tuple[torch.Tensor, int]]):
    def __iter__(self) -> Any:
        number = 0
        while True:
            yield torch.randn(3, 6, 6), number % CLASSES
            number += 1


@pytest.mark.timeout(60)
def test_an_endless_training_set_is_tested_on_as_much_as_was_trained_on(tmp_path: Path) -> None:
    class Stream(SmallData):
        def train_dataloader(self) -> Any:
            return DataLoader(Endless(), batch_size=4)

    trainer = {"max_steps": 5, "accelerator": "cpu", "limit_val_batches": 0}
    found = compare(tmp_path, Stream(), trainer=trainer, arms=["none", "metaperturb"])
    assert len(found.rows) == 2


class Declared(MetaPerturbMixin, Small):
    def __init__(self) -> None:
        super().__init__()
        self.perturb(PHI)


class Undeclared(MetaPerturbMixin, Small):
    pass


class Inside(Small):
    def __init__(self) -> None:
        super().__init__()
        attach(self.net, PHI)


class ByCallback(Small):
    def configure_callbacks(self) -> Any:
        return MetaPerturbCallback(PHI)


@pytest.mark.parametrize("factory", [Declared, Undeclared, Inside, ByCallback])
def test_a_module_that_perturbs_itself_is_refused_as_none_would_train_with_phi(tmp_path: Path, factory: Any) -> None:
    message = f"{factory.__name__} perturbs itself, .*'none' too.*; let module_factory make one without MetaPerturb"
    with pytest.raises(ConfigurationError, match=message):
        compare(tmp_path, factory=factory)
    assert not (tmp_path / "found").exists()
    with pytest.raises(ConfigurationError, match=message):
        check_plan(plan(["none"], 1, experiment=experiment(module_factory=factory)))


@pytest.mark.parametrize("several", [True, False])
def test_a_perturbation_in_the_trainers_callbacks_is_refused(tmp_path: Path, several: bool) -> None:
    callback = MetaPerturbCallback(PHI)
    trainer = {"max_epochs": 1, "accelerator": "cpu", "callbacks": [callback] if several else callback}
    with pytest.raises(ConfigurationError, match=r"trainer= has a MetaPerturbCallback .*; leave it out, as"):
        compare(tmp_path, trainer=trainer)
    assert not (tmp_path / "found").exists()


def test_batches_that_are_reloaded_are_those_of_their_epoch_and_alike_for_every_arm(tmp_path: Path) -> None:
    made_modules: list[Small] = []

    def factory() -> Small:
        made_modules.append(Small())
        return made_modules[-1]

    def batches(**trainer: Any) -> list[list[torch.Tensor]]:
        made_modules.clear()
        what = experiment(module_factory=factory)
        what_with = plan(["none", "metaperturb"], 1, experiment=replace(what, trainer={**what.trainer, **trainer}))
        made(what_with, tmp_path / f"{trainer}")
        return [module.seen[:6] for module in made_modules]  # what follows re-estimates batch norm

    (tmp_path / "{}").mkdir()
    (tmp_path / "{'reload_dataloaders_every_n_epochs': 1}").mkdir()
    usual, again = batches(), batches(reload_dataloaders_every_n_epochs=1)
    for first, second in (again, (usual[0][:3], again[0][:3])):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert len(again[0]) == 6 and not torch.equal(torch.cat(again[0][:3]).sort()[0], torch.cat(again[0][3:]).sort()[0])


class OwnGenerator(Augmented):
    """Augments by a generator of NumPy that belongs to the dataset."""

    def __init__(self) -> None:
        super().__init__(12, 0)
        self.generator = np.random.default_rng(0)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self._images[index] + float(self.generator.normal()), index % CLASSES


class Held(SmallData):
    """With the dataset from the start."""

    def __init__(self) -> None:
        super().__init__()
        self.held = OwnGenerator()

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.train = self.held


def test_a_generator_that_a_dataset_holds_begins_each_run_anew(tmp_path: Path) -> None:
    first = compare(tmp_path, datamodule=Held(), arms=["none", Arm("same", lambda seed: [])])
    assert first.rows[0].nll == first.rows[1].nll
    data = Held()
    data.trainer = Any  # what a fit before leaves there
    assert UserData(data)(0).trainer is None


def test_data_that_cannot_be_copied_is_said_with_what_to_do() -> None:
    data = SmallData()
    data.file = (one for one in [1])
    with pytest.raises(ConfigurationError, match=r"SmallData cannot be copied .*; give a function of the seed"):
        UserData(data)


def test_what_scores_are_made_of_decides_which_comparison_it_is(tmp_path: Path) -> None:
    def predict(module: Small, batch: Any) -> Any:
        return module(batch[0]), batch[1]

    compare(tmp_path, predict=predict)
    with pytest.raises(RunFolderError, match=r"holds a run with predict=test_what_scores_.*, not null"):
        compare(tmp_path)
    with pytest.raises(RunFolderError, match=r"holds a run with output=null, not log_probabilities"):
        compare(tmp_path, predict=predict, output="log_probabilities")
    given = json.loads((tmp_path / "found" / "settings.json").read_text())
    assert "output" not in given and given["predict"] == identity(predict)


def scaled(module: Any, batch: Any, by: float = 1.0) -> Any:
    return by * module(batch[0]), batch[1]


def doubled(module: Any, batch: Any) -> Any:
    return 2.0 * module(batch[0]), batch[1]


def tripled(module: Any, batch: Any) -> Any:
    return 3.0 * module(batch[0]), batch[1]


class Slotted:
    __slots__ = ()

    def __call__(self, module: Any, batch: Any) -> Any:
        return module(batch[0]), batch[1]


@dataclass
class Settings:
    by: float


class Scaling:
    def __init__(self, by: float) -> None:
        self.by = by

    def __call__(self, module: Any, batch: Any) -> Any:
        return self.by * module(batch[0]), batch[1]


def test_a_function_is_told_by_its_name_its_code_and_what_it_holds() -> None:
    def held(by: Any) -> Any:
        return lambda module, batch: by * module(batch[0])

    tripled.__qualname__ = "doubled"
    pairs = [
        (doubled, tripled),
        (partial(scaled, by=2.0), partial(scaled, by=3.0)),
        (held(2.0), held(3.0)),
        (held(torch.tensor(2.0)), held(torch.tensor(3.0))),
        (Scaling(2.0), Scaling(3.0)),
        (held(Settings(2.0)), held(Settings(3.0))),
        (held(SimpleNamespace(by=2.0)), held(SimpleNamespace(by=3.0))),
        (held({2.0}), held({3.0})),
        (held(np.array([2.0])), held(np.array([3.0]))),
        (held(np.float32(2)), held(np.float32(3))),
        (held(Path("2")), held(Path("3"))),
        (held(Scaling), held(Settings)),
    ]
    for first, second in pairs:
        assert identity(first) == identity(copy.deepcopy(first)) != identity(second)
        assert identity(first).split()[:-1] == identity(second).split()[:-1]
    for what in (print, math, open, object()):
        assert identity(held(what)) == identity(held(what))


def test_a_function_whose_surroundings_are_not_complete_yet_is_told_too() -> None:
    def predict(module: Any, batch: Any) -> Any:
        return module(later), batch[1]

    found = identity(predict)
    later = 1
    assert found != identity(predict), f"now it holds {later}"


def test_a_function_that_holds_itself_is_told_too() -> None:
    def held(by: float) -> Any:
        def predict(module: Any, batch: Any, again: bool = True) -> Any:
            return predict(module, batch, False) if again else by * module(batch[0])

        return predict

    class Bound(Scaling):
        def __init__(self, by: float) -> None:
            super().__init__(by)
            self.way = self.__call__

        def __call__(self, module: Any, batch: Any) -> Any:
            return super().__call__(module, batch)

    for make in (held, Bound):
        assert identity(make(2.0)) == identity(make(2.0)) != identity(make(3.0))
    assert identity(Slotted()) == identity(Slotted())


class Unequal(SmallData):
    """Of whose training batches only the first are trained on."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        generator = torch.Generator().manual_seed(3)
        scales = torch.linspace(0.1, 10, 40).view(-1, 1, 1, 1)
        images, labels = scales * torch.randn(40, 3, 6, 6, generator=generator), torch.arange(40) % CLASSES
        self.train = TensorDataset(images, labels)  # type: ignore[assignment]


@pytest.mark.parametrize("inference", ["mean", "mc"])
@pytest.mark.parametrize("batches", [2, 1.0])
def test_an_arm_that_does_nothing_scores_as_none_does(tmp_path: Path, inference: str, batches: Any) -> None:
    """Its batch norm is estimated on the same batches, in the same order, of those that are trained on."""

    def nothing(seed: int) -> list[Callback]:
        return [MetaPerturbCallback(strength=1e-12, full_strength_at=1, ramp_steps=0, inference=inference, samples=2)]  # type: ignore[arg-type]

    found = mp_lightning.compare(
        Small,
        Unequal(),
        trainer={"max_epochs": 2, "accelerator": "cpu", "limit_val_batches": 0, "limit_train_batches": batches},
        arms=["none", Arm("nothing", nothing)],
        seeds=2,
        folder=tmp_path / "run",
    )
    for none, other in zip(found.rows[:2], found.rows[2:], strict=True):
        assert other.nll == pytest.approx(none.nll, rel=1e-4) and other.mean_nll == pytest.approx(none.nll, rel=1e-4)
        assert other.accuracy == none.accuracy


class NeedsGradients(Small):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        torch.autograd.grad(self.net[0](batch[0].requires_grad_()).sum(), batch[0])
        return super().training_step(batch, batch_idx)


def test_a_run_whose_batch_norm_cannot_be_re_estimated_is_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "limit_val_batches": 0},
        **{"arms": ["none", "metaperturb"], "seeds": 1, "phi": PHI, "folder": tmp_path / "run"},
    }
    with pytest.raises(ConfigurationError, match=r"of NeedsGradients cannot be re-estimated.*inference='mc'"):
        mp_lightning.compare(NeedsGradients, SmallData(), **options)
    assert "metaperturb" not in (tmp_path / "run" / "results.csv").read_text()
    found = mp_lightning.compare(
        NeedsGradients, SmallData(), **{**options, "inference": "mc", "samples": 2, "folder": tmp_path / "mc"}
    )
    assert math.isfinite(found.rows[1].nll) and math.isnan(found.rows[1].mean_nll)


def test_a_changed_step_or_datamodule_is_another_comparison(tmp_path: Path) -> None:
    def module(smoothing: bool) -> Any:
        class Own(Small):
            if smoothing:

                def training_step(self, batch: Any, batch_idx: int) -> Any:
                    return cross_entropy(self(batch[0]), batch[1], label_smoothing=0.9)

        return Own

    class OtherData(SmallData):
        def teardown(self, stage: str) -> None:
            self.ended = True

    OtherData.__qualname__ = OtherData.__name__ = "SmallData"
    options: dict[str, Any] = {
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "limit_val_batches": 0},
        **{"arms": ["none"], "seeds": 1, "folder": tmp_path / "run"},
    }
    first = mp_lightning.compare(module(False), SmallData(), **options)
    assert mp_lightning.compare(module(False), SmallData(), **options).rows == first.rows
    for other in ((module(True), SmallData()), (module(False), OtherData())):
        with pytest.raises(RunFolderError, match=r"holds a run with code=\w+, not \w+: set it back, choose another"):
            mp_lightning.compare(*other, **options)
