"""Low-rank layers for inference: several on one input at once, pivoted ones, 8-bit weights."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from soco.core import (
    DTYPES,
    MOST_MEMBERS,
    WEIGHT_DTYPES,
    Run,
    implement,
    library,
    without_autocast,
)
from soco.ops.checks import autograd, check, check_dtype
from soco.ops.direct import DirectCall
from soco.ops.layers import Weights, compute, packed
from soco.ops.shares import shares_for

library.define(
    "low_rank_group(Tensor x, Tensor? residual, Tensor down, Tensor[] ups, Tensor[] sources,"
    " Tensor? bias, Tensor? down_scale, Tensor[] up_scales, bool gated) -> Tensor"
)


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
    """Apply several low-rank linear layers to one input, their outputs side by side.

    For layer g, ``z = x @ down[its rows].T``; ``y = z @ ups[g].T``, or, where it has sources,
    ``y = cat(z, z @ ups[g].T)[..., sources[g]]`` (a pivoted layer). All of that is one kernel for
    as many tokens as :func:`low_rank_linear` has one for, with the values in between in float32
    (float64 for float64), and products of torch's matrix library for more.

    For inference: no gradient flows back through it, and asking for one is an error.

    Args:
        x: (..., in), float32, float64, bfloat16 or float16.
        down: (sum of ranks, in), the layers' one after the other, of ``x``'s dtype; or int8 or
            float8_e4m3fn, and then with scales.
        ups: for each layer (out, rank), or (out - rank, rank) where it has sources; of ``down``'s
            dtype. Rows may lie apart: padded factors are passed as views.
        sources: for each layer (out,), int64, where in ``cat(z, z @ up.T)`` its outputs are, those
            of ``up``'s rows all and in their order (of ``z`` some may be padding); or an empty
            tensor for a layer without pivots. Not given: no layer has any. The values are not
            checked: wrong ones give wrong outputs.
        bias: (sum of outs,), of ``x``'s dtype, or None.
        residual: shaped as the result, of ``x``'s dtype, added at the end; or None.
        down_scale: (sum of ranks,), float32: what each row of an 8-bit ``down`` is multiplied by.
        up_scales: the same for each of ``ups``: (its rows,), float32.
        gated: there are two layers, and the result is ``silu(first) * second``.

    Returns:
        (..., sum of outs), or (..., out) if gated; of ``x``'s dtype.

    Source:
        Pivoted layers: PIFA, Zhao et al., ICML 2025 (arXiv 2501.19090).

    >>> x, down = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0], [2.0, 0.0]])
    >>> low_rank_group(x, down, [torch.tensor([[1.0], [2.0]]), torch.tensor([[5.0]])])
    tensor([[ 3.,  6., 10.]])
    """
    return torch.ops.soco.low_rank_group.default(
        x, residual, down, list(ups), list(sources), bias, down_scale, list(up_scales), gated
    )


def _check(x: Tensor, residual: Tensor | None, weights: Weights) -> None:
    """Refuse what does not fit together."""
    down, ups, sources, bias, down_scale, up_scales, gated = weights
    check_dtype("x", x)
    if x.dim() < 1 or down.dim() != 2 or any(up.dim() != 2 for up in ups):
        raise ValueError(
            "x must be (..., in), down (sum of ranks, in) and each of ups (out, rank), got "
            f"{tuple(x.shape)}, {tuple(down.shape)} and {[tuple(up.shape) for up in ups]}"
        )
    count = len(ups)
    if not 1 <= count <= MOST_MEMBERS:
        raise ValueError(f"a group has 1 to {MOST_MEMBERS} layers, got {count}")
    eight_bit = down.dtype in WEIGHT_DTYPES and down.dtype not in DTYPES
    if eight_bit and x.dtype == torch.float64:
        raise TypeError("8-bit weights are computed with in float32: x must not be float64")
    if len(sources) not in (0, count):
        raise ValueError(
            f"sources must have one tensor per layer or none, that is {count} or 0, "
            f"got {len(sources)}"
        )
    if len(up_scales) != count * eight_bit:
        raise ValueError(
            f"up_scales must have one tensor per layer for 8-bit weights and none for others, that "
            f"is {count * eight_bit} for {down.dtype}, got {len(up_scales)}"
        )
    if eight_bit != (down_scale is not None):
        raise ValueError(
            f"down_scale goes with 8-bit weights, got {'none' if eight_bit else 'one'} with "
            f"{down.dtype}"
        )
    dtypes = (down.dtype,) if eight_bit else (x.dtype,)
    shape = sum(up.shape[1] for up in ups), x.shape[-1]
    check("down", down, shape, "(sum of ranks, in)", x, dtypes)
    if down_scale is not None:
        check("down_scale", down_scale, down.shape[:1], "(sum of ranks,)", x, (torch.float32,))
    for number, up in enumerate(ups):
        check(f"ups[{number}]", up, up.shape, "(out, rank)", x, dtypes)
        if eight_bit:
            scale = up_scales[number]
            check(f"up_scales[{number}]", scale, up.shape[:1], "(rows,)", x, (torch.float32,))
        if sources and (found := sources[number].numel()) > 0:
            least, most = len(up), sum(up.shape)  # some of z may be padding
            shape = (min(max(found, least), most),)
            check(f"sources[{number}]", sources[number], shape, "(out,)", x, (torch.int64,))
    outs = weights.outs
    if bias is not None:
        check("bias", bias, (sum(outs),), "(sum of outs,)", x)
    if gated and (count != 2 or outs[0] != outs[1]):
        raise ValueError(f"gated means two layers with as many outputs each, got outs {outs}")
    if residual is not None:
        shape = (*x.shape[:-1], weights.width)
        check("residual", residual, shape, "shaped as the result", x)


@implement("low_rank_group", "low_rank_group")
def _low_rank_group(run: Run, x: Tensor, residual: Tensor | None, *weights: Any) -> Tensor:
    group = Weights(*weights)
    _check(x, residual, group)
    return compute(run, x, group, residual)


@torch.library.register_fake("soco::low_rank_group", lib=library)
def _low_rank_group_fake(x: Tensor, residual: Tensor | None, *weights: Any) -> Tensor:
    group = Weights(*weights)
    _check(x, residual, group)
    return x.new_empty((*x.shape[:-1], group.width))


def _refuse(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError(
        "low_rank_group is for inference and has no derivative: use low_rank_linear, or the layers "
        "as they are in a model that was not optimized"
    )


autograd("low_rank_group", _refuse, lambda ctx, inputs, output: None)
without_autocast(torch.ops.soco.low_rank_group.default, cast=True)


class PreparedGroup:
    """:func:`low_rank_group` for weights that stay where they are: checked once, called often.

    A call is a few microseconds of Python instead of the tens that the way through torch's
    dispatcher takes. What goes that way instead - a compiler, a profiler's or a fake tensor's mode,
    autocast - is noticed, and calls the op.

    Args:
        down: as for :func:`low_rank_group`, like all that follow; kept, and not copied where they
            are contiguous.
        ups: the same.
        dtype: of the inputs.
        dependent: launch the CUDA kernel so that it may begin while what the stream ran before
            still ends (programmatic dependent launch, sm_90 and newer); None: if
            ``SOCO_DEPENDENT_LAUNCH=1`` is in the environment.
        options: ``sources``, ``bias``, ``down_scale``, ``up_scales`` and ``gated``.

    Raises:
        ValueError, TypeError: as :func:`low_rank_group`.
    """

    def __init__(
        self, down: Tensor, ups: Sequence[Tensor], dtype: torch.dtype, *,
        dependent: bool | None = None, **options: Any,
    ) -> None:  # fmt: skip
        weights = Weights(down, ups, **options)
        self.weights, self.dtype, self.dependent = weights, dtype, dependent
        _check(down.new_empty((0, *down.shape[1:]), dtype=dtype), None, weights)
        self._kept = packed(weights)
        self._call = DirectCall(self._kept, dtype, dependent, shares_for(weights))

    def __call__(self, x: Tensor) -> Tensor:
        """``low_rank_group(x, ...)``, for ``x`` of the dtype and device that it was made for."""
        y = self._call(x)
        return low_rank_group(x, **self.weights._asdict()) if y is None else y

    def __deepcopy__(self, memo: dict) -> "PreparedGroup":
        """The same: the weights stay where they are."""
        return self

    def __reduce__(self) -> Any:
        """How to make it again from its weights."""
        return _prepared, (self.dtype, self.weights, self.dependent)


def direct_call(
    down: Tensor, up: Tensor, bias: Tensor | None, source: Tensor | None, made_for: Any
) -> DirectCall:
    """A call for one layer whose weights are checked now, and may be freed or moved any time.

    Args:
        down: as for :func:`low_rank_linear`, like ``up`` and ``bias``.
        up: the same.
        bias: the same.
        source: as one of :func:`low_rank_group`'s ``sources``, or None.
        made_for: see :class:`DirectCall`.
    """
    weights = Weights(down, [up], [] if source is None else [source], bias)
    _check(down.new_empty((0, *down.shape[1:])), None, weights)
    return DirectCall(weights, down.dtype, made_for=made_for)


def _prepared(dtype: torch.dtype, weights: Weights, dependent: bool | None) -> PreparedGroup:
    return PreparedGroup(dtype=dtype, dependent=dependent, **weights._asdict())
