"""What was estimated for one set of weights is not used with another, however they came into the model."""

import threading

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from holder import ACTING, Holder, images, trained
from lightning_modules import Classifier, loader, module, trainer
from mp_lightning import Mean, MetaPerturbCallback, attach, attachment_of, reestimate_batch_norm
from mp_lightning.errors import ConfigurationError


@pytest.mark.parametrize("part", ["", "net"])
def test_other_weights_that_are_loaded_into_a_part_are_noticed(part):
    model, attachment = trained()
    torch.manual_seed(1)
    model.get_submodule(part).load_state_dict(Holder().get_submodule(part).state_dict())
    with pytest.warns(UserWarning, match="not re-estimated since the model was trained"):
        model(images())
    assert attachment.estimates is None


def test_the_same_weights_that_are_loaded_again_keep_their_estimates(recwarn):
    model, attachment = trained()
    before = model(images())
    model.net.load_state_dict({name: value.clone() for name, value in model.net.state_dict().items()})
    model.load_state_dict(model.state_dict())
    assert torch.equal(model.train().eval()(images()), before)
    assert attachment.estimates.buffers and not recwarn.list


def test_weights_that_are_copied_in_are_noticed_in_the_next_evaluation():
    model, attachment = trained()
    for parameter in model.parameters():
        parameter.data.mul_(1.1)
    model.eval()
    with pytest.warns(UserWarning, match="not re-estimated"):
        model(images())
    assert attachment.estimates is None


@pytest.mark.parametrize("asked_to_look", [True, False])
def test_weights_that_differ_by_two_percent_are_others(asked_to_look):
    """Also those that are changed in place between two evaluations, which nothing announces."""
    model, attachment = trained()
    model(images())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.02)
    if asked_to_look:
        model.eval()
    with pytest.warns(UserWarning, match="not re-estimated"):
        model(images())
    assert attachment.estimates is None


def test_parameters_that_took_the_places_of_others_are_watched():
    model, attachment = trained()
    model(images())
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    model(images())
    assert attachment.estimates is not None
    with torch.no_grad():
        next(model.parameters()).mul_(1.1)
    with pytest.warns(UserWarning, match="not re-estimated"):
        model(images())


def test_a_convolution_of_the_other_sign_has_other_weights():
    model, attachment = trained()
    next(parameter for parameter in model.parameters() if parameter.dim() == 4).data.neg_()
    model.eval()
    with pytest.warns(UserWarning, match="not re-estimated"):
        model(images())
    assert attachment.estimates is None


def test_averages_that_another_callback_puts_in_for_a_test_get_their_own_batch_norm(tmp_path):
    class Swaps(Callback):
        def on_test_start(self, trainer, pl_module):
            for parameter in pl_module.parameters():
                parameter.data.mul_(1.2)

    model = module()
    run = trainer(tmp_path, [Swaps(), MetaPerturbCallback(full_strength_at=1)])
    run.fit(model, loader(2))
    before = {name: value.clone() for name, value in attachment_of(model).estimates.buffers.items()}
    run.test(model, loader(2), verbose=False)
    after = attachment_of(model).estimates.buffers
    assert after.keys() == before.keys() and any(not torch.equal(after[name], before[name]) for name in before)


def test_layers_that_are_frozen_after_training_are_reestimated_all_the_same():
    model, attachment = trained()
    model.requires_grad_(False)
    reestimate_batch_norm(attachment, [lambda: model(images())])
    assert len(attachment.estimates.buffers) == 8


def test_layers_whose_statistics_training_left_alone_are_not_reestimated():
    torch.manual_seed(0)
    model = Holder()
    attachment = attach(model, **ACTING)
    norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    norm.eval()
    model(images())
    attachment.step(1.0)
    model.eval()
    reestimate_batch_norm(attachment, [lambda: model(images())])
    assert len(attachment.estimates.buffers) == 6
    state = attachment.state()
    other = attach(Holder(), **ACTING)
    other.load_state(state)
    assert other.trained_norms == attachment.trained_norms and len(other.trained_norms) == 3


def test_a_batch_that_a_training_step_passes_over_does_not_end_the_reestimation(tmp_path):
    class Passes(Classifier):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    model = module(Passes)
    trainer(tmp_path, [MetaPerturbCallback(full_strength_at=1)]).fit(model, loader(3))
    assert len(attachment_of(model).estimates.buffers) == 8


def test_gradients_pass_after_a_forward_in_inference_mode_in_another_dtype():
    model, _ = trained()
    model.double()
    with torch.inference_mode():
        model(images().double())
    model(images().double()).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_test_step_may_call_a_block_as_well_as_the_model(tmp_path):
    class Both(Classifier):
        def test_step(self, batch, batch_idx):
            self.log("norm", self.net.conv_layers[0](batch[0]).norm())
            return super().test_step(batch, batch_idx)

    model = module(Both)
    run = trainer(tmp_path, [MetaPerturbCallback(full_strength_at=1, sites=1)])
    run.fit(model, loader(2))
    with pytest.warns(UserWarning, match="blocks of the model were called one by one"):
        (found,) = run.test(model, loader(2), verbose=False)
    assert found["norm"] > 0


def test_several_threads_evaluate_as_one_does():
    model, attachment = trained()
    x = images()
    with torch.no_grad():
        expected = model(x)
    wrong = []

    def evaluate():
        with torch.no_grad():
            for _ in range(15):
                if not torch.allclose(model(x), expected, atol=1e-5):
                    wrong.append(threading.get_ident())

    threads = [threading.Thread(target=evaluate) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and attachment.depth == 0


def test_a_text_is_no_inference():
    model, attachment = trained()
    attachment.inference = "mean"
    with pytest.raises(ConfigurationError, match=r"is 'mean'; give an object, such as mp_lightning\.Mean\(\)"):
        model(images())
    attachment.inference = Mean()
    assert model(images()).isfinite().all() and attachment.depth == 0


def test_constants_need_functions_that_can_be_gone_through_twice():
    model, attachment = trained()
    with pytest.raises(ConfigurationError, match="give a list"):
        reestimate_batch_norm(attachment, iter([lambda: model(images())]), fold=True)
    assert attachment.estimates.buffers  # nothing is lost
