"""How much of the perturbation acts: a strength that grows over a ramp, and may follow the training loss."""

import warnings

import torch
from torch import Tensor

from mp_lightning.errors import ConfigurationError
from mp_lightning.perturbation.precision import KeepsPrecision
from mp_lightning.sites.arguments import whole_number
from mp_lightning.sites.fitting import OFF, Fitting

RAMP_FRACTION = 0.4  # Section 4 of the paper
# Where the strength follows the loss: a network that is trained briefly under all of it ends correct and unsure of
# itself, since its classifier cannot grow as fast as its features are held small.
SHORTEST_RUN = 1200  # steps of the optimizer, from which on all of the strength is reached
_HORIZON = 0.1  # of the ramp: the batches that the recent loss looks back over
_IDLE = 0.1  # of the strength: hardly any of it acts
_UNCOUNTED = 200  # training forwards without a batch that is counted; a step may make many
_FEWEST = 20  # batches that a loss which has not fallen has been looked at for
_LONG_ENOUGH = 0.4  # of the shortest run, for a loss that has not fallen to mean anything


class GrowingStrength(KeepsPrecision):
    """Counts training batches, and knows from them, and from their losses, the strength that acts.

    Args:
        strength: when the ramp has ended, above 0 and at most 1.
        persistent: keep all of it in the model's ``state_dict``.
        full_strength_at, acts_below: see :class:`~mp_lightning.sites.fitting.Fitting`.

    Attributes:
        strength: a float32 tensor without dimensions.
        coeff: the strength now, another one.
        steps: training batches so far, an int64 tensor without dimensions.
        ramp_steps: number of batches over which the strength grows; None if that is not known.
        reached: share of the strength that acts when the ramp has ended; less than 1 in a short run.
        fitting: how far the network fits its training images, which the strength may follow.
        by_callback: made by a callback, or by the mixin, which are to count.
    """

    strength: Tensor
    coeff: Tensor
    steps: Tensor

    def __init__(self, strength: float, persistent: bool, full_strength_at: float, acts_below: float) -> None:
        super().__init__()
        for name, value in {
            "strength": torch.tensor(float(strength), dtype=torch.float32),
            "coeff": torch.tensor(float(strength), dtype=torch.float32),
            "steps": torch.zeros((), dtype=torch.int64),
        }.items():
            self.register_buffer(name, value, persistent=persistent)
        self.fitting = Fitting(full_strength_at, persistent, acts_below)
        self.ramp_steps: int | None = None
        self.reached = 1.0
        self.by_callback = False
        self._forwards = 0  # since a batch was counted
        self._warned = False

    def ramp_over(self, ramp_steps: int) -> None:
        """Let ``coeff`` grow from 0 to ``strength`` over ``ramp_steps`` training batches (0: full strength at once).

        Where the strength follows the loss, it does so from the second batch on, when the first loss is known.

        Raises:
            ConfigurationError: that is no number of batches.
        """
        self.ramp_steps = whole_number(ramp_steps, "ramp_steps", 0, "of batches, or 0 for no ramp")
        self.reached = 1.0
        self.update_coeff()

    def ramp_over_run(self, total_steps: int, accumulated: float = 1, before: int = 0) -> None:
        """Let ``coeff`` grow over the first 40 % of the training batches of a run; a ramp that has ended stays so.

        Where the strength follows the loss, a training of fewer than 1,200 steps of the optimizer reaches a part of it,
        in proportion to its length.

        Args:
            total_steps: number of training batches of the run.
            accumulated: number of batches whose gradients make one step of the optimizer, on average.
            before: number of training batches of earlier runs, which this one continues.

        Raises:
            ConfigurationError: ``total_steps`` is no number of batches.
        """
        total_steps = whole_number(total_steps, "total_steps", 0, "of training batches")
        done = self.ramp_steps is not None and 0 < self.ramp_steps <= int(self.steps)
        if not done:
            self.ramp_over(round(RAMP_FRACTION * total_steps))
        if self.fitting.follows:
            length = max(before + total_steps, int(self.steps))
            self.reached = share_reached(length / accumulated)
            self.update_coeff()

    def count(self, loss: Tensor | float | None, rank: int, world: int) -> None:
        """Count one training batch, and set ``coeff``.

        Args:
            loss: of the batch; None where this process has none.
            rank: of this process among those that hold parts of one global batch.
            world: the number of them; each must call this, and the mean of their losses counts.

        Raises:
            ConfigurationError: the length of the ramp is not known.
        """
        if self.ramp_steps is None:
            raise ConfigurationError(
                "the ramp's length is unknown; pass total_steps= (number of training batches) or ramp_steps="
            )
        self.steps.add_(1)
        self._forwards = 0
        if self.fitting.follows:
            if loss is None and not self.fitting.told and not self._warned and rank == 0:
                self._warned = True
                warnings.warn(
                    "MetaPerturb: the strength is to follow the training loss, which is not known; until it is, the "
                    "ramp alone decides. Give it, by step(loss), or by returning it from a training_step that "
                    "optimizes by hand, or choose full_strength_at=1",
                    stacklevel=3,
                )
            self.fitting.note(loss, self.ramp_steps * _HORIZON, synchronize=world > 1)
        self.update_coeff()

    def note_forward(self) -> None:
        """Say so, once, where training goes on while nobody counts its batches, on which the strength depends."""
        if torch.compiler.is_compiling():
            return
        self._forwards += 1
        if self._forwards != _UNCOUNTED:
            return
        grows = self.ramp_steps is not None and (self.fitting.follows or int(self.steps) < self.ramp_steps)
        if grows or self.by_callback:
            warnings.warn(
                f"MetaPerturb: the model has made {_UNCOUNTED} training forwards and no batch was counted, so that the "
                f"strength stays at {float(self.coeff):.3g}; call attachment.step(loss) after each batch, or, with "
                "Lightning, train with MetaPerturbCallback, or let configure_callbacks of a module with the mixin add "
                "super().configure_callbacks()",
                stacklevel=2,
            )

    def update_coeff(self) -> None:
        """Set the strength that follows from the batches counted, and the losses noted, so far."""
        ramp = max(self.ramp_steps or 0, 0)
        whole = self.strength * self.reached
        grown = whole * (self.steps / ramp).clamp(max=1.0) if ramp else whole
        self.coeff.copy_(grown * self.fitting.factor() if self.fitting.follows else grown)

    def never_acted(self) -> bool:
        """Whether no batch was counted, and nothing acts until one is."""
        return int(self.steps) == 0 and float(self.coeff) == 0

    def outlook(self, total_steps: int | None) -> str:
        """How the strength will grow in a run of so many training batches (None: nobody knows), in words."""
        strength, steps, ramp = float(self.strength) * self.reached, int(self.steps), self.ramp_steps or 0
        short = (
            f" ({_percent(self.reached)} of {float(self.strength):g}, as the run is short)" if self.reached < 1 else ""
        )
        to = "" if strength == 1 else f" to {strength:.3g}{short}"
        if steps >= ramp:
            words = f"at {'full strength' if strength == 1 else f'strength {strength:.3g}{short}'} from the first batch"
        elif steps > 0:
            words = f"strength grows{to} over {ramp} training batches, {steps} of which are done"
        else:
            of = "" if total_steps is None else f" of {total_steps}"
            words = f"strength grows{to} over the first {ramp}{of} training batches"
        if (full_at := float(self.fitting.full_strength_at)) < OFF:
            words += f", less while the training loss is above {full_at:.0%} of its first value"
            if (below := float(self.fitting.acts_below)) < OFF:
                words += f" and nothing from {below:.0%} on"
        return words

    def idle(self) -> str | None:
        """Why hardly any of the strength acts when a training of some length has ended; None where enough does."""
        factor = float(self.fitting.factor())
        least = max(self.ramp_steps or 0, _FEWEST)
        if factor >= _IDLE or int(self.steps) < least or self.reached < _LONG_ENOUGH:
            return None
        share = float(self.fitting.recent / self.fitting.first)
        higher = "" if float(self.fitting.acts_below) == OFF else "; where it cannot fall far, acts_below=1"
        return (
            f"{factor:.0%} of the strength acts, since the training loss is still at {share:.0%} of its first value. "
            "That is meant for networks that do not fit their training images; where the loss started low, choose "
            f"full_strength_at=1{higher}"
        )


def share_reached(steps: float) -> float:
    """The share of the strength, where it follows the loss, that a training of so many optimizer steps reaches."""
    return min(1.0, steps / SHORTEST_RUN)


def _percent(share: float) -> str:
    return "less than 1%" if share < 0.01 else f"{share:.0%}"
