"""What the perturbation does at each site, now and then, for a logger: read beside the step and never part of it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mp_lightning.perturbation import MetaPerturb
from mp_lightning.sites import Attachment
from mp_lightning.sites.site import Site

_IMAGES = 4  # of a batch that are looked at
PREFIX = "metaperturb"


def batches_between_looks(trainer: Any, total: int | None) -> int:
    """Ten times as many as Lightning has between two logs, or a tenth of a run of so many training batches."""
    usual = 10 * max(1, trainer.log_every_n_steps)
    return usual if total is None else min(usual, max(1, total // 10))


class SiteLog:
    """The strength that acts, and the multiplier at each site, with noise, on a few images, every so many batches.

    Args:
        attachment: of the model; its batches so far count. The sites of compiled models are not watched, since a hook
            would compile them again.
        every: number of training batches between two looks; 0 for none.
    """

    def __init__(self, attachment: Attachment, every: int) -> None:
        self._attachment = attachment
        self._every = every
        self._batches = int(attachment.steps)
        self._seen: dict[Site, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def begin_batch(self) -> None:
        """Count a batch, and keep what the sites get in its forward when its turn has come; their last call counts."""
        self._batches += 1
        self.stop()
        if self._is_due() and not _is_compiled(self._attachment.model):
            self._handles = [site.register_forward_pre_hook(self._keep) for site in self._attachment.sites]

    def end_batch(self) -> dict[str, float]:
        """What the batch showed, before the attachment counts it; empty when it is not its turn.

        Returns:
            ``metaperturb/strength``, and for each site that was reached the mean and standard deviation of the
            multiplier over elements, ``metaperturb/SITE/multiplier_mean`` and ``.../multiplier_std``, and, of
            MetaPerturb, the mean scale s of the channels, ``.../scale``.
        """
        found: dict[str, Tensor] = {}
        seen = dict(self._seen)
        self.stop()
        with torch.no_grad():
            for site, x in seen.items():
                found |= {f"{PREFIX}/{site.spec.name}/{name}": value for name, value in self._of(site, x).items()}
        if self._is_due():
            found[f"{PREFIX}/strength"] = self._attachment.coeff
        return dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True)) if found else {}

    def stop(self) -> None:
        """End a watch, as one that an exception left."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._seen.clear()

    def _is_due(self) -> bool:
        return self._every > 0 and self._batches % self._every == 0

    def _keep(self, site: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(site, Site)
        self._seen[site] = args[0][:_IMAGES].detach().clone()

    def _of(self, site: Site, x: Tensor) -> dict[str, Tensor]:
        perturbation = self._attachment.perturbation
        maps, norms = site.maps_and_norms(x)
        with torch.autocast(x.device.type, enabled=False):
            eps = site.first_noise(maps)
            multiplier = perturbation.multiplier(maps, eps, site.statistics, norms).expand_as(maps)
            found = {"multiplier_mean": multiplier.mean(), "multiplier_std": multiplier.std()}
            if isinstance(perturbation, MetaPerturb):
                found["scale"] = perturbation.scale(maps, perturbation.phi, site.statistics, norms).mean()
        return found


def _is_compiled(model: nn.Module) -> bool:
    return any(hasattr(part, "_orig_mod") or part._compiled_call_impl is not None for part in model.modules())
