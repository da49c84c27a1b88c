"""One site: the perturbation of one feature map, with the running statistics that belong to this place alone."""

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mp_lightning.errors import SiteError
from mp_lightning.perturbation import Norms, Statistics, gaussian_noise
from mp_lightning.perturbation.mathematics import apply_multiplier
from mp_lightning.perturbation.precision import KeepsPrecision
from mp_lightning.sites.plan import SiteSpec

if TYPE_CHECKING:
    from mp_lightning.sites.attachment import Attachment

MOMENTUM = 0.1
_EVALUATION = 1 << 31  # training and evaluation draw from different streams
_CALLS = 1 << 12  # calls of one site within one forward of the model
_REMEMBERED = 32


class _Call(NamedTuple):
    forward: Tensor
    stream: int
    fingerprint: Tensor


class Site(KeepsPrecision):
    """The perturbation at one place of a network.

    Args:
        spec: where it is.
        index: its number in the plan; with the call it selects the noise stream.
        attachment: what all sites of the network share.
    """

    def __init__(self, spec: SiteSpec, index: int, attachment: "Attachment", persistent: bool) -> None:
        super().__init__()
        self.spec = spec
        self.index = index
        # In __dict__ and not as a submodule: the attachment is this module's parent.
        self.__dict__["attachment"] = attachment
        self._calls: deque[_Call] = deque(maxlen=_REMEMBERED)
        self._statistics = tuple(attachment.perturbation.initial_statistics(spec.channels))
        for name, value in attachment.perturbation.initial_statistics(spec.channels).items():
            self.register_buffer(name, value, persistent=persistent)

    @property
    def statistics(self) -> Statistics:
        """The running statistics, by name."""
        return {name: getattr(self, name) for name in self._statistics}

    def forward(self, x: Tensor, call: int, training: bool) -> Tensor:
        """Perturb one feature map.

        Args:
            x: (B, C, H, W), any floating dtype; half precision is computed in float32 and given back as it came.
            call: how many times this site was reached before within one forward of the model.
            training: use, and record, the statistics of the batch; otherwise the running ones.

        Raises:
            SiteError: ``x`` is not (B, C, H, W) with the number of channels of the plan.
        """
        if x.dim() != 4 or x.shape[1] != self.spec.channels:
            raise SiteError(
                f"site '{self.spec.name}' got a tensor of shape {tuple(x.shape)}, expected (B, {self.spec.channels}, H, W);"
                " leave it out of the plan"
            )
        with torch.autocast(x.device.type, enabled=False):
            work = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
            return self._perturb(work, call, training).to(x.dtype)

    def _perturb(self, x: Tensor, call: int, training: bool) -> Tensor:
        shared = self.attachment
        perturbation = shared.perturbation
        replay = _in_backward()
        statistics = self.statistics
        if training:
            statistics, measured = perturbation.measure(x, self.statistics, shared.synchronize)
            if measured is not None and not replay:
                self._record(measured)
        eps = None
        if training or shared.sampling:
            eps = self._noise(x, call, replay)
        norms = Norms(shared.channel_norm, shared.input_height(x))
        multiplier = perturbation.multiplier(x, eps, statistics, norms)
        y = apply_multiplier(x, multiplier, shared.coeff.to(x.dtype), shared.clip)
        if not training and shared.clip is not None:
            shared.bound_hits.add_((y.detach() >= shared.clip).sum())
        return y

    @torch.no_grad()
    def _record(self, measured: Statistics) -> None:
        """Running average, left as it is by a batch with anything that is not finite (without asking the device)."""
        finite = torch.stack([value.isfinite().all() for value in measured.values()]).all()
        for name, value in measured.items():
            buffer = getattr(self, name)
            buffer.copy_(torch.where(finite, buffer.lerp(value.to(buffer.dtype), MOMENTUM), buffer))

    def _noise(self, x: Tensor, call: int, replay: bool) -> Tensor:
        shared = self.attachment
        forward = shared.forwards if shared.training_forward else shared.evaluations
        stream = self.index * _CALLS + call % _CALLS + (0 if shared.training_forward else _EVALUATION)
        if (shared.training_forward or torch.is_grad_enabled()) and not torch.compiler.is_compiling():
            if replay:
                forward, stream = self._recall(x, forward, stream)
            else:
                self._calls.append(_Call(forward.clone(), stream, _fingerprint(x)))
        rank, world = shared.shard
        positions = torch.arange(x.shape[0], device=x.device) * world + rank
        eps = gaussian_noise(x.shape, positions, seed=shared.seed, stream=stream, forward=forward)
        return eps.to(x.dtype)

    def _recall(self, x: Tensor, forward: Tensor, stream: int) -> tuple[Tensor, int]:
        """The key of the call that is being computed again: the latest one that saw the same numbers."""
        fingerprint = _fingerprint(x)
        for past in reversed(self._calls):
            if past.fingerprint.shape == fingerprint.shape and torch.equal(past.fingerprint, fingerprint):
                return past.forward, past.stream
        return forward, stream

    def extra_repr(self) -> str:
        return f"{self.spec.name}, channels={self.spec.channels}"


def _in_backward() -> bool:
    """Whether autograd is running, that is, activation checkpointing computes a forward again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _fingerprint(x: Tensor) -> Tensor:
    """A few elements of x, spread over it: enough to tell one call of a site from another."""
    flat = x.detach().flatten()
    return flat[:: max(1, flat.numel() // 16)].clone()
