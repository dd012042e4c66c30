"""What computes low-rank layers: a kernel for few tokens, torch's matrix library for many."""

import functools
import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from soco.core import DTYPES, WEIGHT_DTYPES, LowRankPlan, Run
from soco.ops.barriers import barrier_for
from soco.ops.checks import check_size, sum_dtype

# Instructions that multiply 16-bit floats, or with which oneDNN has good products of them.
BF16 = {"avx512_bf16", "amx_bf16", "avx_ne_convert"}
LIBRARY = {
    torch.bfloat16: BF16 | {"avx512_bw"},
    torch.float16: {"avx512_fp16", "amx_fp16", "avx_ne_convert"},
}
PIECE = 1024  # rows of a weight that are widened at a time
LARGEST = {torch.int8: 128, torch.float8_e4m3fn: 512}  # powers of two that their numbers are below


class Weights(NamedTuple):
    """The layers of a group: what ``low_rank_group`` takes beside its input and the residual."""

    down: Tensor
    ups: Sequence[Tensor]
    sources: Sequence[Tensor] = ()
    bias: Tensor | None = None
    down_scale: Tensor | None = None
    up_scales: Sequence[Tensor] = ()
    gated: bool = False

    @property
    def outs(self) -> list[int]:
        """The outputs of each layer: as many as it has sources, or else rows of ``up``."""
        if not self.sources:
            return [up.shape[0] for up in self.ups]
        pairs = zip(self.sources, self.ups, strict=True)
        return [source.shape[0] or up.shape[0] for source, up in pairs]

    @property
    def width(self) -> int:
        """The outputs of all together."""
        return self.outs[0] if self.gated else sum(self.outs)


@functools.cache
def most_tokens(device: str, dtype: torch.dtype, weights: torch.dtype | None = None) -> int:
    """Up to how many tokens a low-rank layer runs a kernel of the core.

    Above, products of torch's matrix library are at the limit of the machine already. The numbers
    are measured where docs/performance.md says so: on the CPU, ours lose to MKL in float32 from
    here on, to the widened products of :func:`products` in 16 bits, and to oneDNN where the
    processor multiplies 16-bit floats itself.

    Args:
        device: cpu, cuda.
        dtype: of the inputs.
        weights: dtype of the weights, if it is another one: in 8 bits the library has to widen
            them first.
    """
    if device != "cpu" or dtype == torch.float64:
        return 16
    known = instructions()
    bf16 = dtype == torch.bfloat16 and bool(BF16 & known)
    if weights is not None and weights.itemsize == 1 and "avx512_bw" in known:
        return 32 if bf16 else 64
    if dtype == torch.float32:
        return 16 if "avx512_bw" in known else 32
    if bf16:
        return 4
    if dtype == torch.float16 and LIBRARY[dtype] & known:
        return 12
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


