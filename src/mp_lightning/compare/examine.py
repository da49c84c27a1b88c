"""The test of one run, made while its trainer still holds the module: each test image is read once, at the end."""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from mp_lightning.callback import MetaPerturbCallback
from mp_lightning.compare.metrics import Scores, reliability, scores
from mp_lightning.compare.moments import SiteMoments, site_moments
from mp_lightning.errors import ConfigurationError, DataError, UserError, one_line
from mp_lightning.inference import Output
from mp_lightning.inference.mc import OUTPUTS, output_kind, probabilities_of, tolerance_of
from mp_lightning.inference.reestimation import BATCHES, plain_averages
from mp_lightning.neighbours import act_last
from mp_lightning.randomness import seed_all
from mp_lightning.reestimation_steps import moved
from mp_lightning.sites import Attachment, attachment_of

# From a module and a batch to the scores (B, K) and the labels (B,).
Predict = Callable[[L.LightningModule, Any], tuple[Tensor, Tensor]]
_BATCHES = 4  # of training images, on which the multiplier is looked at


class Predictions(NamedTuple):
    """Class probabilities float32 (N, K) and labels int64 (N,), both on the CPU."""

    probabilities: Tensor
    labels: Tensor


class Examined(NamedTuple):
    """What the test found; ``mean`` is equal to ``test`` for a network without noise in evaluation.

    ``acted`` is the share of its strength that a perturbation acted at when training ended; None without one.
    """

    test: Scores
    train: Scores
    mean: Scores
    reliability: list[tuple[int, float, float]]
    multiplier: list[SiteMoments]
    inference: str
    acted: float | None


def predict_pair(module: L.LightningModule, batch: Any) -> tuple[Tensor, Tensor]:
    """Scores and labels, where a batch begins with images and labels and the module's forward gives the scores."""
    if not isinstance(batch, list | tuple) or len(batch) < 2:
        raise ConfigurationError(
            f"a batch is a {type(batch).__name__}, not images and labels; pass predict=, a function from the module "
            "and a batch to scores (B, K) and labels (B,)"
        )
    return module(batch[0]), batch[1]


