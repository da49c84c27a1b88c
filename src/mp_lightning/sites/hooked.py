"""The parts of a model that have hooks: whether they are still there."""

from torch import nn

from mp_lightning.errors import ConfigurationError


def missing(model: nn.Module, hooked: dict[str, nn.Module]) -> str | None:
    """The name of a part that has hooks, and was replaced or removed since; None where all are there.

    Args:
        model: that is attached.
        hooked: its parts by their names at that time; another name, or being compiled, makes no difference.
    """
    suspects = [name for name, module in hooked.items() if not _is_at(model, name, module)]
    present = {*model.modules()} if suspects else set()
    return next((name for name in suspects if hooked[name] not in present), None)


def check_there(model: nn.Module, hooked: dict[str, nn.Module]) -> None:
    """Refuse a model of which a part that has hooks is not there any more.

    Raises:
        ConfigurationError: names it.
    """
    name = missing(model, hooked)
    if name is not None:
        raise ConfigurationError(
            f"self.{name} was replaced or removed since MetaPerturb was attached to it, so that nothing acts there; "
            "call mp_lightning.detach(model) before such a change, and attach again after it"
        )


def _is_at(model: nn.Module, name: str, module: nn.Module) -> bool:
    found = _part(model, name)
    return found is module or getattr(found, "_orig_mod", None) is module  # compiled since


def _part(model: nn.Module, name: str) -> nn.Module | None:
    """As ``get_submodule``, which takes ten times as long, and this is looked up in every forward."""
    found = model
    for part in name.split(".") if name else ():
        inside = found._modules.get(part)
        if inside is None:
            try:
                return model.get_submodule(name)  # inside of what was compiled since
            except AttributeError:
                return None
        found = inside
    return found
