"""Linear layers through a bottleneck, one alone or several on one input."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from soco.core import DTYPES, LowRankPlan, Run, implement, library, without_autocast
from soco.ops.checks import autograd, check, check_dtype, check_size, flat, sum_dtype

# Instructions that multiply 16-bit floats, or with which oneDNN has good products of them.
BF16 = {"avx512_bf16", "amx_bf16", "avx_ne_convert"}
LIBRARY = {
    torch.bfloat16: BF16 | {"avx512_bw"},
    torch.float16: {"avx512_fp16", "amx_fp16", "avx_ne_convert"},
}
PIECE = 1024  # rows of a weight that are widened at a time

library.define("low_rank_linear(Tensor x, Tensor down, Tensor up, Tensor? bias) -> Tensor")
library.define(
    "low_rank_linear_backward(Tensor grad, Tensor x, Tensor down, Tensor up, bool[4] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)


@functools.cache
def most_tokens(device: str, dtype: torch.dtype) -> int:
    """Up to how many tokens a low-rank layer runs a kernel of the core.

    Above, products of torch's matrix library are at the limit of the machine already. The numbers
    are measured where docs/performance.md says so: on the CPU, ours lose to MKL in float32 from
    here on, to the widened products of :func:`products` in 16 bits, and to oneDNN where the
    processor multiplies bfloat16 itself.
    """
    if device != "cpu" or dtype == torch.float64:
        return 16
    if dtype == torch.float32:
        return 32
    if dtype == torch.bfloat16 and BF16 & instructions():
        return 8
    return 64 if is_slow(device, dtype) else 32


@functools.cache
def is_slow(device: str, dtype: torch.dtype) -> bool:
    """Whether torch's own products in this dtype are loops of single multiplications.

    They are in 16 bits on processors that oneDNN has nothing for: 5 to 10 times slower than
    widening the weights and multiplying in float32.
    """
    on_x86 = "avx2" in instructions()  # of others nothing is known
    return device == "cpu" and dtype in LIBRARY and on_x86 and not LIBRARY[dtype] & instructions()


@functools.cache
def instructions() -> frozenset[str]:
    """The sets of instructions that the processor has, as torch names them."""
    known = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 need not have it
    return frozenset(name for name, there in known.items() if there is True)


def widened(x: Tensor) -> Tensor:
    """``x`` in a dtype that torch's matrix library multiplies fast, see :func:`is_slow`."""
    return x.float() if is_slow(x.device.type, x.dtype) else x


def products(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """``x @ weight.T`` by torch's matrix library, and times ``scale`` where there is one.

    Of ``x``'s dtype; a weight in fewer bits is widened, not all of it at once.
    """
    if x.dtype == weight.dtype:
        y = linear(x, weight)
    else:
        y = torch.cat([linear(x, piece.to(x.dtype)) for piece in weight.split(PIECE)], -1)
    return y if scale is None else y * scale.to(y.dtype)


def low_rank_linear(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a linear layer whose weight is the product ``up @ down``.

    ``y = (x @ down.T) @ up.T + bias``. For few tokens (:func:`most_tokens`) one kernel does both
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
    tokens = math.prod(x.shape[:-1])
    if tokens > most_tokens(x.device.type, x.dtype):
        if not is_slow(x.device.type, x.dtype):
            return linear(linear(x, down), up, bias).contiguous()
        y = products(products(widened(x), down), up)
        return (y if bias is None else y.add_(bias)).to(x.dtype)
    (rank, in_features), out_features = down.shape, up.shape[0]
    check_size(tokens, max(in_features, rank, out_features))
    y = x.new_empty((*x.shape[:-1], out_features))
    if y.numel() > 0:
        x, down = x.contiguous(), down.contiguous()
        up = up if up.stride(1) == 1 else up.contiguous()
        bias = None if bias is None else bias.contiguous()
        shift = 0 if bias is None else bias.data_ptr()
        z = x.new_empty((tokens, rank), dtype=sum_dtype(x))
        member = up.data_ptr(), up.stride(0), 0, 0, rank, out_features, out_features
        dtype = DTYPES[x.dtype]
        plan = LowRankPlan(down.data_ptr(), 0, [member], shift, in_features, dtype, dtype, False)
        run(x, plan, x.data_ptr(), 0, z.data_ptr(), y.data_ptr(), tokens)
    return y


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
