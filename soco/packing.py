"""Compressed layers on one input computed together: weights side by side, one call for all."""

import copy
import itertools
import types
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from soco import ops
from soco.modules import CompressedLinear, PivotedLinear, version_of

# What 8-bit weights may be, by the name users call it, and the largest number of each.
EIGHT_BIT = {"int8": (torch.int8, 127.0), "float8": (torch.float8_e4m3fn, 448.0)}

GATED = "soco_gated"  # the attribute of a module that fuse_gated has changed: its LayerGroup


class _Held(NamedTuple):
    """What one call has computed for layers that have not asked for it yet."""

    x: Tensor
    version: int  # of x: nobody has written into it since
    made: Tensor  # the outputs of all layers, or what their ups are to be applied to
    is_reduced: bool  # the latter
    waiting: list[int]  # layers


class LayerState:
    """How a compressed layer was, to see at little cost whether it still is.

    What is looked at is all that a call without gradients depends on, but for the values: the
    factors and whether anything is attached to them (an adapter, a hook, a parametrization,
    accelerate's wrapping of forward), and where weights and bias lie.
    """

    def __init__(self, layer: CompressedLinear) -> None:
        self._factors = [
            (name, factor, vars(factor), factor._parameters, factor.weight)
            for name, factor in (("down", layer.down), ("up", layer.up))
        ]
        self._addresses = [weight.data_ptr() for *_, weight in self._factors]
        self._modules, self._parameters = layer._modules, layer._parameters
        self._buffers = layer._buffers
        self._bias = layer.bias
        self._bias_address = 0 if layer.bias is None else layer.bias.data_ptr()
        self._pivots = layer._buffers.get("pivots")
        self._version = 0 if self._pivots is None else version_of(self._pivots)

    def holds(self) -> bool:
        """Whether the layer is as it was.

        A compiler cannot follow addresses: it asks once, while it compiles.
        """
        return self._constant() if torch.compiler.is_compiling() else self._found()

    @torch.compiler.assume_constant_result
    def _constant(self) -> bool:
        return self._found()

    def _found(self) -> bool:
        """Look. It reads dictionaries, since attributes of modules are slow."""
        known = zip(self._factors, self._addresses, strict=True)
        for (name, factor, attributes, parameters, weight), address in known:
            if (
                self._modules.get(name) is not factor
                or type(factor) is not nn.Linear
                or attributes["_forward_hooks"]
                or attributes["_forward_pre_hooks"]
                or "forward" in attributes
                or parameters.get("bias") is not None
                or parameters.get("weight") is not weight
                or weight.data_ptr() != address
            ):
                return False
        bias, pivots = self._parameters.get("bias"), self._buffers.get("pivots")
        if bias is not self._bias or (bias is not None and bias.data_ptr() != self._bias_address):
            return False
        return pivots is self._pivots and (pivots is None or version_of(pivots) == self._version)


