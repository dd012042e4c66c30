"""The core called past torch's dispatcher, for weights that stay where they are.

On its way through the dispatcher an op that is written in Python takes tens of microseconds, which
for one token of a small layer is longer than its kernel. What that way is there for - derivatives,
compilers, modes, tensors that are not what they seem - is looked for at every call instead.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from soco.core import runner
from soco.ops.barriers import barrier_for
from soco.ops.checks import sum_dtype
from soco.ops.layers import Weights, address, most_tokens, packed, plan_of


class DirectCall:
    """What one call of the core takes, made ready: the addresses of weights that were checked.

    It holds no tensor. Whoever calls it keeps the weights where they were. Copies and files of it
    are None.

    Args:
        weights: that fit together. Where they are not as the core reads them, the outputs are None.
        dtype: of the inputs.
        dependent: see :class:`soco.ops.PreparedGroup`.
        shares: see :func:`soco.ops.shares.shares_for`.
        made_for: what tells these weights from others, for who has to ask; kept as it is.
    """

    def __init__(
        self, weights: Weights, dtype: torch.dtype, dependent: bool | None = None,
        shares: Sequence[int] = (), made_for: Any = None,
    ) -> None:  # fmt: skip
        down, self.made_for = weights.down, made_for
        self._device, self._dtype = down.device, dtype
        self._in, self._width = down.shape[1], weights.width
        self._plan = plan_of(weights, dtype, dependent, shares)
        self._run = runner("low_rank_group", down.device.type) if _lies_well(weights) else None
        self._most = most_tokens(down.device.type, dtype, down.dtype)
        self._ranks = 0 if down.is_cpu else len(down)  # the core has memory there
        self._sums = sum_dtype(down.new_empty(0, dtype=dtype))

    def __call__(self, x: Tensor) -> Tensor | None:
        """The outputs; None if the call has to go through the dispatcher.

        That is so with gradients enabled, for another dtype, device or size than it was made for,
        for no token, and for more than a kernel is used for.
        """
        if torch.is_grad_enabled() or is_followed(self._device.type):
            return None
        shape = x.shape
        tokens = x.numel() // self._in if self._in else 0
        if (
            not is_plain(x)
            or x.dtype is not self._dtype
            or x.device != self._device
            or shape[-1:] != (self._in,)
            or not 0 < tokens <= self._most
            or self._run is None
        ):
            return None
        y = x.new_empty((*shape[:-1], self._width))
        if not x.is_contiguous():
            x = x.contiguous()
        z = x.new_empty((tokens, self._ranks), dtype=self._sums) if self._ranks else None
        self._run(x, self._plan, x.data_ptr(), 0, address(z), y.data_ptr(), tokens, barrier_for(x))
        return y

    def __deepcopy__(self, memo: dict) -> None:
        """None: what the copy is of has weights of its own."""

    def __reduce__(self) -> Any:
        """None, as for copies."""
        return type(None), ()


def _lies_well(weights: Weights) -> bool:
    """Whether the core can read the weights where they are."""
    again = packed(weights)
    pairs = zip(_tensors(weights), _tensors(again), strict=True)
    return all(a is b and not a.is_neg() for a, b in pairs)


def _tensors(weights: Weights) -> list[Tensor]:
    down, ups, sources, bias, down_scale, up_scales, _ = weights
    return [t for t in (down, bias, down_scale, *ups, *sources, *up_scales) if t is not None]


def is_plain(x: Tensor) -> bool:
    """Whether the numbers of a tensor are those in the memory that it points to.

    Those of a subclass, of a sparse tensor, or of one on the meta device are not, nor of one that
    is negative or zero without having been written so.
    """
    return (
        type(x) is Tensor
        and x.layout is torch.strided
        and not x.is_meta
        and not x.is_neg()
        and not x._is_zerotensor()
    )


def is_followed(device: str) -> bool:
    """Whether something follows the program by the ops that pass through torch's dispatcher.

    A compiler, a tracer, a mode (a profiler's, a fake tensor's), a transform of functions, forward
    derivatives, or autocast on this kind of device.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore
        or torch.is_autocast_enabled(device)
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )
