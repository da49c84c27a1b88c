"""The Lightning callback: a learned regularizer in one line."""

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from mp_lightning.announcements import opening, stays_in_force
from mp_lightning.checkpoints import CheckpointHooks
from mp_lightning.errors import ConfigurationError
from mp_lightning.evaluation_epochs import EvaluationEpochs
from mp_lightning.inference import INFERENCE_MODES, InferenceMode, MonteCarlo, Output
from mp_lightning.late_layers import AttachesLater, late_hook
from mp_lightning.neighbours import (
    act_last,
    check_alone,
    check_single,
    check_strategy,
    leave_averages_plain,
    unfrozen,
)
from mp_lightning.perturbation import NamedPhi, Perturbation, Phi, check_fraction, load_phi
from mp_lightning.reestimation_steps import reestimate, training_data, try_to_reestimate
from mp_lightning.restoring import load_trained, set_back, set_to_evaluation
from mp_lightning.schedule import batches_per_step, total_training_batches, training_loss
from mp_lightning.site_metrics import SiteLog, batches_between_looks
from mp_lightning.sites import Attachment, SitePlan, Sites, attach, attachment_of
from mp_lightning.sites.arguments import check_arguments, check_one_of, whole_number
from mp_lightning.sites.attachment import CLIP, PATHS, PathName
from mp_lightning.sites.choice import is_file, is_share
from mp_lightning.sites.hooked import check_there
from mp_lightning.sites.surgery import attachment_to_train, detach_changed, following


