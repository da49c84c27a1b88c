"""Floor 2: where does the perturbation act? Finding sites in a model, one site, and attaching and detaching."""

from mp_lightning.sites.attachment import Attachment
from mp_lightning.sites.choice import Sites, choose_sites
from mp_lightning.sites.discovery import find_activations, find_sites
from mp_lightning.sites.plan import SitePlan, SiteSpec
from mp_lightning.sites.surgery import attach, attachment_of, detach

__all__ = [
    "Attachment",
    "SitePlan",
    "SiteSpec",
    "Sites",
    "attach",
    "attachment_of",
    "choose_sites",
    "detach",
    "find_activations",
    "find_sites",
]
