"""The layers that stand in a model where a linear stood."""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from soco import ops


class CompressedLinear(nn.Module):
    """What the compressed layers have in common: two factors, a bias and a sentinel.

    The factors are two ``nn.Linear`` children, ``down`` and ``up``, because adapters, quantizers
    and exporters look for ``nn.Linear``.

    ``weight`` is no weight but a sentinel of one element at the place where the dense layer has its
    weight: reading ``.weight.dtype`` or ``.weight.device`` works, and a program that takes the
    files for a dense model's stops at a wrong shape instead of running with random layers.

    Args:
        in_features: size of the inputs.
        out_features: size of the outputs.
        rank: size in between.
        combined: size of the outputs of ``up``.
        bias: whether a bias is added at the end.
        device: where the parameters are made.
        dtype: of the parameters.
    """

    weight: Tensor  # (1,), the sentinel
    bias: nn.Parameter | None  # (out,)
    up: nn.Linear
    # What soco.optimize puts here: the outputs for an input, or None where it has none for it.
    fast: "Callable[[CompressedLinear, Tensor], Tensor | None] | None" = None
    _call: ops.DirectCall | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        combined: int,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Make a layer with random factors and a zero bias."""
        if min(in_features, out_features, rank) < 1:
            raise ValueError(
                f"in_features, out_features and rank must be at least 1, "
                f"got {in_features}, {out_features} and {rank}"
            )
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, combined, bias=False, device=device, dtype=dtype)
        zeros = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if zeros is None else nn.Parameter(zeros))
        self.register_buffer("weight", torch.zeros(1, device=device, dtype=dtype))

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """The dense layer with the same outputs, up to rounding.

        Raises:
            ValueError: a factor is not a plain ``nn.Linear`` (an adapter that is not merged, say),
                or its weight is not in memory.
        """
        for name, factor in (("down", self.down), ("up", self.up)):
            if type(factor) is not nn.Linear:
                kind = f"{type(factor).__module__}.{type(factor).__qualname__}"
                raise ValueError(f"{name} is a {kind}: merge or remove it first")
            if factor.weight.is_meta:
                raise ValueError(f"the weight of {name} is offloaded: load the model without that")
        up, down = self.up.weight, self.down.weight
        wide = torch.promote_types(up.dtype, torch.float32)
        linear = nn.Linear(
            self.in_features, self.out_features, bias=self.bias is not None, device="meta"
        )
        weight = self._weight(up.to(wide), down.to(up.device, wide))
        linear.weight = nn.Parameter(weight.to(up.dtype))
        if self.bias is not None:
            linear.bias = nn.Parameter(_copy(self.bias))
        return linear.train(self.training)

    def _plain_factors(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """The weights of down and up if calling them on ``x`` is multiplying with these alone."""
        down, up = _plain_weight(self.down, x), _plain_weight(self.up, x)
        if down is None or up is None or down.device != up.device or _is_special(x):
            return None
        return down, up

    def _at_once(
        self, x: Tensor, down: Tensor, up: Tensor, source: Tensor | None = None
    ) -> Tensor | None:
        """The outputs for these plain factors by one direct call of the core; None if it cannot be.

        What the call was made ready for is a matter of where the factors lie, and of their shapes
        and dtypes: that is compared at every call, and nothing is held that could be in the way of
        somebody who moves, replaces or offloads them.
        """
        if torch.is_grad_enabled() or ops.is_followed(x.device.type):
            return None
        tensors = (down, up, self._parameters.get("bias"), source)
        found = [
            None if t is None else (t.data_ptr(), t.shape, t.stride(), t.dtype) for t in tensors
        ]
        call = self._call
        if call is None or call.made_for != found:
            call = self._call = ops.direct_call(down, up, tensors[2], source, made_for=found)
        return call(x)

    def _weight(self, up: Tensor, down: Tensor) -> Tensor:
        """The dense weight (out, in) of these factors."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """What ``print`` shows beside the children."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.rank}, bias={self.bias is not None}"
        )


