"""Every op of soco in plain torch or numpy: slow, short, and plainly what the formula says."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def spectral_scale(x: Tensor, scale: Tensor, mask: Tensor) -> Tensor:
    product = x.to(_wide(x)) * scale.to(_wide(x))
    return torch.where(mask, product, torch.zeros_like(product)).to(x.dtype)


def spectral_scale_backward(
    grad: Tensor, x: Tensor, scale: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    product = (grad.double() * x.double()).reshape(-1, x.shape[-1] or 1).sum(0)[: x.shape[-1]]
    grad_scale = torch.where(mask, product, torch.zeros_like(product))
    return spectral_scale(grad, scale, mask), grad_scale.to(scale.dtype)


def spectral_linear(
    z: Tensor, scale: Tensor, mask: Tensor, up: Tensor, bias: Tensor | None
) -> Tensor:
    y = torch.where(mask, z.double() * scale.double(), 0) @ up.double().mT
    return (y if bias is None else y + bias.double()).to(z.dtype)


def spectral_linear_backward(
    grad: Tensor, z: Tensor, scale: Tensor, mask: Tensor, up: Tensor, segments: int
) -> tuple[Tensor, Tensor]:
    inner = grad.double() @ up.double()
    grad_z = torch.where(mask, inner * scale.double(), 0)
    sums = (inner * z.double()).reshape(segments, -1, z.shape[-1] or 1)[..., : z.shape[-1]].sum(1)
    return grad_z.to(z.dtype), sums.to(_wide(z))


def low_rank_linear(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
    y = x.double() @ down.double().mT @ up.double().mT
    return (y if bias is None else y + bias.double()).to(x.dtype)


def low_rank_group(
    x: Tensor,
    down: Tensor,
    ups: Sequence[Tensor],
    *,
    sources: Sequence[Tensor] = (),
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    down_scale: Tensor | None = None,
    up_scales: Sequence[Tensor] = (),
    gated: bool = False,
) -> Tensor:
    def scaled(weight: Tensor, scale: Tensor | None) -> Tensor:
        return weight.double() if scale is None else weight.double() * scale.double()[:, None]

    zs = (x.double() @ scaled(down, down_scale).mT).split([up.shape[1] for up in ups], -1)
    parts = []
    for g, (z, up) in enumerate(zip(zs, ups, strict=True)):
        part = z @ scaled(up, up_scales[g] if up_scales else None).mT
        if sources and len(sources[g]):
            part = torch.cat((z, part), -1)[..., sources[g]]
        parts.append(part)
    y = torch.cat(parts, -1)
    if bias is not None:
        y = y + bias.double()
    if gated:
        first, second = y.chunk(2, -1)
        y = first / (1 + torch.exp(-first)) * second
    return (y if residual is None else y + residual.double()).to(x.dtype)


def philox(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Philox4x32-10: counters (n, 4) and keys (n, 2) to words (n, 4), all uint64 below 2**32."""
    c0, c1, c2, c3 = (counter[:, i].astype(np.uint64) for i in range(4))
    k0, k1 = (key[:, i].astype(np.uint64) for i in range(2))
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (p1 >> half) ^ c1 ^ k0, p1 & low, (p0 >> half) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return np.stack([c0, c1, c2, c3], axis=1)


def gaussian(rows: int, columns: int, seed: int) -> np.ndarray:
    """The matrix of :func:`soco.ops.gaussian_sketch` in float64."""
    groups = -(-columns // 4)
    row, group = (a.ravel() for a in np.mgrid[0:rows, 0:groups])
    zero = np.zeros_like(row)
    keys = np.broadcast_to(np.array([seed & 0xFFFFFFFF, seed >> 32], np.uint64), (len(row), 2))
    words = philox(np.stack([group, zero, row, zero], axis=1), keys)
    uniform = words[:, ::2].astype(np.float32) * np.float32(2**-32) + np.float32(2**-33)  # (n, 2)
    radius = np.sqrt(-2 * np.log(uniform.astype(np.float64)))
    angle = 2 * np.pi * words[:, 1::2].astype(np.float64) / 2**32
    normals = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=2)  # (n, 2, 2)
    return normals.reshape(rows, 4 * groups)[:, :columns]
