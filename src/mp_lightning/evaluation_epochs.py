"""Evaluation epochs of a trainer: what an attached model needs before one, and what must hold after it."""

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from mp_lightning.errors import ConfigurationError
from mp_lightning.inference import Fold, InferenceMode, Mean, MonteCarlo, Output, OutputAverage
from mp_lightning.reestimation_steps import try_to_reestimate
from mp_lightning.sites import attachment_of


class EvaluationEpochs(Callback):
    """The hooks around the epochs that validate, test and predict, and between the batches of a training.

    Args:
        inference, samples, fit_samples, output: see :class:`~mp_lightning.MetaPerturbCallback`.
    """

    def __init__(self, inference: InferenceMode, samples: int, fit_samples: int, output: Output | None) -> None:
        super().__init__()
        self.inference: InferenceMode = inference
        self.samples = int(samples)
        self.fit_samples = int(fit_samples)
        self.output = output

    def make_inference(self) -> Mean | MonteCarlo:
        """The inference that was asked for."""
        if self.inference == "mc":
            return MonteCarlo(self.samples, self.output)
        return Fold(self.samples) if self.inference == "fold" else Mean(self.samples)

    def _between_batches(self) -> OutputAverage:
        """The inference of what is evaluated within a training and outside of its epochs of validation."""
        return OutputAverage(self.fit_samples, self.output)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The step has made its forwards, unless it goes on by hand; other callbacks may evaluate when it ends."""
        attachment = attachment_of(pl_module)
        if attachment is not None and pl_module.automatic_optimization:
            attachment.inference = self._between_batches()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin_evaluation(trainer, pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin_evaluation(trainer, pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin_evaluation(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end_evaluation(pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end_evaluation(pl_module)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end_evaluation(pl_module)

    def _inference_of_epoch(self, trainer: pl.Trainer) -> Mean | MonteCarlo:
        if trainer.state.fn != "fit":
            return self.make_inference()
        kind = OutputAverage if self.inference != "mc" and self.output is None else MonteCarlo
        return kind(self.fit_samples, self.output)

    def _begin_evaluation(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Prepare an attached module for an epoch of evaluation; warn where it was never attached.

        Outside of ``fit`` batch norm is re-estimated where the inference needs it.
        """
        attachment, inference = attachment_of(module), self._inference_of_epoch(trainer)
        declared = attachment is not None and attachment.persistent and trainer.state.fn != "fit"
        if attachment is None or (declared and attachment.never_acted()):
            rank_zero_warn(
                f"{type(module).__name__} was never trained with MetaPerturb in this process; it is evaluated without "
                "perturbation. One that was trained elsewhere comes back by MetaPerturbCallback.restore(module, "
                "checkpoint)"
            )
        if attachment is None:
            return
        attachment.settle()
        attachment.look_again()  # callbacks before this one may have put averages in their place
        attachment.forget_other_weights()
        attachment.evaluations.zero_()
        attachment.bound_hits.zero_()
        if trainer.state.fn != "fit" and inference.lacks(attachment) is not None:
            try_to_reestimate(trainer, module, attachment, self.inference)
        attachment.inference = inference
        attachment.strays = 0
        attachment.look_again()  # and those after it may
        attachment.sampling = self.inference == "mc"  # where the module calls blocks one by one, see _end_evaluation

    def _end_evaluation(self, module: pl.LightningModule) -> None:
        """Check after an epoch of evaluation that its inference acted, and warn of feature values that were clipped.

        Raises:
            ConfigurationError: no step of the epoch called the model as a whole, so that it did not act.
        """
        attachment = attachment_of(module)
        if attachment is None:
            return
        attachment.sampling = True
        inference = attachment.inference
        if (
            (isinstance(inference, Mean) or type(inference) is MonteCarlo)
            and inference.calls == 0
            and attachment.strays > 0
        ):
            names = " or ".join(
                f"{type(module).__name__}.forward" if name == "" else f"self.{name}"
                for name in attachment.entry_modules()
            )
            what = "did not act" if isinstance(inference, Mean) else "averaged nothing"
            raise ConfigurationError(
                f"inference='{self.inference}' {what}: no step of this epoch called {names} as a whole; do so"
            )
        if int(attachment.bound_hits) > 0:
            rank_zero_warn(
                f"MetaPerturb: {int(attachment.bound_hits)} feature values reached the bound clip={attachment.clip} in "
                "evaluation; the network's activations are unusually large"
            )