class LowRankLinear(CompressedLinear):
    """A linear layer through a bottleneck: ``y = up(down(x)) + bias``.

    Both factors are what they seem as long as nobody replaced, hooked or wrapped them, and then one
    fused op computes the layer; otherwise the children are called one after the other.

    A layer may use the ``down`` of another one, its ``basis`` (see :func:`share_basis`).

    Args:
        in_features: size of the inputs.
        out_features: size of the outputs.
        rank: size in between.
        bias: whether a bias is added at the end.
        device: where the parameters are made.
        dtype: of the parameters.
    """

    _owner: "tuple[LowRankLinear, ...]" = ()

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make a layer with random factors and a zero bias."""
        super().__init__(in_features, out_features, rank, out_features, bias, device, dtype)

    @classmethod
    def from_factors(
        cls, factors: tuple[Tensor, Tensor], bias: Tensor | None = None
    ) -> "LowRankLinear":
        """Make the layer that computes ``x @ (up @ down).T + bias``.

        Args:
            factors: ``up`` (out, rank) and ``down`` (rank, in), as a ``linalg.Factors`` or a plain
                pair; copied. Their device and dtype are the layer's.
            bias: (out,) or None; copied, and rounded to the factors' dtype.

        Raises:
            ValueError: the shapes, dtypes or devices do not fit together.
        """
        up, down = factors
        if up.dim() != 2 or down.dim() != 2 or up.shape[1] != down.shape[0]:
            raise ValueError(
                f"up must be (out, rank) and down (rank, in), "
                f"got {tuple(up.shape)} and {tuple(down.shape)}"
            )
        if up.dtype != down.dtype or up.device != down.device:
            raise ValueError(
                f"up and down must have one dtype and device, "
                f"got {up.dtype} on {up.device} and {down.dtype} on {down.device}"
            )
        if bias is not None and bias.shape != up.shape[:1]:
            raise ValueError(f"bias must be (out,) = ({up.shape[0]},), got {tuple(bias.shape)}")
        (out_features, rank), in_features = up.shape, down.shape[1]
        layer = cls(in_features, out_features, rank, bias is not None, device="meta")
        _fill(layer, up, down, bias)
        return layer

    @property
    def down(self) -> nn.Linear:
        """The first factor (rank, in): a child of this layer, or else of its basis."""
        own = self._modules.get("down")
        return cast(nn.Linear, own) if own is not None or not self._owner else self._owner[0].down

    @down.setter
    def down(self, module: nn.Module) -> None:
        raise TypeError(f"down must be a module, got {type(module).__name__}")  # those it keeps

    @property
    def basis(self) -> "LowRankLinear | None":
        """The layer whose ``down`` this one uses; None where it has its own."""
        if not self._owner or "down" in self._modules:
            return None
        return self._owner[0].basis or self._owner[0]

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., in) to (..., out)."""
        if self.fast is not None and (y := self.fast(self, x)) is not None:
            return y
        if (factors := self._plain_factors(x)) is not None:
            y = self._at_once(x, *factors)
            return ops.low_rank_linear(x, *factors, self.bias) if y is None else y
        y = self.up(self._reduce(x))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _reduce(self, x: Tensor) -> Tensor:
        """``down(x)``, also where the basis lies on another device than this layer."""
        down = self.down
        if not self._owner:
            return down(x)
        device = down.weight.device
        moved = x if device.type == "meta" else x.to(device)  # if offloaded, its hook moves x
        return down(moved).to(x.device)

    def _weight(self, up: Tensor, down: Tensor) -> Tensor:
        return up @ down

    def extra_repr(self) -> str:
        """What ``print`` shows beside the children."""
        return super().extra_repr() + ("" if self.basis is None else ", down=another layer's")


