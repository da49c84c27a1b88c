"""The Lightning callback: a learned regularizer in one line."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn

from mp_lightning.checkpoints import KEY, MARKER, CheckpointHooks, attach_state, read_checkpoint
from mp_lightning.errors import ConfigurationError
from mp_lightning.inference import INFERENCE_MODES, Mean, MonteCarlo, MonteCarloOrMean, Output, reestimate_batch_norm
from mp_lightning.perturbation import NamedPhi, Phi, load_phi
from mp_lightning.schedule import total_training_batches
from mp_lightning.sites import Attachment, SitePlan, attach, attachment_of
from mp_lightning.sites.attachment import CLIP, ramp_length


class MetaPerturbCallback(Callback):
    """Regularizes the training of any convolutional network by learned, input-dependent noise on its feature maps.

    One tiny network of 82 numbers, phi, which was meta-trained elsewhere and stays frozen, multiplies the feature maps
    before the last activation of every residual block, or before the activation of every normalized convolution. It
    stands where dropout or DropBlock would, and there is nothing to tune: sites, sizes and the ramp of its strength are
    derived from the model and the run.

    After ``fit`` the model stays attached, because removing the perturbation would change the function it learned. In
    evaluation the noise is averaged out as ``inference`` says. Checkpoints hold all of it, and come back by resuming
    with this callback or by :meth:`restore`.

    Example::

        trainer = L.Trainer(max_epochs=100, callbacks=[MetaPerturbCallback()])
        trainer.fit(module, datamodule)
        trainer.test(module, datamodule)

    Args:
        phi: a ``phi.safetensors`` file, the name of a bundled phi, or None for the bundled default.
        sites: where to perturb; None finds the sites, see :func:`mp_lightning.find_sites`.
        ramp_steps: number of training batches over which the strength grows; None takes the first 40 % of the run.
        inference: 'mean' makes one forward with the expected noise, and re-estimates batch norm for it on at most 50
            training batches when training ends. 'mc' averages the class probabilities of several noisy forwards, as
            published; it needs a model that gives a (B, K) tensor.
        samples: number of forwards of 'mc'.
        fit_samples: number of forwards averaged in the validation epochs of ``fit``, in both modes.
        output: what the model's (B, K) output holds ('logits', 'probabilities', 'log_probabilities'); None finds out.
        input_size: height of the network's input in pixels; None takes it from the first batch.
        seed: seed of the noise; None takes the one of ``seed_everything``, else 0.
        clip: upper bound of perturbed feature maps; None for no bound.
        sync_statistics: take batch statistics over all processes (as SyncBatchNorm) instead of each on its own.
        marker: let a plain strict load of a checkpoint fail with a message that names :meth:`restore`.
    """

    def __init__(
        self,
        phi: "str | Path | Phi | NamedPhi | None" = None,
        *,
        sites: SitePlan | None = None,
        ramp_steps: int | None = None,
        inference: Literal["mean", "mc"] = "mean",
        samples: int = 20,
        fit_samples: int = 5,
        output: Output | None = None,
        input_size: int | None = None,
        seed: int | None = None,
        clip: float | None = CLIP,
        sync_statistics: bool = False,
        marker: bool = True,
    ) -> None:
        super().__init__()
        if inference not in INFERENCE_MODES:
            raise ConfigurationError(f"inference={inference!r} is unknown; use one of {', '.join(INFERENCE_MODES)}")
        self.phi = load_phi(phi)  # now, so that a bad file is known before data is prepared
        self.sites = sites
        self.ramp_steps = ramp_steps
        self.inference = inference
        self.samples = samples
        self.fit_samples = fit_samples
        self.output = output
        self.input_size = input_size
        self.seed = seed
        self.clip = clip
        self.sync_statistics = sync_statistics
        self.marker = marker
        self.persistent = False
        for number in (samples, fit_samples):
            MonteCarlo(number, output)  # the same checks, early

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Attach for training. A model that comes only to be evaluated stays plain unless its checkpoint says otherwise."""
        if stage == "fit":
            self.attach(pl_module)
        elif attachment_of(pl_module) is None:
            self._checkpoint_hooks(pl_module).install()

    def attach(self, module: nn.Module) -> Attachment:
        """Attach to a module by the settings of this callback, once."""
        attachment = attachment_of(module)
        if attachment is None:
            attachment = attach(
                module,
                self.phi,
                sites=self.sites,
                input_size=self.input_size,
                seed=int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.seed is None else self.seed,
                clip=self.clip,
                synchronize=self.sync_statistics,
                persistent=self.persistent,
            )
        if "on_save_checkpoint" not in module.__dict__:
            hooks = self._checkpoint_hooks(module)
            hooks.install()
            attachment.on_detach.append(hooks.remove)
        return attachment

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        attachment = self._attached(pl_module)
        total = None if self.ramp_steps is not None else total_training_batches(trainer)
        attachment.ramp_over(ramp_length(total) if total is not None else self.ramp_steps or 0)
        attachment.evaluation_buffers = None
        attachment.inference = None
        of = f" of {total}" if total is not None else ""
        rank_zero_info(
            f"MetaPerturb: {len(attachment.plan)} sites, phi {self.phi}, strength grows over the first "
            f"{attachment.ramp_steps}{of} training batches"
        )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._attached(pl_module).step()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        attachment = self._attached(pl_module)
        if self.inference == "mean":
            self._reestimate(trainer, pl_module, attachment)
        attachment.inference = self._inference()

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

    @staticmethod
    def restore(model: pl.LightningModule, checkpoint: str | Path) -> pl.LightningModule:
        """Bring a trained model back from a checkpoint: its weights, and the perturbation attached as it was saved.

        Args:
            model: a freshly made module of the class that was trained.
            checkpoint: path of the file; it is read with ``weights_only=True``.

        Returns:
            ``model``, attached, in evaluation mode.

        Raises:
            CheckpointError: the file cannot be read or was made without MetaPerturb.
            SiteError: the model does not have the sites of the checkpoint.
        """
        content = read_checkpoint(checkpoint)
        state = content[KEY]
        weights = {name: value for name, value in content["state_dict"].items() if name != MARKER}
        attachment = attach_state(model, state)
        model.load_state_dict(weights)
        callback = MetaPerturbCallback(NamedPhi(Phi(**state["phi"]), state["phi_name"]), **state["inference"])
        callback.attach(model)
        attachment.inference = callback._inference()
        model.eval()
        return model

    def _checkpoint_hooks(self, module: nn.Module) -> CheckpointHooks:
        declared = {"inference": self.inference, "samples": self.samples, "output": self.output}
        return CheckpointHooks(module, declared, self.marker)

    def _inference(self) -> Mean | MonteCarlo:
        return Mean() if self.inference == "mean" else MonteCarlo(self.samples, self.output)

    def _attached(self, module: nn.Module) -> Attachment:
        attachment = attachment_of(module)
        if attachment is None:
            raise ConfigurationError(
                f"{type(module).__name__} was detached while it trained; call detach() after fit, or remove the callback"
            )
        return attachment

    def _begin_evaluation(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        attachment = attachment_of(module)
        if attachment is None:
            rank_zero_warn(
                f"{type(module).__name__} was never trained with MetaPerturb; it is evaluated as it is, without perturbation"
            )
            return
        attachment.evaluations.zero_()
        attachment.bound_hits.zero_()
        if trainer.state.fn == "fit":
            kind = MonteCarloOrMean if self.inference == "mean" else MonteCarlo
            attachment.inference = kind(self.fit_samples, self.output)
            return
        if self.inference == "mean" and attachment.evaluation_buffers is None:
            self._reestimate(trainer, module, attachment)
        attachment.inference = self._inference()

    def _end_evaluation(self, module: pl.LightningModule) -> None:
        attachment = attachment_of(module)
        if attachment is None:
            return
        inference = attachment.inference
        if isinstance(inference, MonteCarlo) and inference.calls == 0:
            names = " or ".join(name or f"{type(module).__name__} itself" for name in attachment.entry_modules())
            raise ConfigurationError(
                f"Monte Carlo inference averaged nothing: no forward of {names} was seen in this epoch; call one of them "
                "in the step, or use inference='mean'"
            )
        if int(attachment.bound_hits) > 0:
            rank_zero_warn(
                f"MetaPerturb: {int(attachment.bound_hits)} feature values reached the bound clip={attachment.clip} in "
                "evaluation; the network's activations are unusually large"
            )

    def _reestimate(self, trainer: pl.Trainer, module: pl.LightningModule, attachment: Attachment) -> None:
        loaders = trainer.train_dataloader
        if loaders is None:
            rank_zero_warn(
                "MetaPerturb: batch norm was not re-estimated for inference='mean', since this trainer has no training "
                "data; evaluate with the trainer that trained, or use inference='mc'"
            )
            return
        with isolate_rng(), torch.no_grad(), trainer.precision_plugin.train_step_context():
            reestimate_batch_norm(attachment, _training_forwards(trainer, module, loaders))


def _training_forwards(trainer: pl.Trainer, module: pl.LightningModule, loaders: Any) -> Iterator[Callable[[], Any]]:
    """The training step on one batch after another."""
    takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    combined = CombinedLoader(loaders)
    limit = trainer.num_training_batches
    for batch, index, _ in iter(combined):
        if index >= limit:
            return
        moved = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))

        def forward(batch: Any = moved, index: int = index) -> Any:
            return module.training_step(*((batch, index) if takes_index else (batch,)))

        yield forward
