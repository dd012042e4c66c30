"""Counters at which the blocks of a CUDA grid wait for each other."""

import functools

import torch
from torch import Tensor

CHUNK = 4096  # counters that are made at a time
APART = 32  # numbers of 32 bits: a cache line of a GPU


class Counters:
    """The counters on one device: one for each stream, one for each call recorded in a CUDA graph.

    Two grids that run at the same time must not wait at the same counter. What one stream runs, it
    runs in order. A graph may be replayed on any stream, beside others recorded on the stream that
    it was recorded on, but never beside itself; so every recorded call gets a counter for good.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: list[Tensor] = []
        self._free: list[int] = []
        self._of_streams: dict[int, int] = {}

    def __len__(self) -> int:
        """How many nobody has yet."""
        return len(self._free)

    def address(self, stream: int, recorded: bool) -> int:
        """The address of a counter; 0 if there is none for a call that is being recorded.

        Memory cannot be made ready while a graph is recorded. There is a counter if the device ran
        such a call before, as everyone does to warm up.
        """
        if recorded:
            return self._free.pop() if self._free else 0
        if len(self._free) < CHUNK // 2:
            self._make()
        known = self._of_streams.get(stream, 0)
        return known or self._of_streams.setdefault(stream, self._free.pop())

    def _make(self) -> None:
        counters = torch.zeros(CHUNK * APART, dtype=torch.int32, device=self._device)
        if counters.is_cuda:
            torch.cuda.synchronize(self._device)  # zeros for every stream
        self._kept.append(counters)
        begin, size = counters.data_ptr(), counters.element_size() * APART
        self._free.extend(begin + size * i for i in range(CHUNK))


counters = functools.cache(Counters)


def barrier_for(x: Tensor) -> int:
    """The address of a counter for a call on ``x`` on its device's current stream; 0 for none."""
    if not x.is_cuda or x.dtype.itemsize != 2:
        return 0
    with torch.cuda.device(x.device):  # whose current stream may be recorded
        stream = torch.cuda.current_stream().cuda_stream
        return counters(x.device).address(stream, torch.cuda.is_current_stream_capturing())
