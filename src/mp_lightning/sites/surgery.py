"""Attach a perturbation to a model and take it away again, in plain PyTorch.

Example::

    attachment = attach(model, total_steps=len(loader) * epochs)
    for x, y in loader:
        value = loss(model(x), y)
        value.backward()
        optimizer.step()
        attachment.step(value)
"""

import math
from pathlib import Path

import torch
import torch.distributed
from torch import nn

from mp_lightning.errors import ConfigurationError, SiteError
from mp_lightning.perturbation import (
    MetaPerturb,
    NamedPhi,
    Perturbation,
    Phi,
    check_following,
    check_fraction,
    load_phi,
)
from mp_lightning.sites.arguments import check_arguments, check_model
from mp_lightning.sites.attachment import CLIP, NAME, Attachment, PathName
from mp_lightning.sites.calls import Block
from mp_lightning.sites.choice import Sites, choose_sites
from mp_lightning.sites.discovery import find_sites
from mp_lightning.sites.fitting import OFF
from mp_lightning.sites.hooked import check_there, missing
from mp_lightning.sites.plan import SitePlan
from mp_lightning.sites.recording import images_of
from mp_lightning.sites.tracing import is_frozen, remembered


def attach(
    model: nn.Module,
    phi: "str | Path | Phi | NamedPhi | None" = None,
    *,
    sites: Sites = None,
    target: str | None = None,
    perturbation: Perturbation | None = None,
    total_steps: int | None = None,
    ramp_steps: int | None = None,
    strength: float | None = None,
    full_strength_at: float | None = None,
    acts_below: float | None = None,
    input_size: int | None = None,
    seed: int = 0,
    clip: float | None = CLIP,
    synchronize: bool = False,
    persistent: bool = False,
    path: PathName = "auto",
    distributed: bool = True,
) -> Attachment:
    """Perturb the feature maps of ``model`` at its sites.

    Adds one submodule, ``_metaperturb``, and hooks. Attached twice is attached once: the first attachment is returned,
    with the length of the ramp that is given now, if one is, and its own seed, bound and path.

    Args:
        model: any module; what its forward computes changes, its parameters do not, and its ``state_dict`` keys only
            where ``persistent`` asks for it, or ``perturbation`` is a module with keys of its own.
        phi: a phi file, the name of a bundled one, or None for the bundled default. Never trained.
        sites: where to perturb; None finds the sites and takes the share of them that phi comes with. A plan, a YAML
            file with one, a share such as 0.5 (the deeper half), names, patterns, classes of modules, functions: see
            :func:`~mp_lightning.sites.choose_sites`.
        target: name of the only submodule that is perturbed, such as 'student'.
        perturbation: any other :class:`~mp_lightning.perturbation.Perturbation` in place of phi.
        total_steps: number of training batches of the run; the strength grows over the first 40 % of them. Where it
            follows the loss, a run of fewer than 1,200 reaches ``total_steps / 1200`` of it.
        ramp_steps: number of batches over which all of it grows, instead. With neither, it is at full strength from the
            start and ``step()`` raises.
        strength: how much of the perturbation acts when it has grown, above 0 and at most 1: a feature map is
            multiplied by ``1 + strength * (multiplier - 1)``. None takes the one that phi comes with; of any other
            perturbation 1.
        full_strength_at: share of the loss of the first batches at or below which the whole strength acts, and in
            proportion a part of it between that and ``acts_below``, so that a network that cannot fit its images is
            harmed less. 1 for a strength that does not follow the loss. None takes what phi comes with; of any other
            perturbation 1.
        acts_below: share of that loss at or above which nothing acts, so that such a network is left alone; above
            ``full_strength_at``. None takes what phi comes with, and 1 where ``full_strength_at`` is given.
        input_size: height of the network's input in pixels; None takes it from the first forward. Sites of a forward
            that does not compute the same for images of any size are found for this one.
        seed: seed of the noise.
        clip: upper bound of a perturbed feature map, in training and in evaluation, once anything acts; None for no
            bound.
        synchronize: batch statistics over all processes instead of each on its own.
        persistent: keep phi and the statistics in the model's ``state_dict``. Batch norm that was re-estimated for an
            inference is not among them; ``Attachment.state`` has all.
        path: 'auto' computes the perturbation by the fast path wherever this machine has one, 'reference' by the
            readable one; the function is the same.
        distributed: several processes hold parts of one global batch, and draw the noise of their own part; False where
            each of them trains a model of its own.

    Returns:
        The attachment; call its ``step(loss)`` after each training batch and ``detach()`` to undo.

    Raises:
        PhiError: phi cannot be loaded.
        SiteError: no site was found, or the plan does not fit the model.
        ConfigurationError: the model is attached already, with another phi, strength, perturbation or plan, or was
            changed since; or ``path`` is unknown, or a number out of range.
    """
    check_arguments(
        perturbation=perturbation,
        clip=clip,
        seed=seed,
        input_size=input_size,
        synchronize=synchronize,
        distributed=distributed,
        total_steps=total_steps,
        ramp_steps=ramp_steps,
    )
    check_model(model, "attach")
    parameter = next(model.parameters(), None)
    if torch.get_default_device().type == "meta" or (parameter is not None and parameter.is_meta):
        raise ConfigurationError(
            "attach was called on torch's device 'meta', where there are no numbers; call it later"
        )
    existing = attachment_to_train(model)
    named = None if perturbation is not None else load_phi(phi)
    for name, value in (("strength", strength), ("full_strength_at", full_strength_at), ("acts_below", acts_below)):
        if value is not None:
            check_fraction(value, name)
    follows = following(named, full_strength_at, acts_below)
    if existing is not None:
        check_there(existing.model, existing.hooked)
        with images_of(input_size or existing.found_at):
            wanted = None if sites is None and target is None else choose_sites(existing.model, sites, target)
        asked = {"full_strength_at": full_strength_at, "acts_below": acts_below}
        if phi is not None:
            asked = dict(zip(asked, follows, strict=True))
        _check_same(existing, None if phi is None else named, perturbation, wanted, strength, asked)
        _set_ramp(existing, total_steps, ramp_steps)
        return existing
    if sites is None and named is not None and named.share_of_sites != 1:
        sites = named.share_of_sites
    with remembered(), images_of(input_size):
        plan = choose_sites(model, sites, target)
        channel_norm = _channel_norm(model, plan, sites, target)
    if named is not None:
        perturbation = MetaPerturb(named.phi, noise_per=named.noise_per, persistent=persistent)
    assert perturbation is not None
    attachment = Attachment(
        model,
        plan,
        perturbation,
        phi_name=perturbation.name if named is None else named.name,
        channel_norm=channel_norm,
        input_size=input_size,
        strength=strength if strength is not None else 1.0 if named is None else named.strength,
        full_strength_at=follows[0],
        acts_below=follows[1],
        seed=seed,
        clip=clip,
        synchronize=synchronize,
        persistent=persistent,
        path=path,
        distributed=distributed,
    )
    attachment.found_at = input_size
    if parameter is not None:
        attachment.to(parameter.device)
    attachment.train(model.training)
    _set_ramp(attachment, total_steps, ramp_steps)
    model.add_module(NAME, attachment)
    _guard_compiled_code()
    return attachment


