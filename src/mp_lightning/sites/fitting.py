"""How far a network fits its training images, by its training loss, for a strength that follows it.

A network that overfits gains from noise which harms one that cannot fit its images yet. To follow a run is the idea of
adaptive augmentation (Karras et al., NeurIPS 2020, arXiv 2006.06676, Section 3). There an estimate of overfitting moves
the probability of augmentation; here the training loss decides the strength of the perturbation.
"""

from collections.abc import Iterator
from numbers import Real
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from mp_lightning.errors import ConfigurationError

_FIRST = 5  # batches whose mean loss is that of a network that has not learned
_OUTLIER = 2.0  # times the median of the first losses
_SHORTEST = 10  # batches that the recent loss looks back over
OFF = 1.0


class Fitting(nn.Module):
    """The recent training loss beside the first one.

    With ``share = recent / first``, the strength is multiplied by ``(acts_below - share) / (acts_below -
    full_strength_at)``, at least 0 and at most 1. Losses that are not finite are passed over, and first ones above
    twice their median. Where the first loss is not above 0, a share of it means nothing, and the factor is 1.

    Args:
        full_strength_at: share of the first loss at or below which the whole strength acts; 1 for a strength that does
            not follow the loss.
        persistent: keep all of it in the model's ``state_dict``.
        acts_below: share of the first loss at or above which nothing acts, above ``full_strength_at``.

    Attributes:
        follows: whether the strength follows the loss.
        told: whether any loss was given.
        first: the mean of the first losses, a float32 tensor without dimensions; 0 before any is known.
    """

    full_strength_at: Tensor
    acts_below: Tensor
    first_losses: Tensor
    recent: Tensor
    losses: Tensor
    first: Tensor
    follows: bool
    told: bool

    def __init__(self, full_strength_at: float, persistent: bool, acts_below: float = 1.0) -> None:
        super().__init__()
        for name, value in {
            "full_strength_at": torch.tensor(float(full_strength_at), dtype=torch.float32),
            "acts_below": torch.tensor(float(acts_below), dtype=torch.float32),
            "first_losses": torch.zeros(_FIRST, dtype=torch.float32),
            "recent": torch.zeros((), dtype=torch.float32),
            "losses": torch.zeros((), dtype=torch.int64),
        }.items():
            self.register_buffer(name, value, persistent=persistent)
        self.register_buffer("first", torch.zeros((), dtype=torch.float32), persistent=False)
        self._refresh()
        self.register_load_state_dict_post_hook(_refreshed)

    def _usual_losses(self) -> Tensor:
        """The first losses (5,), with NaN for those that are not known or far above the others."""
        noted = torch.arange(_FIRST, device=self.losses.device) < self.losses
        first = torch.where(noted, self.first_losses, torch.nan)
        middle = ((self.losses.clamp(max=_FIRST) - 1) // 2).clamp(min=0)
        median = first.sort().values.gather(0, middle.view(1))  # nanmedian() would make a GPU wait
        usual = (first <= _OUTLIER * median) | (first <= 0)
        return torch.where(usual, first, torch.nan)

    def note(self, loss: Tensor | float | None, horizon: float, synchronize: bool) -> None:
        """Take in the loss of one training batch.

        Args:
            loss: a number, or a tensor, whose mean counts; None where this process has none.
            horizon: number of batches that the recent loss looks back over; at least 10 are taken.
            synchronize: take the mean over all processes, each of which must call this.

        Raises:
            ConfigurationError: it is no number.
        """
        if loss is not None and not isinstance(loss, Tensor | Real):
            raise ConfigurationError(f"step({loss!r}): give the loss of the batch, a number or a tensor, or nothing")
        value = torch.as_tensor(torch.nan if loss is None else loss).detach().to(self.recent).mean()
        known = value.isfinite()
        if synchronize:
            sums = torch.stack([torch.where(known, value, 0.0), known.to(value)])
            torch.distributed.all_reduce(sums)
            value, known = sums[0] / sums[1], sums[1] > 0
        self.told = self.told or loss is not None
        place = torch.arange(_FIRST, device=value.device) == self.losses
        self.first_losses.copy_(torch.where(known & place, value, self.first_losses))
        self.losses += known
        weight = torch.where(self.losses == 1, torch.ones_like(value), 1 / max(horizon, _SHORTEST))
        self.recent.copy_(torch.where(known, self.recent + weight * (value - self.recent), self.recent))
        usual = self._usual_losses()
        self.first.copy_(usual.nanmean().nan_to_num())
        outlier = (self.losses == _FIRST) & usual.isnan().any()
        self.recent.copy_(torch.where(known & outlier, self.first, self.recent))  # which would take long to forget it

    def factor(self) -> Tensor:
        """What the strength is multiplied by, a float32 tensor without dimensions; 1 before any loss is known."""
        span = (self.acts_below - self.full_strength_at).clamp(min=1e-6)
        factor = ((self.acts_below - self.recent / self.first) / span).clamp(0, 1)
        follows = (self.full_strength_at < OFF) & (self.losses > 0) & (self.first > 0)
        return torch.where(follows, factor, torch.ones_like(factor))

    def state(self) -> dict[str, Any]:
        """All of it, as numbers and lists."""
        return {name: value.tolist() for name, value in self._kept()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` gave."""
        for name, value in self._kept():
            value.copy_(torch.tensor(state[name], dtype=value.dtype))
        self._refresh()

    def _kept(self) -> Iterator[tuple[str, Tensor]]:
        return (item for item in self.named_buffers() if item[0] != "first")  # which follows from the others

    def _refresh(self) -> None:
        self.follows = float(self.full_strength_at) < OFF
        self.told = int(self.losses) > 0
        self.first.copy_(self._usual_losses().nanmean().nan_to_num())


def _refreshed(module: nn.Module, incompatible: Any) -> None:
    assert isinstance(module, Fitting)
    module._refresh()