class PivotedLinear(CompressedLinear):
    """A linear layer of which some outputs are combinations of the others, the pivots.

    ``z = down(x); y[pivots] = z; y[others] = up(z); y + bias``, with the others in ascending order.
    ``down`` holds the rows of the weight at the pivots: r (in + out) - r^2 parameters in all, never
    more than the dense layer.

    Args:
        in_features: size of the inputs.
        out_features: size of the outputs.
        rank: number of the pivots, less than ``out_features``.
        bias: whether a bias is added at the end.
        device: where the parameters are made.
        dtype: of the parameters.

    Source:
        PIFA: Zhao et al., Pivoting Factorization, ICML 2025 (arXiv 2501.19090).
    """

    pivots: Tensor  # (rank,), int64: which outputs are pivots

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make a layer with random factors and a zero bias; the first outputs are the pivots."""
        if rank >= out_features:
            raise ValueError(
                f"a layer with pivots needs a rank below out_features, "
                f"got {rank} and {out_features}: keep it dense"
            )
        combined = out_features - rank
        super().__init__(in_features, out_features, rank, combined, bias, device, dtype)
        self.register_buffer("pivots", torch.arange(rank, device=device))
        self._known: tuple[Tensor, int, Tensor] | None = None

    @classmethod
    def from_factors(
        cls, pivoted: tuple[Tensor, Tensor, Tensor], bias: Tensor | None = None
    ) -> "PivotedLinear":
        """Make the layer whose weight has these rows at the pivots and combinations elsewhere.

        Args:
            pivoted: ``rest`` (out - rank, rank), ``rows`` (rank, in) and ``pivots`` (rank,), as a
                ``pivots.Pivoted`` or a plain tuple; copied. The device and dtype of the first two
                are the layer's.
            bias: (out,) or None; copied, and rounded to their dtype.

        Raises:
            ValueError: the shapes, dtypes or devices do not fit together, or the pivots are not
                different outputs.
        """
        rest, rows, pivots = pivoted
        if rest.dim() != 2 or rows.dim() != 2 or rest.shape[1] != rows.shape[0]:
            raise ValueError(
                f"rest must be (out - rank, rank) and rows (rank, in), "
                f"got {tuple(rest.shape)} and {tuple(rows.shape)}"
            )
        if rest.dtype != rows.dtype or rest.device != rows.device:
            raise ValueError(
                f"rest and rows must have one dtype and device, "
                f"got {rest.dtype} on {rest.device} and {rows.dtype} on {rows.device}"
            )
        out_features, (rank, in_features) = sum(rest.shape), rows.shape
        if bias is not None and bias.shape != (out_features,):
            raise ValueError(f"bias must be (out,) = ({out_features},), got {tuple(bias.shape)}")
        layer = cls(in_features, out_features, rank, bias is not None, device="meta")
        _fill(layer, rest, rows, bias)
        layer.pivots = _copy(pivots.to(rest.device))
        layer.check_pivots()
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., in) to (..., out)."""
        if self.fast is not None and (y := self.fast(self, x)) is not None:
            return y
        if not torch.is_grad_enabled() and (factors := self._plain_factors(x)) is not None:
            (down, up), order = factors, self.order()
            y = self._at_once(x, down, up, order)
            if y is None:
                y = ops.low_rank_group(x, down, [up], sources=[order], bias=self.bias)
            return y
        z = self.down(x)
        y = torch.cat((z, self.up(z)), -1).index_select(-1, self.order())
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def check_pivots(self) -> None:
        """Refuse pivots that are not ``rank`` different outputs.

        Raises:
            ValueError: wrong dtype or shape, an index out of range, or one that is there twice.
        """
        pivots, out_features = self.pivots, self.out_features
        if pivots.dtype != torch.int64 or pivots.shape != (self.rank,):
            raise ValueError(
                f"pivots must be int64 of shape {[self.rank]}, "
                f"got {pivots.dtype} of shape {list(pivots.shape)}"
            )
        if pivots.is_meta:
            raise ValueError("the pivots are not in memory")
        low, high = int(pivots.min()), int(pivots.max())
        if low < 0 or high >= out_features:
            wrong = low if low < 0 else high
            raise ValueError(f"pivots hold {wrong}, which is no output of {out_features}")
        ordered = pivots.sort().values
        if (ordered[1:] == ordered[:-1]).any():
            twice = int(ordered[1:][ordered[1:] == ordered[:-1]][0])
            raise ValueError(f"pivots hold {twice} twice")

    def order(self) -> Tensor:
        """Where in ``cat(z, up(z))`` each output is: (out,), int64.

        It is a function of the pivots, and kept for as long as they are the same tensor and nobody
        has written into it, however they came: a state dict, ``.to()``, a loader that sets buffers.
        A compiler, which could not see that, gets the computation.
        """
        pivots = self.pivots
        if torch.compiler.is_compiling():
            return _order(pivots, self.out_features)
        version = version_of(pivots)
        known = self._known
        if known is not None and known[0] is pivots and known[1] == version:
            return known[2]
        with torch.inference_mode(False), torch.no_grad():  # a later call may want gradients
            order = _order(pivots, self.out_features)
        if type(order) is Tensor:  # and no stand-in of a tracer
            self._known = pivots, version, order
        return order

    def _weight(self, up: Tensor, down: Tensor) -> Tensor:
        self.check_pivots()
        return torch.cat((down, up @ down)).index_select(0, self.order())


