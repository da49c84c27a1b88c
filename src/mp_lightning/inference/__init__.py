"""Floor 3, what remains after training: inference by sampling or by expectation, and what each needs."""

from typing import Literal, get_args

from mp_lightning.inference.exporting import export, exportable
from mp_lightning.inference.mc import MonteCarlo, Output, OutputAverage
from mp_lightning.inference.mean import Fold, Mean
from mp_lightning.inference.reestimation import reestimate_batch_norm

InferenceMode = Literal["mean", "mc", "fold"]
INFERENCE_MODES = get_args(InferenceMode)

__all__ = [
    "INFERENCE_MODES",
    "Fold",
    "InferenceMode",
    "Mean",
    "MonteCarlo",
    "Output",
    "OutputAverage",
    "export",
    "exportable",
    "reestimate_batch_norm",
]
