"""``export``: from a checkpoint to a file that gives the same output, and one line for what cannot be exported."""

from pathlib import Path

import lightning as L
import pytest
import torch
from command_line import CommandLine, Done
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mp_lightning import MetaPerturbCallback
from mp_lightning.cli.export import read

MODULE = """
import lightning as L
import torch
from mp_lightning.backbones import build_backbone

class Classifier(L.LightningModule):
    def __init__(self, classes, width=4):
        super().__init__()
        self.save_hyperparameters()
        self.net = build_backbone("resnet20", classes, width=width)

    def training_step(self, batch):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

def make():
    return Classifier(3)

def other():
    return Classifier(3, width=8)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints after a short training, by what they were trained with."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "nets.py").write_text(MODULE)
    namespace: dict[str, type[L.LightningModule]] = {"__name__": "nets"}
    exec(MODULE, namespace)
    paths = {"folder": folder}
    data = DataLoader(TensorDataset(torch.rand(16, 3, 32, 32), torch.arange(16) % 3), batch_size=8)
    for mode in ("mean", "fold", "mc"):
        trainer = L.Trainer(
            max_epochs=1,
            accelerator="cpu",
            callbacks=[MetaPerturbCallback(inference=mode, full_strength_at=1)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(namespace["Classifier"](classes=3), data)
        paths[mode] = folder / f"{mode}.ckpt"
        trainer.save_checkpoint(paths[mode])
    return paths


def export(mp: CommandLine, folder: Path, *words: str, code: int = 0) -> Done:
    done = mp(folder, "export", *words)
    assert done.code == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_the_class_is_found_by_the_checkpoint_and_the_file_gives_its_output(
    mp: CommandLine, trained: dict[str, Path], tmp_path: Path
) -> None:
    done = export(mp, trained["folder"], "ckpt=mean.ckpt", f"to={tmp_path}/net.pt2")
    assert "mode mean, any number of images of 3x32x32" in done.stdout
    namespace: dict[str, type[L.LightningModule]] = {"__name__": "nets"}
    exec(MODULE, namespace)
    model = MetaPerturbCallback.restore(namespace["Classifier"](3), trained["mean"])
    images = torch.rand(5, 3, 32, 32)
    with torch.no_grad():
        expected = model.net(images)
    net: nn.Module = torch.export.load(tmp_path / "net.pt2").module()
    assert torch.allclose(net(images), expected, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_fold_as_onnx(mp: CommandLine, trained: dict[str, Path], tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    words = "ckpt=fold.ckpt", f"to={tmp_path}/net.onnx", "model=nets.py:make", "input=3x24x24"
    done = export(mp, trained["folder"], *words)
    assert "mode fold, any number of images of 3x24x24" in done.stdout
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    (output,) = session.run(None, {session.get_inputs()[0].name: torch.rand(3, 3, 24, 24).numpy()})
    assert output.shape == (3, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["to=a.onnx"], "ckpt is missing; give one, for example ckpt=trained.ckpt"),
        (["ckpt=mean.ckpt"], "to is missing"),
        (["ckpt=mean.ckpt", "to=a.tflite"], "to=a.tflite cannot be used; give a file name that ends in .onnx or .pt2"),
        (["ckpt=none.ckpt", "to=a.pt2"], "checkpoint 'none.ckpt' does not exist"),
        (["ckpt=nets.py", "to=a.pt2"], "checkpoint 'nets.py' cannot be read with weights_only=True"),
        (["ckpt=mean.ckpt", "to=a.pt2", "mode=mc"], "mode=mc cannot be exported, as it draws noise in every forward"),
        (["ckpt=mean.ckpt", "to=a.pt2", "mode=mode"], "mode=mode is unknown; use one of mean, fold"),
        (["ckpt=mean.ckpt", "to=a.pt2", "mode=fold"], "mode=fold needs constants, which were not estimated"),
        (["ckpt=fold.ckpt", "to=a.pt2", "mode=mean"], "batch norm was estimated for mode=fold"),
        (["ckpt=mc.ckpt", "to=a.pt2"], "was trained with inference='mc', which draws noise"),
        (["ckpt=mean.ckpt", "to=a.pt2", "model=nets.py:other"], "the weights of checkpoint 'mean.ckpt' are not those"),
        (["ckpt=mean.ckpt", "to=a.pt2", "model=nets.py:nothing"], "there is no 'nothing' in nets.py"),
        (["ckpt=mean.ckpt", "to=nets.py/a.pt2"], "'nets.py/a.pt2' cannot be written"),
        (["ckpt=mean.ckpt", "to=a.pt2", "input=1x32x32"], "images of 1x32x32 do not pass through"),
        (
            ["ckpt=bare.ckpt", "to=a.pt2"],
            "the checkpoint does not say of which class the model is",
        ),
        (["ckpt=number.ckpt", "to=a.pt2"], "the checkpoint does not say of which class the model is"),
        (["ckpt=file.ckpt", "to=a.pt2"], "the checkpoint does not say of which class the model is"),  # no file is run
        (
            ["ckpt=moved.ckpt", "to=a.pt2"],
            "network 'gone.nets:Classifier': gone.nets cannot be imported (ModuleNotFoundError: No module named "
            "'gone'); it is the class that was trained: name where it is now, with model=",
        ),
        (["ckpt=odd.ckpt", "to=a.pt2"], "model=os:getcwd is no LightningModule; name the class that was trained"),
        (["ckpt=plain.ckpt", "to=a.pt2"], "checkpoint 'plain.ckpt' was made without MetaPerturb"),
    ],
)
def test_what_cannot_be_exported_is_one_line(
    mp: CommandLine, trained: dict[str, Path], words: list[str], message: str
) -> None:
    folder = trained["folder"]
    content = torch.load(trained["mean"], weights_only=True)
    changes = {
        "bare": None,
        "number": 3,
        "moved": "gone.nets:Classifier",
        "odd": "os:getcwd",
        "file": "nets.py:Classifier",
    }
    for name, module in changes.items():
        changed = {**content, "mp_lightning": {**content["mp_lightning"], "module": module}}
        torch.save(changed, folder / f"{name}.ckpt")
    torch.save({"state_dict": {}}, folder / "plain.ckpt")
    done = export(mp, folder, *words, code=2)
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not [path for path in folder.iterdir() if path.suffix in (".onnx", ".pt2")]


def test_paths_may_start_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    given = {"command": "export", "ckpt": "~/a.ckpt", "to": "~/a.pt2", "mode": None, "model": None, "input": None}
    request = read(OmegaConf.create(given))
    assert (request.checkpoint, request.to) == (tmp_path / "a.ckpt", tmp_path / "a.pt2")