class LayerGroup:
    """Layers that are called one after the other with the same input: the first call computes all.

    The factors of the layers are moved into memory where they lie side by side, and what they were
    becomes a view of it: they are seen, trained and saved as before, and nothing is there twice.
    A rank is padded with zeros where that makes rows begin at multiples of 16 elements.

    For an input that needs gradients, and from when a layer is not any more what it was - an
    adapter or a hook in it, weights that were moved - a call gives None, and the layer computes its
    outputs itself. What is written into the weights in place is seen.

    Args:
        layers: at least one, of one input size, dtype and device, each with both its factors.
        weights: "int8" or "float8": keep the factors like that, with a factor per row, and nothing
            else. The layers can then be called, and no more. None: as they are.
        align: what ranks are padded to multiples of; None: 16 on a GPU, 1 on the CPU.
    """

    def __init__(
        self,
        layers: Sequence[CompressedLinear],
        weights: str | None = None,
        align: int | None = None,
    ) -> None:
        """Move the weights, and attach the group to its layers."""
        self.layers, self.weights = list(layers), weights
        first = layers[0].down.weight
        self.dtype, self._kind = first.dtype, first.device.type
        if align is None:
            align = 16 if first.is_cuda else 1
        ranks = [-(-layer.rank // align) * align for layer in layers]
        self._reduced = _places(ranks)
        self._outputs = _places([layer.out_features for layer in layers])
        self._wide = ops.widened(first.new_empty(0)).dtype
        with torch.no_grad():
            sources = list(map(_sources, layers, ranks))
            self._weights = ops.Weights(*_factors(self.layers, ranks), sources, _bias(self.layers))
            if weights is not None:
                self._weights = _eight_bit(self._weights, weights)
                _take_away(self.layers)
        stored = self._weights.down.dtype
        self._most = first.shape[1] * ops.most_tokens(first.device.type, self.dtype, stored)
        self._known = [LayerState(layer) for layer in self.layers]
        self._all = self._prepared(gated=False)
        self._gated: ops.PreparedGroup | None = None
        self._held: _Held | None = None
        for layer in self.layers:
            layer.fast = self

    def __call__(self, layer: CompressedLinear, x: Tensor) -> Tensor | None:
        """The outputs of one of the layers for ``x``; None: it has to compute them itself."""
        number = 0
        while self.layers[number] is not layer:
            number += 1
        held = self._held
        known = held is not None and held.x is x and held.version == version_of(x)
        if held is not None and known and number in held.waiting:
            held.waiting.remove(number)
            if not held.waiting:
                self._held = None
            return self._part(held.made, held.is_reduced, number)
        if not self._is_ready(x):
            return None
        made, is_reduced = self._compute(x)
        if len(self.layers) > 1:
            waiting = [i for i in range(len(self.layers)) if i != number]
            self._held = _Held(x, version_of(x), made, is_reduced, waiting)
        return self._part(made, is_reduced, number)

    def gated(self, x: Tensor) -> Tensor | None:
        """``silu(first) * second`` of two layers; None: it has to be made of their outputs."""
        if not self._is_ready(x):
            return None
        if x.numel() > self._most:
            made, _ = self._compute(x)
            return silu(self._part(made, True, 0)) * self._part(made, True, 1)
        if self._gated is None:
            self._gated = self._prepared(gated=True)
        return self._gated(x)

    def _prepared(self, gated: bool) -> ops.PreparedGroup:
        weights = self._weights._replace(gated=gated)
        return ops.PreparedGroup(dtype=self.dtype, **weights._asdict())

    def tensors(self) -> list[Tensor]:
        """What it computes with."""
        down, ups, sources, bias, down_scale, up_scales, _ = self._weights
        single = [tensor for tensor in (down, bias, down_scale) if tensor is not None]
        return [*single, *ups, *sources, *up_scales]

    def _is_ready(self, x: Tensor) -> bool:
        """Whether the layers are what they were, and ``x`` is for them."""
        usual = (
            x.dtype == self.dtype
            and not (torch.is_grad_enabled() and self._needs_gradients(x))
            and not torch.is_autocast_enabled(self._kind)
            and not torch.compiler.is_exporting()
        )
        if self.weights is not None and not usual:
            raise RuntimeError(
                f"the factors are {self.weights} since soco.optimize(model, weights=...), for "
                f"inference in {self.dtype}, without gradients and autocast: train, export or "
                "convert the model as it was before"
            )
        if self.weights is not None or not usual:
            return usual
        return all([known.holds() for known in self._known])

    def _needs_gradients(self, x: Tensor) -> bool:
        parameters = (p for layer in self.layers for p in layer.parameters())
        return x.requires_grad or any(p.requires_grad for p in parameters)

    def _compute(self, x: Tensor) -> tuple[Tensor, bool]:
        """For few tokens all outputs; for many ``down(x)`` of all layers, by one product."""
        if x.numel() <= self._most:
            return self._all(x), False
        return ops.products(x.to(self._wide), self._weights.down, self._weights.down_scale), True

    def _part(self, made: Tensor, is_reduced: bool, number: int) -> Tensor:
        """The outputs of one layer."""
        if not is_reduced:
            return made if len(self.layers) == 1 else made[..., self._outputs[number]]
        _, ups, sources, bias, _, scales, _ = self._weights
        y = ops.expanded(
            made[..., self._reduced[number]],
            ups[number],
            scales[number] if scales else None,
            sources[number],
            None if bias is None else bias[self._outputs[number]],
        )
        return y.to(self.dtype)

    def __deepcopy__(self, memo: dict) -> "LayerGroup | None":
        """None: the copied layers have weights of their own. 8-bit ones are shared instead."""
        if self.weights is None:
            return None
        memo[id(self)] = other = copy.copy(self)
        other.layers, other._held = copy.deepcopy(self.layers, memo), None
        return other

    def __reduce__(self) -> Any:
        """None, as for copies."""
        if self.weights is None:
            return type(None), ()
        return super().__reduce__()


def fuse_gated(block: nn.Module, group: LayerGroup, last: str) -> None:
    """Let ``block`` be computed as ``last(silu(first) * second)``, with one call for the product.

    Args:
        block: a module whose forward makes that of its one input, and nothing else.
        group: of the two layers.
        last: name of the child that gets the product.
    """

    def forward(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        found: LayerGroup | None = getattr(self, GATED)
        usual = found is not None and not (args or kwargs or self.training)
        product = found.gated(x) if found is not None and usual else None
        if product is None:
            return type(self).forward(self, x, *args, **kwargs)
        return getattr(self, last)(product)

    setattr(block, GATED, group)
    block.forward = types.MethodType(forward, block)


def check_whole(model: nn.Module) -> None:
    """Refuse a model of which layers have their factors in 8 bits and not as they were."""
    for name, layer in model.named_modules():
        group = layer.fast if isinstance(layer, CompressedLinear) else None
        if isinstance(group, LayerGroup) and group.weights is not None:
            raise ValueError(
                f"the factors of {name} are {group.weights} since soco.optimize(model, "
                "weights=...), which keeps nothing else: load the model again"
            )


def weight_bytes(model: nn.Module) -> int:
    """The memory of all parameters and of the groups' weights, each counted once."""
    tensors = [p for p in model.parameters() if not p.is_meta]
    for module in model.modules():
        if isinstance(module, CompressedLinear) and isinstance(module.fast, LayerGroup):
            tensors += module.fast.tensors()
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def take_apart(model: nn.Module) -> None:
    """Let every layer compute its own outputs again; where the weights lie stays as it is.

    Raises:
        ValueError: there are layers that have their weights in 8 bits only.
    """
    check_whole(model)
    for module in model.modules():
        if isinstance(module, CompressedLinear):
            module.fast = None
        if GATED in module.__dict__:
            delattr(module, GATED)
            del module.__dict__["forward"]


def _places(sizes: Sequence[int]) -> list[slice]:
    """Where parts of these sizes lie, one behind the other."""
    ends = list(itertools.accumulate(sizes))
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def _factors(
    layers: Sequence[CompressedLinear], ranks: Sequence[int]
) -> tuple[Tensor, list[Tensor]]:
    """The factors in new memory, padded to these ranks; the layers' own become views of it."""
    first = layers[0].down.weight
    down = first.new_zeros(sum(ranks), first.shape[1])
    ups = []
    for layer, rank, place in zip(layers, ranks, _places(ranks), strict=True):
        rows = down[place][: layer.rank]
        rows.copy_(layer.down.weight)
        layer.down.weight.data = rows
        up = first.new_zeros(layer.up.out_features, rank)
        up[:, : layer.rank] = layer.up.weight
        layer.up.weight.data = up[:, : layer.rank]
        ups.append(up)
    return down, ups


def _bias(layers: Sequence[CompressedLinear]) -> Tensor | None:
    """The biases one after the other, zeros for layers without; the layers' own become views."""
    if all(layer.bias is None for layer in layers):
        return None
    outs = [layer.out_features for layer in layers]
    together = layers[0].down.weight.new_zeros(sum(outs))
    for layer, place in zip(layers, _places(outs), strict=True):
        if layer.bias is not None:
            together[place] = layer.bias
            layer.bias.data = together[place]
    return together


def _sources(layer: CompressedLinear, rank: int) -> Tensor:
    """Where the outputs of a pivoted layer are for a padded rank, empty for another layer."""
    if not isinstance(layer, PivotedLinear):
        return torch.empty(0, dtype=torch.int64, device=layer.down.weight.device)
    order = layer.order()
    return torch.where(order < layer.rank, order, order + (rank - layer.rank))


def _eight_bit(exact: ops.Weights, kind: str) -> ops.Weights:
    """The same factors in 8 bits, with a factor per row.

    A component's scale may lie in either factor. Here the columns of ``up`` get one size, so that
    the numbers of one row, which share a factor, are alike; the rows of ``down`` have their own
    factors and take up the rest. In a pivoted layer what lies between is the outputs at the pivots,
    whose scale is given.
    """
    down, ups = exact.down.float(), []
    places = _places([up.shape[1] for up in exact.ups])
    for up, source, place in zip(exact.ups, exact.sources, places, strict=True):
        up = up.float()
        if source.numel() == 0:
            size = up.square().mean(0).sqrt()
            size = torch.where(size > 0, size, torch.ones_like(size))
            up = up / size
            down[place] *= size[:, None]
        ups.append(round_rows(up, kind))
    rounded, scale = round_rows(down, kind)
    return exact._replace(
        down=rounded,
        down_scale=scale,
        ups=[values for values, _ in ups],
        up_scales=[scale for _, scale in ups],
    )


def round_rows(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Round a weight to 8 bits, each row in steps of its own.

    Args:
        weight: (rows, columns), finite.
        kind: a name in ``EIGHT_BIT``.

    Returns:
        The rounded numbers (rows, columns), and what each row is to be multiplied by: (rows,),
        float32.
    """
    dtype, largest = EIGHT_BIT[kind]
    weight = weight.float()
    scale = weight.abs().amax(1) / largest if weight.numel() else weight.new_ones(len(weight))
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    scaled = weight / scale[:, None]
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scale


def _take_away(layers: Sequence[CompressedLinear]) -> None:
    """Leave the layers without the values of their factors."""
    for layer in layers:
        for factor in (layer.down, layer.up):
            factor.weight = nn.Parameter(factor.weight.to("meta"), requires_grad=False)
