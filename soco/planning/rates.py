"""How fast a device computes: measured here in a moment, or assumed of one that is not here."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_SIDE = {torch.float64: 512}  # of the matrices that are multiplied; others are larger
_LARGER = 1024
_EIGEN = 384  # columns of what is taken apart
_FEW, _CALLS = 64, 6  # columns of what is tried first; calls at most
_LONG = 0.4  # seconds after which none follows


@dataclass(frozen=True)
class Rates:
    """Operations in a second."""

    products: Mapping[torch.dtype, float]  # multiplications and additions of matrix products
    cubes: float  # of eigendecompositions in float64: n^3 for n columns, one at a time

    def seconds(self, products: Mapping[torch.dtype, float], cubes: float) -> float:
        """The time for so many operations."""
        single = self.products[torch.float32]
        return cubes / self.cubes + sum(
            count / self.products.get(dtype, single) for dtype, count in products.items()
        )


# What is assumed of a data-center GPU of 2023 (an H100): about half of the dense products that its
# maker states, and a guess at eigendecompositions, which are slow on all of them. Never measured.
ASSUMED_GPU = Rates(
    {torch.float64: 30e12, torch.float32: 30e12, torch.bfloat16: 400e12, torch.float16: 400e12},
    cubes=50e9,
)


def measured_rates(dtype: torch.dtype) -> Rates:
    """What this CPU does; it takes about a second.

    Products run on the threads that torch has now, eigendecompositions on one: they gain little by
    more, and several matrices are taken apart side by side.

    Args:
        dtype: that a model computes in, beside float32 and float64.
    """
    products = {}
    for kind in dict.fromkeys((torch.float32, torch.float64, dtype)):
        side = _SIDE.get(kind, _LARGER)
        x = torch.randn(side, side).to(kind)
        products[kind] = 2 * side**3 / _quickest(lambda x: x @ x, x)
    x = torch.randn(_EIGEN, _EIGEN, dtype=torch.float64)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        return Rates(products, _EIGEN**3 / _quickest(torch.linalg.eigh, x @ x.mT))
    finally:
        torch.set_num_threads(threads)


def _quickest(work: Callable[[Tensor], object], x: Tensor) -> float:
    """Seconds of the quickest of some calls, after a small one that sets libraries up."""
    work(x[:_FEW, :_FEW].contiguous())
    best, spent = float("inf"), 0.0
    for _ in range(_CALLS):
        begin = time.perf_counter()
        work(x)
        seconds = time.perf_counter() - begin
        best, spent = min(best, seconds), spent + seconds
        if spent > _LONG:
            break
    return best
