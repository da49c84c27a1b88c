"""Moments of phi's multiplier on the network of a comparison, which its controls are matched to."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.seed import isolate_rng

from mp_lightning.compare.arm_callbacks import Context, callbacks_of
from mp_lightning.compare.arms import parse_arm
from mp_lightning.compare.cost import Cost
from mp_lightning.compare.examine import Predict, batches, forward
from mp_lightning.compare.moments import SiteMoments, site_moments
from mp_lightning.compare.pairing import PairedSteps
from mp_lightning.compare.run import Experiment, Job, OnStep, RunError, fresh_module, train
from mp_lightning.compare.store import RunKey
from mp_lightning.perturbation import NamedPhi, phi_digest
from mp_lightning.randomness import derived_seed, seed_all
from mp_lightning.runs import unusable
from mp_lightning.sites import attachment_of
from mp_lightning.whole import write_json

_WHEN = "at the end of a run"  # before, it was after 100 steps
_BATCHES = 10
PILOT_SEED = 2 * 10**9  # none of the comparison's, nor of tuning


def matched_moments(
    experiment: Experiment,
    phi: NamedPhi,
    folder: Path,
    display: Callable[[], AbstractContextManager[OnStep | None]] = nullcontext,
) -> list[SiteMoments]:
    """Mean and variance of phi's multiplier at each site, in training, when a run with phi has ended.

    They move with the feature maps through all of a training, so that the pilot run is as long as those of the
    comparison, and phi acts in its training as in that of its arm ``metaperturb``, by itself: a control in a
    combination, such as ``fixed_noise+mixup``, is matched to phi alone, not to ``metaperturb+mixup``. The seed of the
    pilot run is none of theirs, and the network is thrown away. What was measured is kept in ``folder``.

    Args:
        experiment: what all runs share.
        phi: with what it is meant for.
        folder: of the comparison.
        display: entered only for a pilot run; gives what is called after each of its training batches.

    Raises:
        RunError: the pilot run diverged.
        UserError: as a run does.
    """
    path = moments_path(phi, folder)
    kept = read_moments(path)
    if kept is not None:
        return kept
    with display() as on_step:
        found = _measure(experiment, phi, on_step)
    if not all(math.isfinite(site.mean) and math.isfinite(site.var) for site in found):
        raise RunError(
            f"the pilot run of the controls, with phi '{phi.name}', diverged; lower the learning rate, or leave out "
            "the arms whose moments are matched to phi's (fixed_noise, shrink_only, mean_one)"
        )
    write_moments(path, phi.name, found)
    return found


def moments_path(phi: NamedPhi, folder: Path) -> Path:
    """The file of a comparison's folder in which the moments of this phi are kept."""
    return folder / f"moments-{phi_digest(phi)}.json"


def read_moments(path: Path) -> list[SiteMoments] | None:
    """What :func:`write_moments` wrote; None if nothing that can be used is there."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["measured"] == _WHEN:
            return [SiteMoments(str(name), float(mean), float(var)) for name, mean, var in content["sites"]]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def write_moments(path: Path, phi: str, moments: list[SiteMoments]) -> None:
    """Keep moments, with the name of the phi that they are of; all digits, so that their digest stays the same.

    Raises:
        RunFolderError: the file cannot be written.
    """
    try:
        write_json(path, {"phi": phi, "measured": _WHEN, "sites": moments})
    except OSError as error:
        raise unusable(path.parent, error) from error


def moments_digest(moments: list[SiteMoments]) -> str:
    """A few characters that tell moments from others: controls that are matched to others are other controls."""
    return hashlib.sha256(json.dumps(moments).encode()).hexdigest()[:12]


def _measure(experiment: Experiment, phi: NamedPhi, on_step: OnStep | None) -> list[SiteMoments]:
    arm = parse_arm("metaperturb", phi)
    with isolate_rng():
        context = Context(
            derived_seed(PILOT_SEED, "noise"), experiment.num_classes, "mc", samples=1, ramp=experiment.ramp
        )
        callbacks, _ = callbacks_of(arm, context)
        measuring = _Measuring(experiment.predict)
        module = fresh_module(experiment, PILOT_SEED)
        job = Job(RunKey("", "", "pilot of the controls", PILOT_SEED, ""), arm)
        train(
            experiment,
            module,
            job,
            [PairedSteps(derived_seed(PILOT_SEED, "steps")), *callbacks, Cost(on_step), measuring],
        )
    return measuring.found


class _Measuring(Callback):
    """Looks at the multiplier of some training steps when training ends."""

    def __init__(self, predict: Predict) -> None:
        super().__init__()
        self._predict = predict
        self.found: list[SiteMoments] = []

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        attachment = attachment_of(pl_module)
        assert attachment is not None
        attachment.inference = None
        pl_module.train()
        seed_all(derived_seed(PILOT_SEED, "moments"))
        with torch.no_grad():
            self.found = site_moments(attachment, self._forwards(trainer, pl_module))

    def _forwards(self, trainer: L.Trainer, module: L.LightningModule) -> Iterator[Callable[[], Any]]:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        for batch in islice(batches(data.train_dataloader(), "train_dataloader"), _BATCHES):
            yield partial(forward, trainer, self._predict, module, batch)
