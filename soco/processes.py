"""Several processes that work on one model: who does what, and how results come together."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

# A process may take apart a large layer while the others wait. When one dies, its launcher stops
# the others.
_PATIENCE = timedelta(days=1)

_SMALL = 2**16  # entries of a tensor that does not travel alone

_together = False
_store: Any = None  # a dist.Store that the processes have in common, also when one is lost


@contextmanager
def together() -> Iterator[None]:
    """Inside, what soco does is shared by the processes of ``torchrun`` or ``accelerate launch``.

    Every process has to call the same functions with the same arguments, and gets the same result.
    Calibration and training are shared by sequences: sums and gradients of all processes are added
    up, statistics in float64, so that results differ from those of one process by rounding.
    Decompositions are shared by layers, and are the same bit for bit. In a process that was started
    alone, and inside another such block, this does nothing.

    The processes of ``torch.distributed`` take part if that is initialized already. Otherwise it is
    here, by what the launcher put into the environment: gloo for what is on CPUs, nccl for GPUs.

    Raises:
        ValueError: the environment speaks of several processes and does not say how to reach them,
            or this torch cannot.
    """
    global _store, _together
    if _together:
        yield
        return
    begun = dist.is_available() and dist.is_initialized()
    started = not begun and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if started:
        _start()
    _together = begun or started
    try:
        yield
    finally:
        _together = False
        if started:
            dist.destroy_process_group()
            _store = None


@contextmanager
def alone() -> Iterator[None]:
    """Inside ``together``: what one process does while the others do not take part."""
    global _together
    before, _together = _together, False
    try:
        yield
    finally:
        _together = before


def _start() -> None:
    missing = [n for n in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(n)]
    if missing:
        raise ValueError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {missing[0]} is not set: start the "
            f"processes by torchrun or accelerate launch"
        )
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    if not dist.is_available():
        raise ValueError("this torch was built without torch.distributed: start one process alone")
    from torch.distributed import (
        PrefixStore,  # pyright: ignore[reportPrivateImportUsage]
        rendezvous,  # pyright: ignore[reportPrivateImportUsage]
    )

    global _store
    store, rank, size = next(iter(rendezvous("env://", timeout=_PATIENCE)))
    _store = PrefixStore("soco", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)


def count() -> int:
    """How many processes share the work; 1 outside of ``together``."""
    return dist.get_world_size() if _together else 1


def number() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if _together else 0


def first_to(do: str) -> bool:
    """Whether no other process has asked this of the same thing."""
    if _store is None:
        return number() == 0
    return _store.add(do, 1) == 1


def own(items: int) -> range:
    """Which of so many things are for this process."""
    return range(number(), items, count())


def part_of(chosen: Tensor) -> Tensor:
    """This process's part of a batch: every so-manieth entry of (sequences, ...)."""
    return chosen[number() :: count()]


def owners(costs: Sequence[float], processes: int | None = None) -> list[int]:
    """Which process does each of several jobs: the costliest first, each to who has least to do.

    Args:
        costs: of the jobs.
        processes: that share them; None: those that there are.

    >>> owners([3.0, 1.0, 2.0])
    [0, 0, 0]
    >>> owners([3.0, 1.0, 2.0], 2)
    [0, 1, 1]
    """
    busy = [0.0] * (processes or count())
    found = [0] * len(costs)
    for job in sorted(range(len(costs)), key=lambda job: (-costs[job], job)):
        found[job] = min(range(len(busy)), key=lambda process: (busy[process], process))
        busy[found[job]] += costs[job]
    return found


def add_up(*tensors: Tensor) -> None:
    """Replace tensors by their sums over all processes, in place; shapes are the same in all.

    Small ones of one dtype travel together.
    """
    if count() == 1:
        return
    small: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel() <= _SMALL:
            small.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        elif tensor.is_contiguous():
            dist.all_reduce(tensor)
        else:
            dense = tensor.contiguous()
            dist.all_reduce(dense)
            tensor.copy_(dense)
    for those in small.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in those])
        dist.all_reduce(flat)
        for tensor, total in zip(those, flat.split([t.numel() for t in those]), strict=True):
            tensor.copy_(total.view_as(tensor))


def gathered(value: T) -> list[T]:
    """What every process has, in their order; not for large things."""
    if count() == 1:
        return [value]
    found: list[Any] = [None] * count()
    dist.all_gather_object(found, value)
    return cast(list[T], found)


def gathered_tensors(tensor: Tensor) -> list[Tensor]:
    """The tensors of all processes, which have one shape."""
    if count() == 1:
        return [tensor]
    found = [
        torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(count())
    ]
    dist.all_gather(found, tensor.contiguous())
    return found


def told(value: T, source: int = 0) -> T:
    """What one process has; not for large things."""
    if count() == 1:
        return value
    held: list[Any] = [value]
    dist.broadcast_object_list(held, source)
    return cast(T, held[0])


def handed(tensors: Sequence[Tensor] | None, source: int, device: torch.device) -> list[Tensor]:
    """The tensors of one process, in all processes.

    Args:
        tensors: what ``source`` has; not read in the others.
        source: number of a process.
        device: to put them on.
    """
    if count() == 1:
        return list(tensors or [])
    have = source == number()
    shapes = told([(t.shape, t.dtype) for t in tensors or []] if have else None, source)
    found = []
    for place, (shape, dtype) in enumerate(cast(list, shapes)):
        if have:
            tensor = cast(Sequence[Tensor], tensors)[place].contiguous()
        else:
            tensor = torch.empty(shape, dtype=dtype, device=device)
        if tensor.numel():  # as bytes: not every backend knows every dtype
            dist.broadcast(tensor.view(-1).view(torch.uint8), source)
        found.append(tensor)
    return found


def from_first(make: Callable[[], Tensor]) -> Tensor:
    """What the first process makes, a tensor on the CPU, in all of them."""
    made = [make()] if number() == 0 else None
    return handed(made, 0, torch.device("cpu"))[0]


def wait() -> None:
    """Until all processes are here."""
    gathered(None)


def check_same(value: object, what: str) -> None:
    """Refuse results that are not the same in all processes.

    Raises:
        RuntimeError: they are not, which is a mistake of ours or of the machine.
    """
    found = gathered(value)
    if any(each != found[0] for each in found):
        raise RuntimeError(f"{what} differ among the {len(found)} processes")
