"""Layers at the sites of a network, where MetaPerturb would act, or behind it; in plain PyTorch."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mp_lightning.errors import ConfigurationError
from mp_lightning.perturbation import NoiseKey, Norms, Perturbed, Statistics
from mp_lightning.sites import Attachment, SitePlan, attach, attachment_of, choose_sites
from mp_lightning.sites.fitting import OFF
from mp_lightning.sites.layout import as_maps, from_maps
from mp_lightning.sites.site import Site


class Identity:
    """A perturbation that leaves feature maps alone: sites for other things to act at."""

    name = "identity"

    def initial_statistics(self, channels: int) -> Statistics:
        return {}

    def measure(self, x: Tensor, running: Statistics, synchronize: bool) -> tuple[Statistics, None]:
        return running, None

    def multiplier(self, x: Tensor, eps: Tensor | None, statistics: Statistics, norms: Norms) -> Tensor:
        return x.new_ones(())

    def fuses(self, x: Tensor) -> bool:
        return True

    def fused(self, x: Tensor, key: NoiseKey | None, running: Statistics, norms: Norms, **_: Any) -> Perturbed:
        return Perturbed(x, None, None)

    def record(self, running: Statistics, measured: Statistics, momentum: float) -> None:
        """Nothing is measured."""


class _Beside(Attachment):
    """Further sites of a model that is attached already, to :class:`Identity`; no submodule of the model."""

    def __init__(self, first: Attachment, plan: SitePlan) -> None:
        self.__dict__["_first"] = first
        super().__init__(
            first.model,
            plan,
            Identity(),
            phi_name=Identity.name,
            channel_norm=plan.channel_norm,
            input_size=1,
            strength=1.0,
            full_strength_at=OFF,
            acts_below=OFF,
            seed=0,
            clip=None,
            synchronize=False,
            persistent=False,
        )
        self.to(first.coeff.device)

    @property
    def perturbing(self) -> bool:
        """Shared: activations that either computes at a site are calls of the model for neither."""
        first: Attachment = self.__dict__["_first"]
        return first.perturbing

    @perturbing.setter
    def perturbing(self, value: bool) -> None:
        self.__dict__["_first"].perturbing = value


class SiteHooks:
    """Forward hooks on the sites of a model; where it is not attached yet it is attached, to :class:`Identity`.

    A hook is called as ``hook(site, (x, call, training), y)`` and may return what is to stand in place of y; as for
    every module of torch.

    Args:
        model: any module. One that is attached at some of the sites, or at others, keeps its perturbation there.
        sites: which sites; None takes all that :func:`~mp_lightning.find_sites` gives.

    Raises:
        SiteError: the model has no site, or ``sites`` do not fit it.
    """

    def __init__(self, model: nn.Module, sites: SitePlan | None = None) -> None:
        attachment = attachment_of(model)
        self._attached: Attachment | None = None
        if attachment is None:
            # The identity does not ask for the size of the input, which can then remain unknown.
            attachment = self._attached = attach(model, perturbation=Identity(), sites=sites, clip=None)
            attachment.height.note(1.0, training=True)
            plan, found = attachment.plan, _by_place(attachment)
        else:
            plan = choose_sites(attachment.model, sites)
            found = _by_place(attachment)
            further = [spec for spec in plan if spec.place not in found]
            if further:
                self._attached = _Beside(attachment, SitePlan(further))
                found |= _by_place(self._attached)
        self.sites = [found[spec.place] for spec in plan]
        self._handles: list[RemovableHandle] = []

    def register(self, hooks: Iterable[Callable[..., Any]]) -> None:
        """One hook for each of the sites, in their order."""
        self._handles += [site.register_forward_hook(hook) for site, hook in zip(self.sites, hooks, strict=True)]

    def remove(self) -> None:
        """Take the hooks away, and the attachment that was made for them."""
        while self._handles:
            self._handles.pop().remove()
        if self._attached is not None:
            self._attached.detach()
            self._attached = None


def _by_place(attachment: Attachment) -> dict[tuple[str, str | None, int], Site]:
    return {site.spec.place: site for site in attachment.all_sites()}


class SiteLayer(nn.Module):
    """A layer behind one site. It acts where the network around the site trains."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def after(self, site: Site, args: tuple[Tensor, int, bool], y: Tensor) -> Tensor | None:
        """The forward hook. Layers read maps (B, C, H, W), whatever the layout of the site."""
        *_, training = args
        if not training:
            return None
        layout = site.spec.layout
        return from_maps(self.layer(as_maps(y, layout)), y, layout)


class SiteLayers(nn.ModuleList):
    """One layer at each site of a model, as a submodule of it that its ``state_dict`` does not show.

    Args:
        model: any module.
        make_layer: makes the layer for a site, from its number of channels.
        name: what the submodule is called after; one of each name at a time.
        sites: as for :class:`SiteHooks`.

    Raises:
        ConfigurationError: the model has layers of that name already.
    """

    def __init__(
        self, model: nn.Module, make_layer: Callable[[int], nn.Module], name: str, sites: SitePlan | None = None
    ) -> None:
        super().__init__()
        self.key = f"_{name}_at_sites"
        if self.key in model._modules:
            raise ConfigurationError(f"the model has layers '{name}' at its sites already; give others another name")
        hooks = SiteHooks(model, sites)
        try:
            layers = [SiteLayer(make_layer(site.spec.channels)) for site in hooks.sites]
        except BaseException:
            hooks.remove()
            raise
        self.extend(layers)
        self.__dict__.update(_hooks=hooks, _model=model)  # not as a submodule: the model is this module's parent
        parameter = next(model.parameters(), None)
        if parameter is not None:
            self.to(parameter.device, parameter.dtype)
        self.train(model.training)
        self.register_load_state_dict_post_hook(_expect_nothing)
        model.add_module(self.key, self)
        hooks.register(layer.after for layer in layers)

    def forward(self, x: Any) -> Any:
        """The identity: containers such as ``nn.Sequential`` call every submodule, this one included."""
        return x

    def layers(self) -> list[nn.Module]:
        """Those that were made, in the order of the sites."""
        return [layer.layer for layer in self if isinstance(layer, SiteLayer)]

    def remove(self) -> None:
        """Leave the model as it was."""
        self.__dict__["_hooks"].remove()
        self.__dict__["_model"]._modules.pop(self.key, None)

    def own_state(self) -> dict[str, Tensor]:
        """What ``state_dict`` would be, copied; ``load_state_dict`` takes it."""
        return {name: value.clone() for name, value in super().state_dict().items()}

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        """Nothing, so that a checkpoint of the model loads without the layers."""
        return {} if destination is None else destination


def _expect_nothing(module: nn.Module, incompatible: Any) -> None:
    assert isinstance(module, SiteLayers)
    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if module.key not in name.split(".")]
