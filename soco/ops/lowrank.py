"""A linear layer through a bottleneck, alone."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from soco.core import DTYPES, Run, implement, library, without_autocast
from soco.ops.checks import autograd, check, check_dtype, flat
from soco.ops.layers import Weights, compute, is_slow

library.define("low_rank_linear(Tensor x, Tensor down, Tensor up, Tensor? bias) -> Tensor")
library.define(
    "low_rank_linear_backward(Tensor grad, Tensor x, Tensor down, Tensor up, bool[4] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)


def low_rank_linear(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a linear layer whose weight is the product ``up @ down``.

    ``y = (x @ down.T) @ up.T + bias``. For few tokens (``ops.most_tokens``) one kernel does both
    products and keeps the values between them in float32 (float64 for float64); for more they are
    two products of torch's matrix library, rounded in between as in two ``nn.Linear``, but for
    16-bit floats on a processor that does not multiply those: there they are float32 products.
    Where a gradient of ``up`` is wanted, it is two linears for any number of tokens.

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
    if torch.is_grad_enabled() and up.requires_grad and _keeps_z(x):
        _check_low_rank(x, down, up, bias)
        return linear(linear(x, down), up, bias)
    return torch.ops.soco.low_rank_linear.default(x, down, up, bias)


def _keeps_z(x: Tensor) -> bool:
    """Whether a layer that is trained runs as two of torch's linears.

    The gradient of ``up`` takes ``x @ down.T``, which they keep and the op computes again: one
    product in six more. Where torch's products are slow, the op is faster all the same.
    """
    if torch.is_autocast_enabled(x.device.type) or x.dtype not in DTYPES or x.dim() < 1:
        return False
    return torch.compiler.is_compiling() or not is_slow(x.device.type, x.dtype)


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
    check_dtype("x", x)
    if x.dim() < 1 or down.dim() != 2 or up.dim() != 2:
        raise ValueError(
            "x must be (..., in), down (rank, in) and up (out, rank), got "
            f"{tuple(x.shape)}, {tuple(down.shape)} and {tuple(up.shape)}"
        )
    rank, out_features = down.shape[0], up.shape[0]
    check("down", down, (rank, x.shape[-1]), "(rank, in)", x)
    check("up", up, (out_features, rank), "(out, rank)", x)
    if bias is not None:
        check("bias", bias, (out_features,), "(out,)", x)
    if grad is not None:
        check("grad", grad, (*x.shape[:-1], out_features), "(..., out)", x)


@implement("low_rank_linear", "low_rank_group")
def _low_rank_linear(run: Run, x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
    _check_low_rank(x, down, up, bias)
    return compute(run, x, Weights(down, [up], bias=bias))


@torch.library.register_fake("soco::low_rank_linear", lib=library)
def _low_rank_linear_fake(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
    _check_low_rank(x, down, up, bias)
    return x.new_empty((*x.shape[:-1], up.shape[0]))


@implement("low_rank_linear_backward", "low_rank_group")
def _low_rank_linear_backward(
    run: Run, grad: Tensor, x: Tensor, down: Tensor, up: Tensor, needs: list[bool]
) -> tuple[Tensor, ...]:
    """Products of torch's matrix library; z is computed again, not stored."""
    _check_low_rank(x, down, up, None, grad)
    grads = [x.new_empty(0) for _ in needs]
    flat_grad, flat_x = flat(grad), flat(x)
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
    g, flat_x = flat(grad), flat(x)
    a = flat(a) if ctx.needs[0] else torch.zeros_like(flat_x)
    b = b if ctx.needs[1] else torch.zeros_like(down)
    c = c if ctx.needs[2] else torch.zeros_like(up)
    e = e if ctx.needs[3] else up.new_zeros(up.shape[0])
    d = a @ down.mT + flat_x @ b.mT  # (tokens, rank)
    for_grad = d @ up.mT + flat_x @ down.mT @ c.mT + e
    for_x = g @ up @ b + g @ c @ down
    for_down = (g @ up).mT @ a + (g @ c).mT @ flat_x
    return for_grad.view(grad.shape), for_x.view(x.shape), for_down, g.mT @ d, None


autograd("low_rank_linear", _low_rank_linear_autograd, _low_rank_linear_setup)
autograd(
    "low_rank_linear_backward", _low_rank_linear_backward_autograd, _low_rank_linear_backward_setup
)
without_autocast(torch.ops.soco.low_rank_linear.default, cast=True)
without_autocast(torch.ops.soco.low_rank_linear_backward.default, cast=False)
