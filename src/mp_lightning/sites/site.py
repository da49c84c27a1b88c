"""One site: the perturbation of one feature map, with the running statistics that belong to this place alone."""

from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mp_lightning.errors import SiteError
from mp_lightning.perturbation import FusedPerturbation, NoiseKey, Norms, Perturbed, Statistics
from mp_lightning.perturbation.mathematics import apply_multiplier
from mp_lightning.perturbation.precision import KeepsPrecision
from mp_lightning.sites.layout import as_maps, channels_of, from_maps, shape_words, stretch
from mp_lightning.sites.plan import SiteSpec

if TYPE_CHECKING:
    from mp_lightning.sites.attachment import Attachment

MOMENTUM = 0.1
_EVALUATION = 1 << 31  # training and evaluation draw from different streams
_CALLS = 1 << 12  # calls of one site within one forward of the model
_REMEMBERED = 256  # calls of one site that activation checkpointing may compute again
_SAME = 0.1  # relative distance below which two inputs are one, up to what a device's kernels may vary


@dataclass
class _Call:
    """A call of a site: the key of its noise, whether it drew any, and what tells it from other calls."""

    forward: Tensor
    stream: int
    training: bool
    drawn: bool
    shape: torch.Size
    fingerprint: Tensor
    replays: int = 0


