"""Floor 3, what remains after training: inference by sampling or by expectation, and what each needs."""

from mp_lightning.inference.exporting import export, exportable
from mp_lightning.inference.mc import MonteCarlo, Output, OutputAverage
from mp_lightning.inference.mean import Fold, Mean
from mp_lightning.inference.reestimation import reestimate_batch_norm

INFERENCE_MODES = ("mean", "mc", "fold")

__all__ = [
    "INFERENCE_MODES",
    "Fold",
    "Mean",
    "MonteCarlo",
    "Output",
    "OutputAverage",
    "export",
    "exportable",
    "reestimate_batch_norm",
]
