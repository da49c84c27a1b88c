"""The joint first-order step of meta-training (Algorithm 1 of the paper), for one task."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mp_lightning.errors import ConfigurationError


def theta_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    """One optimizer step on theta, all that ``optimizer`` holds; phi gets no gradient.

    Args:
        model: a perturbed network in training mode.
        optimizer: optimizer of theta only.
        x, y: training batch (B, 3, H, W) and labels (B,).

    Returns:
        The training loss before the step, without dimensions.

    Raises:
        ConfigurationError: the loss depends on nothing of theta.
    """
    theta = [p for group in optimizer.param_groups for p in group["params"]]
    with gradients_for(model, theta):
        loss = F.cross_entropy(model(x), y)
    for parameter, gradient in zip(theta, _gradients(loss, theta), strict=True):
        parameter.grad = gradient
    optimizer.step()
    return loss.detach()


def phi_gradient(model: nn.Module, phi: Sequence[Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Gradient of the validation loss with respect to phi alone, theta being constant (first order).

    Batch norm is in evaluation mode, the perturbation in training mode: it uses and records the batch's statistics.

    Returns:
        The validation loss without dimensions, and one gradient for each tensor of phi.

    Raises:
        ConfigurationError: the loss does not depend on phi.
    """
    with batch_norm_in_evaluation(model), gradients_for(model, phi):
        loss = F.cross_entropy(model(x), y)
    gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(phi, _gradients(loss, phi), strict=True)]
    return loss.detach(), gradients


def _gradients(loss: Tensor, wanted: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """By tensor; None for what the network has and does not use."""
    found = torch.autograd.grad(loss, list(wanted), allow_unused=True) if loss.requires_grad else [None] * len(wanted)
    if all(gradient is None for gradient in found):
        raise ConfigurationError(
            "its output does not depend on what is learned, its weights and the perturbation at its sites; look for "
            "detach, no_grad and frozen layers in it, or choose another network"
        )
    return found


@contextmanager
def gradients_for(model: nn.Module, wanted: Sequence[Tensor]) -> Iterator[None]:
    """Forwards inside this context lead back to ``wanted`` alone: no other parameter of the model costs a gradient."""
    kept = {id(parameter) for parameter in wanted}
    frozen = [p for p in model.parameters() if p.requires_grad and id(p) not in kept]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


@contextmanager
def batch_norm_in_evaluation(model: nn.Module) -> Iterator[None]:
    """Batch norm normalizes by its running statistics, and leaves them alone, inside this context."""
    changed = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training]
    for module in changed:
        module.training = False
    try:
        yield
    finally:
        for module in changed:
            module.training = True
