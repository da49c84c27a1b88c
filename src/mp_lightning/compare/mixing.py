"""Regularizers that change the batch: mixed images, mixed features, soft labels."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torchvision.transforms import v2

from mp_lightning.compare.site_layers import SiteHooks
from mp_lightning.compare.training_step import Step, WrappedStep
from mp_lightning.errors import ConfigurationError
from mp_lightning.sites import SitePlan
from mp_lightning.sites.site import Site, in_backward


class BatchTransform(Callback):
    """Gives ``training_step`` a changed (images, labels, ...) batch, whose labels are class probabilities.

    The step must take these in place of classes, as ``F.cross_entropy`` does. A batch is a list or a tuple (named ones
    included) and stays one; what comes after images and labels is passed on. Labels may be probabilities already, so
    that several of these callbacks act one after the other.

    Args:
        name: what it is called in messages.
        transform: from images (B, C, H, W) and probabilities (B, K) to the same; any randomness from torch's global
            generator.
        num_classes: K.

    Raises:
        ConfigurationError: by ``training_step``, where the batch is nothing of the kind.
    """

    def __init__(
        self, name: str, transform: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], num_classes: int
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ConfigurationError(f"{name}: num_classes={num_classes} leaves nothing to tell apart; give 2 or more")
        self.name = name
        self.transform = transform
        self.num_classes = num_classes
        self._looked = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._looked = False
        WrappedStep.put(pl_module, self._around)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        WrappedStep.take(pl_module, self._around)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        WrappedStep.take(pl_module, self._around)

    def _around(self, step: Step, batch: Any, *args: Any, **kwargs: Any) -> Any:
        x, y, *rest = self._checked(batch)
        x, y = self.transform(x, self._probabilities(y).to(x.dtype))
        changed = (x, y, *rest)
        named = hasattr(batch, "_fields")
        return step(type(batch)(*changed) if named else type(batch)(changed), *args, **kwargs)

    def _checked(self, batch: Any) -> Any:
        if isinstance(batch, list | tuple) and len(batch) >= 2:
            x, y = batch[:2]
            if isinstance(x, Tensor) and isinstance(y, Tensor) and x.is_floating_point() and x.dim() == 4:
                classes = y.dtype == torch.int64 and y.dim() == 1
                probabilities = y.is_floating_point() and y.shape[1:] == (self.num_classes,)
                if (classes or probabilities) and len(x) == len(y):
                    return batch
        raise ConfigurationError(
            f"{self.name} needs batches of images (B, C, H, W) of a floating dtype and labels (B,) of int64, and got "
            f"{_described(batch)}; let the data loader give such, or leave {self.name} out"
        )

    def _probabilities(self, y: Tensor) -> Tensor:
        if y.dim() == 2:
            return y
        if not self._looked:  # at the first batch alone, as looking makes a GPU wait
            self._looked = True
            if int(y.min()) < 0 or int(y.max()) >= self.num_classes:
                raise ConfigurationError(
                    f"{self.name}: a batch has labels from {int(y.min())} to {int(y.max())}, which are not classes of "
                    f"num_classes={self.num_classes}; give the number of classes of the data"
                )
        return F.one_hot(y, self.num_classes)


class MixUp(BatchTransform):
    """mixup (Zhang et al. 2018, arXiv 1710.09412), by torchvision's transform: neighbours in the batch are mixed.

    Args:
        num_classes: of the data.
        alpha: of the distribution Beta(alpha, alpha) of the weight, one for each batch.

    Raises:
        ConfigurationError: an argument is out of range.
    """

    def __init__(self, num_classes: int, alpha: float = 0.2) -> None:
        _check_alpha("mixup", alpha)
        super().__init__("mixup", v2.MixUp(alpha=alpha), num_classes)


class LabelSmoothing(BatchTransform):
    """Label smoothing (Szegedy et al. 2016, arXiv 1512.00567): as ``label_smoothing`` of ``F.cross_entropy``.

    Args:
        num_classes: K of the data.
        smoothing: probability that is spread evenly over all K classes.

    Raises:
        ConfigurationError: an argument is out of range.
    """

    def __init__(self, num_classes: int, smoothing: float = 0.1) -> None:
        if not 0 <= smoothing < 1:
            raise ConfigurationError(f"label_smoothing: smoothing={smoothing} is no fraction; give one from 0 up to 1")
        super().__init__("label_smoothing", self._smooth, num_classes)
        self.smoothing = smoothing

    def _smooth(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x, y * (1 - self.smoothing) + self.smoothing / self.num_classes


class ManifoldMixup(BatchTransform):
    """Manifold Mixup (Verma et al. 2019, arXiv 1806.05236): images, or the features at one of the sites, are mixed.

    Each step draws a weight from Beta(alpha, alpha), one place, and a permutation of the batch. The paper draws the
    place from a set of layers that it chooses for each network, the input among them: here it is the input and all
    sites, each as likely. Only the first call of a site in a step is mixed. Beside MetaPerturbCallback, perturbed
    features are mixed.

    Args:
        num_classes: of the data.
        alpha: of the distribution of the weight; 2 in the paper.
        sites: which sites; None takes all that :func:`~mp_lightning.find_sites` gives, also beside MetaPerturbCallback.

    Raises:
        ConfigurationError: an argument is out of range; by the run, where a site is not reached by ``training_step``,
            has another batch size than the images, or is computed again by activation checkpointing.
    """

    def __init__(self, num_classes: int, alpha: float = 2.0, sites: SitePlan | None = None) -> None:
        _check_alpha("manifold_mixup", alpha)
        super().__init__("manifold_mixup", self._mix_somewhere, num_classes)
        self.sites = sites
        self._weights = torch.distributions.Beta(torch.tensor(float(alpha)), torch.tensor(float(alpha)))
        self._hooks: SiteHooks | None = None
        self._place: Site | None = None  # None: the input
        self._mix: tuple[float, Tensor] | None = None  # weight and permutation that the place still waits for

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._hooks = SiteHooks(pl_module, self.sites)
        self._hooks.register([self._after] * len(self._hooks.sites))
        super().on_fit_start(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._remove()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._remove()

    def draw(self, places: int, batch: int) -> tuple[float, int, Tensor]:
        """What one step needs, in this order from torch's global generator: a weight in (0, 1), the index of a place,
        and a permutation of the batch (int64)."""
        return float(self._weights.sample()), int(torch.randint(places, ())), torch.randperm(batch)

    def _mix_somewhere(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        assert self._hooks is not None
        weight, place, permutation = self.draw(1 + len(self._hooks.sites), len(x))
        mix = weight, permutation.to(x.device)
        self._place = self._hooks.sites[place - 1] if place else None
        self._mix = mix if place else None
        return x if place else _mixed(x, *mix), _mixed(y, *mix)

    def _around(self, step: Step, batch: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            result = super()._around(step, batch, *args, **kwargs)
            if self._mix is not None and self._place is not None:
                raise ConfigurationError(
                    f"manifold_mixup was to mix at site '{self._place.spec.name}', which training_step does not reach; "
                    "leave it out of sites="
                )
        finally:
            self._mix = None
        return result

    def _after(self, site: Site, args: Any, y: Tensor) -> Tensor | None:
        """The forward hook."""
        if site is not self._place:
            return None
        if in_backward():
            raise ConfigurationError(
                f"manifold_mixup cannot mix at site '{site.spec.name}' again, which activation checkpointing computes "
                "twice; leave the site out of sites=, or use no checkpointing"
            )
        if self._mix is None:
            return None
        (weight, permutation), self._mix = self._mix, None
        if len(y) != len(permutation):
            raise ConfigurationError(
                f"manifold_mixup: site '{site.spec.name}' has a batch of {len(y)} where there are {len(permutation)} "
                "images; leave it out of sites="
            )
        return _mixed(y, weight, permutation)

    def _remove(self) -> None:
        self._place = self._mix = None
        if self._hooks is not None:
            self._hooks.remove()
            self._hooks = None


def _mixed(values: Tensor, weight: float, permutation: Tensor) -> Tensor:
    return weight * values + (1 - weight) * values[permutation]


def _check_alpha(name: str, alpha: float) -> None:
    if not alpha > 0:
        raise ConfigurationError(f"{name}: alpha={alpha} is not positive; 0.2 to 2 are usual")


def _described(batch: Any) -> str:
    if isinstance(batch, list | tuple):
        return f"{type(batch).__name__} of {', '.join(_described(part) for part in batch[:4]) or 'nothing'}"
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')} {tuple(batch.shape)}"
    return type(batch).__name__
