"""Callbacks that put layers at the sites of a module while it trains."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import Optimizer

from mp_lightning.compare.layers import InformationDropout
from mp_lightning.compare.site_layers import SiteLayers
from mp_lightning.compare.training_step import Step, WrappedStep
from mp_lightning.errors import ConfigurationError
from mp_lightning.sites import SitePlan


class AtSites(Callback):
    """Layers behind the sites of a module while it trains; beside MetaPerturbCallback, both act, at shared sites too.

    In evaluation, and after ``fit``, the model is as without them. Parameters of the layers are trained by the first
    optimizer, with the settings of its first group; in a checkpoint the layers are part of the state of this callback.

    Example::

        dropout = AtSites(lambda channels: nn.Dropout(0.1), "dropout")
        trainer = L.Trainer(max_epochs=100, callbacks=[dropout])

    Args:
        make_layer: makes the layer for a site, from its number of channels.
        name: what it is called; two of these callbacks in one run need two names. Without dots.
        sites: where; None takes all that :func:`~mp_lightning.find_sites` gives, of which phi may take a share.
    """

    def __init__(self, make_layer: Callable[[int], nn.Module], name: str, sites: SitePlan | None = None) -> None:
        super().__init__()
        self.make_layer = make_layer
        self.name = name
        self.sites = sites
        self._layers: SiteLayers | None = None
        self._optimizer: Optimizer | None = None
        self._state: dict[str, Tensor] | None = None

    @property
    def state_key(self) -> str:
        return f"{type(self).__qualname__}:{self.name}"

    def state_dict(self) -> dict[str, Any]:
        return {} if self._layers is None else {"layers": self._layers.own_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = state_dict.get("layers")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Not in ``setup``: the module must be attached by then, if another callback attaches it.

        Raises:
            SiteError: the module has no site.
            ConfigurationError: it has layers of this name, or the processes of this run would train them apart.
        """
        self._layers = SiteLayers(pl_module, self.make_layer, self.name, self.sites)
        if self._state is not None:
            self._layers.load_state_dict(self._state)
            self._state = None
        parameters = list(self._layers.parameters())
        if not parameters:
            return
        if trainer.world_size > 1:
            raise ConfigurationError(
                f"{self.name} has parameters, which {type(trainer.strategy).__name__} does not keep equal over its "
                "processes; use devices=1"
            )
        # The optimizers are there, and are restored after this: a run that is resumed finds as many parameters.
        self._optimizer = trainer.optimizers[0]
        self._optimizer.param_groups[0]["params"].extend(parameters)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._remove()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Not in ``on_train_end``, where checkpoints are still saved, and which a run of no epoch never reaches."""
        self._remove()

    def _remove(self) -> None:
        if self._layers is None:
            return
        self._layers.remove()
        if self._optimizer is not None:
            theirs = set(self._layers.parameters())
            for group in self._optimizer.param_groups:
                group["params"][:] = [parameter for parameter in group["params"] if parameter not in theirs]
            for parameter in theirs:
                self._optimizer.state.pop(parameter, None)
        self._layers = self._optimizer = None


class InformationDropoutCallback(AtSites):
    """Information Dropout at the sites: :class:`~mp_lightning.compare.layers.InformationDropout` and its cost.

    Adds ``beta`` times the mean over the sites of the layers' ``kl``, which are means over elements, to the loss that
    ``training_step`` gives (a tensor, or ``loss`` of a dict; None is left alone). The authors' code adds sums over the
    elements of an image, divided by the number of training images, so that its beta means something else.

    The noise is not mean-one, and batch norm keeps the statistics of noisy forwards, as it does under dropout.

    Args:
        beta: weight of the cost.
        max_alpha: the largest size of the noise.
        sites: where; None takes all that :func:`~mp_lightning.find_sites` gives, of which phi may take a share.

    Raises:
        ConfigurationError: an argument is out of range.
    """

    def __init__(self, beta: float = 0.1, max_alpha: float = 0.7, sites: SitePlan | None = None) -> None:
        if not beta >= 0:
            raise ConfigurationError(f"information_dropout: beta={beta} is negative; give a number from 0 up")
        InformationDropout(1, max_alpha)  # the same check, early
        super().__init__(partial(InformationDropout, max_alpha=max_alpha), "information_dropout", sites)
        self.beta = beta

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not pl_module.automatic_optimization:
            raise ConfigurationError(
                f"information_dropout adds to the loss that training_step gives, and {type(pl_module).__name__} "
                "optimizes by itself; use automatic optimization"
            )
        super().on_fit_start(trainer, pl_module)
        WrappedStep.put(pl_module, self._add_cost)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        WrappedStep.take(pl_module, self._add_cost)
        super().on_exception(trainer, pl_module, exception)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        WrappedStep.take(pl_module, self._add_cost)
        super().teardown(trainer, pl_module, stage)

    def _add_cost(self, step: Step, *args: Any, **kwargs: Any) -> Any:
        assert self._layers is not None
        layers = [layer for layer in self._layers.layers() if isinstance(layer, InformationDropout)]
        for layer in layers:
            layer.kl = None  # that of the step before is of no use where this step does not reach the layer
        result = step(*args, **kwargs)
        costs = [layer.kl for layer in layers if layer.kl is not None]
        if result is None or not costs:
            return result
        cost = self.beta * torch.stack(costs).mean()
        return {**result, "loss": result["loss"] + cost} if isinstance(result, Mapping) else result + cost
