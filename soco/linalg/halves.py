"""Products in nearly float32 from three in bfloat16, for GPUs that multiply that so much faster."""

from typing import NamedTuple

import torch
from torch import Tensor


class Halves(NamedTuple):
    """Numbers as sums of two in bfloat16: to 2^-17 of each, since both have eight bits."""

    high: Tensor
    low: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> "Halves":
        """A float32 tensor, split."""
        high = matrix.bfloat16()
        return cls(high, (matrix - high.float()).bfloat16())

    @property
    def mT(self) -> "Halves":
        """The transposed matrices."""
        return Halves(self.high.mT, self.low.mT)

    def __matmul__(self, other: "Halves") -> Tensor:
        """(batch, n, k) by (batch, k, m), float32; what is lost is 2^-15 of ``|a| |b|`` at most.

        The product of the two low parts, 2^-16 of that, is left out; the small ones are added
        first.
        """
        small = _product(self.high, other.low) + _product(self.low, other.high)
        return _product(self.high, other.high) + small


def pay(matrices: Tensor) -> bool:
    """Whether these matrices are where three products in bfloat16 are quicker than one.

    By data sheets a GPU from compute capability 8.0 on multiplies bfloat16, with sums in float32,
    15 times as fast as float32 (A100: 312 and 19.5 TFLOP/s, H200: 989 and 67). Not measured here.
    """
    return (
        matrices.is_cuda
        and matrices.dtype == torch.float32
        and torch.version.hip is None
        and torch.cuda.get_device_capability(matrices.device) >= (8, 0)
    )


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Of matrices in bfloat16, summed in float32 and left there."""
    if left.is_cuda:
        return torch.bmm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()
