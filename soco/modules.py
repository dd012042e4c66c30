"""The layers that stand in a model where a linear stood."""

import torch
from torch import Tensor, nn

from soco import ops


class LowRankLinear(nn.Module):
    """A linear layer through a bottleneck: ``y = up(down(x)) + bias``.

    The factors are two ``nn.Linear`` children, because adapters, quantizers and exporters look for
    ``nn.Linear``. Both are what they seem as long as nobody replaced, hooked or wrapped them, and
    then one fused op computes the layer; otherwise the children are called one after the other.

    ``weight`` is no weight but a sentinel of one element at the place where the dense layer has its
    weight: reading ``.weight.dtype`` or ``.weight.device`` works, and a program that takes the
    files for a dense model's stops at a wrong shape instead of running with random layers.

    Args:
        in_features: size of the inputs.
        out_features: size of the outputs.
        rank: size in between.
        bias: whether a bias is added at the end.
        device: where the parameters are made.
        dtype: of the parameters.
    """

    weight: Tensor  # (1,), the sentinel
    bias: nn.Parameter | None  # (out,)

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
        self.up = nn.Linear(rank, out_features, bias=False, device=device, dtype=dtype)
        zeros = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if zeros is None else nn.Parameter(zeros))
        self.register_buffer("weight", torch.zeros(1, device=device, dtype=dtype))

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
        layer.down.weight = nn.Parameter(_copy(down))
        layer.up.weight = nn.Parameter(_copy(up))
        if bias is not None:
            layer.bias = nn.Parameter(_copy(bias.to(up)))
        layer.weight = up.new_zeros(1)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., in) to (..., out)."""
        down = _plain_weight(self.down, x)
        up = _plain_weight(self.up, x)
        if down is None or up is None or _is_special(x):
            y = self.up(self.down(x))
            return y if self.bias is None else y + self.bias.to(y.dtype)
        return ops.low_rank_linear(x, down, up, self.bias)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """The dense layer with the same outputs, up to rounding: its weight is ``up @ down``.

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
        linear.weight = nn.Parameter((up.to(wide) @ down.to(wide)).to(up.dtype))
        if self.bias is not None:
            linear.bias = nn.Parameter(_copy(self.bias))
        return linear.train(self.training)

    def extra_repr(self) -> str:
        """What ``print`` shows beside the children."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.rank}, bias={self.bias is not None}"
        )


def _copy(tensor: Tensor) -> Tensor:
    """A contiguous copy with storage of its own: a view would keep alive all it was cut from."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


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
