"""Scaling of spectral components under a mask, and the layer whose scales are trained."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from soco.core import DTYPES, Run, implement, library, spectral_partials, without_autocast
from soco.ops.checks import autograd, check, check_dtype, flat, sum_dtype

library.define("spectral_scale(Tensor x, Tensor scale, Tensor mask) -> Tensor")
library.define(
    "spectral_scale_backward(Tensor grad, Tensor x, Tensor scale, Tensor mask) -> (Tensor, Tensor)"
)
library.define(
    "spectral_linear(Tensor z, Tensor scale, Tensor mask, Tensor up, Tensor? bias) -> Tensor"
)
library.define(
    "spectral_linear_backward(Tensor grad, Tensor z, Tensor scale, Tensor mask, Tensor up,"
    " SymInt segments) -> (Tensor, Tensor)"
)
library.define("spectral_quadratic(Tensor z, Tensor up, Tensor target) -> (Tensor, Tensor, Tensor)")
TOKENS_AT_ONCE = 1024  # whose products are summed in float32 before they are in float64


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
    check_dtype("x", x)
    if x.dim() < 1:
        raise ValueError("x must be (..., rank), got a tensor without dimensions")
    check("scale", scale, x.shape[-1:], "(rank,)", x, (x.dtype, torch.float32))
    check("mask", mask, x.shape[-1:], "(rank,)", x, (torch.bool,))
    if grad is not None:
        check("grad", grad, x.shape, "shaped as x", x)


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


def _run_backward(
    run: Run, grad: Tensor, x: Tensor, scale: Tensor, mask: Tensor, grad_x: Tensor, segments: int
) -> Tensor:
    """Writes ``grad_x``, which may be ``grad``; returns the sums of each segment, masked or not."""
    rank = x.shape[-1]
    sums = x.new_zeros((segments, rank), dtype=sum_dtype(x))
    if x.numel() > 0:
        tokens = x.numel() // rank
        partials = x.new_empty((spectral_partials(tokens, segments), rank), dtype=sums.dtype)
        tensors = grad, x, scale, mask, grad_x, sums, partials
        sizes = tokens, rank, segments
        run(x, *(t.data_ptr() for t in tensors), *sizes, DTYPES[x.dtype], DTYPES[scale.dtype])
    return sums


@implement("spectral_scale_backward", "spectral_scale_backward")
def _spectral_scale_backward(
    run: Run, grad: Tensor, x: Tensor, scale: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    _check_spectral(x, scale, mask, grad)
    inputs = grad.contiguous(), x.contiguous(), scale.contiguous(), mask.contiguous()
    grad_x = x.new_empty(x.shape)
    sums = _run_backward(run, *inputs, grad_x, 1)[0]
    return grad_x, torch.where(mask, sums, 0).to(scale.dtype)


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


autograd("spectral_scale", _spectral_scale_autograd, _save_inputs)
autograd("spectral_scale_backward", _spectral_scale_backward_autograd, _save_inputs)


# The layer ----------------------------------------------------------------------------------------


def spectral_linear(
    z: Tensor, scale: Tensor, mask: Tensor, up: Tensor, bias: Tensor | None = None
) -> Tensor:
    """``y = (z * scale * mask) up^T + bias``, for training the scales of a frozen weight.

    With ``z = x down^T`` it is the second half of the layer whose weight is
    ``up diag(scale * mask) down``. The scales go into ``z`` where there are fewer tokens than
    outputs, and into a copy of ``up`` otherwise. The backward pass multiplies ``grad up`` once, and
    goes over that and ``z`` once for both gradients, without another tensor of their size.

    Args:
        z: (..., rank), float32, float64, bfloat16 or float16.
        scale: (rank,), of ``z``'s dtype or float32.
        mask: (rank,), bool.
        up: (out, rank), of ``z``'s dtype.
        bias: (out,), of ``z``'s dtype, or None.

    Returns:
        (..., out), of ``z``'s dtype.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices do not fit.

    >>> z, up = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0]])
    >>> spectral_linear(z, torch.tensor([3.0, 4.0]), torch.tensor([True, False]), up)
    tensor([[3.]])
    """
    return torch.ops.soco.spectral_linear.default(z, scale, mask, up, bias)


def spectral_linear_backward(
    grad: Tensor, z: Tensor, scale: Tensor, mask: Tensor, up: Tensor, segments: int = 1
) -> tuple[Tensor, Tensor]:
    """The gradients of :func:`spectral_linear` for ``z``, and for each scale and run of tokens.

    Args:
        grad: (..., out), of the outputs.
        z: (..., rank), as in the forward pass; as the next three.
        scale: (rank,).
        mask: (rank,), bool.
        up: (out, rank).
        segments: into how many runs of equal length the tokens are divided: 1, or the number of
            sequences of a batch.

    Returns:
        The gradient for ``z``, and ``sums`` (segments, rank), float32 and float64 for float64:
        ``sum_t (grad up)_t z_t`` over the tokens of a run, whether a component is masked or not.
        The gradient for ``scale`` is their sum where the mask is set.
    """
    return torch.ops.soco.spectral_linear_backward.default(grad, z, scale, mask, up, segments)


def _check_linear(
    z: Tensor, scale: Tensor, mask: Tensor, up: Tensor, bias: Tensor | None = None
) -> None:
    _check_spectral(z, scale, mask)
    if up.dim() != 2:
        raise ValueError(f"up must be (out, rank), got {tuple(up.shape)}")
    check("up", up, (up.shape[0], z.shape[-1]), "(out, rank)", z)
    if bias is not None:
        check("bias", bias, up.shape[:1], "(out,)", z)


def _check_linear_backward(
    grad: Tensor, z: Tensor, scale: Tensor, mask: Tensor, up: Tensor, segments: int
) -> None:
    _check_linear(z, scale, mask, up)
    check("grad", grad, (*z.shape[:-1], up.shape[0]), "(..., out)", z)
    tokens = flat(z).shape[0]
    if segments < 1 or tokens % segments != 0:
        raise ValueError(f"segments must divide the {tokens} tokens, got {segments}")


@implement("spectral_linear", "spectral_scale")
def _spectral_linear(
    run: Run, z: Tensor, scale: Tensor, mask: Tensor, up: Tensor, bias: Tensor | None
) -> Tensor:
    _check_linear(z, scale, mask, up, bias)
    if flat(z).shape[0] < up.shape[0]:
        return linear(_spectral_scale(run, z, scale, mask), up, bias)
    return linear(z, _spectral_scale(run, up, scale, mask), bias)


@torch.library.register_fake("soco::spectral_linear", lib=library)
def _spectral_linear_fake(
    z: Tensor, scale: Tensor, mask: Tensor, up: Tensor, bias: Tensor | None
) -> Tensor:
    _check_linear(z, scale, mask, up, bias)
    return z.new_empty((*z.shape[:-1], up.shape[0]))


@implement("spectral_linear_backward", "spectral_scale_backward")
def _spectral_linear_backward(
    run: Run, grad: Tensor, z: Tensor, scale: Tensor, mask: Tensor, up: Tensor, segments: int
) -> tuple[Tensor, Tensor]:
    _check_linear_backward(grad, z, scale, mask, up, segments)
    inner = (grad @ up).contiguous()  # (..., rank); the gradient for z takes its place
    inputs = z.contiguous(), scale.contiguous(), mask.contiguous()
    return inner, _run_backward(run, inner, *inputs, inner, segments)


@torch.library.register_fake("soco::spectral_linear_backward", lib=library)
def _spectral_linear_backward_fake(
    grad: Tensor, z: Tensor, scale: Tensor, mask: Tensor, up: Tensor, segments: int
) -> tuple[Tensor, Tensor]:
    _check_linear_backward(grad, z, scale, mask, up, segments)
    return z.new_empty(z.shape), z.new_empty((segments, z.shape[-1]), dtype=sum_dtype(z))


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    z, scale, mask, up, _ = inputs
    ctx.save_for_backward(z, scale, mask, up)


def _spectral_linear_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    z, scale, mask, up = ctx.saved_tensors
    needs_z, needs_scale, _, needs_up, needs_bias = ctx.needs_input_grad
    grad_z = grad_scale = grad_up = grad_bias = None
    with torch.autocast(z.device.type, enabled=False):
        if needs_z or needs_scale:
            grad_z, sums = spectral_linear_backward(grad, z, scale, mask, up)
            grad_scale = torch.where(mask, sums[0], 0).to(scale.dtype)
        if needs_up:
            grad_up = flat(grad).mT @ flat(spectral_scale(z, scale, mask))
        if needs_bias:
            grad_bias = flat(grad).sum(0)
    return grad_z, grad_scale, None, grad_up, grad_bias


def _save_linear_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.segments = inputs
    ctx.save_for_backward(*tensors)


def _spectral_linear_backward_autograd(
    ctx: Any, grad_grad_z: Tensor, grad_sums: Tensor
) -> tuple[Tensor | None, ...]:
    # Both outputs are linear in G = grad up: <grad_grad_z, G scale mask> + <grad_sums, sum G z>.
    grad, z, scale, mask, up = ctx.saved_tensors
    with torch.autocast(z.device.type, enabled=False):
        tokens = flat(z).shape[0]
        each = grad_sums.to(z.dtype).repeat_interleave(tokens // ctx.segments, 0).view(z.shape)
        inner = grad @ up
        for_inner = spectral_scale(grad_grad_z, scale, mask) + each * z
        _, for_scale = spectral_scale_backward(inner, grad_grad_z, scale, mask)
        for_up = flat(grad).mT @ flat(for_inner)
        return for_inner @ up.mT, each * inner, for_scale, None, for_up, None


autograd("spectral_linear", _spectral_linear_autograd, _save_linear)
autograd("spectral_linear_backward", _spectral_linear_backward_autograd, _save_linear_backward)
without_autocast(torch.ops.soco.spectral_linear.default, cast=True, keep=(1,))
without_autocast(torch.ops.soco.spectral_linear_backward.default, cast=False)


# The layer's error as a quadratic -----------------------------------------------------------------


def spectral_quadratic(z: Tensor, up: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the error of a layer is as a function of its scales, in one pass over the tokens.

    ``|target - (z * s) up^T|^2 = s^T H s - 2 b^T s + c`` with ``H = (up^T up) * (z^T z)``,
    ``b = sum_t z_t * (target up)_t`` and ``c = |target|^2``. Products of 1024 tokens are summed in
    float32 and those sums in float64. No gradient flows.

    Args:
        z: (..., rank), float32, float64, bfloat16 or float16.
        up: (out, rank), of ``z``'s dtype.
        target: (..., out), of ``z``'s dtype.

    Returns:
        H (rank, rank), b (rank,) and c (), float64.

    >>> z, up = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 3.0]])  # y = s_1 + 6 s_2
    >>> spectral_quadratic(z, up, torch.tensor([[5.0]]))[:2]
    (tensor([[ 1.,  6.],
            [ 6., 36.]], dtype=torch.float64), tensor([ 5., 30.], dtype=torch.float64))
    """
    return torch.ops.soco.spectral_quadratic.default(z.detach(), up.detach(), target.detach())


