"""Several matrices at once, where one alone leaves threads, or a GPU, without work."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import islice
from queue import SimpleQueue
from typing import TypeVar

import torch
from torch import Tensor

# From so many rows or columns on, several matrices are quicker on a thread of the CPU each than one
# after the other on all of them.
WORTH_A_THREAD = 512
# What the matrices that are worked on together may take beside what they are, in bytes: each about
# six times its smaller side squared, in float64.
MOST_BYTES = 4 * 2**30
# Streams of a GPU: an eigensolver has stretches of small kernels, and waits for the host between
# them. How many pay has not been measured.
STREAMS = 4

Item = TypeVar("Item")
Result = TypeVar("Result")
Tensors = TypeVar("Tensors", bound=tuple[Tensor, ...])


def work_of(rows: int, columns: int, whitened: bool) -> float:
    """How much a decomposition is, to compare it with others: about its multiplications."""
    side = min(rows, columns)
    return float(side * side * max(rows, columns) + whitened * rows * columns * columns)


def workers_for(side: int, count: int, threads: int | None = None) -> int:
    """How many matrices of this smaller side are worked on at once, of ``count``.

    Args:
        side: of the largest.
        count: of matrices.
        threads: that there are; None: those that torch has now.
    """
    threads = threads or torch.get_num_threads()
    if side < WORTH_A_THREAD:
        return 1
    return max(1, min(threads, count, MOST_BYTES // (48 * side**2)))


def side_by_side(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[Result]:
    """``map(work, items)``, several at once, each on its share of torch's threads.

    Without gradients. Not more than ``workers`` items are taken before the first of their results
    was asked for. An exception ends it with the first result that is missing.
    """
    work = torch.no_grad()(work)  # a mode of the thread
    if workers < 2:
        yield from map(work, items)
        return
    threads, waiting = torch.get_num_threads(), iter(items)
    share = max(1, threads // workers)
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(share,))
    try:
        running = deque(pool.submit(work, item) for item in islice(waiting, workers))
        while running:
            result = running.popleft().result()
            running.extend(pool.submit(work, item) for item in islice(waiting, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # the number is the process's in part


def on_streams(
    work: Callable[[Tensor], Tensors], items: Iterable[Tensor], device: torch.device, streams: int
) -> Iterator[Tensors]:
    """``map(work, items)`` on a GPU, several at once: a thread of the host and a stream each.

    Without gradients. What is given has to be there until the last result is; results may be used
    on the stream that is current here, like any tensors made there.

    Args:
        work: from a tensor to tensors.
        items: on the device, all of them taken at once.
        device: CUDA.
        streams: that run side by side, at most ``STREAMS``.
    """
    work = torch.no_grad()(work)  # a mode of the thread
    here = torch.cuda.current_stream(device)
    free: SimpleQueue[torch.cuda.Stream] = SimpleQueue()
    for stream in _streams_of(device)[:streams]:
        free.put(stream)

    def beside(item: Tensor) -> Tensors:
        stream = free.get()
        try:
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                found = work(item)
            here.wait_stream(stream)
            for part in found:
                part.record_stream(here)  # its memory is the other stream's
            return found
        finally:
            free.put(stream)

    with ThreadPoolExecutor(streams) as pool:
        yield from pool.map(beside, items)


@cache
def _streams_of(device: torch.device) -> tuple[torch.cuda.Stream, ...]:
    """The same ones each time: to every stream belong tens of MB of cuBLAS's."""
    return tuple(torch.cuda.Stream(device) for _ in range(STREAMS))