def share_basis(layers: Sequence[LowRankLinear]) -> None:
    """Let several layers compute the same ``down``: that of the first, their basis.

    Only the first has it as a child. The others look it up there at every call, and have nothing of
    it among their modules and parameters, so that it is one tensor wherever the model is walked,
    moved, saved or trained, and what replaces it - an adapter, a quantized layer, a hook - replaces
    it for all. (With one ``nn.Linear`` as a child of each, or one ``Parameter``, transformers
    refuses to save tensors under two names that it does not know to be tied and misses the second
    one on loading, and peft wraps it in one layer only and yet merges the adapter into all.)

    Layers that have their basis in one of ``layers`` follow. Devices may differ.

    Args:
        layers: at least two, of one ``in_features``, rank and dtype, whose ``down`` have the same
            values (which is not looked at where they are on the meta device).

    Raises:
        ValueError: there are fewer than two, or they do not fit together.

    Source:
        Basis Sharing, ICLR 2025 (arXiv 2410.03765).
    """
    if len(layers) < 2:
        raise ValueError(f"a basis is shared by two layers or more, got {len(layers)}")
    for layer in layers:
        if not isinstance(layer, LowRankLinear):
            raise ValueError(f"only a LowRankLinear shares a basis, got {type(layer).__name__}")
    first = layers[0].basis or layers[0]
    down = first.down.weight
    for position, layer in enumerate(layers[1:], start=1):
        other = layer.down.weight
        if other is down:
            continue
        if other.shape != down.shape or other.dtype != down.dtype:
            raise ValueError(
                f"layers 0 and {position} cannot share a basis: down is {list(down.shape)} in "
                f"{down.dtype} and {list(other.shape)} in {other.dtype}"
            )
        if not (down.is_meta or other.is_meta or torch.equal(down, other.to(down.device))):
            raise ValueError(f"layers 0 and {position} differ in down: there is no basis to share")
    for layer in layers:
        root = layer.basis or layer
        if root is not first:
            root._owner = (first,)  # a tuple, in which torch sees no child
            del root._modules["down"]


def _fill(layer: CompressedLinear, up: Tensor, down: Tensor, bias: Tensor | None) -> None:
    """Give a layer on the meta device copies of these values."""
    layer.down.weight = nn.Parameter(_copy(down))
    layer.up.weight = nn.Parameter(_copy(up))
    if bias is not None:
        layer.bias = nn.Parameter(_copy(bias.to(up)))
    layer.weight = up.new_zeros(1)


def _order(pivots: Tensor, out_features: int) -> Tensor:
    """Pivot i of ``pivots`` is at i, and of the other outputs the j-th at rank + j."""
    rank = len(pivots)
    is_pivot = torch.zeros(out_features, dtype=torch.int64, device=pivots.device)
    is_pivot = is_pivot.index_fill(0, pivots, 1)
    order = torch.arange(rank, rank + out_features, device=pivots.device) - is_pivot.cumsum(0)
    return order.index_copy(0, pivots, torch.arange(rank, device=pivots.device))


def _copy(tensor: Tensor) -> Tensor:
    """A contiguous copy with storage of its own: a view would keep alive all it was cut from."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def version_of(x: Tensor) -> int:
    """What changes when somebody writes into ``x``; where torch does not tell, 0."""
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version


def _plain_weight(linear: nn.Module, x: Tensor) -> Tensor | None:
    """The weight of ``linear`` if calling it on ``x`` is ``x @ weight.T`` and nothing else.

    It is more when the module was replaced or parametrized (its type), when accelerate or an
    adapter wrapped its forward, when hooks wait for the call (pruning, offloading, statistics),
    when the weight is of a tensor subclass (quantized, sharded), and when the dtypes differ.
    """
    if type(linear) is not nn.Linear or linear._forward_hooks or linear._forward_pre_hooks:
        return None
    if linear._backward_hooks or linear._backward_pre_hooks:
        return None
    wrapped = linear.__dict__.get("forward")  # accelerate leaves the method itself when it goes
    if wrapped is not None and getattr(wrapped, "__func__", None) is not nn.Linear.forward:
        return None
    weight, bias = linear._parameters.get("weight"), linear._parameters.get("bias")
    if weight is None or type(weight) not in (nn.Parameter, Tensor) or bias is not None:
        return None
    return weight if weight.dtype == x.dtype else None


def _is_special(x: Tensor) -> bool:
    """Whether something else than eager code or a compiler reads the program along.

    Autocast chooses dtypes by what it knows of the ops, and an exported program is to run where
    there is no soco: both get the two plain linears.
    """
    return torch.is_autocast_enabled(x.device.type) or torch.compiler.is_exporting()
