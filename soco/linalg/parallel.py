"""Several matrices at once on the CPU, where one alone leaves threads without work."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import torch

# From so many rows or columns on, several matrices are quicker on a thread of the CPU each than one
# after the other on all of them.
WORTH_A_THREAD = 512
# What the matrices that are worked on together may take beside what they are, in bytes: each about
# six times its smaller side squared, in float64.
MOST_BYTES = 4 * 2**30

Item = TypeVar("Item")
Result = TypeVar("Result")


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
