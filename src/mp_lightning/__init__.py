"""mp_lightning: a regularizer that was learned, for any PyTorch Lightning training in one line.

An implementation of MetaPerturb (Ryu et al., NeurIPS 2020, arXiv 2006.07540).
"""

from importlib.metadata import version

from mp_lightning.callback import MetaPerturbCallback
from mp_lightning.checkpoints import CheckpointError
from mp_lightning.compare import Arm, Comparison, compare
from mp_lightning.errors import ConfigurationError, DataError, PhiError, SiteError, UserError
from mp_lightning.inference import Fold, Mean, MonteCarlo, export, exportable, reestimate_batch_norm
from mp_lightning.mixin import MetaPerturbMixin
from mp_lightning.perturbation import (
    MetaPerturb,
    NamedPhi,
    Perturbation,
    Phi,
    PhiDescription,
    describe_phi,
    list_phi,
    load_phi,
    save_phi,
)
from mp_lightning.sites import (
    Attachment,
    SitePlan,
    SiteSpec,
    attach,
    attachment_of,
    choose_sites,
    detach,
    find_activations,
    find_sites,
)

__version__ = version("mp_lightning")

__all__ = [
    "Arm",
    "Attachment",
    "CheckpointError",
    "Comparison",
    "ConfigurationError",
    "DataError",
    "Fold",
    "Mean",
    "MetaPerturb",
    "MetaPerturbCallback",
    "MetaPerturbMixin",
    "MonteCarlo",
    "NamedPhi",
    "Perturbation",
    "Phi",
    "PhiDescription",
    "PhiError",
    "SiteError",
    "SitePlan",
    "SiteSpec",
    "UserError",
    "attach",
    "attachment_of",
    "choose_sites",
    "compare",
    "describe_phi",
    "detach",
    "export",
    "exportable",
    "find_activations",
    "find_sites",
    "list_phi",
    "load_phi",
    "reestimate_batch_norm",
    "save_phi",
]
