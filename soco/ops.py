"""The ops of soco: schema, checks, kernels per device, fake, backward - one place per op.

Tensors in, new tensors out: nothing is written into an input, and randomness comes in as a seed.
Sums and products are float32 (float64 for float64) whatever the dtype of the tensors. Derivatives
of every order exist: each backward pass is an op with a backward pass of its own. Under autocast
:func:`low_rank_linear` casts its inputs as ``torch.nn.functional.linear`` does; the other ops
compute on what they are given.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from soco.core import DTYPES, Run, implement, library, spectral_partials, without_autocast

__all__ = [
    "gaussian_sketch",
    "gaussian_sketch_backward",
    "low_rank_linear",
    "low_rank_linear_backward",
    "spectral_scale",
    "spectral_scale_backward",
]

# low_rank_linear runs a kernel of the core up to this many tokens (rows of x), and two products of
# torch's matrix library above, where that is at the limit of the machine already.
DECODE_TOKENS = 16


def _autograd(op: str, backward: Callable[..., Any], setup: Callable[..., None]) -> None:
    torch.library.register_autograd(f"soco::{op}", backward, setup_context=setup, lib=library)


def _check_dtype(name: str, x: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")


def _check(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    meaning: str,
    like: Tensor,
    dtypes: tuple[torch.dtype, ...] | None = None,
) -> None:
    """Refuse a tensor of another shape or device than this, or none of ``dtypes`` (like's)."""
    if tensor.shape != shape:
        raise ValueError(f"{name} must be {meaning} = {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device} as the others, got {tensor.device}")
    if tensor.dtype not in (dtypes or (like.dtype,)):
        names = " or ".join(str(dtype) for dtype in dtypes or (like.dtype,))
        raise TypeError(f"{name} must be {names}, got {tensor.dtype}")


def _check_size(*shape: int) -> None:
    if math.prod(shape) > (2**63 - 1) // 8:
        raise ValueError(f"a tensor of shape {shape} is too large for 64-bit sizes")


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _flat(x: Tensor) -> Tensor:
    """View (..., n) as (tokens, n)."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


# spectral_scale ----------------------------------------------------------------------------------

library.define("spectral_scale(Tensor x, Tensor scale, Tensor mask) -> Tensor")
library.define(
    "spectral_scale_backward(Tensor grad, Tensor x, Tensor scale, Tensor mask) -> (Tensor, Tensor)"
)


def spectral_scale(x: Tensor, scale: Tensor, mask: Tensor) -> Tensor:
    """Scale the spectral components of ``x``; those that the mask drops become exactly 0.

    ``y[..., i] = x[..., i] * scale[i] if mask[i] else 0``, also where ``x`` is not finite.

    Args:
        x: (..., rank), float32, float64, bfloat16 or float16.
        scale: (rank,), of ``x``'s dtype or float32.
        mask: (rank,), bool.

    Returns:
        (..., rank), of ``x``'s dtype.

    >>> x, scale = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    >>> spectral_scale(x, scale, torch.tensor([True, False]))
    tensor([3., 0.])
    """
    return torch.ops.soco.spectral_scale.default(x, scale, mask)


def spectral_scale_backward(
    grad: Tensor, x: Tensor, scale: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of :func:`spectral_scale` with respect to ``x`` and ``scale``."""
    return torch.ops.soco.spectral_scale_backward.default(grad, x, scale, mask)


def _check_spectral(x: Tensor, scale: Tensor, mask: Tensor, grad: Tensor | None = None) -> None:
    _check_dtype("x", x)
    if x.dim() < 1:
        raise ValueError("x must be (..., rank), got a tensor without dimensions")
    _check("scale", scale, x.shape[-1:], "(rank,)", x, (x.dtype, torch.float32))
    _check("mask", mask, x.shape[-1:], "(rank,)", x, (torch.bool,))
    if grad is not None:
        _check("grad", grad, x.shape, "shaped as x", x)


@implement("spectral_scale", "spectral_scale")
def _spectral_scale(run: Run, x: Tensor, scale: Tensor, mask: Tensor) -> Tensor:
    _check_spectral(x, scale, mask)
    x, scale, mask = x.contiguous(), scale.contiguous(), mask.contiguous()
    y = torch.empty_like(x)
    if x.numel() > 0:
        addresses = x.data_ptr(), scale.data_ptr(), mask.data_ptr(), y.data_ptr()
        sizes = x.numel() // x.shape[-1], x.shape[-1]
        run(x, *addresses, *sizes, DTYPES[x.dtype], DTYPES[scale.dtype])
    return y


@torch.library.register_fake("soco::spectral_scale", lib=library)
def _spectral_scale_fake(x: Tensor, scale: Tensor, mask: Tensor) -> Tensor:
    _check_spectral(x, scale, mask)
    return x.new_empty(x.shape)


@implement("spectral_scale_backward", "spectral_scale_backward")
def _spectral_scale_backward(
    run: Run, grad: Tensor, x: Tensor, scale: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    _check_spectral(x, scale, mask, grad)
    inputs = grad.contiguous(), x.contiguous(), scale.contiguous(), mask.contiguous()
    grad_x, grad_scale = x.new_empty(x.shape), scale.new_zeros(scale.shape)
    if x.numel() > 0:
        sizes = x.numel() // x.shape[-1], x.shape[-1]
        partials = x.new_empty((spectral_partials(sizes[0]), sizes[1]), dtype=_sum_dtype(x))
        addresses = (t.data_ptr() for t in (*inputs, grad_x, grad_scale, partials))
        run(x, *addresses, *sizes, DTYPES[x.dtype], DTYPES[scale.dtype])
    return grad_x, grad_scale


@torch.library.register_fake("soco::spectral_scale_backward", lib=library)
def _spectral_scale_backward_fake(
    grad: Tensor, x: Tensor, scale: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    _check_spectral(x, scale, mask, grad)
    return x.new_empty(x.shape), scale.new_empty(scale.shape)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _spectral_scale_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *spectral_scale_backward(grad, *ctx.saved_tensors), None


def _spectral_scale_backward_autograd(
    ctx: Any, grad_grad_x: Tensor, grad_grad_scale: Tensor
) -> tuple[Tensor | None, ...]:
    grad, x, scale, mask = ctx.saved_tensors
    for_grad = spectral_scale(grad_grad_x, scale, mask) + spectral_scale(x, grad_grad_scale, mask)
    for_x = spectral_scale(grad, grad_grad_scale, mask)
    _, for_scale = spectral_scale_backward(grad_grad_x, grad, scale, mask)
    return for_grad, for_x, for_scale, None


_autograd("spectral_scale", _spectral_scale_autograd, _save_inputs)
_autograd("spectral_scale_backward", _spectral_scale_backward_autograd, _save_inputs)


# low_rank_linear ---------------------------------------------------------------------------------

library.define("low_rank_linear(Tensor x, Tensor down, Tensor up, Tensor? bias) -> Tensor")
library.define(
    "low_rank_linear_backward(Tensor grad, Tensor x, Tensor down, Tensor up, bool[4] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)


def low_rank_linear(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a linear layer whose weight is the product ``up @ down``.

    ``y = (x @ down.T) @ up.T + bias``. For at most :data:`DECODE_TOKENS` tokens one kernel does
    both products and keeps the values between them in float32 (float64 for float64); for more
    they are two products of torch's matrix library, rounded in between as in two ``nn.Linear``.

    Args:
        x: (..., in), float32, float64, bfloat16 or float16.
        down: (rank, in), of the same dtype.
        up: (out, rank), of the same dtype.
        bias: (out,), of the same dtype, or None.

    Returns:
        (..., out), of the same dtype.

    >>> low_rank_linear(torch.ones(1, 2), torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]]))
    tensor([[ 9., 12.]])
    """
    return torch.ops.soco.low_rank_linear.default(x, down, up, bias)


def low_rank_linear_backward(
    grad: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    needs: Sequence[bool] = (True, True, True, True),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of :func:`low_rank_linear` for ``x``, ``down``, ``up`` and ``bias``.

    Those that ``needs`` says are not needed are empty tensors of shape (0,).
    """
    return torch.ops.soco.low_rank_linear_backward.default(grad, x, down, up, list(needs))


def _check_low_rank(
    x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, grad: Tensor | None = None
) -> None:
    _check_dtype("x", x)
    if x.dim() < 1 or down.dim() != 2 or up.dim() != 2:
        raise ValueError(
            "x must be (..., in), down (rank, in) and up (out, rank), got "
            f"{tuple(x.shape)}, {tuple(down.shape)} and {tuple(up.shape)}"
        )
    rank, out_features = down.shape[0], up.shape[0]
    _check("down", down, (rank, x.shape[-1]), "(rank, in)", x)
    _check("up", up, (out_features, rank), "(out, rank)", x)
    if bias is not None:
        _check("bias", bias, (out_features,), "(out,)", x)
    if grad is not None:
        _check("grad", grad, (*x.shape[:-1], out_features), "(..., out)", x)


@implement("low_rank_linear", "low_rank_linear")
def _low_rank_linear(run: Run, x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
    _check_low_rank(x, down, up, bias)
    tokens = math.prod(x.shape[:-1])
    if tokens > DECODE_TOKENS:
        return linear(linear(x, down), up, bias).contiguous()
    (rank, in_features), out_features = down.shape, up.shape[0]
    _check_size(tokens, max(in_features, rank, out_features))
    y = x.new_empty((*x.shape[:-1], out_features))
    if y.numel() > 0:
        x, down, up = x.contiguous(), down.contiguous(), up.contiguous()
        bias = None if bias is None else bias.contiguous()
        shift = 0 if bias is None else bias.data_ptr()
        z = x.new_empty((tokens, rank), dtype=_sum_dtype(x))
        inputs = x.data_ptr(), down.data_ptr(), up.data_ptr(), shift
        sizes = tokens, in_features, rank, out_features
        run(x, *inputs, y.data_ptr(), z.data_ptr(), *sizes, DTYPES[x.dtype])
    return y


@torch.library.register_fake("soco::low_rank_linear", lib=library)
def _low_rank_linear_fake(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
    _check_low_rank(x, down, up, bias)
    return x.new_empty((*x.shape[:-1], up.shape[0]))


@implement("low_rank_linear_backward", "low_rank_linear")
def _low_rank_linear_backward(
    run: Run, grad: Tensor, x: Tensor, down: Tensor, up: Tensor, needs: list[bool]
) -> tuple[Tensor, ...]:
    """Products of torch's matrix library; z is computed again, not stored."""
    _check_low_rank(x, down, up, None, grad)
    grads = [x.new_empty(0) for _ in needs]
    flat_grad, flat_x = _flat(grad), _flat(x)
    if needs[0] or needs[1]:
        grad_z = flat_grad @ up  # (tokens, rank)
        if needs[0]:
            grads[0] = (grad_z @ down).view(x.shape)
        if needs[1]:
            grads[1] = grad_z.mT @ flat_x
    if needs[2]:
        grads[2] = flat_grad.mT @ linear(flat_x, down)
    if needs[3]:
        grads[3] = flat_grad.sum(0)
    return tuple(grads)


@torch.library.register_fake("soco::low_rank_linear_backward", lib=library)
def _low_rank_linear_backward_fake(
    grad: Tensor, x: Tensor, down: Tensor, up: Tensor, needs: list[bool]
) -> tuple[Tensor, ...]:
    _check_low_rank(x, down, up, None, grad)
    shapes = (x.shape, down.shape, up.shape, up.shape[:1])
    return tuple(
        x.new_empty(shape if needed else (0,)) for shape, needed in zip(shapes, needs, strict=True)
    )


def _low_rank_linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:3])


def _low_rank_linear_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, down, up = ctx.saved_tensors
    needs = list(ctx.needs_input_grad)
    grads = low_rank_linear_backward(grad, x, down, up, needs)
    return tuple(g if needed else None for g, needed in zip(grads, needs, strict=True))


def _low_rank_linear_backward_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.needs = inputs[4]


def _low_rank_linear_backward_autograd(
    ctx: Any, a: Tensor, b: Tensor, c: Tensor, e: Tensor
) -> tuple[Tensor | None, ...]:
    """The derivative of <a, g up down> + <b, (g up)^T x> + <c, g^T x down^T> + <e, sum of g>."""
    grad, x, down, up = ctx.saved_tensors
    g, flat_x = _flat(grad), _flat(x)
    a = _flat(a) if ctx.needs[0] else torch.zeros_like(flat_x)
    b = b if ctx.needs[1] else torch.zeros_like(down)
    c = c if ctx.needs[2] else torch.zeros_like(up)
    e = e if ctx.needs[3] else up.new_zeros(up.shape[0])
    d = a @ down.mT + flat_x @ b.mT  # (tokens, rank)
    for_grad = d @ up.mT + flat_x @ down.mT @ c.mT + e
    for_x = g @ up @ b + g @ c @ down
    for_down = (g @ up).mT @ a + (g @ c).mT @ flat_x
    return for_grad.view(grad.shape), for_x.view(x.shape), for_down, g.mT @ d, None


_autograd("low_rank_linear", _low_rank_linear_autograd, _low_rank_linear_setup)
_autograd(
    "low_rank_linear_backward", _low_rank_linear_backward_autograd, _low_rank_linear_backward_setup
)
without_autocast(torch.ops.soco.low_rank_linear.default, cast=True)
without_autocast(torch.ops.soco.low_rank_linear_backward.default, cast=False)


# gaussian_sketch ---------------------------------------------------------------------------------

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
    _check_dtype(name, matrix)
    if matrix.dim() < 2:
        raise ValueError(f"{name} must have at least two dimensions, got {tuple(matrix.shape)}")
    if count < 0:
        raise ValueError(f"{what} must not be negative, got {count}")
    _check_seed(seed)


def _times_omega(
    run: Run, matrix: Tensor, rows: int, columns: int, seed: int, *, transpose: bool
) -> Tensor:
    """``matrix @ Omega`` or ``matrix @ Omega.T``, where Omega is (rows, columns)."""
    _check_size(rows, columns)
    omega = matrix.new_empty((rows, columns), dtype=torch.float32)
    if omega.numel() > 0:
        run(matrix, omega.data_ptr(), rows, columns, seed)
    omega, exact = omega.to(_sum_dtype(matrix)), matrix.to(_sum_dtype(matrix))
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


_autograd("gaussian_sketch", _gaussian_sketch_autograd, _gaussian_sketch_setup)
_autograd("gaussian_sketch_backward", _gaussian_sketch_backward_autograd, _gaussian_sketch_setup)
without_autocast(torch.ops.soco.gaussian_sketch.default, cast=False)
without_autocast(torch.ops.soco.gaussian_sketch_backward.default, cast=False)
