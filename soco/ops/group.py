"""Low-rank layers for inference: several on one input at once, pivoted ones, 8-bit weights."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from soco.core import (
    DTYPES,
    MOST_MEMBERS,
    WEIGHT_DTYPES,
    LowRankPlan,
    Run,
    implement,
    library,
    runner,
    without_autocast,
)
from soco.ops.checks import autograd, check, check_dtype, check_size, sum_dtype
from soco.ops.lowrank import most_tokens, products, widened

library.define(
    "low_rank_group(Tensor x, Tensor down, Tensor[] ups, Tensor[] sources, Tensor? bias,"
    " Tensor? residual, Tensor? down_scale, Tensor[] up_scales, bool gated) -> Tensor"
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
        x, down, list(ups), list(sources), bias, residual, down_scale, list(up_scales), gated
    )


def _checked(
    x: Tensor,
    down: Tensor,
    ups: list[Tensor],
    sources: list[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    down_scale: Tensor | None,
    up_scales: list[Tensor],
    gated: bool,
) -> list[int]:
    """The number of outputs of each layer, if everything fits together."""
    check_dtype("x", x)
    if x.dim() < 1 or down.dim() != 2 or any(up.dim() != 2 for up in ups):
        raise ValueError(
            "x must be (..., in), down (sum of ranks, in) and each of ups (out, rank), got "
            f"{tuple(x.shape)}, {tuple(down.shape)} and {[tuple(up.shape) for up in ups]}"
        )
    if not 1 <= len(ups) <= MOST_MEMBERS:
        raise ValueError(f"a group has 1 to {MOST_MEMBERS} layers, got {len(ups)}")
    eight_bit = down.dtype in WEIGHT_DTYPES and down.dtype not in DTYPES
    if eight_bit and x.dtype == torch.float64:
        raise TypeError("8-bit weights are computed with in float32: x must not be float64")
    for name, given, count in (("sources", sources, 0), ("up_scales", up_scales, len(ups))):
        allowed = {len(ups) * eight_bit} if count else {0, len(ups)}
        if len(given) not in allowed:
            raise ValueError(
                f"{name} must have one tensor per layer{'' if count else ' or none'}, that is "
                f"{max(allowed)} for weights in {down.dtype}, got {len(given)}"
            )
    ranks = [up.shape[1] for up in ups]
    weights = (down.dtype,) if eight_bit else (x.dtype,)
    check("down", down, (sum(ranks), x.shape[-1]), "(sum of ranks, in)", x, weights)
    outs = []
    for number, up in enumerate(ups):
        check(f"ups[{number}]", up, up.shape, "(out, rank)", x, weights)
        out = up.shape[0]
        if sources and sources[number].numel() > 0:
            most = sum(up.shape)
            out = min(max(sources[number].numel(), out), most)
            check(f"sources[{number}]", sources[number], (out,), "(out,)", x, (torch.int64,))
        outs.append(out)
        if eight_bit:
            shape = up.shape[:1]
            check(f"up_scales[{number}]", up_scales[number], shape, "(rows,)", x, _FLOAT32)
    if eight_bit != (down_scale is not None):
        raise ValueError(
            f"down_scale goes with 8-bit weights, got {'none' if eight_bit else 'one'} with "
            f"{down.dtype}"
        )
    if down_scale is not None:
        check("down_scale", down_scale, down.shape[:1], "(sum of ranks,)", x, _FLOAT32)
    if bias is not None:
        check("bias", bias, (sum(outs),), "(sum of outs,)", x)
    if gated and (len(ups) != 2 or outs[0] != outs[1]):
        raise ValueError(f"gated means two layers with as many outputs each, got outs {outs}")
    if residual is not None:
        shape = (*x.shape[:-1], outs[0] if gated else sum(outs))
        check("residual", residual, shape, "shaped as the result", x)
    return outs


_FLOAT32 = (torch.float32,)


@implement("low_rank_group", "low_rank_group")
def _low_rank_group(
    run: Run,
    x: Tensor,
    down: Tensor,
    ups: list[Tensor],
    sources: list[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    down_scale: Tensor | None,
    up_scales: list[Tensor],
    gated: bool,
) -> Tensor:
    outs = _checked(x, down, ups, sources, bias, residual, down_scale, up_scales, gated)
    tokens, in_features, width = (
        math.prod(x.shape[:-1]),
        x.shape[-1],
        outs[0] if gated else sum(outs),
    )
    if tokens > most_tokens(x.device.type, x.dtype):
        return _by_products(x, down, ups, sources, bias, residual, down_scale, up_scales, gated)
    check_size(tokens, max(in_features, down.shape[0], sum(outs)))
    y = x.new_empty((*x.shape[:-1], width))
    if y.numel() > 0:
        x, residual = x.contiguous(), None if residual is None else residual.contiguous()
        plan, kept = _plan(down, ups, sources, bias, down_scale, up_scales, gated, x.dtype, outs)
        z = x.new_empty((tokens, down.shape[0]), dtype=sum_dtype(x))
        added = 0 if residual is None else residual.data_ptr()
        run(x, plan, x.data_ptr(), added, z.data_ptr(), y.data_ptr(), tokens)
        del kept
    return y


def _plan(
    down: Tensor,
    ups: Sequence[Tensor],
    sources: Sequence[Tensor],
    bias: Tensor | None,
    down_scale: Tensor | None,
    up_scales: Sequence[Tensor],
    gated: bool,
    dtype: torch.dtype,
    outs: list[int],
) -> tuple[LowRankPlan, list[Tensor | None]]:
    """The weights as the core sees them, and the tensors to be kept for as long as that is used."""
    whole = [t if t is None else t.contiguous() for t in (down, down_scale, bias)]
    ups = [up if up.stride(1) == 1 else up.contiguous() for up in ups]
    found = [source.contiguous() if source.numel() > 0 else None for source in sources]
    found = found or [None] * len(ups)
    scales = [scale.contiguous() for scale in up_scales] or [None] * len(ups)
    members = [
        (up.data_ptr(), up.stride(0), _address(scale), _address(source), up.shape[1], len(up), out)
        for up, scale, source, out in zip(ups, scales, found, outs, strict=True)
    ]
    dtypes = DTYPES[dtype], WEIGHT_DTYPES[down.dtype]
    at, scale_at, bias_at = (_address(tensor) for tensor in whole)
    plan = LowRankPlan(at, scale_at, members, bias_at, down.shape[1], *dtypes, gated)
    return plan, [*whole, *ups, *scales, *found]


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _by_products(
    x: Tensor,
    down: Tensor,
    ups: list[Tensor],
    sources: list[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    down_scale: Tensor | None,
    up_scales: list[Tensor],
    gated: bool,
) -> Tensor:
    """The same by torch's matrix library: one product for all of down, one for each of ups."""
    zs = products(widened(x), down, down_scale).split([up.shape[1] for up in ups], dim=-1)
    parts = []
    for number, (z, up) in enumerate(zip(zs, ups, strict=True)):
        part = products(z, up, up_scales[number] if up_scales else None)
        if sources and sources[number].numel() > 0:
            part = torch.cat((z, part), -1).index_select(-1, sources[number])
        parts.append(part)
    if bias is not None:
        shifts = bias.split([part.shape[-1] for part in parts])
        parts = [part + shift for part, shift in zip(parts, shifts, strict=True)]
    y = silu(parts[0]) * parts[1] if gated else torch.cat(parts, -1)
    return (y if residual is None else y + residual).to(x.dtype)


