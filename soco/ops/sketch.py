"""Products with random matrices that are the same on every device."""

from typing import Any

import torch
from torch import Tensor

from soco.core import Run, implement, library, without_autocast
from soco.ops.checks import autograd, check_dtype, check_size, sum_dtype

library.define("gaussian_sketch(Tensor weight, SymInt columns, int seed) -> Tensor")
library.define("gaussian_sketch_backward(Tensor grad, SymInt in_features, int seed) -> Tensor")


def gaussian_sketch(weight: Tensor, columns: int, seed: int) -> Tensor:
    """Multiply ``weight`` by a random matrix Omega of independent standard normal numbers.

    Element (i, j) of Omega depends on ``seed``, i and j only: it is the same bit for bit on every
    device, for every number of threads, columns and inputs (Philox4x32-10, key ``seed``; counter
    i, j // 4 gives four neighbours by Box and Muller's transform, in float32). The product is one
    of torch's matrix library in float32, in float64 for float64.

    Args:
        weight: (..., out, in), float32, float64, bfloat16 or float16.
        columns: columns of Omega, which is (in, columns) and shared by the leading dimensions.
        seed: from 0 to 2**63 - 1.

    Returns:
        (..., out, columns), of ``weight``'s dtype.
    """
    _check_seed(seed)
    return torch.ops.soco.gaussian_sketch.default(weight, columns, seed)


def gaussian_sketch_backward(grad: Tensor, in_features: int, seed: int) -> Tensor:
    """Return the gradient of :func:`gaussian_sketch` for its weight: ``grad @ Omega.T``."""
    _check_seed(seed)
    return torch.ops.soco.gaussian_sketch_backward.default(grad, in_features, seed)


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be from 0 to 2**63 - 1, got {seed}")


def _check_sketch(name: str, matrix: Tensor, what: str, count: int, seed: int) -> None:
    check_dtype(name, matrix)
    if matrix.dim() < 2:
        raise ValueError(f"{name} must have at least two dimensions, got {tuple(matrix.shape)}")
    if count < 0:
        raise ValueError(f"{what} must not be negative, got {count}")
    _check_seed(seed)


def _times_omega(
    run: Run, matrix: Tensor, rows: int, columns: int, seed: int, *, transpose: bool
) -> Tensor:
    """``matrix @ Omega`` or ``matrix @ Omega.T``, where Omega is (rows, columns)."""
    check_size(rows, columns)
    omega = matrix.new_empty((rows, columns), dtype=torch.float32)
    if omega.numel() > 0:
        run(matrix, omega.data_ptr(), rows, columns, seed)
    omega, exact = omega.to(sum_dtype(matrix)), matrix.to(sum_dtype(matrix))
    return (exact @ (omega.mT if transpose else omega)).to(matrix.dtype)


@implement("gaussian_sketch", "gaussian")
def _gaussian_sketch(run: Run, weight: Tensor, columns: int, seed: int) -> Tensor:
    _check_sketch("weight", weight, "columns", columns, seed)
    return _times_omega(run, weight, weight.shape[-1], columns, seed, transpose=False)


@implement("gaussian_sketch_backward", "gaussian")
def _gaussian_sketch_backward(run: Run, grad: Tensor, in_features: int, seed: int) -> Tensor:
    _check_sketch("grad", grad, "in_features", in_features, seed)
    return _times_omega(run, grad, in_features, grad.shape[-1], seed, transpose=True)


@torch.library.register_fake("soco::gaussian_sketch", lib=library)
def _gaussian_sketch_fake(weight: Tensor, columns: int, seed: int) -> Tensor:
    _check_sketch("weight", weight, "columns", columns, seed)
    return weight.new_empty((*weight.shape[:-1], columns))


@torch.library.register_fake("soco::gaussian_sketch_backward", lib=library)
def _gaussian_sketch_backward_fake(grad: Tensor, in_features: int, seed: int) -> Tensor:
    _check_sketch("grad", grad, "in_features", in_features, seed)
    return grad.new_empty((*grad.shape[:-1], in_features))


def _gaussian_sketch_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.contracted, ctx.seed = inputs[0].shape[-1], inputs[2]


def _gaussian_sketch_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return gaussian_sketch_backward(grad, ctx.contracted, ctx.seed), None, None


def _gaussian_sketch_backward_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return gaussian_sketch(grad, ctx.contracted, ctx.seed), None, None


autograd("gaussian_sketch", _gaussian_sketch_autograd, _gaussian_sketch_setup)
autograd("gaussian_sketch_backward", _gaussian_sketch_backward_autograd, _gaussian_sketch_setup)
without_autocast(torch.ops.soco.gaussian_sketch.default, cast=False)
without_autocast(torch.ops.soco.gaussian_sketch_backward.default, cast=False)