class Site(KeepsPrecision):
    """The perturbation at one place of a network.

    Args:
        spec: where it is.
        index: its number in the plan; with the call it selects the noise stream.
        attachment: what all sites of the network share.
        persistent: keep the statistics in the model's ``state_dict``.
    """

    attachment: "Attachment"
    factor: Tensor | None  # of each channel (C,), once the attachment is frozen by constants

    def __init__(self, spec: SiteSpec, index: int, attachment: "Attachment", persistent: bool) -> None:
        super().__init__()
        self.spec = spec
        self.index = index
        # In __dict__ and not as a submodule: the attachment is this module's parent.
        self.__dict__["attachment"] = attachment
        self._calls: deque[_Call] = deque(maxlen=_REMEMBERED)
        self._statistics = tuple(attachment.perturbation.initial_statistics(spec.channels))
        self.register_buffer("factor", None, persistent=False)
        for name, value in attachment.perturbation.initial_statistics(spec.channels).items():
            # Also where a model is made in 16 bits by torch's default dtype.
            self.register_buffer(name, value.float() if value.is_floating_point() else value, persistent=persistent)

    @property
    def statistics(self) -> Statistics:
        """The running statistics, by name."""
        return {name: getattr(self, name) for name in self._statistics}

    def forward(self, x: Tensor, call: int, training: bool) -> Tensor:
        """Perturb one feature map.

        Args:
            x: in the layout of the plan (:mod:`mp_lightning.sites.layout`), any floating dtype; half precision is
                computed in float32 and given back as it came.
            call: how many times this site was reached before within one forward of the model.
            training: use, and record, the statistics of the batch; otherwise the running ones.

        Raises:
            SiteError: ``x`` has another layout or number of channels than the plan says.
        """
        spec = self.spec
        if channels_of(x, spec.layout) != spec.channels:
            raise SiteError(
                f"site '{spec.name}' got a tensor of shape {tuple(x.shape)}, expected "
                f"{shape_words(spec.layout, spec.channels)}; where a layer was changed, detach and "
                "attach again, else leave it out of the plan"
            )
        y = self._perturb(as_maps(x, spec.layout), stretch(x, spec.layout), call, training)
        return from_maps(y, x, spec.layout)

    def maps_and_norms(self, x: Tensor) -> tuple[Tensor, Norms]:
        """What the perturbation reads of a tensor in the layout of the plan: float32 (B, C, H, W), and the norms."""
        layout = self.spec.layout
        height = self.attachment.height.known() * stretch(x, layout)
        return as_maps(x, layout).float(), Norms(self.attachment.channel_norm, height)

    def _perturb(self, x: Tensor, stretched: float, call: int, training: bool) -> Tensor:
        """Maps (B, C, H, W) that are so many times higher than what they show."""
        shared = self.attachment
        if shared.only_drawn(training):
            return x
        replay = in_backward()
        if shared.folding and not training:
            if not replay:
                self._noise_key(x, call, training, replay)  # to remember the call
            return self._folded(x)
        if training:
            shared.perturbed = True
        if replay and not training and shared.inference is not None:
            _refuse_replay(shared)
        key = self._noise_key(x, call, training, replay)
        fused = shared.fused_for(x)
        with torch.autocast(x.device.type, enabled=False):
            height = shared.height.known()
            norms = Norms(shared.channel_norm, height if stretched == 1 else height * stretched)
            if fused is None:
                done = self._reference(x, key, norms, training)
            else:
                done = self._fused(fused, x, key, norms, training)
            if done.measured is not None and not replay:
                if fused is None:
                    self._record(done.measured)
                else:
                    fused.record(self.statistics, done.measured, MOMENTUM)
            if done.hits is not None and shared.clip is not None and not shared.frozen:
                shared.bound_hits.add_(done.hits.sum())
        return done.y

    def _fused(
        self, perturbation: FusedPerturbation, x: Tensor, key: NoiseKey | None, norms: Norms, training: bool
    ) -> Perturbed:
        shared = self.attachment
        return perturbation.fused(
            x,
            key,
            self.statistics,
            norms,
            coeff=shared.coeff,
            clip=shared.clip,
            training=training,
            synchronize=shared.synchronize,
        )

    def _folded(self, x: Tensor) -> Tensor:
        """By a constant for each channel: linear but for the bound, which is not counted here."""
        clip, factor = self.attachment.bound(), self.factor if self.factor is not None else self.factor_by_constants()
        if factor.dtype != x.dtype:
            factor = factor.to(x.dtype)
        y = x * factor.view(1, -1, 1, 1)
        return y if clip is None else y.clamp_(max=clip)

    def factor_by_constants(self) -> Tensor:
        """What each channel is multiplied by in inference by constants, (C,).

        Raises:
            SiteError: there is no constant of this site.
        """
        shared = self.attachment
        assert shared.estimates is not None and shared.estimates.constants is not None
        constants = shared.estimates.constants
        if self.spec.name not in constants:
            raise SiteError(
                f"site '{self.spec.name}' has no constant, as no batch reached it when the constants were "
                "estimated; use inference='mean', or leave it out of the plan"
            )
        constant = constants[self.spec.name]
        if constant.device != shared.coeff.device:  # as after a checkpoint was loaded
            with torch.inference_mode(False):
                constant = constants[self.spec.name] = constant.to(shared.coeff.device)
        return 1 + shared.coeff * (constant - 1)

    def _reference(self, x: Tensor, key: NoiseKey | None, norms: Norms, training: bool) -> Perturbed:
        shared, dtype = self.attachment, x.dtype
        if dtype in (torch.float16, torch.bfloat16):
            x = x.float()
        statistics, measured = self.statistics, None
        if training:
            statistics, measured = shared.perturbation.measure(x, statistics, shared.synchronize)
        eps = None if key is None else key.draw(x, shared.noise_per)
        assert isinstance(norms.size, Tensor)
        norms = replace(norms, size=norms.size.to(x.dtype))
        multiplier = shared.perturbation.multiplier(x, eps, statistics, norms)
        if shared.observed is not None:
            total, count = shared.observed.get(self.spec.name, (0.0, 0))
            means = multiplier.detach().expand_as(x).mean(dim=(0, 2, 3)).float()
            shared.observed[self.spec.name] = (total + means, count + 1)
        clip = shared.bound()
        y = apply_multiplier(x, multiplier, shared.coeff.to(x.dtype, copy=True), clip)
        hits = None if training or clip is None else (y.detach() >= clip).sum()
        return Perturbed(y.to(dtype), measured, hits)

    @torch.no_grad()
    def _record(self, measured: Statistics) -> None:
        """Running average; of whole numbers the latest. A batch with anything that is not finite leaves it as it is.

        Without asking the device.
        """
        if not measured:
            return
        finite = torch.stack([value.isfinite().all() for value in measured.values()]).all()
        for name, value in measured.items():
            buffer = getattr(self, name)
            mixed = buffer.lerp(value.to(buffer.dtype), MOMENTUM) if buffer.is_floating_point() else value
            buffer.copy_(torch.where(finite, mixed, buffer))

    def first_noise(self, maps: Tensor) -> Tensor:
        """The noise of this site's first call in the latest training forward, for the first images (B, C, H, W)."""
        shared = self.attachment
        key = NoiseKey(shared.seed, self.index * _CALLS, shared.forwards, *shared.shard)
        return key.draw(maps, shared.noise_per)

    def _noise_key(self, x: Tensor, call: int, training: bool, replay: bool) -> NoiseKey | None:
        """None where the expected noise is taken."""
        shared = self.attachment
        drawn = training or shared.draws
        forward = shared.forwards if shared.training_forward else shared.evaluations
        stream = self.index * _CALLS + call % _CALLS + (0 if shared.training_forward else _EVALUATION)
        if replay:
            past = self.recall(x)
            if past is not None and past.drawn != drawn:
                raise _another_function(shared)
            if past is not None:
                past.replays += 1
                forward, stream = past.forward, past.stream
            else:
                self.refuse_unknown(drawn)
        elif may_be_computed_again(shared):
            forward = forward.clone()
            self._calls.append(_Call(forward, stream, training, drawn, x.shape, _fingerprint(x)))
        rank, world = shared.shard
        return NoiseKey(shared.seed, stream, forward, rank, world) if drawn else None

    def refuse_unknown(self, certain: bool) -> None:
        """Of a call that is computed again, and is none that is remembered.

        Args:
            certain: it was a call of this site, and not another one of its activation.

        Raises:
            SiteError: it was, or what it was computed from is not there any more.
        """
        if self._calls and not self._calls[-1].training and self.attachment.inference is not None:
            _refuse_replay(self.attachment)
        if certain:
            raise SiteError(
                f"activation checkpointing computes site '{self.spec.name}' again for an input that is not "
                f"among its last {_REMEMBERED} calls; checkpoint fewer calls before each backward, or with "
                "use_reentrant=False"
            )

    def recall_input(self, x: Tensor) -> "_Call | None":
        """The call that is being computed again for an input in the layout of the plan, if it is one of this site's."""
        if channels_of(x, self.spec.layout) != self.spec.channels:
            return None
        return self.recall(as_maps(x, self.spec.layout))

    def recall(self, x: Tensor) -> "_Call | None":
        """The call that is being computed again: the one that saw the same numbers.

        Of several, as when one batch passes twice before one backward, the one replayed least, the latest first: the
        order in which a backward needs them.
        """
        candidates = [call for call in self._calls if call.shape == x.shape]
        if not candidates:
            return None
        seen = torch.stack([call.fingerprint for call in candidates])
        now = _fingerprint(x).to(seen.device)
        distances = ((seen - now).norm(dim=1) / (now.norm() + 1e-30)).tolist()
        nearest = min(distances)
        if nearest > _SAME:
            return None
        same = [call for call, distance in zip(candidates, distances, strict=True) if distance == nearest]
        return min(reversed(same), key=lambda call: call.replays)

    def __getstate__(self) -> dict[str, Any]:
        """Without the calls it remembers, which matter only until the next backward."""
        return {**super().__getstate__(), "_calls": deque(maxlen=_REMEMBERED)}

    def extra_repr(self) -> str:
        return f"{self.spec.name}, channels={self.spec.channels}"


