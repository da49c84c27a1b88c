"""Results of an experiment that was changed are not shown as its own, and the same script continues its own."""

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback
from small_runs import Small
from test_api import ONE_EPOCH, compare
from torch import Tensor, nn

from mp_lightning.compare.fingerprint import described
from mp_lightning.compare.plain_values import layers_of, plain
from mp_lightning.compare.user_code import code_of, identity
from mp_lightning.runs import RunFolderError


class Chosen(Small):
    """What the arguments choose changes no tensor of the state, no method and no optimizer."""

    def __init__(
        self, smoothing: float = 0.0, p: float = 0.2, act: type[nn.Module] = nn.ReLU, frozen: bool = False
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["p", "act", "frozen"])
        self.net[2], self.net[5] = act(), nn.Dropout(p)
        self.net[6].requires_grad_(not frozen)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1], label_smoothing=self.hparams["smoothing"])


class Constant(Chosen):
    smoothing = 0.1


GIVEN: dict[str, Any] = {}


@pytest.mark.parametrize("change", [{"smoothing": 0.3}, {"p": 0.5}, {"act": nn.GELU}, {"frozen": True}], ids=str)
def test_a_module_that_was_changed_is_another_comparison(tmp_path: Path, change: dict[str, Any]) -> None:
    """Though the factory, a function with the same code, only reads another value."""

    def run() -> Any:
        return compare(tmp_path, module_factory=make, arms=["none"], seeds=1)[0].rows

    def make() -> Chosen:
        return Chosen(**GIVEN)

    GIVEN.clear()
    first = run()
    assert run() == first
    GIVEN.update(change)
    with pytest.raises(RunFolderError, match="holds a run with module="):
        run()


def test_a_constant_of_a_class_and_what_the_factory_holds_are_told(tmp_path: Path, monkeypatch: Any) -> None:
    def factory(momentum: float) -> Any:
        return lambda: Constant() if momentum else Small()

    def run(momentum: float) -> Any:
        return compare(tmp_path, module_factory=factory(momentum), arms=["none"], seeds=1)

    run(0.9)
    with pytest.raises(RunFolderError, match="holds a run with code="):
        run(0.8)
    monkeypatch.setattr(Constant, "smoothing", 0.2)
    with pytest.raises(RunFolderError, match="holds a run with code="):
        run(0.9)


def test_a_callback_of_the_trainer_is_told_by_what_it_was_given(tmp_path: Path) -> None:
    def run(patience: int) -> Any:
        trainer = {**ONE_EPOCH, "callbacks": [EarlyStopping("loss", patience=patience, strict=False)]}
        return compare(tmp_path, trainer=trainer, arms=["none"], seeds=1)[0].rows

    assert run(1) == run(1)
    with pytest.raises(RunFolderError, match=r"holds a run with trainer.callbacks=\[\"EarlyStopping "):
        run(9)


SCRIPT = """
import sys, threading, weakref
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mp_lightning.compare.fingerprint import described, fingerprint
from mp_lightning.compare.first_look import FirstBatches

dead = [object() for _ in range(int(sys.argv[1]))]  # so that addresses are others
place = Path(sys.argv[2])

@dataclass
class Settings:
    names: frozenset = frozenset(["a", "b", "c", "d"])
    root: Path = place

class Held:
    pass

class Net(L.LightningModule):
    kinds = {"x", "y", "z"}

    def __init__(self, held, **kwargs):
        super().__init__()
        self.save_hyperparameters(ignore=["held"])
        self.held = held
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
        self.generator, self.generator_of_numpy = torch.Generator(), np.random.default_rng(0)
        self.lock, self.device_of_mine, self.itself = threading.Lock(), torch.device("cpu"), [self]
        self.act, self.wrong, self.text = lambda x: x, {nn.ReLU(): 1, place: 2}, repr(Held())
        self.data = TensorDataset(torch.zeros(3, 3))
        self.reference = weakref.ref(self)
        self.names = {name: {name} for name in {"a", "b", "c", "d"}}
        self.namespace, self.chosen = Namespace(root=place), {"a", "b", "c", None, 3, nn.ReLU}
        self.net.register_forward_hook(lambda *given: None, with_kwargs=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

held = Held()
held.lock, held.names, held.root, held.keys = threading.Lock(), {"a", "b", "c"}, place, {Held: 1, Held(): 2}

def factory():
    torch.manual_seed(0)
    return Net(held, settings=Settings(), root=str(place), relative=Path("data"), numbers=np.arange(3))

def made():
    def inside():
        return held, place, factory
    own, root = held, place
    return lambda: (own, root, inside, factory())[-1]

batch = [torch.ones(2, 12), torch.tensor([0, 1])]
for _ in range(int(sys.argv[3])):
    nn.ReLU().register_forward_hook(print, with_kwargs=True)
told = fingerprint(factory(), FirstBatches([batch], [batch], None), lambda seed: held, made())
print(told, described(EarlyStopping("a")), described(ModelCheckpoint(place / "kept", monitor="a")))
"""


def test_the_same_script_has_the_same_fingerprint_wherever_it_runs(tmp_path: Path) -> None:
    """In another process hashes, addresses, numbers of hooks and places of files are others."""
    (tmp_path / "script.py").write_text(SCRIPT)
    path = os.pathsep.join(filter(None, sys.path))
    told = [
        subprocess.run(
            [sys.executable, str(tmp_path / "script.py"), str(1000 * number), str(tmp_path / str(number)), str(number)],
            env={**os.environ, "PYTHONHASHSEED": str(number), "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for number in (1, 2, 3)
    ]
    assert "'module'" in told[0] and len(set(told)) == 1


class Compiled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(nn.Linear(2, 2), backend="eager")


class WithCompiledMethod(nn.Module):
    @torch.compile(backend="eager")
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def test_what_torch_compiles_is_told_alike_each_time() -> None:
    assert layers_of(Compiled()) == layers_of(Compiled())
    before = code_of([WithCompiledMethod])
    WithCompiledMethod()(torch.ones(2))
    assert code_of([WithCompiledMethod]) == before


def test_arrays_are_told_by_their_content() -> None:
    one, other = np.zeros((2000, 1000)), np.zeros((2000, 1000))
    assert plain(one) == plain(other) and len(repr(plain(one))) < 100
    other[-1, -1] = 1
    assert plain(one) != plain(other) != plain(other.T)
    assert identity(lambda: one.mean()) != identity(lambda: other.mean())


def test_functions_that_a_callback_is_given_are_told_by_what_they_do() -> None:
    one, same, other = (LambdaCallback(on_train_start=given) for given in (lambda *_: 1, lambda *_: 1, lambda *_: 2))
    assert described(one) == described(same) != described(other)


def test_loggers_that_a_factory_holds_do_not_tell_it_from_itself() -> None:
    log = logging.getLogger("factory")
    before = identity(lambda: log.info("made"))
    logging.getLogger("another").info("something")
    assert identity(lambda: log.info("made")) == before
