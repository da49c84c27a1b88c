"""The learned perturbation: 82 numbers, shared by all sites, networks and tasks."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from mp_lightning.errors import ConfigurationError
from mp_lightning.perturbation import fast, mathematics
from mp_lightning.perturbation.noise import NoiseKey, NoisePer, check_noise_per
from mp_lightning.perturbation.phi import FEATURES, SHAPES, Phi
from mp_lightning.perturbation.precision import KeepsPrecision
from mp_lightning.perturbation.protocol import Norms, Perturbed, Statistics


class MetaPerturb(KeepsPrecision):
    """The perturbation net g_phi (Section 3 of the paper) as a :class:`~mp_lightning.perturbation.Perturbation`.

    Args:
        phi: its numbers; they are copied.
        noise_per: 'element' draws the noise of every element by itself, as published; 'channel' draws one number for
            all elements of a channel of a sample, so that whole features come out weaker or stronger.
        trainable: hold phi as parameters (meta-training) instead of buffers that no optimizer can see.
        persistent: whether a frozen phi appears in ``state_dict()``; a trainable one always does.
    """

    name = "metaperturb"
    scale_kernels: Tensor
    _noise_per: NoisePer = "element"
    _per_channel: Tensor

    def __init__(
        self, phi: Phi, *, noise_per: NoisePer = "element", trainable: bool = False, persistent: bool = True
    ) -> None:
        if not isinstance(phi, Phi):
            raise ConfigurationError(
                f"MetaPerturb takes the 82 numbers of a Phi, not a {type(phi).__name__}; of a NamedPhi give its phi"
            )
        super().__init__()
        self.noise_per = noise_per
        for key, value in phi._asdict().items():
            if trainable:
                self.register_parameter(key, nn.Parameter(value.detach().clone()))
            else:
                self.register_buffer(key, value.detach().clone(), persistent=persistent)
        if not trainable:  # of a phi that is learned, the settings of the run say it
            # Beside phi wherever its numbers are kept, since they mean something else with other noise. A number,
            # because averages of weights are taken over buffers as well.
            per_channel = torch.tensor(float(noise_per == "channel"), dtype=torch.float32)
            self.register_buffer("_per_channel", per_channel, persistent=persistent)
            self.register_load_state_dict_post_hook(_take_noise_per)

    @property
    def noise_per(self) -> NoisePer:
        """What each number of the noise is drawn for. It can be set; what is loaded with a frozen phi decides."""
        return self._noise_per

    @noise_per.setter
    def noise_per(self, noise_per: NoisePer) -> None:
        check_noise_per(noise_per)
        self._noise_per = noise_per
        if "_per_channel" in self._buffers:
            self._per_channel.fill_(float(noise_per == "channel"))

    @property
    def phi(self) -> Phi:
        """The numbers themselves, not a copy."""
        return Phi(**{key: getattr(self, key) for key in SHAPES})

    def initial_statistics(self, channels: int) -> Statistics:
        """Running mean 0 and variance 1 of the pooled responses, both float32 (C, 4)."""
        return {"mean": torch.zeros(channels, FEATURES), "var": torch.ones(channels, FEATURES)}

    def measure(
        self, x: Tensor, running: Statistics, synchronize: bool = False
    ) -> tuple[Statistics, Statistics | None]:
        """Moments of the batch. A batch of one has no variance: the running one is used and nothing is recorded."""
        responses = mathematics.pooled_responses(x, self.scale_kernels.to(x.dtype))
        moments = mathematics.batch_moments(responses, synchronize)
        if moments is None:
            return {"mean": responses.mean(dim=0), "var": running["var"].to(x.dtype)}, None
        used = {"mean": moments.mean, "var": moments.var}
        return used, {key: value.detach() for key, value in used.items()}

    def multiplier(self, x: Tensor, eps: Tensor | None, statistics: Statistics, norms: Norms) -> Tensor:
        """s * z, (B, C, H, W)."""
        phi = self.phi.to(x.dtype)
        return self.scale(x, phi, statistics, norms) * self.noise(x, phi, eps)

    def scale(self, x: Tensor, phi: Phi, statistics: Statistics, norms: Norms) -> Tensor:
        """s, (1, C, 1, 1)."""
        moments = mathematics.Moments(statistics["mean"].to(x.dtype), statistics["var"].to(x.dtype))
        return mathematics.scale(moments, phi, x.shape[1] / norms.channels, x.shape[2] / norms.size)

    def noise(self, x: Tensor, phi: Phi, eps: Tensor | None) -> Tensor:
        """z, or its expectation where no ``eps`` is given, (B, C, H, W); ``eps`` need only broadcast to x."""
        alpha = mathematics.noise_location(x, phi)
        return mathematics.expected_noise(alpha) if eps is None else mathematics.noise(alpha, eps)

    def fuses(self, x: Tensor) -> bool:
        """Whether :meth:`fused` can be used: not in a subclass, which may compute something else."""
        return type(self) is MetaPerturb and self.has_fast_path(x)

    def has_fast_path(self, x: Tensor) -> bool:
        """Whether this machine has a fast path for x and these numbers."""
        # The kernels count the elements of a sample in 32 bits.
        return (
            0 < x.numel() < x.shape[0] * 2**31
            and self.scale_kernels.dtype == torch.float32
            and fast.available(x.device.type, x.dtype)
        )

    def fused(
        self,
        x: Tensor,
        key: NoiseKey | None,
        running: Statistics,
        norms: Norms,
        *,
        coeff: Tensor,
        clip: float | None,
        training: bool,
        synchronize: bool,
    ) -> Perturbed:
        """The perturbed x, by the fast path."""
        unused = coeff.new_zeros((), dtype=torch.int64) if key is None else key.forward
        size = torch.as_tensor(norms.size, dtype=torch.float32, device=x.device)
        call = fast.Call(
            channel_norm=float(norms.channels),
            clip=math.inf if clip is None else clip,
            key=(0, 0, 0, 1) if key is None else (_signed(key.seed), key.stream, key.rank, key.world),
            training=training,
            sampled=key is not None,
            synchronize=synchronize,
            per_channel=self.noise_per == "channel",
        )
        moments = mathematics.Moments(running["mean"], running["var"])
        result = fast.perturb(x, self.phi, moments, fast.Numbers(coeff, size, unused), None, call)
        if not training:
            return Perturbed(result.y, None, result.hits)
        single = x.shape[0] * (key.world if key is not None and synchronize else 1) < 2
        return Perturbed(result.y, None if single else {"mean": result.mean, "var": result.var}, None)

    def record(self, running: Statistics, measured: Statistics, momentum: float) -> None:
        """Running averages of the moments, in place and in one launch."""
        old, new = (mathematics.Moments(of["mean"], of["var"]) for of in (running, measured))
        fast.record(old, new, momentum)

    def extra_repr(self) -> str:
        trainable = any(True for _ in self.parameters())
        return f"82 numbers, {'trainable' if trainable else 'frozen'}, noise per {self.noise_per}"


def _take_noise_per(module: nn.Module, incompatible: Any) -> None:
    """What was loaded decides; it is kept as a plain value, so that no forward asks the device for it."""
    assert isinstance(module, MetaPerturb)
    module._noise_per = "channel" if float(module._per_channel) > 0.5 else "element"


def _signed(seed: int) -> int:
    """The low 64 bits of a seed, as an operator takes them."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)