def products(
    x: Tensor, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """``x @ weight.T``, times ``scale``, plus ``bias``, by torch's matrix library.

    Of ``x``'s dtype; a weight in fewer bits is widened, not all of it at once, and divided by a
    power of two, which is exact and keeps the sums in the range of float16.
    """
    if x.dtype == weight.dtype:
        return linear(x, weight, bias)
    pieces = (piece.to(x.dtype) for piece in weight.split(PIECE))
    if scale is None:
        y = torch.cat([linear(x, piece) for piece in pieces], -1)
    else:
        largest = LARGEST[weight.dtype]
        y = torch.cat([linear(x, piece / largest) for piece in pieces], -1)
        y = y * (scale * largest).to(y.dtype)
    return y if bias is None else y + bias


def expanded(
    z: Tensor, up: Tensor, scale: Tensor | None, source: Tensor | None, bias: Tensor | None
) -> Tensor:
    """The outputs of one layer for what its ``down`` gave, in ``z``'s dtype."""
    if source is None or source.numel() == 0:
        return products(z, up, scale, bias)
    y = torch.cat((z, products(z, up, scale)), -1).index_select(-1, source)
    return y if bias is None else y + bias


def compute(run: Run, x: Tensor, weights: Weights, residual: Tensor | None = None) -> Tensor:
    """The outputs of a group, checked before: contiguous, and of ``x``'s dtype."""
    down = weights.down
    tokens = math.prod(x.shape[:-1])
    if tokens > most_tokens(x.device.type, x.dtype, down.dtype):
        return _by_products(x, weights, residual).contiguous()
    ranks = down.shape[0]
    check_size(tokens, max(x.shape[-1], ranks, sum(weights.outs)))
    y = x.new_empty((*x.shape[:-1], weights.width))
    if y.numel() > 0:
        x, residual = x.contiguous(), None if residual is None else residual.contiguous()
        weights = packed(weights)
        plan = plan_of(weights, x.dtype)
        z = None  # the core has memory of its own on the CPU
        if not x.is_cpu:
            z = x.new_empty((tokens, ranks), dtype=sum_dtype(x))
        run(
            x, plan, x.data_ptr(), address(residual), address(z), y.data_ptr(), tokens,
            barrier_for(x),
        )  # fmt: skip
    return y


def dependent_launches() -> bool:
    """Whether CUDA kernels may begin while what the stream ran before still ends.

    That is asked for by ``SOCO_DEPENDENT_LAUNCH=1`` in the environment: programmatic dependent
    launches, which GPUs have from sm_90 on.
    """
    return os.environ.get("SOCO_DEPENDENT_LAUNCH", "0") == "1"


def packed(weights: Weights) -> Weights:
    """The same where the core can read it: copies of what does not lie side by side."""
    down, ups, sources, bias, down_scale, up_scales, gated = weights
    return Weights(
        down.contiguous(),
        [up if up.stride(1) == 1 else up.contiguous() for up in ups],
        [source.contiguous() for source in sources],
        None if bias is None else bias.contiguous(),
        None if down_scale is None else down_scale.contiguous(),
        [scale.contiguous() for scale in up_scales],
        gated,
    )


def plan_of(
    weights: Weights, dtype: torch.dtype, dependent: bool | None = None,
    shares: Sequence[int] = (),
) -> LowRankPlan:  # fmt: skip
    """Where these weights, which are :func:`packed`, lie: as the core sees them."""
    none = (None,) * len(weights.ups)
    of_each = weights.ups, weights.up_scales or none, weights.sources or none, weights.outs
    members = []
    for up, scale, source, out in zip(*of_each, strict=True):
        rows, rank = up.shape
        place = up.data_ptr(), up.stride(0), address(scale), address(source)
        members.append((*place, rank, rows, out))
    return LowRankPlan(
        address(weights.down), address(weights.down_scale), members, address(weights.bias),
        weights.down.shape[1], DTYPES[dtype], WEIGHT_DTYPES[weights.down.dtype], weights.gated,
        dependent_launches() if dependent is None else dependent, shares,
    )  # fmt: skip


def address(tensor: Tensor | None) -> int:
    """Where a tensor lies; 0 for none, and for one without elements."""
    return 0 if tensor is None else tensor.data_ptr()


def _by_products(x: Tensor, weights: Weights, residual: Tensor | None) -> Tensor:
    """The outputs by torch's matrix library: one product for all of down, one for each of ups."""
    count = len(weights.ups)
    zs = products(widened(x), weights.down, weights.down_scale)
    biases = [None] * count if weights.bias is None else weights.bias.split(weights.outs)
    parts = [
        expanded(*layer)
        for layer in zip(
            zs.split([up.shape[1] for up in weights.ups], -1), weights.ups,
            weights.up_scales or [None] * count, weights.sources or [None] * count, biases,
            strict=True,
        )
    ]  # fmt: skip
    y = silu(parts[0]) * parts[1] if weights.gated else parts[0]
    if not weights.gated and count > 1:
        y = torch.cat(parts, -1)
    return (y if residual is None else y + residual).to(x.dtype)
