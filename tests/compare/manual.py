"""Manual optimization for any module of the tests."""


class ManualOptimization:
    """Before a LightningModule among the bases: makes a step on the loss that its ``training_step`` gives."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()