class MetaPerturbCallback(EvaluationEpochs):
    """Regularizes the training of any convolutional network by learned, input-dependent noise on its feature maps.

    One tiny network of 82 numbers, phi, which was meta-trained elsewhere and stays frozen, multiplies the feature maps
    before the last activation of residual blocks, or before the activation of normalized convolutions: in the whole
    network, or in its deeper part, as phi comes with. It stands where dropout or DropBlock would, and there is nothing
    to tune: sites, sizes and the ramp of its strength are derived from the model and the run.

    After ``fit`` the model stays attached, because removing the perturbation would change the function it learned. In
    evaluation the noise is averaged out as ``inference`` says. Checkpoints hold all of it, and come back by resuming
    with this callback or by :meth:`restore`.

    Example::

        trainer = L.Trainer(max_epochs=100, callbacks=[MetaPerturbCallback()])
        trainer.fit(module, datamodule)
        trainer.test(module, datamodule)

    Args:
        phi: a ``phi.safetensors`` file, the name of a bundled phi, or None for the bundled default.
        perturbation: any other :class:`~mp_lightning.Perturbation`, to stand at the same sites in place of phi.
        sites: where to perturb; None finds the sites and takes the share of them that phi comes with. A plan, a YAML
            file with one, a share such as 0.5 (the deeper half), names, patterns, classes of modules or functions
            choose them: see :func:`mp_lightning.choose_sites`.
        target: name of the only part of the module that is perturbed, such as 'student'; None perturbs every network in
            it that is trained.
        ramp_steps: number of training batches over which the strength grows; None takes the first 40 % of the run, and,
            where the strength follows the loss, lets a training of fewer than 1,200 steps of the optimizer reach a part
            of it, in proportion to its length; with a number all of it is reached.
        strength: how much of the perturbation acts once it has grown, above 0 and at most 1; None takes the one that
            phi comes with, and 1 for any other perturbation.
        full_strength_at: share of the loss of the first batches at or below which the whole strength acts, and in
            proportion a part of it between that and ``acts_below``, so that a network that cannot fit its images is
            harmed less. 1 for a strength that does not follow the loss; None takes what phi comes with, and 1 for
            any other perturbation.
        acts_below: share of that loss at or above which nothing acts, so that such a network is left alone; above
            ``full_strength_at``. None takes what phi comes with, and 1 where ``full_strength_at`` is given.
        inference: 'mean' makes one forward with the expected noise, and re-estimates batch norm for it on at most 50
            training batches when training ends. 'fold' multiplies by a constant for each channel, estimated at the same
            time, so that nothing learned is left to compute. 'mc' averages the class probabilities of several noisy
            forwards, as published; it needs a model that gives scores (B, K), of one class for each image.
        samples: number of forwards of 'mc'.
        fit_samples: number of noisy forwards averaged in the validation epochs of ``fit``, in both modes; with 'mean'
            their outputs are averaged as they are, unless ``output`` says what they hold.
        output: what the model's (B, K) output holds ('logits', 'probabilities', 'log_probabilities'); None finds out.
        input_size: height of the network's input in pixels; None takes it from the first batch.
        seed: seed of the noise; None takes the one of ``seed_everything``, else 0.
        clip: upper bound of perturbed feature maps; None for no bound.
        sync_statistics: take batch statistics over all processes (as SyncBatchNorm) instead of each on its own.
        marker: let a plain strict load of a checkpoint fail with a message that names :meth:`restore`.
        path: 'auto' computes the perturbation by the fast path wherever this machine has one; 'reference' by the
            readable one, which is slower and the same function.
        log_every: number of training batches after which the strength that acts, and mean and spread of the multiplier,
            and the scale, at each site go to the trainer's loggers; None takes ten times ``log_every_n_steps``, or a
            tenth of a shorter run; 0 logs nothing. The sites of compiled models are not watched.
    """

    def __init__(
        self,
        phi: "str | Path | Phi | NamedPhi | None" = None,
        *,
        perturbation: Perturbation | None = None,
        sites: Sites = None,
        target: str | None = None,
        ramp_steps: int | None = None,
        strength: float | None = None,
        full_strength_at: float | None = None,
        acts_below: float | None = None,
        inference: InferenceMode = "mean",
        samples: int = 20,
        fit_samples: int = 5,
        output: Output | None = None,
        input_size: int | None = None,
        seed: int | None = None,
        clip: float | None = CLIP,
        sync_statistics: bool = False,
        marker: bool = True,
        path: PathName = "auto",
        log_every: int | None = None,
    ) -> None:
        check_one_of(inference, "inference", INFERENCE_MODES)
        MonteCarlo(samples, output)  # the same checks, early
        fit_samples = whole_number(fit_samples, "fit_samples", 1, "of noisy forwards, at least one")
        super().__init__(inference, samples, fit_samples, output)
        if phi is not None and perturbation is not None:
            raise ConfigurationError("phi= and perturbation= are both given; give one of them")
        check_arguments(
            perturbation=perturbation,
            clip=clip,
            seed=seed,
            input_size=input_size,
            synchronize=sync_statistics,
            ramp_steps=ramp_steps,
        )
        self.phi = load_phi(phi)  # now, so that a bad file is known before data is prepared
        self._phi_given = phi is not None
        self.perturbation = perturbation
        self.sites = SitePlan.load(sites) if is_file(sites) else sites  # now, so that a bad file is known early
        self.target = target
        self.ramp_steps = ramp_steps
        self.strength = strength
        self.full_strength_at = full_strength_at
        self.acts_below = acts_below
        self.input_size = input_size
        self.seed = seed
        self.clip = clip
        self.sync_statistics = sync_statistics
        self.marker = marker
        check_one_of(path, "path", PATHS)
        self.path: PathName = path
        self.persistent = False
        self._attached_here = False  # by setup, and not before by the user or a checkpoint
        shares = {
            "strength": strength,
            "full_strength_at": full_strength_at,
            "acts_below": acts_below,
            "sites": sites if is_share(sites) else None,
        }
        for name, share in shares.items():
            if share is not None:
                check_fraction(share, name)
        following(None if perturbation is not None else self.phi, full_strength_at, acts_below)  # the same, early
        if log_every is not None:
            whole_number(log_every, "log_every", 0, "of batches, or 0 for nothing")
        self.log_every = log_every
        self._site_log: SiteLog | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Attach for training. A model that is only evaluated stays plain unless its checkpoint says otherwise."""
        leave_averages_plain(trainer)  # before their weights are loaded
        if stage != "fit":
            self._install_hooks(pl_module)
            return
        check_strategy(trainer)
        check_alone(trainer, MetaPerturbCallback)
        if type(trainer.strategy.launcher).__name__ == "_MultiProcessingLauncher":
            rank_zero_warn(
                "MetaPerturb: this strategy trains copies of the module in processes of their own, and brings back "
                "their weights alone; bring the module back from a checkpoint with MetaPerturbCallback.restore"
            )
        self._attached_here = False

        def attach_now(module: pl.LightningModule) -> None:
            with unfrozen(trainer, self, module):
                self._attached_here = attachment_to_train(module) is None
                attachment = self.attach(module)
                if self._attached_here:
                    attachment.coeff.zero_()  # until training begins; copies may be made before

        hook = late_hook(pl_module)
        if hook is None:
            attach_now(pl_module)
        else:
            AttachesLater(attach_now, pl_module, hook).install()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        act_last(trainer, self)
        leave_averages_plain(trainer)
        set_back(pl_module)
        if not pl_module.training:
            rank_zero_warn(
                f"MetaPerturb: {type(pl_module).__name__} is in evaluation mode, in which nothing is regularized; call "
                "train() before fit"
            )

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A fit without any training (a finished run that is resumed, no epochs) changes nothing."""
        attachment = attachment_of(pl_module)
        if attachment is None:
            return
        if self._attached_here and int(attachment.steps) == 0:
            attachment.detach()
        elif attachment.inference is None:
            attachment.inference = self.make_inference()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        hooks = CheckpointHooks.of(pl_module)
        if hooks is not None and attachment_of(pl_module) is None:
            hooks.remove()

    def attach(self, module: nn.Module) -> Attachment:
        """Attach to a module by the settings of this callback, once.

        Raises:
            SiteError: the module has no site.
            ConfigurationError: it is attached already, with another phi or strength or at other sites than this
                callback was given; several parts of it are; or a part is gone of what was not attached by a callback.
        """
        existing = attachment_to_train(module)
        if existing is not None and existing.model not in {*module.modules()}:
            raise ConfigurationError(
                f"a network of {type(module).__name__} is attached already, as a part of "
                f"{type(existing.model).__name__}; call mp_lightning.detach(network) first"
            )
        if existing is not None:
            check_single(module)
            if (gone := detach_changed(module)) is not None:
                rank_zero_info(f"MetaPerturb: self.{gone} was replaced since; it is attached anew")
                existing, self._attached_here = None, True
        if existing is not None and self.persistent:
            check_there(existing.model, existing.hooked)
            return self._with_hooks(module, existing)  # what a module declares may have been loaded with its weights
        attachment = attach(
            module,
            self.phi if self._phi_given or (existing is None and self.perturbation is None) else None,
            perturbation=self.perturbation,
            sites=self.sites,
            target=self.target,
            strength=self.strength,
            full_strength_at=self.full_strength_at,
            acts_below=self.acts_below,
            input_size=self.input_size,
            seed=int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.seed is None else self.seed,
            clip=self.clip,
            synchronize=self.sync_statistics,
            persistent=self.persistent,
            path=self.path,
        )
        attachment.by_callback = True
        attachment.managed |= existing is None and not self.persistent
        if self.path != "auto":  # how it is computed belongs to this run, whoever attached it
            attachment.path = self.path
        attachment.synchronize |= self.sync_statistics
        return self._with_hooks(module, attachment)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        attachment = self._attached(pl_module)
        training_data(trainer)
        total = None if self.ramp_steps is not None else total_training_batches(trainer)
        if total is None:
            attachment.ramp_over(self.ramp_steps or 0)
        else:
            before = int(attachment.steps) if trainer.global_step == 0 else 0
            attachment.ramp_over_run(total, batches_per_step(trainer, total), before)
        attachment.inference = self._between_batches()
        every = batches_between_looks(trainer, total) if self.log_every is None else self.log_every
        self._site_log = SiteLog(attachment, every if trainer.loggers else 0)
        phi = self.phi if self.perturbation is None else None
        rank_zero_info(f"MetaPerturb: {opening(attachment, phi, total)}")
        asked = self.phi if self._phi_given else None
        given = (self.strength, self.full_strength_at, self.acts_below, self.seed, self.clip, self.input_size)
        for kept in stays_in_force(attachment, asked, *given):
            rank_zero_warn(f"MetaPerturb: {kept}")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._attached(pl_module).inference = None  # each forward draws its noise, whatever the mode of its module
        if self._site_log is not None:
            self._site_log.begin_batch()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        attachment = self._attached(pl_module)
        metrics = self._site_log.end_batch() if self._site_log is not None else {}
        attachment.step(training_loss(trainer, outputs))
        attachment.inference = self._between_batches()
        if metrics and trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        attachment = self._attached(pl_module)
        if (why := attachment.idle()) is not None:
            rank_zero_warn(f"MetaPerturb: {why}")
        if self.inference != "mc":
            try_to_reestimate(trainer, pl_module, attachment, self.inference)
        attachment.inference = self.make_inference()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """An interrupted training leaves a model that can be evaluated; one that had not begun changes nothing."""
        AttachesLater.uninstall(pl_module)
        attachment = attachment_of(pl_module)
        if attachment is not None:
            attachment.settle()
            attachment.sampling = True
            if self._attached_here and int(attachment.steps) == 0:
                attachment.detach()
            else:
                attachment.inference = self.make_inference()
        if self._site_log is not None:
            self._site_log.stop()

    @staticmethod
    def restore(model: pl.LightningModule, checkpoint: str | Path) -> pl.LightningModule:
        """Bring a trained model back from a checkpoint: its weights, and the perturbation attached as it was saved.

        Args:
            model: a freshly made module of the class that was trained.
            checkpoint: path of the file; it is read with ``weights_only=True``.

        Returns:
            ``model``, attached, in evaluation mode.

        Raises:
            CheckpointError: the file cannot be read, was made without MetaPerturb, or holds another model's weights.
            SiteError: the model does not have the sites of the checkpoint.
        """
        attachment, declared = load_trained(model, checkpoint)
        callback = MetaPerturbCallback(**declared)
        callback._install_hooks(model).remove_with(attachment)
        attachment.inference = inference = callback.make_inference()
        if (lacking := inference.lacks(attachment)) is not None:
            rank_zero_warn(
                f"checkpoint '{checkpoint}' was saved while training went on, when {lacking} for "
                f"inference='{callback.inference}'; until mp_lightning.reestimate_batch_norm is called, "
                f"{callback.samples} noisy forwards are averaged instead"
            )
        set_to_evaluation(model)
        return model

    def switch_inference(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, inference: InferenceMode, loaders: Any = None
    ) -> None:
        """Evaluate in another way from now on, after training and before the trainer lets go of the module.

        Args:
            trainer: that trained.
            pl_module: attached; 'mean' and 'fold' re-estimate its batch norm on at most 50 training batches.
            inference: as for the class.
            loaders: of these batches; None takes those that the trainer trained with.
        """
        self.inference = inference
        attachment = self._attached(pl_module)
        if inference != "mc":
            reestimate(trainer, pl_module, attachment, self.inference, loaders)
        attachment.inference = self.make_inference()

    def _with_hooks(self, module: nn.Module, attachment: Attachment) -> Attachment:
        self._install_hooks(module).remove_with(attachment)
        return attachment

    def _install_hooks(self, module: nn.Module) -> CheckpointHooks:
        declared = {
            "inference": self.inference,
            "samples": self.samples,
            "output": self.output,
            "marker": self.marker,
        }
        return CheckpointHooks.install(module, declared, self.marker)

    def _attached(self, module: nn.Module) -> Attachment:
        attachment = attachment_of(module)
        if attachment is None:
            raise ConfigurationError(
                f"{type(module).__name__} was detached while it trained; detach after fit, or remove the callback"
            )
        return attachment
