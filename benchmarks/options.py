"""What the benchmarks take on the command line."""

import argparse
from collections.abc import Sequence

import torch


def some_of(parser: argparse.ArgumentParser, option: str, text: str, known: Sequence[str]) -> list[str]:
    """A list out of text with commas; an unknown name ends the program with the known ones."""
    chosen = text.split(",")
    for name in chosen:
        if name not in known:
            parser.error(f"--{option}: '{name}' is unknown; use some of {', '.join(known)}")
    return chosen


def check_device(parser: argparse.ArgumentParser, device: str) -> None:
    """End the program where a GPU is asked for and there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU was found here; use --device cpu")