def _check_quadratic(z: Tensor, up: Tensor, target: Tensor) -> None:
    check_dtype("z", z)
    if z.dim() < 1:
        raise ValueError("z must be (..., rank), got a tensor without dimensions")
    if up.dim() != 2:
        raise ValueError(f"up must be (out, rank), got {tuple(up.shape)}")
    check("up", up, (up.shape[0], z.shape[-1]), "(out, rank)", z)
    check("target", target, (*z.shape[:-1], up.shape[0]), "(..., out)", z)


@implement("spectral_quadratic", "spectral_scale_backward")
def _spectral_quadratic(
    run: Run, z: Tensor, up: Tensor, target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    _check_quadratic(z, up, target)
    wide = sum_dtype(z)
    rank = z.shape[-1]
    curvature = z.new_zeros((rank, rank), dtype=torch.float64)
    pull = z.new_zeros(rank, dtype=torch.float64)
    energy = z.new_zeros((), dtype=torch.float64)
    scale, mask = z.new_ones(rank, dtype=wide), z.new_ones(rank, dtype=torch.bool)
    up = up.to(wide)
    parts = zip(flat(z).split(TOKENS_AT_ONCE), flat(target).split(TOKENS_AT_ONCE), strict=True)
    for some, wanted in parts:
        some, wanted = some.to(wide).contiguous(), wanted.to(wide)
        inner = wanted @ up
        pull += _run_backward(run, inner, some, scale, mask, inner, 1)[0]
        curvature += some.mT @ some
        energy += wanted.double().square().sum()
    return curvature * (up.double().mT @ up.double()), pull, energy


@torch.library.register_fake("soco::spectral_quadratic", lib=library)
def _spectral_quadratic_fake(
    z: Tensor, up: Tensor, target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    _check_quadratic(z, up, target)
    rank = z.shape[-1]
    return tuple(z.new_empty(s, dtype=torch.float64) for s in ((rank, rank), (rank,), ()))  # pyright: ignore


without_autocast(torch.ops.soco.spectral_quadratic.default, cast=False)
