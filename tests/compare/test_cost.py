"""What training costs, measured on steps whose cost is known."""

import time
from typing import Any

import lightning as L
import pytest
import torch
from small_runs import SmallData
from torch import nn

from mp_lightning.compare.cost import POINTS, Cost, KeptForBackward


class Slow(L.LightningModule):
    """Each step waits, and loses as much as its number says."""

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.seconds = seconds

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        time.sleep(self.seconds)
        return {"loss": self.weight * 0 + self.global_step}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module: L.LightningModule, cost: Cost, epochs: int, accumulate: int = 1) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate}
    options |= {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = L.Trainer(max_epochs=epochs, callbacks=[cost], enable_model_summary=False, limit_val_batches=0, **options)
    trainer.fit(module, datamodule=SmallData())


def test_the_time_of_a_step_is_its_median() -> None:
    cost = Cost()
    fit(Slow(0.02), cost, 2)
    assert 20 <= cost.step_ms < 40


def test_steps_are_counted_and_the_curve_averages_the_loss_between_points() -> None:
    steps: list[int] = []
    cost = Cost(steps.append)
    fit(Slow(), cost, 67)  # of three batches each
    assert sum(steps) == 201
    assert len(cost.curve) == POINTS + 1
    assert cost.curve[:2] == [(4, pytest.approx(1.5)), (8, pytest.approx(5.5))] and cost.curve[-1] == (201, 200.0)


def test_the_curve_is_that_of_the_loss_whether_or_not_gradients_are_accumulated() -> None:
    cost = Cost()
    module = Slow()
    module.training_step = lambda batch, batch_idx: module.weight * 0 + 2.0  # type: ignore[method-assign]
    fit(module, cost, 2, accumulate=3)
    assert [loss for _, loss in cost.curve] == pytest.approx([2.0] * len(cost.curve)) and cost.curve


def test_memory_is_what_is_kept_for_the_backward() -> None:
    model = nn.Sequential(nn.Linear(8, 4, bias=False), nn.ReLU())
    x = torch.randn(16, 8)
    with KeptForBackward(model) as kept:
        model(x).sum()
        x.sum()
    # The input of the linear layer and the output of the ReLU; the weight belongs to the model.
    assert kept.bytes == 4 * (16 * 8 + 16 * 4)


def test_memory_is_measured_once_in_a_run_and_nothing_stays_behind() -> None:
    class Linear(Slow):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x = torch.randn(32, 1, requires_grad=True)
            return (x.exp() * self.weight).sum()

    cost = Cost()
    fit(Linear(), cost, 2)
    # exp keeps its result, which the product keeps as well.
    assert cost.memory_mb == pytest.approx(4 * 32 / 1e6)
    with KeptForBackward(nn.Linear(1, 1)) as kept:
        pass
    assert kept.bytes == 0


def test_an_error_in_the_measured_step_leaves_no_hooks() -> None:
    class Fails(Slow):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.global_step == 2:
                raise ValueError("broken")
            return super().training_step(batch, batch_idx)

    with pytest.raises(ValueError, match="broken"):
        fit(Fails(), Cost(), 1)
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
