"""Three joint meta-steps of two tasks against the golden numbers."""

import numpy as np
import torch

from golden_files import assert_close_to_golden, golden_phi
from mp_lightning.backbones import build_backbone
from mp_lightning.meta.joint import JointGradient
from mp_lightning.meta.learner import TaskStep
from mp_lightning.meta.step import phi_gradient, theta_step
from mp_lightning.perturbation import MetaPerturb, Phi
from mp_lightning.sites import attach
from mp_lightning.sites.attachment import NAME

LR, WEIGHT_DECAY, ADAM_EPS = 1e-3, 5e-4, 1e-8
TASKS = (0, 1)


class WithoutNoise(MetaPerturb):
    """eps = 0 everywhere, as in the golden run."""

    def noise(self, x, phi, eps):
        return super().noise(x, phi, torch.zeros_like(x))


class JointRun:
    """The golden run's two tasks, set up afresh."""

    def __init__(self, z, phi: Phi) -> None:
        self.z = z
        self.net = WithoutNoise(phi, trainable=True)
        self.phi = list(self.net.parameters())
        self.optimizer = torch.optim.Adam(self.phi, lr=LR, weight_decay=WEIGHT_DECAY)
        self.models, self.thetas = [], []
        for task in TASKS:
            model = build_backbone("conv4", 5, width=8, image_size=16)
            prefix = f"task{task}.init."
            model.load_state_dict(
                {k.removeprefix(prefix): torch.tensor(v) for k, v in z.items() if k.startswith(prefix)}
            )
            attach(model, perturbation=self.net)
            theta = [p for name, p in model.named_parameters() if not name.startswith(NAME)]
            self.models.append(model.train())
            self.thetas.append(torch.optim.Adam(theta, lr=LR, weight_decay=WEIGHT_DECAY))

    def gradients(self, step: int):
        """Losses of both tasks and the mean gradient of phi at one step, after the steps on theta."""
        joint = JointGradient(self.phi, len(TASKS))
        for task in TASKS:
            batch = {
                k: torch.tensor(self.z[f"step{step}.task{task}.{k}"])
                for k in ("train.x", "train.y", "valid.x", "valid.y")
            }
            train = theta_step(self.models[task], self.thetas[task], batch["train.x"], batch["train.y"])
            valid, gradient = phi_gradient(self.models[task], self.phi, batch["valid.x"], batch["valid.y"])
            joint.add(task, TaskStep(train, valid, gradient))
        joint.reduce()
        return joint.losses, joint.mean()


def initial_phi_of_the_golden_run(z) -> Phi:
    """The phi that the golden run started from.

    The file's ``init_phi_*`` are not it: they equal the phi after the last step (asserted below). The start is found by
    undoing Adam's first step, phi0 - lr * g / (|g| + eps), with the gradient g at phi0, a fixed point.
    """
    after_first = golden_phi(z, "step0.phi_")
    phi = after_first
    for _ in range(5):
        _, mean = JointRun(z, phi).gradients(0)
        penalised = [g + WEIGHT_DECAY * p for g, p in zip(mean, phi, strict=True)]
        phi = Phi(*(a + LR * g / (g.abs() + ADAM_EPS) for a, g in zip(after_first, penalised, strict=True)))
    return phi


def test_golden_init_phi_is_the_phi_after_the_last_step(golden):
    """If this fails the file was mended, and the run below should start from ``init_phi_*``."""
    z = golden("joint_steps.npz")
    for first, last in zip(golden_phi(z, "init_phi_"), golden_phi(z, "step2.phi_"), strict=True):
        assert torch.equal(first, last)


def test_golden_joint_steps(golden):
    z = golden("joint_steps.npz")
    run = JointRun(z, initial_phi_of_the_golden_run(z))
    for step in range(3):
        losses, gradients = run.gradients(step)
        for task in TASKS:
            for value, name in zip(losses[task], ("train_loss", "valid_loss"), strict=True):
                np.testing.assert_allclose(
                    value, z[f"step{step}.task{task}.{name}"], rtol=1e-5, err_msg=f"{step} {task}"
                )
        for parameter, gradient in zip(run.phi, gradients, strict=True):
            parameter.grad = gradient
        run.optimizer.step()
        for field, expected in golden_phi(z, f"step{step}.phi_")._asdict().items():
            assert_close_to_golden(getattr(run.net, field).detach(), expected, f"{field} after step {step}")
    for task in TASKS:
        assert_close_to_golden(run.models[task].fc.weight.detach(), z[f"task{task}.final.fc.weight"], "head")
        for index, site in enumerate(run.models[task].get_submodule(NAME).sites):
            assert_close_to_golden(
                site.mean, z[f"task{task}.final.running_mean.{index}"], f"running mean of site {index}"
            )
