"""A comparison from start to end: what must be known beforehand, the runs that are missing, and what they say."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.seed import isolate_rng

from mp_lightning.compare.arm_callbacks import Context, callbacks_of
from mp_lightning.compare.arms import BASELINE, AnyArm, Arm, NamedArm, Part, follows_the_loss
from mp_lightning.compare.at_sites import AtSites
from mp_lightning.compare.calibration import matched_moments, moments_digest
from mp_lightning.compare.pool import perform_all
from mp_lightning.compare.results import Details, Row
from mp_lightning.compare.run import Experiment, Job, OnStep, fresh_module
from mp_lightning.compare.store import RunKey, Store
from mp_lightning.compare.tuning import Budget, Tuned, choose, trials, untuned, with_values
from mp_lightning.compare.user_code import identity
from mp_lightning.errors import ConfigurationError
from mp_lightning.perturbation import phi_digest
from mp_lightning.sites import find_sites
from mp_lightning.sites.strength import SHORTEST_RUN

RESULTS = "results.csv"
TUNING = "tuning.csv"
# Shows how far a stage has come: its name, the number of its runs, and how many of them are finished already.
Display = Callable[[str, int, int], AbstractContextManager["Shown"]]


class Shown:
    """What is told of a stage; this one shows nothing.

    A display overrides both.
    """

    def step(self, batches: int) -> None:
        """So many training batches were made."""

    def finished(self, row: Row) -> None:
        """A run was finished."""


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Attributes:
        experiment: what all runs share.
        arms: in the order in which they are shown; the baseline is put first if it is absent.
        seeds: numbers, from 0.
        target, model: what tables call them.
        settings: everything else that decides the results, as plain values.
        metric: what the verdict is about, and what is tuned for.
        budget: of tuning.
        processes: runs at a time.
    """

    experiment: Experiment
    arms: Sequence[AnyArm]
    seeds: Sequence[int]
    target: str
    model: str
    settings: dict[str, Any]
    metric: str
    budget: Budget
    processes: int


@dataclass(frozen=True)
class Outcome:
    """What a comparison found: its arms with their hyperparameters, its rows, and how these were tuned."""

    arms: list[AnyArm]
    rows: list[Row]
    details: dict[tuple[str, int], Details]
    tuned: list[Tuned]


def check_arms(arms: Sequence[AnyArm]) -> None:
    """Refuse arms that no module and no data could make good.

    Raises:
        ConfigurationError: two arms of one name, a value that its regularizer does not take, or one's own arm that
            makes no callbacks.
    """
    names = [arm.name for arm in arms]
    for name in names:
        if names.count(name) > 1:
            raise ConfigurationError(f"arm '{name}' is named twice; name each arm once")
    for arm in arms:
        if isinstance(arm, NamedArm):
            _check_values(arm)
        else:
            with isolate_rng():
                callbacks_of(arm, Context(seed=0, num_classes=None, inference="mean", samples=1))


def _check_values(arm: NamedArm) -> None:
    regularizers = replace(arm, parts=tuple(part for part in arm.parts if not part.kind.multiplies))
    try:
        callbacks, _ = callbacks_of(regularizers, Context(seed=0, num_classes=2, inference="mean", samples=1))
        for callback in callbacks:
            if isinstance(callback, AtSites):
                callback.make_layer(1)
    except (ConfigurationError, ValueError) as error:
        raise ConfigurationError(f"arm '{arm.name}': {error}") from error


def check_plan(plan: Plan) -> None:
    """Refuse what would fail only after other arms were trained.

    Raises:
        ConfigurationError: as :func:`check_arms`, an arm whose parts need what is not known, or a module that is
            perturbed in every arm.
        SiteError: an arm acts at sites, and the module has none.
    """
    check_arms(plan.arms)
    parts = [(arm, part) for arm in plan.arms if isinstance(arm, NamedArm) for part in arm.parts]
    for arm, part in parts:
        if part.name in _NEED_CLASSES and plan.experiment.num_classes is None:
            raise ConfigurationError(f"arm '{arm.name}' needs the number of classes; pass num_classes=")
    with isolate_rng():
        module = fresh_module(plan.experiment, plan.seeds[0])
    acts_at_sites = any(part.name in _AT_SITES or part.kind.multiplies for _, part in parts)
    if acts_at_sites and any(True for _ in module.parameters()):  # otherwise its layers are made in configure_model
        find_sites(module)


