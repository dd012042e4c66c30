"""Scaling of spectral components under a mask."""

from typing import Any

import torch
from torch import Tensor

from soco.core import DTYPES, Run, implement, library, spectral_partials
from soco.ops.checks import autograd, check, check_dtype, sum_dtype

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


@implement("spectral_scale_backward", "spectral_scale_backward")
def _spectral_scale_backward(
    run: Run, grad: Tensor, x: Tensor, scale: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    _check_spectral(x, scale, mask, grad)
    inputs = grad.contiguous(), x.contiguous(), scale.contiguous(), mask.contiguous()
    grad_x, grad_scale = x.new_empty(x.shape), scale.new_zeros(scale.shape)
    if x.numel() > 0:
        sizes = x.numel() // x.shape[-1], x.shape[-1]
        partials = x.new_empty((spectral_partials(sizes[0]), sizes[1]), dtype=sum_dtype(x))
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


autograd("spectral_scale", _spectral_scale_autograd, _save_inputs)
autograd("spectral_scale_backward", _spectral_scale_backward_autograd, _save_inputs)
