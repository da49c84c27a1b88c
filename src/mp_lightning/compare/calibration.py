"""Moments of phi's multiplier on the network of a comparison, which its controls are matched to."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.seed import isolate_rng

from mp_lightning.callback import MetaPerturbCallback
from mp_lightning.compare.arms import NamedArm, Part
from mp_lightning.compare.examine import Predict, forward
from mp_lightning.compare.moments import SiteMoments, site_moments
from mp_lightning.compare.pairing import PairedSteps, seed_all
from mp_lightning.compare.run import Experiment, Job, RunError, fresh_module, train
from mp_lightning.compare.store import RunKey
from mp_lightning.perturbation import NamedPhi
from mp_lightning.randomness import derived_seed
from mp_lightning.runs import unusable, write_whole
from mp_lightning.sites import attachment_of

STEPS = 100  # of the pilot run
_BATCHES = 10
_SEED = 2 * 10**9  # none of the comparison's, nor of tuning


def phi_digest(phi: NamedPhi) -> str:
    """A few characters that tell a phi, and all that it is meant for (strength, noise, sites, loss), from others."""
    digest = hashlib.sha256()
    for value in phi.phi:
        digest.update(value.detach().cpu().numpy().tobytes())
    if phi.strength != 1:
        digest.update(str(phi.strength).encode())
    if phi.noise_per != "element":
        digest.update(phi.noise_per.encode())
    if phi.share_of_sites != 1:
        digest.update(f"sites {phi.share_of_sites}".encode())
    if phi.full_strength_at != 1:
        digest.update(f"full strength at {phi.full_strength_at}".encode())
    return digest.hexdigest()[:12]


def matched_moments(experiment: Experiment, phi: NamedPhi, folder: Path) -> list[SiteMoments]:
    """Mean and variance of phi's multiplier at each site, in training, after a pilot run of at most 100 batches.

    phi acts at its strength from the first batch of the pilot run, whose seed is none of the comparison's; the network
    is thrown away. What was measured is kept in ``folder``.

    Raises:
        RunError: the pilot run diverged.
        UserError: as a run does.
    """
    path = folder / f"moments-{phi_digest(phi)}.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return [SiteMoments(str(name), float(mean), float(var)) for name, mean, var in content["sites"]]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    found = _measure(experiment, phi)
    if not all(math.isfinite(site.mean) and math.isfinite(site.var) for site in found):
        raise RunError(
            f"the pilot run of the controls, with phi '{phi.name}', diverged; lower the learning rate, or leave out "
            "the arms whose moments are matched to phi's (fixed_noise, shrink_only, mean_one)"
        )
    try:
        write_whole(path, {"phi": phi.name, "steps": STEPS, "sites": found})
    except OSError as error:
        raise unusable(folder, error) from error
    return found


def _measure(experiment: Experiment, phi: NamedPhi) -> list[SiteMoments]:
    with isolate_rng():
        callback = MetaPerturbCallback(
            phi,
            ramp_steps=0,
            full_strength_at=1,
            inference="mc",
            samples=1,
            seed=derived_seed(_SEED, "noise"),
            marker=False,
        )
        measuring = _Measuring(experiment.predict)
        pilot = Experiment(
            experiment.module_factory,
            experiment.data,
            {**experiment.trainer, "max_steps": STEPS, **_short_epochs(experiment.trainer)},
        )
        module = fresh_module(pilot, _SEED)
        job = Job(
            RunKey("", "", "pilot of the controls", _SEED, ""), NamedArm("pilot", (Part("metaperturb", phi=phi),))
        )
        train(pilot, module, job, [PairedSteps(derived_seed(_SEED, "steps")), callback, measuring])
    return measuring.found


def _short_epochs(trainer: dict[str, Any]) -> dict[str, Any]:
    """Epochs end within the pilot run, with the validation that callbacks and schedulers may ask for."""
    limit = trainer.get("limit_train_batches")
    return {} if isinstance(limit, float) else {"limit_train_batches": min(limit or STEPS, STEPS)}


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
        seed_all(derived_seed(_SEED, "moments"))
        with torch.no_grad():
            self.found = site_moments(attachment, self._forwards(trainer, pl_module))

    def _forwards(self, trainer: L.Trainer, module: L.LightningModule) -> Iterator[Callable[[], Any]]:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        for batch in islice(data.train_dataloader(), _BATCHES):
            yield partial(forward, trainer, self._predict, module, batch)
