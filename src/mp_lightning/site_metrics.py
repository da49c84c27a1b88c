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
    """The strength that acts, and what happens at the sites, every so many training batches.

    Args:
        attachment: of the model; its batches so far count.
        every: number of batches between two looks; 0 for none.
    """

    def __init__(self, attachment: Attachment, every: int) -> None:
        self._attachment = attachment
        self._metrics = SiteMetrics(attachment)
        self._every = every
        self._batches = int(attachment.steps)

    def begin_batch(self) -> None:
        """Count a batch, and watch its forward when its turn has come."""
        self._batches += 1
        if self._is_due() and self._metrics.can_watch:
            self._metrics.watch()

    def end_batch(self) -> dict[str, float]:
        """``metaperturb/strength`` and what :meth:`SiteMetrics.measure` gives; empty when it is not its turn.

        Before the attachment counts the batch.
        """
        metrics = self._metrics.measure()
        if self._is_due():
            metrics[f"{PREFIX}/strength"] = float(self._attachment.coeff)
        return metrics

    def stop(self) -> None:
        """End a watch that an exception left."""
        self._metrics.stop()

    def _is_due(self) -> bool:
        return self._every > 0 and self._batches % self._every == 0


class SiteMetrics:
    """The multiplier at each site, with noise, on a few images of one training batch.

    Args:
        attachment: of the model; compiled models are not watched, since a hook would compile them again.
    """

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment
        self._seen: dict[Site, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    @property
    def can_watch(self) -> bool:
        """Whether the model runs uncompiled."""
        parts = self._attachment.model.modules()
        return not any(hasattr(part, "_orig_mod") or part._compiled_call_impl is not None for part in parts)

    def watch(self) -> None:
        """Keep what the sites get in the next forward; its last call counts."""
        self.stop()
        self._handles = [site.register_forward_pre_hook(self._keep) for site in self._attachment.sites]

    def stop(self) -> dict[Site, Tensor]:
        """End a watch; returns what was seen."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        seen, self._seen = self._seen, {}
        return seen

    def measure(self) -> dict[str, float]:
        """Mean and standard deviation of the multiplier, over elements, and the mean scale s of the channels, by site.

        Returns:
            ``metaperturb/SITE/multiplier_mean``, ``.../multiplier_std``, and, of MetaPerturb, ``.../scale``; empty
            without a forward since :meth:`watch`.
        """
        seen = self.stop()
        names: list[str] = []
        values: list[Tensor] = []
        with torch.no_grad():
            for site, x in seen.items():
                for name, value in self._of(site, x).items():
                    names.append(f"{PREFIX}/{site.spec.name}/{name}")
                    values.append(value)
        return dict(zip(names, torch.stack(values).tolist(), strict=True)) if values else {}

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