class Examination(L.Callback):
    """Classifies the training and the test images when training ends, after all that other callbacks do then.

    Before that, batch norm is re-estimated on training batches in the mode in which the network is tested, for every
    arm alike: statistics of noisy training would be wrong for a layer that is off in evaluation, such as dropout.

    Args:
        perturbation: the callback whose noise acts in evaluation as well, if there is one.
        predict: from a module and a batch to scores and labels.
        output: what the scores are; None finds out.
        seed: of whatever is drawn.
        setup_seed: of what the datamodule's ``setup`` draws, such as a random split: the same as before training.
        tested: what the datamodule's ``test_dataloader`` is called, for messages.

    Attributes:
        found: the result, once training has ended.
    """

    def __init__(
        self,
        perturbation: MetaPerturbCallback | None,
        predict: Predict,
        output: Output | None,
        seed: int,
        setup_seed: int,
        tested: str = "test_dataloader",
    ) -> None:
        super().__init__()
        self._perturbation = perturbation
        self._predict = predict
        self._output = output
        self._seed = seed
        self._setup_seed = setup_seed
        self._tested = tested
        self.found: Examined | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        act_last(trainer, self)  # that of the perturbation has done so, too, and must end its training before

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with isolate_rng():
            seed_all(self._seed)
            self.found = self._examine(trainer, pl_module)

    def _examine(self, trainer: L.Trainer, module: L.LightningModule) -> Examined:
        data = getattr(trainer, "datamodule", None)
        assert data is not None
        training = trainer.state.stage
        perturbation = self._perturbation
        attachment = attachment_of(module)
        if perturbation is not None:
            assert attachment is not None and attachment.inference is not None, "the perturbation is still training"
        inference = "plain" if perturbation is None else perturbation.inference
        # On the same batches for every arm, whatever it has made of its loader, and with an error where it cannot be.
        if perturbation is None or inference == "mc":
            self._settle_batch_norm(trainer, module, data.train_dataloader())
        else:
            _settle(perturbation, trainer, module, perturbation.inference, data.train_dataloader())
        trainer.testing = True  # augmentation that asks the trainer is off
        module.eval()
        try:
            seed_all(self._setup_seed)
            data.setup("test")
            seed_all(self._seed)
            test = self._predictions(trainer, module, data.test_dataloader(), self._tested)
            plain = getattr(data, "train_evaluation_dataloader", partial(_as_trained, trainer, data))
            train = self._predictions(trainer, module, plain(), "train_dataloader")
            own = scores(*test)
            mean = own
            multiplier: list[SiteMoments] = []
            acted = None
            if perturbation is not None:
                assert attachment is not None
                multiplier = _multiplier(attachment, self._forwards(trainer, module, plain()))
                acted = float(attachment.coeff / attachment.strength)
                if inference != "mean":
                    trainer.state.stage = training  # batch norm is re-estimated on batches as in training
                    mean = self._by_expected_noise(trainer, module, perturbation, data)
            return Examined(own, scores(*train), mean, reliability(*test), multiplier, inference, acted)
        finally:
            trainer.state.stage = training
            module.train()

    def _by_expected_noise(
        self, trainer: L.Trainer, module: L.LightningModule, perturbation: MetaPerturbCallback, data: Any
    ) -> Scores:
        try:
            _settle(perturbation, trainer, module, "mean", data.train_dataloader())
        except ConfigurationError:
            return Scores(*[math.nan] * len(Scores._fields))
        module.eval()
        trainer.testing = True
        seed_all(self._seed)  # of what test images draw, as before
        return scores(*self._predictions(trainer, module, data.test_dataloader(), self._tested))

    def _predictions(self, trainer: L.Trainer, module: L.LightningModule, loader: Any, name: str) -> Predictions:
        return predictions(trainer, module, loader, self._predict, self._output, name)

    def _forwards(self, trainer: L.Trainer, module: L.LightningModule, loader: Any) -> Iterator[Callable[[], Any]]:
        for batch in islice(batches(loader, "train_dataloader"), _BATCHES):
            yield partial(forward, trainer, self._predict, module, batch)

    @torch.no_grad()
    def _settle_batch_norm(self, trainer: L.Trainer, module: L.LightningModule, loader: Any) -> None:
        """Batch norm's statistics become plain averages over training batches; what is frozen stays as it is."""
        norms = [
            norm
            for norm in module.modules()
            if isinstance(norm, _BatchNorm) and norm.running_mean is not None and norm.training
            if norm.weight is None or norm.weight.requires_grad
        ]
        attachment = attachment_of(module)
        inference = None if attachment is None else attachment.inference
        try:
            if attachment is not None:
                attachment.inference = None  # one forward with noise, where there is any, and not several
            with plain_averages(module, norms):
                most = int(min(BATCHES, trainer.num_training_batches))
                for batch in islice(batches(loader, "train_dataloader"), most) if norms else ():
                    forward(trainer, self._predict, module, batch)
        finally:
            if attachment is not None:
                attachment.inference = inference
            module.eval()


def _settle(
    perturbation: MetaPerturbCallback, trainer: L.Trainer, module: L.LightningModule, inference: Any, loaders: Any
) -> None:
    """Re-estimate batch norm for an inference.

    Raises:
        ConfigurationError: the training step cannot be run for it.
    """
    try:
        perturbation.switch_inference(trainer, module, inference, loaders)
    except UserError:
        raise
    except Exception as error:  # of the user's training step, or of the loader
        raise ConfigurationError(
            f"batch norm of {type(module).__name__} cannot be re-estimated for inference='{inference}', as a training "
            f"step ended with {type(error).__name__}: {one_line(error)}; mend that, or compare by inference='mc'"
        ) from error


def _multiplier(attachment: Attachment, forwards: Iterator[Callable[[], Any]]) -> list[SiteMoments]:
    """What acts at each site, as its strength leaves it."""
    inference, attachment.inference = attachment.inference, None
    try:
        with torch.no_grad():
            found = site_moments(attachment, forwards)
        strength = float(attachment.coeff)
        return [SiteMoments(site, 1 + strength * (mean - 1), strength**2 * var) for site, mean, var in found]
    finally:
        attachment.inference = inference


