"""What a checkpoint holds of an attachment, and how one takes it over."""

from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import nn

from mp_lightning.errors import ConfigurationError, SiteError, one_line
from mp_lightning.perturbation import MetaPerturb
from mp_lightning.sites.estimates import Estimates
from mp_lightning.sites.plan import SitePlan

if TYPE_CHECKING:
    from mp_lightning.sites.attachment import Attachment

_NEEDED = {
    *("phi_name", "plan", "channel_norm", "seed", "clip", "strength", "ramp_steps", "reached", "fitting", "input_size"),
    *("sites", "evaluation_buffers", "constants", "weights", "trained_norms", "counters"),
}


def state_of(attachment: "Attachment") -> dict[str, Any]:
    """Everything that a checkpoint needs, as tensors, dicts, lists, strings and numbers only."""
    estimates = attachment.estimates
    state: dict[str, Any] = {
        "phi_name": attachment.phi_name,
        "plan": attachment.plan.to_dict(),
        "channel_norm": attachment.channel_norm,
        "seed": attachment.seed,
        "clip": attachment.clip,
        "strength": float(attachment.strength),
        "ramp_steps": attachment.ramp_steps,
        "reached": attachment.reached,
        "fitting": attachment.fitting.state(),
        "input_size": float(attachment.input_size),
        "sites": {
            site.spec.name: {k: v.detach().clone() for k, v in site.statistics.items()}
            for site in attachment.all_sites()
        },
        "evaluation_buffers": None if estimates is None else dict(estimates.buffers),
        "constants": None if estimates is None or estimates.constants is None else dict(estimates.constants),
        "weights": None if estimates is None else estimates.weights,
        "trained_norms": None if attachment.trained_norms is None else sorted(attachment.trained_norms),
        "counters": {name: int(getattr(attachment, name)) for name in ("steps", "forwards")},
    }
    if isinstance(attachment.perturbation, MetaPerturb):
        state["phi"] = {key: value.detach().clone() for key, value in attachment.perturbation.phi._asdict().items()}
        state["noise_per"] = attachment.perturbation.noise_per
    if is_of_the_user(attachment.perturbation):
        state["perturbation"] = {k: v.detach().clone() for k, v in attachment.perturbation.state_dict().items()}
    return state


def is_of_the_user(perturbation: Any) -> TypeGuard[nn.Module]:
    """Whether a perturbation is a module that phi alone does not make, such as a subclass of :class:`MetaPerturb`."""
    return isinstance(perturbation, nn.Module) and type(perturbation) is not MetaPerturb


def check_state(state: Any) -> None:
    """Refuse what is no state of an attachment, before anything is taken over.

    Raises:
        ConfigurationError: names what it lacks.
    """
    lacking = sorted(_NEEDED - (state.keys() if isinstance(state, dict) else set()))
    if lacking:
        raise ConfigurationError(
            f"this is no whole state of MetaPerturb, as it lacks {', '.join(lacking)}; give what Attachment.state() "
            "returned, or an undamaged checkpoint"
        )


def _load_perturbation(perturbation: nn.Module, saved: dict[str, Any]) -> None:
    try:
        perturbation.load_state_dict(saved)
    except RuntimeError as error:
        raise ConfigurationError(
            f"the checkpoint was made with another {type(perturbation).__name__} ({one_line(error, 200)}); attach the "
            "same one"
        ) from error


def take_over(attachment: "Attachment", state: dict[str, Any]) -> None:
    """Set an attachment to what :func:`state_of` gave; see :meth:`Attachment.load_state`."""
    check_state(state)
    saved, own = SitePlan.from_dict(state["plan"]), attachment.plan
    if saved != own:
        changed = sorted(set(saved.names) ^ set(own.names)) or list(own.names)
        raise SiteError(
            f"the checkpoint was made with other sites (they differ in {', '.join(changed[:5])}); attach with the "
            "checkpoint's plan (sites=1 for all that are found), or use MetaPerturbCallback.restore(model, "
            "checkpoint)"
        )
    kept, has = set(next(iter(state["sites"].values()))), set(attachment.all_sites()[0].statistics)
    if kept != has or ("phi" in state) != isinstance(attachment.perturbation, MetaPerturb):
        raise ConfigurationError(
            f"the checkpoint was made with perturbation '{state['phi_name']}', not with '{attachment.phi_name}'; "
            "attach the same one"
        )
    with torch.no_grad():
        for site in attachment.all_sites():
            for name, value in state["sites"][site.spec.name].items():
                getattr(site, name).copy_(value)
        if isinstance(attachment.perturbation, MetaPerturb):
            for key, value in state["phi"].items():
                getattr(attachment.perturbation, key).copy_(value)
            attachment.perturbation.noise_per = state["noise_per"]
        if is_of_the_user(attachment.perturbation):
            _load_perturbation(attachment.perturbation, state.get("perturbation", {}))
        for name, value in state["counters"].items():
            getattr(attachment, name).fill_(value)
        attachment.input_size.fill_(state["input_size"])
        attachment.strength.fill_(state["strength"])
    attachment.height.loaded()
    attachment.fitting.load_state(state["fitting"])
    attachment.phi_name, attachment.channel_norm = state["phi_name"], state["channel_norm"]
    attachment.seed, attachment.clip, attachment.ramp_steps = state["seed"], state["clip"], state["ramp_steps"]
    attachment.reached = state["reached"]
    buffers, constants = state["evaluation_buffers"], state["constants"]
    attachment.estimates = (
        None
        if buffers is None
        else Estimates(dict(buffers), None if constants is None else dict(constants), state["weights"])
    )
    trained = state["trained_norms"]
    attachment.trained_norms = None if trained is None else set(trained)
