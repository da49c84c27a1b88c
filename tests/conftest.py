"""Shared by all tests: one torch thread (the numbers of tiny tests gain nothing from more), and the golden files."""

import os
import signal

import pytest
import torch

from golden_files import load_golden

torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Before anything imports Triton: its kernels then run on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def ctrl_c():
    """Not ignored, as a shell leaves it for what it starts in the background, and for all that start from there."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def golden():
    """The loader of golden files."""
    return load_golden
