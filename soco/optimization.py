"""A compressed model made ready to run: ``soco.optimize``."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from soco.modules import CompressedLinear, LowRankLinear
from soco.objectives import run_model
from soco.ops import MOST_MEMBERS, all_finite
from soco.packing import EIGHT_BIT, LayerGroup, check_whole, fuse_gated, take_apart
from soco.surgery import low_rank_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 16  # that a model is run on once, to see which layers get the same input


def optimize(
    model: "PreTrainedModel",
    *,
    weights: str | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> "PreTrainedModel":
    """Make the compressed layers of a model fast to call, in place.

    Layers that get the same input - q, k, v; gate and up - are computed by one call, together with
    what makes a gated block of them (``silu(gate) * up``). Which these are is seen in one run of
    the model, not looked up by names. Factors are laid side by side and padded as kernels want
    them; the layers' parameters become views of that, so that memory stays what it was, and the
    model is trained, saved and adapted as before: wherever gradients are needed, or a layer has an
    adapter or a hook, it computes as it did. The outputs are those from before up to rounding.

    Do this last: what moves the weights (``model.to(...)``, a deep copy) ends it, without harm.
    Doing it again is possible, and takes up what has changed.

    Args:
        model: compressed, with its weights on the CPU or on one GPU or several.
        weights: "int8" or "float8" (e4m3): store the factors in 8 bits, with a factor for each
            row, and nothing else: half the memory of bfloat16. The model can then run, and no
            more: it cannot be saved, trained or resized. None: as they are.
        inputs: keyword arguments for one run of the model, where token ids alone are not enough.

    Returns:
        The same model.

    Raises:
        ValueError: nothing is compressed; a layer's weights are not in memory, or in 8 bits
            already; unknown ``weights``, or a layer that cannot be kept in them (float64, not
            finite, adapted, with the basis of another one); the model does not run.
    """
    if weights is not None and weights not in EIGHT_BIT:
        raise ValueError(f"weights must be {' or '.join(EIGHT_BIT)}, or None, got {weights!r}")
    layers = low_rank_layers(model)
    if not layers:
        raise ValueError("the model has no compressed layers: soco.compress or soco.load makes it")
    check_whole(model)
    for name, layer in layers.items():
        if layer.down.weight.is_meta or layer.up.weight.is_meta:
            raise ValueError(f"the weights of {name} are offloaded: load the model without that")
        if weights is not None:
            _check_for_eight_bits(name, layer)
    take_apart(model)
    calls = _calls(model, inputs)
    made = {}  # the first layer of each group to the group
    for group in _groups(calls, set(layers.values())):
        made[group[0]] = LayerGroup(group, weights)
    grouped = {layer for group in made.values() for layer in group.layers}
    for layer in layers.values():
        if layer not in grouped and _is_plain(layer):
            LayerGroup([layer], weights)
    for block, first, last in _gated_blocks(model, calls, made):
        fuse_gated(block, made[first], last)
    return model


def _check_for_eight_bits(name: str, layer: CompressedLinear) -> None:
    """Refuse a layer whose factors cannot be rounded and taken away."""
    if not _is_plain(layer):
        raise ValueError(
            f"{name} has an adapter, or uses another layer's basis: it cannot be kept in 8 bits"
        )
    for factor in (layer.down, layer.up):
        if factor.weight.dtype == torch.float64:
            raise ValueError(f"{name} is float64, which 8-bit weights are not computed with")
        if not all_finite(factor.weight):
            raise ValueError(f"{name} has weights that are not finite: 8 bits have no such numbers")


class _Call(NamedTuple):
    """What a module was given and gave, once."""

    module: nn.Module
    x: Any
    y: Any


def _calls(model: "PreTrainedModel", inputs: Mapping[str, Any] | None) -> list[_Call]:
    """All calls of modules with one tensor, in the order in which they ended."""
    found: list[_Call] = []

    def note(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            found.append(_Call(module, args[0], output))

    was_training = {module: module.training for module in model.modules()}
    hooks = [m.register_forward_hook(note, with_kwargs=True) for m in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            if inputs is not None:
                model(**inputs)
            else:
                run_model(model, _ids(model))
    except (TypeError, ValueError, RuntimeError) as error:
        given = "token ids alone" if inputs is None else "these inputs"
        raise ValueError(
            f"{type(model).__name__} does not run on {given} ({_first_line(error)}): "
            "give the keyword arguments of one run as inputs"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in was_training.items():
            module.training = training
    return found


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _ids(model: "PreTrainedModel") -> Tensor:
    """Token ids of all kinds."""
    embeddings = model.get_input_embeddings()
    count = getattr(embeddings, "num_embeddings", 1)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(count, (1, TOKENS), generator=generator)
    return ids.to(next(embeddings.parameters()).device)


def _is_plain(layer: CompressedLinear) -> bool:
    """Whether a layer has both its factors, as they were made."""
    shared = isinstance(layer, LowRankLinear) and layer.basis is not None
    plain = all(type(f) is nn.Linear and f.bias is None for f in (layer.down, layer.up))
    return plain and not shared and layer.down.weight.device == layer.up.weight.device


def _groups(calls: list[_Call], layers: set[CompressedLinear]) -> Iterator[list[CompressedLinear]]:
    """Layers that were called one after the other with the same input, each once."""
    own = [call for call in calls if call.module in layers]
    times = Counter(call.module for call in own)
    group: list[CompressedLinear] = []
    last: Tensor | None = None
    for call in own:
        layer = call.module
        assert isinstance(layer, CompressedLinear)
        if times[layer] > 1 or not _is_plain(layer):
            continue
        fits = (
            call.x is last
            and len(group) < MOST_MEMBERS
            and group[0].down.weight.dtype == layer.down.weight.dtype
            and group[0].down.weight.device == layer.down.weight.device
        )
        if not fits and group:
            yield group
            group = []
        group = [*group, layer]
        last = call.x
    if group:
        yield group


def _gated_blocks(
    model: nn.Module, calls: list[_Call], groups: Mapping[CompressedLinear, LayerGroup]
) -> Iterator[tuple[nn.Module, CompressedLinear, str]]:
    """Modules that are ``last(silu(first) * second)`` of a group of two: these, first and last.

    That is seen from the values of the run, bit for bit, and from what the module consists of:
    these three layers and an activation without parameters.
    """
    outputs = {call.module: call for call in calls}
    for first, group in groups.items():
        pair = group.layers
        if len(pair) != 2 or pair[0].out_features != pair[1].out_features:
            continue
        for block in model.modules():
            children = dict(block.named_children())
            if not set(pair) <= set(children.values()) or "forward" in block.__dict__:
                continue
            others = {name: child for name, child in children.items() if child not in pair}
            last = [name for name, child in others.items() if [*child.parameters()]]
            if len(children) > 4 or len(last) != 1 or block not in outputs:
                continue
            given, end = outputs[block], outputs.get(children[last[0]])
            if end is None or given.x is not outputs[pair[0]].x or given.y is not end.y:
                continue
            if torch.equal(end.x, silu(outputs[pair[0]].y) * outputs[pair[1]].y):
                yield block, first, last[0]
