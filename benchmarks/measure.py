"""Measuring side by side: interleaved rounds, launched kernels, copy bandwidth."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one arm in each round; its ratios are to the first arm in the same round."""

    milliseconds: list[float]
    ratios: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.milliseconds)

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    def columns(self) -> dict[str, str]:
        """What a table holds of it."""
        first, third = self.spread()
        return {
            "milliseconds": f"{self.median:.2f}",
            "ratio": f"{self.ratio:.3f}",
            "ratio_q1": f"{first:.3f}",
            "ratio_q3": f"{third:.3f}",
        }

    def spread(self) -> tuple[float, float]:
        """First and third quartile of the ratios."""
        if len(self.ratios) < 2:
            return self.ratios[0], self.ratios[0]
        first, _, third = statistics.quantiles(self.ratios, n=4, method="inclusive")
        return first, third


def interleaved(functions: Sequence[Callable[[], object]], rounds: int, device: torch.device) -> list[Timing]:
    """Time all functions once in each round, after each ran twice; a round's order is that of the round before turned.

    On a CPU it is the time of the process, which other programs on the machine disturb least; on a GPU that between
    two events in the stream.
    """
    for function in functions:
        for _ in range(2):
            function()
    times: list[list[float]] = [[] for _ in functions]
    for round_ in range(rounds):
        for position in range(len(functions)):
            index = (position + round_) % len(functions)
            times[index].append(_time(functions[index], device))
    return [Timing(own, [a / b for a, b in zip(own, times[0], strict=True)]) for own in times]


def _time(function: Callable[[], object], device: torch.device) -> float:
    if device.type == "cpu":
        start = time.process_time()
        function()
        return 1e3 * (time.process_time() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end))


def launched_kernels(function: Callable[[], object]) -> int:
    """Number of kernels that one call launches on the GPU."""
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        function()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in recorded.events())


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of copying 64 MiB (256 MiB on a GPU) of float32."""
    source = torch.ones((64 if device.type == "cuda" else 16) << 20, device=device)
    target = torch.empty_like(source)
    (timing,) = interleaved([lambda: target.copy_(source)], 10, device)
    return 2 * source.numel() * source.element_size() / (timing.median * 1e-3)
