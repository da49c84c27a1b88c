"""Settings of meta-training."""

from dataclasses import dataclass
from typing import Literal

from mp_lightning.perturbation import NoisePer


@dataclass(frozen=True)
class MetaSettings:
    """Settings of meta-training.

    Attributes:
        steps: joint meta-steps.
        lr, weight_decay: of phi (Adam; the decay is an L2 penalty).
        theta_lr, theta_weight_decay: of the networks (likewise).
        batch_size: images for theta and, again as many, for phi; in each task.
        restart_after: meta-steps after which each network starts afresh, staggered over the tasks; None: never.
        on_divergence: what happens when the loss or a gradient of a task is not finite: 'stop' ends the run,
            'leave_out' leaves the task out of this step's mean and starts its network afresh.
        strength: at which phi is learned, and meant to be used: ``1 + strength * (multiplier - 1)``.
        noise_per: what its noise is drawn for, 'element' as published, or 'channel'.
        share_of_sites: at how many of the sites of a network it is learned, and meant to be used, counted from the last
            one.
    """

    steps: int
    lr: float
    weight_decay: float
    theta_lr: float
    theta_weight_decay: float
    batch_size: int
    restart_after: int | None
    on_divergence: Literal["stop", "leave_out"] = "stop"
    strength: float = 1.0
    noise_per: NoisePer = "element"
    share_of_sites: float = 1.0
