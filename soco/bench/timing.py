"""Times of things side by side: interleaved, with cold weights, as medians and percentiles."""

import gc
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from soco import ops

Run = Callable[[int], Any]  # does the work with the weights of that number

CACHES = 4  # weights are cycled through until they are this many times the last-level cache
MOST = 128  # copies: layers so small that more are needed are cached in a model, too
SHARE_OF_MEMORY = 32  # that all copies may take, in 8 bits
CALLS = 50  # in a CUDA graph, at least
READ_AT_LEAST = 2**24  # bytes, in a call that shows how fast memory is
CPU = torch.device("cpu")
DEFAULT_CACHE = 64 * 2**20  # bytes, where the size of the cache is not known


def cache_bytes(device: torch.device) -> int:
    """The last-level cache."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 2**10, "M": 2**20}[text[-1]])
    return max(sizes, default=DEFAULT_CACHE)


def memory_bytes(device: torch.device) -> int:
    """The memory of the machine, or of a GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def copies_for(nbytes: int, device: torch.device) -> int:
    """How many copies of weights of this size leave no cache a chance.

    Not more than ``MOST``, nor more than memory has room for, with several ways of storing them
    side by side: a virtual machine may be shown the cache of a whole processor.
    """
    wanted = -(-CACHES * cache_bytes(device) // max(nbytes, 1))
    room = memory_bytes(device) // SHARE_OF_MEMORY // max(nbytes, 1)
    return min(max(3, min(wanted, room)), MOST)


def percentiles(times: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile, in microseconds, from seconds.

    >>> percentiles([3e-6, 1e-6, 2e-6])
    {'median_us': 2.0, 'p10_us': 1.0, 'p90_us': 3.0}
    """
    ordered = sorted(times)

    def at(share: float) -> float:
        return round(ordered[min(int(share * len(ordered)), len(ordered) - 1)] * 1e6, 3)

    return {"median_us": at(0.5), "p10_us": at(0.1), "p90_us": at(0.9)}


def side_by_side(
    runs: Mapping[str, Run], copies: int, device: torch.device, repeats: int
) -> dict[str, dict[str, float]]:
    """Time several ways to do one thing, one after the other in every round.

    On a GPU each way is a CUDA graph of at least ``CALLS`` calls that cycle through the copies, and
    a time is that of one replay by their number. On the CPU a time is that of one call.

    Args:
        runs: name to what is timed; it is called with the number of a copy, from 0.
        copies: of the weights.
        device: that it runs on.
        repeats: rounds.

    Returns:
        name to ``percentiles``.
    """
    if device.type == "cuda":
        return _by_graphs(runs, copies, repeats)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(0)
    gc.disable()
    try:
        for turn in range(repeats):
            for name, run in runs.items():
                begin = time.perf_counter()
                run(turn % copies)
                times[name].append(time.perf_counter() - begin)
    finally:
        gc.enable()
    return {name: percentiles(found) for name, found in times.items()}


def _by_graphs(runs: Mapping[str, Run], copies: int, repeats: int) -> dict[str, dict[str, float]]:
    calls = -(-CALLS // copies) * copies
    graphs = {}
    for name, run in runs.items():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):  # what is done on a first call is not captured
            for number in range(copies):
                run(number)
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for call in range(calls):
                run(call % copies)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 3):
        for name, graph in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            if turn >= 3:
                times[name].append(begin.elapsed_time(end) / 1e3 / calls)
    return {name: percentiles(found) for name, found in times.items()}


class Memory:
    """Reads memory on the CPU and does nothing else.

    It runs our own float32 kernel on a vector, which reads several streams at once and gets more
    than a sum or a product by torch. What memory gives depends on who else reads it, and changes
    from one minute to the next: timed in turn with what reads ``nbytes``, this is the roofline.
    """

    def __init__(self, nbytes: int) -> None:
        rows = max(nbytes, READ_AT_LEAST) // 4096
        self.nbytes = rows * 4096  # that a call reads
        buffers = [torch.ones(rows, 1024) for _ in range(copies_for(self.nbytes, CPU))]
        self._groups = [
            ops.PreparedGroup(buffer, [torch.ones(1, rows)], torch.float32) for buffer in buffers
        ]
        self._vector = torch.ones(1, 1024)

    def read(self, number: int) -> Any:
        """Read one of several buffers that no cache holds together."""
        return self._groups[number % len(self._groups)](self._vector)


def read_rate(device: torch.device) -> float:
    """GB/s at which memory is read and not written: the roofline of what streams weights.

    The best of 15 passes over a buffer of ``CACHES`` times the cache: a sum and a product with a
    vector by torch, and our own float32 kernel, which reads several streams at once and on a CPU
    gets more than either.
    """
    size = max(CACHES * cache_bytes(device), 2**28)
    buffer = torch.ones(size // 4096, 1024, device=device)
    vector = torch.ones(1024, device=device)
    ours = ops.PreparedGroup(buffer, [buffer.new_ones(1, len(buffer))], torch.float32)
    ways: list[Callable[[], Any]] = [
        buffer.sum, lambda: torch.mv(buffer, vector), lambda: ours(vector[None])
    ]  # fmt: skip
    best = 0.0
    for way in ways:
        way()
        for _ in range(15):
            if device.type == "cuda":
                torch.cuda.synchronize()
            begin = time.perf_counter()
            way()
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = max(best, buffer.nbytes / (time.perf_counter() - begin) / 1e9)
    return best