def _refuse_replay(attachment: "Attachment") -> None:
    """What inference puts in place of the model's own is not there any more when backward computes a forward again."""
    inference = attachment.inference
    assert inference is not None
    estimates = attachment.estimates
    replaced = estimates is not None and (estimates.buffers or estimates.constants)
    if inference.expects and (attachment.depth or not replaced):
        return  # nothing was replaced, or it is again, by a network that is computed again as a whole
    raise _another_function(attachment)


def _another_function(attachment: "Attachment") -> SiteError:
    inference = attachment.inference
    how = "in evaluation mode" if inference is None else f"by {type(inference).__name__}"
    return SiteError(
        f"activation checkpointing would compute a forward {how} again as another function, so that its gradients are "
        "wrong; turn checkpointing off for gradients in evaluation mode"
    )


def in_backward() -> bool:
    """Whether autograd is running, that is, activation checkpointing computes a forward again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def may_be_computed_again(attachment: "Attachment") -> bool:
    """Whether this call may be part of activation checkpointing, which works without gradients or with hooks."""
    if torch.compiler.is_compiling():
        return False
    if not torch.is_grad_enabled():
        return attachment.training_forward or attachment.with_gradients
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _fingerprint(x: Tensor) -> Tensor:
    """A few elements of x, spread over it (at most 32, float32): enough to tell one call of a site from another."""
    spread = tuple(slice(None, None, -(-size // count)) for size, count in zip(x.shape, (4, 2, 2, 2), strict=True))
    return x.detach()[spread].float().nan_to_num().flatten().clone()
