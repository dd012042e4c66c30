"""What the ops share: checks of what comes in, and the registration of derivatives."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from soco.core import DTYPES, library


def autograd(op: str, backward: Callable[..., Any], setup: Callable[..., None]) -> None:
    """Make ``backward`` the derivative of an op."""
    torch.library.register_autograd(f"soco::{op}", backward, setup_context=setup, lib=library)


def check_dtype(name: str, x: Tensor) -> None:
    """Refuse a dtype that the core does not compute in."""
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")


def check(
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


def check_finite(name: str, x: Tensor) -> None:
    """Refuse NaN and Inf; a GPU is waited for."""
    if not all_finite(x):
        bad = (~x.isfinite()).nonzero()
        raise ValueError(
            f"{name} {tuple(x.shape)} holds NaN or Inf in {len(bad)} of its entries, the first at "
            f"{tuple(bad[0].tolist())}"
        )


def all_finite(x: Tensor) -> bool:
    """Whether there is no NaN or Inf; a GPU is waited for.

    What is not finite shows in the extremes, and those take no memory.
    """
    return x.numel() == 0 or bool(torch.stack(x.detach().aminmax()).isfinite().all())


def check_size(*shape: int) -> None:
    """Refuse a tensor whose size in bytes is no 64-bit number."""
    if math.prod(shape) > (2**63 - 1) // 8:
        raise ValueError(f"a tensor of shape {shape} is too large for 64-bit sizes")


def sum_dtype(x: Tensor) -> torch.dtype:
    """What sums over elements of ``x`` are kept in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def flat(x: Tensor) -> Tensor:
    """View (..., n) as (tokens, n)."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