def _set_ramp(attachment: Attachment, total_steps: int | None, ramp_steps: int | None) -> None:
    if ramp_steps is not None:
        attachment.ramp_over(ramp_steps)
    elif total_steps is not None:
        attachment.ramp_over_run(total_steps)


def following(named: NamedPhi | None, full_strength_at: float | None, acts_below: float | None) -> tuple[float, float]:
    """From which share of the first loss all of the strength acts, and below which any: as given, or as phi has it.

    Raises:
        ConfigurationError: nothing lies between the two.
    """
    full = full_strength_at or (OFF if named is None else named.full_strength_at)
    below = acts_below or (named.acts_below if named is not None and full_strength_at is None else OFF)
    check_following(full, below, "acts_below")
    return full, below


def _guard_compiled_code() -> None:
    """Let ``torch.compile`` tell models with hooks from models without.

    It keeps one cache for all models of a class and by default does not look at their hooks: a graph of a plain model,
    or of this one before it was attached, would run in its place and the sites would be ignored in silence.
    """
    import torch._dynamo  # here, as it takes a second where nothing has needed it before

    if torch._dynamo.config.skip_nnmodule_hook_guards:
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        torch._dynamo.reset()  # graphs that were made without


def detach(model: nn.Module) -> None:
    """Undo :func:`attach`; a model that is not attached stays as it is.

    Args:
        model: that was attached; of a part of one, all of the model that it is a part of is undone.

    Raises:
        ConfigurationError: it is no module.
    """
    check_model(model, "detach")
    attachment = attachment_of(model)
    if attachment is not None:
        attachment.detach()


