"""The perturbation as part of a module, for authors who prefer to declare it."""

from pathlib import Path
from typing import Any

from torch import nn

from mp_lightning.callback import MetaPerturbCallback
from mp_lightning.errors import ConfigurationError
from mp_lightning.perturbation import NamedPhi, Phi
from mp_lightning.sites import Attachment


class MetaPerturbMixin:
    """Makes MetaPerturb part of a LightningModule: phi and the statistics are in its ``state_dict``.

    Call :meth:`perturb` at the end of ``__init__``; the rest (ramp, evaluation, checkpoints) happens by itself, with
    any Trainer. A checkpoint then loads by ``load_from_checkpoint`` as every other. The mixin is named before
    ``LightningModule``; a ``configure_callbacks`` of the module's own adds those of ``super().configure_callbacks()``.

    Example::

        class Classifier(MetaPerturbMixin, L.LightningModule):
            def __init__(self):
                super().__init__()
                self.net = torchvision.models.resnet18(num_classes=10)
                self.perturb()
    """

    _perturb_options: dict[str, Any] | None = None

    def perturb(self, phi: "str | Path | Phi | NamedPhi | None" = None, **options: Any) -> Attachment:
        """Attach the perturbation.

        Args:
            phi: as for :class:`~mp_lightning.MetaPerturbCallback`.
            options: its other arguments, but ``marker``, for which there is no need.

        Raises:
            ConfigurationError: the mixin comes after LightningModule among the bases, which hides what it adds.
        """
        bases = [base.__name__ for base in type(self).__mro__]
        if "LightningModule" in bases[: bases.index("MetaPerturbMixin")]:
            raise ConfigurationError(
                f"{type(self).__name__} has MetaPerturbMixin after LightningModule among its bases, so that Lightning "
                "never sees its callback; name the mixin first: class "
                f"{type(self).__name__}(MetaPerturbMixin, L.LightningModule)"
            )
        self._perturb_options = {"phi": phi, **options, "marker": False}
        assert isinstance(self, nn.Module)
        callback = self._metaperturb_callback()
        attachment = callback.attach(self)
        attachment.inference = callback.make_inference()
        attachment.coeff.zero_()  # until training begins, or a trained state is loaded
        return attachment

    def configure_callbacks(self) -> list[Any]:
        """The module's own callbacks and the one that runs the perturbation."""
        inherited: Any = getattr(super(), "configure_callbacks", list)()
        return [*(inherited if isinstance(inherited, list | tuple) else [inherited]), self._metaperturb_callback()]

    def _metaperturb_callback(self) -> MetaPerturbCallback:
        if self._perturb_options is None:
            raise ConfigurationError(
                f"{type(self).__name__} has the mixin but no perturbation; call self.perturb() in __init__, "
                "or, where configure_model makes the layers, leave the mixin out and give the trainer "
                "MetaPerturbCallback()"
            )
        callback = MetaPerturbCallback(**self._perturb_options)
        callback.persistent = True
        return callback