@torch.no_grad()
def predictions(
    trainer: L.Trainer,
    module: L.LightningModule,
    loader: Any,
    predict: Predict,
    output: Output | None,
    name: str,
) -> Predictions:
    """Class probabilities of all images of a loader.

    Args:
        trainer: that holds the module; it moves batches, and runs in its precision.
        module: in evaluation mode.
        loader: of batches.
        predict: from a module and a batch to scores (B, K) and labels (B,).
        output: what the scores are; None finds out from the first batch.
        name: of the loader, for messages.

    Raises:
        DataError: the loader gives nothing.
        ConfigurationError: there are no scores of classes, or no labels.
    """
    found, labels = [], []
    for batch in batches(loader, name):
        values, y = forward(trainer, predict, module, batch)
        output = output or output_kind(values, type(module).__name__)
        tolerance = tolerance_of(values.dtype)
        values = probabilities_of(values, output)
        if (values.sum(dim=1) - 1).abs().max() > tolerance:  # of what is not a number nothing is said here
            raise ConfigurationError(
                f"the scores of {type(module).__name__} are no {output}, as those of an image do not add up to 1; set "
                f"output= to what they are, one of {', '.join(OUTPUTS)}"
            )
        found.append(values.cpu())
        labels.append(y.cpu())
    if not found:
        raise DataError(f"{name} gives no batch; give at least one image")
    return Predictions(torch.cat(found), torch.cat(labels))


def forward(trainer: L.Trainer, predict: Predict, module: L.LightningModule, batch: Any) -> tuple[Tensor, Tensor]:
    """Scores and labels of a batch, on the device and in the precision of the trainer.

    Raises:
        ConfigurationError: there are no scores of classes, or no labels.
        DataError: a label is of no class.
    """
    ready = moved(trainer, module, batch)
    try:
        with trainer.precision_plugin.test_step_context():
            values, y = predict(module, ready)
    except NotImplementedError as error:
        raise ConfigurationError(
            f"{type(module).__name__} has no forward; give it one, or pass predict=, a function from the module and a "
            "batch to scores (B, K) and labels (B,)"
        ) from error
    name = type(module).__name__
    check_scores(values, name)
    check_labels(y, len(values), values.shape[1], name)
    return values, y.long()


def check_scores(values: Any, name: str) -> None:
    """Refuse what are no scores (B, K) of classes; ``name`` is that of the module.

    Raises:
        ConfigurationError: says what was found instead.
    """
    if not isinstance(values, Tensor) or values.dim() != 2 or values.shape[1] < 2:
        raise ConfigurationError(
            f"the scores of {name} are {_words(values)}, not a column for each of two or more classes; pass predict=, "
            "a function from the module and a batch to scores (B, K) and labels (B,)"
        )


def check_labels(y: Any, images: int, classes: int, name: str) -> None:
    """Refuse what are no class numbers (B,) of so many images and classes; ``name`` is that of the module.

    Raises:
        ConfigurationError: says what was found instead.
        DataError: a label is of no class.
    """
    if not isinstance(y, Tensor) or y.dim() != 1 or y.is_floating_point() or len(y) != images:
        raise ConfigurationError(
            f"labels are {_words(y)}, not one class number for each of {images} images; pass predict=, a function "
            "from the module and a batch to scores (B, K) and labels int64 (B,)"
        )
    if len(y) and not 0 <= int(y.min()) <= int(y.max()) < classes:
        culprit = int(y.min()) if int(y.min()) < 0 else int(y.max())
        raise DataError(
            f"label {culprit} is none of the {classes} classes that {name} gives scores of; number the classes from 0 "
            "without gaps"
        )


def _words(value: Any) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _as_trained(trainer: L.Trainer, data: Any) -> Any:
    """The batches of an epoch of training, and of an endless one as many as were trained on."""
    made = trainer.fit_loop.epoch_loop.total_batch_idx + 1
    return islice(batches(data.train_dataloader(), "train_dataloader"), int(min(trainer.num_training_batches, made)))


def batches(loader: Any, name: str) -> Iterable[Any]:
    """What a dataloader hook gives, which may be a list of one loader.

    Args:
        loader: what it gave.
        name: of the hook, for messages.

    Raises:
        ConfigurationError: there are several loaders.
    """
    if isinstance(loader, dict) or (isinstance(loader, list | tuple) and len(loader) != 1):
        raise ConfigurationError(f"{name} gives several loaders, of which one is needed; give a datamodule with one")
    if isinstance(loader, list | tuple):
        return loader[0]
    if isinstance(loader, CombinedLoader):
        raise ConfigurationError(f"{name} gives a CombinedLoader; give a datamodule with one plain loader")
    return loader
