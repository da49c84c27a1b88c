"""What attach, the callback and their helpers are given is checked before a training begins."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_modules import loader, module, trainer
from mp_lightning import (
    Mean,
    MetaPerturbCallback,
    MonteCarlo,
    attach,
    attachment_of,
    detach,
    find_sites,
    reestimate_batch_norm,
)
from mp_lightning.backbones import build_backbone
from mp_lightning.errors import ConfigurationError
from mp_lightning.perturbation import MetaPerturb

SHARED = [  # what the callback and attach() take alike
    ("clip", "a"),
    ("clip", -1),
    ("clip", 0),
    ("clip", math.nan),
    ("clip", True),
    ("seed", "a"),
    ("seed", 1.5),
    ("seed", -1),
    ("input_size", 0),
    ("input_size", "a"),
    ("input_size", -3),
    ("perturbation", 3),
]


def conv4():
    return build_backbone("conv4", 10, width=4, image_size=16)


@pytest.mark.parametrize(("name", "value"), [*SHARED, ("sync_statistics", "x"), ("log_every", 0.5)])
def test_the_callback_names_an_argument_that_cannot_be_used(name, value):
    with pytest.raises(ConfigurationError, match=repr(value) if name == "sync_statistics" else f"{name}={value!r}"):
        MetaPerturbCallback(**{name: value})


def test_statistics_over_processes_that_train_a_network_each_are_refused():
    with pytest.raises(ConfigurationError, match="synchronize=True takes statistics over all processes, and distr"):
        attach(conv4(), synchronize=True, distributed=False)


@pytest.mark.parametrize(
    ("name", "value"),
    [*SHARED, *((name, value) for name in ("ramp_steps", "total_steps") for value in (math.nan, math.inf, "a", -1))],
)
def test_attach_names_an_argument_that_cannot_be_used_and_attaches_nothing(name, value):
    model = conv4()
    with pytest.raises(ConfigurationError, match=f"{name}={value!r}"):
        attach(model, **{name: value})
    assert attachment_of(model) is None


def test_numbers_of_numpy_and_torch_become_numbers_of_python(tmp_path):
    """Or a checkpoint would hold objects of numpy, which are not unpickled."""
    attachment = attach(
        conv4(), ramp_steps=np.int64(3), input_size=np.int64(16), clip=np.float32(5), seed=np.int64(1)
    ).train()
    attachment.model(torch.rand(2, 3, 16, 16))
    attachment.step(np.float32(1))
    torch.save(attachment.state(), tmp_path / "state.pt")
    kept = torch.load(tmp_path / "state.pt", weights_only=True)
    assert (kept["ramp_steps"], kept["clip"], kept["seed"], kept["input_size"]) == (3, 5.0, 1, 16.0)
    assert attach(conv4(), total_steps=500.0, clip=torch.tensor(5.0)).ramp_steps == 200
    assert type(MonteCarlo(np.int64(3)).samples) is int


def test_a_callback_that_is_given_numbers_of_numpy_can_be_restored(tmp_path):
    callback = MetaPerturbCallback(
        samples=np.int64(4), fit_samples=np.int64(2), seed=np.int64(1), log_every=np.int64(1)
    )
    model, run = module(), trainer(tmp_path, [callback], max_epochs=1)
    run.fit(model, loader(1), loader(1))
    run.save_checkpoint(tmp_path / "end.ckpt")
    MetaPerturbCallback.restore(module(), tmp_path / "end.ckpt")


@pytest.mark.parametrize("loss", ["x", {"loss": torch.zeros(())}])
def test_a_loss_that_is_no_number_is_refused(loss):
    attachment = attach(conv4(), ramp_steps=3, full_strength_at=0.5)
    with pytest.raises(ConfigurationError, match="give the loss of the batch, a number or a tensor"):
        attachment.step(loss)


def test_what_re_estimation_is_given_is_named():
    model = conv4()
    attachment = attach(model, ramp_steps=0)
    batch = [torch.rand(2, 3, 16, 16), torch.zeros(2)]
    with pytest.raises(ConfigurationError, match="was given a list among its functions; give functions that run the"):
        reestimate_batch_norm(attachment, [batch])
    with pytest.raises(ConfigurationError, match="was given a int for its functions; give a list of functions"):
        reestimate_batch_norm(attachment, 5)
    with pytest.raises(ConfigurationError, match=r"was given a Conv\w*; give the attachment that attach"):
        reestimate_batch_norm(model, [lambda: model(batch[0])])


@pytest.mark.parametrize("inference", [Mean, "mean", 5])
def test_what_is_no_inference_is_named(inference):
    model = conv4()
    attach(model, ramp_steps=0).inference = inference
    with pytest.raises(ConfigurationError, match=r"attachment.inference is .*; give an object, such as mp_lightning"):
        model.eval()(torch.rand(2, 3, 16, 16))


@pytest.mark.parametrize("where", ["model", "context"])
def test_a_model_without_numbers_is_attached_later(where):
    model = conv4().to("meta") if where == "model" else conv4()
    with torch.device("meta" if where == "context" else "cpu"), pytest.raises(ConfigurationError, match="'meta'"):
        attach(model)


@pytest.mark.parametrize("function", [attach, detach, find_sites])
@pytest.mark.parametrize("given", [nn.Linear, None, "resnet18"])
def test_what_is_no_module_is_named(function, given):
    with pytest.raises(ConfigurationError, match=f"{function.__name__} was given .*; give a torch.nn.Module"):
        function(given)


def test_the_class_of_a_perturbation_is_none():
    with pytest.raises(ConfigurationError, match="perturbation=MetaPerturb is a class; give an object"):
        attach(build_backbone("conv4", 10, width=8, image_size=16), perturbation=MetaPerturb)
    with pytest.raises(ConfigurationError, match="perturbation=MetaPerturb is a class; give an object"):
        MetaPerturbCallback(perturbation=MetaPerturb)