def detach_changed(model: nn.Module) -> str | None:
    """Undo what a callback attached to a model of which a part was replaced or removed since.

    Returns:
        The name of that part; None where nothing was undone.
    """
    attachment = attachment_to_train(model)
    gone = missing(attachment.model, attachment.hooked) if attachment is not None and attachment.managed else None
    if attachment is not None and gone is not None:
        attachment.detach()
    return gone


def attachment_of_itself(model: nn.Module) -> Attachment | None:
    """What :func:`attach` added to this very module."""
    attachment = model._modules[NAME] if NAME in model._modules else None  # noqa: SIM401 - not in a script
    return attachment if isinstance(attachment, Attachment) else None


def attachment_of(model: nn.Module) -> Attachment | None:
    """The attachment of a model, of one of its parts, or of the model that it is a part of, if there is one."""
    itself = attachment_of_itself(model)  # the usual case, asked for in every batch
    if itself is not None:
        return itself
    parts = [module for module in model.modules() if isinstance(module, Attachment)]
    if parts:
        return min(parts, key=lambda part: is_frozen(part.model))  # the first, but rather one that is trained
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    owners = (getattr(hook, "__self__", None) for hook in hooks)
    return next((owner.attachment for owner in owners if isinstance(owner, Block)), None)


def attachment_to_train(model: nn.Module) -> Attachment | None:
    """As :func:`attachment_of`, but not that of a frozen part, such as a teacher, where other parts have sites."""
    found = attachment_of(model)
    if found is None or found.model is model or not is_frozen(found.model) or found not in {*model.modules()}:
        return found
    try:
        find_sites(model)
    except SiteError:
        return found  # the part, whose head alone is trained
    return None


def _check_same(
    existing: Attachment,
    named: NamedPhi | None,
    perturbation: Perturbation | None,
    sites: SitePlan | None,
    strength: float | None,
    follows: dict[str, float | None],
) -> None:
    """Refuse to return an attachment that is not the one asked for (None: anything will do)."""
    other = perturbation is not None and perturbation is not existing.perturbation
    if named is not None:
        own = existing.perturbation
        other = not isinstance(own, MetaPerturb) or any(
            not torch.equal(value.detach().cpu(), given.detach().to("cpu", value.dtype))
            for value, given in zip(own.phi, named.phi, strict=True)
        )
    if other:
        raise ConfigurationError(
            f"the model is attached already, with phi '{existing.phi_name}'; call detach() before attaching another"
        )
    if named is not None and isinstance(existing.perturbation, MetaPerturb):
        drawn = existing.perturbation.noise_per
        if drawn != named.noise_per:
            raise ConfigurationError(
                f"the model is attached already, with noise per {drawn} and not per {named.noise_per}; call detach() "
                "before attaching again"
            )
    wanted = named.strength if strength is None and named is not None else strength
    if wanted is not None and not math.isclose(wanted, float(existing.strength), rel_tol=1e-6):
        raise ConfigurationError(
            f"the model is attached already, at strength {float(existing.strength):g} and not {wanted:g}; pass "
            f"strength={float(existing.strength):g} to keep it, or call detach() before attaching again"
        )
    for name, asked in follows.items():
        kept = float(getattr(existing.fitting, name))
        if asked is not None and not math.isclose(asked, kept, rel_tol=1e-6):
            raise ConfigurationError(
                f"the model is attached already, with {name}={kept:g} and not {asked:g}; pass {name}={kept:g} to keep "
                "it, or call detach() before attaching again"
            )
    if sites is not None and sites != existing.plan:
        raise ConfigurationError("the model is attached already, at other sites; call detach() before attaching again")


def _channel_norm(model: nn.Module, plan: SitePlan, given: Sites, target: str | None) -> int:
    """The most channels of any site of the *default* plan, so that leaving sites out changes no other site."""
    if given is None:
        return plan.channel_norm
    try:
        return find_sites(model, target).channel_norm
    except SiteError:
        return plan.channel_norm
