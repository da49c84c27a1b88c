"""What a perturbation costs: training steps with each arm, interleaved in one process, as ratios to the plain step.

    python -m benchmarks.overhead                                        # every network, float32, eager
    python -m benchmarks.overhead --models resnet20 --dtypes float32,bf16 --modes eager,compile \
        --formats contiguous,channels_last
    python -m benchmarks.overhead --device cuda --dtypes float32,bf16 --formats contiguous,channels_last

A step is forward, backward and the optimizer's (Adam). On a CPU times are those of the process on one thread. Every
finished setting is appended to ``--out``; the same command continues where an interrupted one stopped.

The byte floor is the time in which a copy moves 8 numbers for each element of each site: what a perturbation that reads
x three times forward and five times backward cannot be faster than on a machine bound by its memory.
"""

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch._inductor.config
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.arms import ARMS, LARGE, SMALL, build, perturbed, site_elements
from benchmarks.environment import describe
from benchmarks.measure import copy_bandwidth, interleaved, launched_kernels
from benchmarks.options import check_device, some_of
from benchmarks.table import Table
from mp_lightning.compare.cost import KeptForBackward

SETTING = ["model", "batch", "dtype", "mode", "format"]
COLUMNS = [
    *SETTING,
    *("arm", "milliseconds", "ratio", "ratio_q1", "ratio_q3", "saved_ratio", "saved_mib"),
    *("added_ms", "floor_ms", "kernels", "compile_s", "rounds"),
]

SHOWN = {"added_ms": "added ms", "saved_ratio": "saved", "kernels": "kernels", "compile_s": "compile s"}


class Step:
    """One training step of one arm on one batch."""

    def __init__(self, arm: str, model: str, batch: int, dtype: str, mode: str, format_: str, device: str) -> None:
        torch.manual_seed(0)
        network, side = build(model)
        memory_format = torch.channels_last if format_ == "channels_last" else torch.contiguous_format
        self.network = perturbed(network.to(device, memory_format=memory_format), arm).train()
        self.x = torch.randn(batch, 3, side, side, device=device).to(memory_format=memory_format)
        self.y = torch.randint(10, (batch,), device=device)
        self.dtype, self.device = dtype, device
        self.called: Callable[[Tensor], Tensor] = self.network
        self.compile_seconds = 0.0
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=1e-4)
        if mode == "compile":
            torch._inductor.config.force_disable_caches = True  # else the time is that of reading an earlier result
            self.called = torch.compile(self.network)
            start = time.perf_counter()
            self()
            self.compile_seconds = time.perf_counter() - start

    def loss(self) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == "bf16"):
            return cross_entropy(self.called(self.x).float(), self.y)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    def saved(self) -> int:
        with KeptForBackward(self.network) as kept:
            self.loss()
        return kept.bytes


def measure(
    setting: dict[str, str], arms: list[str], rounds: int, device: str, bandwidth: float
) -> list[dict[str, str]]:
    """One row for each arm."""
    torch._dynamo.reset()
    model, batch, dtype, mode, format_ = (setting[name] for name in SETTING)
    steps = [Step(arm, model, int(batch), dtype, mode, format_, device) for arm in arms]
    timings = interleaved(steps, rounds, torch.device(device))
    saved = [step.saved() for step in steps]
    item = 2 if dtype == "bf16" else 4
    elements = site_elements(build(model)[0].to(device), steps[0].x)
    floor = 1e3 * 8 * elements * item / bandwidth
    rows = []
    for arm, step, timing, bytes_ in zip(arms, steps, timings, saved, strict=True):
        rows.append(
            {
                **setting,
                "arm": arm,
                **timing.columns(),
                "saved_ratio": f"{bytes_ / saved[0]:.3f}",
                "saved_mib": f"{bytes_ / 2**20:.2f}",
                "added_ms": f"{timing.median - timings[0].median:.2f}",
                "floor_ms": f"{floor:.3f}",
                "kernels": str(launched_kernels(step)) if device == "cuda" else "",
                "compile_s": f"{step.compile_seconds:.1f}" if mode == "compile" else "",
                "rounds": str(rounds),
            }
        )
    return rows


def batches(model: str, device: str) -> list[int]:
    if model in LARGE:
        return [128 if device == "cuda" else 16]
    return [32, 128]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = {
        "models": [*SMALL, *LARGE],
        "arms": list(ARMS),
        "dtypes": ["float32", "bf16"],
        "modes": ["eager", "compile"],
        "formats": ["contiguous", "channels_last"],
    }
    for name, known in choices.items():
        default = ",".join(known if name in ("models", "arms") else known[:1])
        parser.add_argument(f"--{name}", default=default, help=f"some of {','.join(known)}; default: {default}")
    parser.add_argument("--batch", type=int, default=None, help="one batch size instead of the usual ones")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, default=None, help="default: benchmarks/results/overhead-DEVICE.csv")
    arguments = parser.parse_args()
    chosen = {name: some_of(parser, name, getattr(arguments, name), known) for name, known in choices.items()}
    check_device(parser, arguments.device)
    if "plain" not in chosen["arms"]:
        chosen["arms"].insert(0, "plain")
    torch.set_num_threads(1)
    device = arguments.device
    table = Table(arguments.out or Path(f"benchmarks/results/overhead-{device}.csv"), COLUMNS, describe(device))
    bandwidth = copy_bandwidth(torch.device(device))
    print(f"{describe(device)}; copy bandwidth {bandwidth / 1e9:.1f} GB/s")
    for model in chosen["models"]:
        sizes = [arguments.batch] if arguments.batch else batches(model, device)
        for setting in itertools.product(sizes, chosen["dtypes"], chosen["modes"], chosen["formats"]):
            values = dict(zip(SETTING, map(str, (model, *setting)), strict=True))
            if not table.has(values):
                table.add(measure(values, chosen["arms"], arguments.rounds, device, bandwidth))
            floor = table.of(values)[0]["floor_ms"]
            print(f"\n{', '.join(values.values())}; byte floor {floor} ms")
            table.show(values, SHOWN)


if __name__ == "__main__":
    main()