def carry_out(plan: Plan, folder: Path, display: Display) -> Outcome:
    """Make the runs that are missing in ``folder``, and read those that are there.

    Raises:
        UserError: something that was given cannot be used, or the folder not be written.
    """
    experiment = plan.experiment
    store, tuning_store = Store(folder / RESULTS), Store(folder / TUNING)
    arms = list(plan.arms)
    if BASELINE not in [arm.name for arm in arms]:
        arms.insert(0, NamedArm(BASELINE, (Part(BASELINE),)))
    arms = [_with_moments(arm, experiment, folder, display) for arm in arms]
    tuned = _tune(plan, arms, tuning_store, display)
    arms = [with_values(arm, tuned) for arm in arms]
    # Seed by seed, so that whatever is there when it ends early can be compared.
    jobs = [Job(_key(plan, arm, seed), arm) for seed in plan.seeds for arm in arms]
    _make(plan, jobs, store, "comparing", display)
    by_arm = sorted(jobs, key=lambda job: [arm.name for arm in arms].index(job.arm.name))
    rows = store.rows(job.key for job in by_arm)
    return Outcome(arms, rows, {(row.arm, row.seed): store.details(row) for row in rows}, tuned)


def _tune(plan: Plan, arms: Sequence[AnyArm], store: Store, display: Display) -> list[Tuned]:
    names = untuned(arms)
    budget = plan.budget if plan.experiment.data.can_validate else Budget(1, 1)
    jobs = {
        name: [Job(_key(plan, arm, seed), arm, validation=True) for arm, seed in trials(name, budget)] for name in names
    }
    _make(plan, [job for own in jobs.values() for job in own], store, "tuning", display)
    return [choose(name, store.rows(job.key for job in own), plan.metric) for name, own in jobs.items()]


def _make(plan: Plan, jobs: Sequence[Job], store: Store, what: str, display: Display) -> None:
    if not jobs:
        return
    missing = set(store.missing(job.key for job in jobs))
    todo = [job for job in jobs if job.key in missing]
    with (
        display(what, len(jobs), len(jobs) - len(todo)) as shown,
        # However this ends, no process goes on with runs that nobody waits for.
        closing(perform_all(plan.experiment, todo, plan.processes, shown.step)) as made,
    ):
        for _, row, details in made:
            store.append(row, details)
            shown.finished(row)


def _with_moments(arm: AnyArm, experiment: Experiment, folder: Path, display: Display) -> AnyArm:
    if isinstance(arm, Arm):
        return arm

    @contextmanager
    def shown() -> Iterator[OnStep]:
        with display("measuring phi for its controls", 1, 0) as stage:
            yield stage.step

    def measured(part: Part) -> Part:
        if not part.kind.needs_moments or part.phi is None:
            return part
        return replace(part, moments=matched_moments(experiment, part.phi, folder, shown))

    return replace(arm, parts=tuple(measured(part) for part in arm.parts))


def _key(plan: Plan, arm: AnyArm, seed: int) -> RunKey:
    settings = settings_digest(plan.settings, arm, steps=plan.experiment.steps, ramp=plan.experiment.ramp)
    return RunKey(plan.target, plan.model, arm.name, seed, settings)


def settings_digest(settings: dict[str, Any], arm: AnyArm, *, steps: int | None, ramp: bool) -> str:
    """What the key of a run has of its settings and of what its arm is beside its name.

    Args:
        settings: of :class:`Plan`.
        arm: with the values that were tuned, and with the moments where it is matched to some.
        steps, ramp: of :class:`~mp_lightning.compare.run.Experiment`.
    """
    named = () if isinstance(arm, Arm) else arm.parts
    parts = [_identity(part) for part in named]
    # Steps are not known of a run that is measured in epochs.
    if ramp and follows_the_loss(arm) and (steps is None or steps < SHORTEST_RUN):
        parts.append(["all of the strength from", SHORTEST_RUN])  # steps on; before, short runs had other ramps
    parts += [["moments", moments_digest(part.moments)] for part in named if part.moments is not None]
    if any(part.like is not None and part.like.share_of_sites != 1 for part in named):
        if any(part.name in ("first_sites", "last_sites") for part in named):
            parts.append(["halves of phi's sites"])  # before, of all sites
        if any(part.name in _AT_SITES for part in named):
            parts.append(["layers at all sites"])  # before, at phi's
    if isinstance(arm, Arm):
        parts.append([identity(arm.callbacks)])
    if isinstance(arm, Arm) or any(part.kind.multiplies for part in named):
        parts.append(["tested when training has ended"])  # before, runs were tested by one noisy forward
    text = json.dumps([settings, parts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _identity(part: Part) -> list[Any]:
    if part.phi is not None:
        return [part.name, part.value, phi_digest(part.phi)]
    like = part.like
    if like is None:
        return [part.name, part.value, None]
    unusual: list[Any] = [like.strength] if like.strength != 1 else []
    unusual += [like.noise_per] if like.noise_per != "element" else []
    unusual += ["sites", like.share_of_sites] if like.share_of_sites != 1 else []
    unusual += ["full strength at", like.full_strength_at] if like.full_strength_at != 1 else []
    unusual += ["acts below", like.acts_below] if like.acts_below != 1 else []
    return [part.name, part.value, None, *unusual]


_AT_SITES = ("dropout", "dropblock", "gaussian", "information_dropout", "manifold_mixup")
_NEED_CLASSES = ("mixup", "manifold_mixup", "label_smoothing")
