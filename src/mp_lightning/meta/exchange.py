"""What the processes of a run tell each other: sums over tasks, and states by name. Alone, a process is silent."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mp_lightning.errors import UserError


class RankLostError(UserError):
    """Another process of the run has ended or cannot be reached."""


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def add_up(values: Tensor) -> None:
    """Replace ``values`` by their sum over all processes, in one call and with the same bits everywhere.

    Raises:
        RankLostError: another process is gone.
    """
    if world_size() > 1:
        with reporting_losses():
            dist.all_reduce(values)


def same_everywhere(values: Tensor) -> bool:
    """Whether all processes hold the same bits.

    Args:
        values: float32, any shape.

    Raises:
        RankLostError: another process is gone.
    """
    if world_size() == 1:
        return True
    bits = values.detach().flatten().contiguous().view(torch.int32).long()
    extremes = torch.cat([bits, -bits])
    with reporting_losses():
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    highest, lowest = extremes.chunk(2)
    return bool((highest == -lowest).all())


def on_any(condition: bool, device: torch.device) -> bool:
    """Whether the condition holds on at least one process.

    Raises:
        RankLostError: another process is gone.
    """
    flag = torch.tensor(int(condition), device=device)
    add_up(flag)
    return bool(flag > 0)


def collect(local: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The entries of all processes in one dictionary, on the first process; the others get their own back.

    They travel as bytes that are read with ``weights_only=True``, as from a file.

    Args:
        local: tensors, numbers, texts, lists and dictionaries by name; no name occurs on two processes.
        device: where tensors live that the processes exchange.

    Raises:
        RankLostError: another process is gone.
    """
    if world_size() == 1:
        return local
    rank = dist.get_rank()
    own = _to_bytes(local).to(device)
    lengths = torch.zeros(world_size(), dtype=torch.int64, device=device)
    lengths[rank] = own.numel()
    with reporting_losses():
        dist.all_reduce(lengths)
        if rank > 0:
            dist.send(own, 0)
            return local
        together = dict(local)
        for other, length in enumerate(lengths.tolist()[1:], start=1):
            received = torch.empty(length, dtype=torch.uint8, device=device)
            dist.recv(received, other)
            together.update(_from_bytes(received))
    return together


def _to_bytes(values: dict[str, Any]) -> Tensor:
    buffer = io.BytesIO()
    torch.save(values, buffer)
    return torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8).clone()


def _from_bytes(received: Tensor) -> dict[str, Any]:
    content = io.BytesIO(received.cpu().numpy().tobytes())
    values: dict[str, Any] = torch.load(content, map_location="cpu", weights_only=True)
    return values


@contextmanager
def reporting_losses() -> Iterator[None]:
    """Inside this context a broken connection to another process is a :class:`RankLostError`."""
    try:
        yield
    except RuntimeError as error:  # what the backends raise when a connection breaks
        own = dist.get_rank() if dist.is_initialized() else 0
        raise RankLostError(
            f"process {own} of this run lost the others, one of which has ended (look for its message); "
            "the same command continues from the last checkpoint"
        ) from error