@torch.library.register_fake("soco::low_rank_group", lib=library)
def _low_rank_group_fake(x: Tensor, *rest: Any) -> Tensor:
    outs = _checked(x, *rest)
    return x.new_empty((*x.shape[:-1], outs[0] if rest[-1] else sum(outs)))


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
        options: ``sources``, ``bias``, ``down_scale``, ``up_scales`` and ``gated``.

    Raises:
        ValueError, TypeError: as :func:`low_rank_group`.
    """

    def __init__(
        self, down: Tensor, ups: Sequence[Tensor], dtype: torch.dtype, **options: Any
    ) -> None:
        self.down, self.ups, self.options = down, list(ups), options
        self.dtype, self.device, self.in_features = dtype, down.device, down.shape[1]
        weights = (
            down, self.ups, list(options.get("sources", ())), options.get("bias"),
            options.get("down_scale"), list(options.get("up_scales", ())),
            options.get("gated", False),
        )  # fmt: skip
        empty = down.new_empty((0, down.shape[1]), dtype=dtype)
        outs = _checked(empty, *weights[:4], None, *weights[4:])
        self.width = outs[0] if weights[-1] else sum(outs)
        self._plan, self._kept = _plan(*weights, dtype, outs)
        self._run = runner("low_rank_group", self.device.type)
        self._most = most_tokens(self.device.type, dtype)
        self._ranks = 0 if self.device.type == "cpu" else down.shape[0]  # the core has memory there
        self._sums = sum_dtype(empty)

    def __call__(self, x: Tensor) -> Tensor:
        """``low_rank_group(x, ...)``, for ``x`` of the dtype and device that it was made for."""
        shape = x.shape
        tokens = x.numel() // self.in_features if self.in_features else 0
        if (
            type(x) is not Tensor
            or x.dtype is not self.dtype
            or x.device != self.device
            or shape[-1:] != (self.in_features,)
            or not 0 < tokens <= self._most
            or self._run is None
            or torch.is_grad_enabled()
            or _is_watched(self.device.type)
        ):
            return low_rank_group(x, self.down, self.ups, **self.options)
        y = x.new_empty((*shape[:-1], self.width))
        if not x.is_contiguous():
            x = x.contiguous()
        z = x.new_empty((tokens, self._ranks), dtype=self._sums) if self._ranks else None
        self._run(x, self._plan, x.data_ptr(), 0, _address(z), y.data_ptr(), tokens)
        return y

    def __deepcopy__(self, memo: dict) -> "PreparedGroup":
        """The same: the weights stay where they are."""
        return self

    def __reduce__(self) -> Any:
        """How to make it again from its weights."""
        return _prepare, (self.down, self.ups, self.dtype, self.options)


def _prepare(
    down: Tensor, ups: list[Tensor], dtype: torch.dtype, options: dict[str, Any]
) -> PreparedGroup:
    return PreparedGroup(down, ups, dtype, **options)


def _is_watched(device: str) -> bool:
    """Whether something follows the program by the ops that pass through torch's dispatcher."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore
        or torch.is_autocast_enabled(device)
        or torch._C._get_tracing_state() is not None
    )
