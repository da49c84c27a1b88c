"""What a training is told about the perturbation when it starts."""

import math
from collections.abc import Iterator

from mp_lightning.perturbation import NamedPhi
from mp_lightning.sites import Attachment
from mp_lightning.sites.attachment import CLIP


def opening(attachment: Attachment, phi: NamedPhi | None, total: int | None) -> str:
    """What is attached, where, and how its strength will grow.

    Args:
        attachment: of the model.
        phi: that was asked for; None where another perturbation was.
        total: number of training batches of the run; None if nobody knows it.
    """
    what = "perturbation" if phi is None else "phi"
    name = phi if phi is not None and phi.name == attachment.phi_name else attachment.phi_name
    return f"{attachment.plan.size}, {what} {name}, {attachment.outlook(total)}"


def stays_in_force(
    attachment: Attachment,
    phi: NamedPhi | None,
    strength: float | None,
    full_strength_at: float | None,
    acts_below: float | None,
    seed: int | None,
    clip: float | None,
    input_size: int | None,
) -> Iterator[str]:
    """What a model that is attached already keeps, where something else is asked for (None, usual clip: nothing is)."""
    trained, follows = float(attachment.strength), float(attachment.fitting.full_strength_at)
    kept: list[tuple[str, str]] = []
    if _differ(strength, trained):
        kept.append((f"at strength {trained:g}", f"{strength:g}"))
    if _differ(full_strength_at, follows):
        kept.append((f"with full_strength_at={follows:g}", f"{full_strength_at:g}"))
    if _differ(acts_below, below := float(attachment.fitting.acts_below)):
        kept.append((f"with acts_below={below:g}", f"{acts_below:g}"))
    if seed not in (None, attachment.seed):
        kept.append((f"with seed={attachment.seed}", f"{seed}"))
    if clip not in (CLIP, attachment.clip):
        kept.append((f"with clip={attachment.clip}", f"{clip}"))
    if input_size not in (None, int(attachment.input_size)):
        kept.append((f"with input_size={int(attachment.input_size)}", f"{input_size}"))
    if phi is not None:
        if attachment.phi_name != phi.name:
            kept.append((f"with phi '{attachment.phi_name}'", f"'{phi.name}'"))
        if attachment.noise_per != phi.noise_per:
            kept.append((f"with noise per {attachment.noise_per}", f"noise per {phi.noise_per}"))
    for was, asked in kept:
        yield f"the model was trained {was}, which stays in force instead of {asked}"


def _differ(asked: float | None, trained: float) -> bool:
    return asked is not None and not math.isclose(asked, trained, rel_tol=1e-6)
