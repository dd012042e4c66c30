"""Results put into a model: low-rank layers, pivoted ones, shared bases; and what they weigh."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from soco.linalg import Factors
from soco.modules import CompressedLinear, LowRankLinear, PivotedLinear, share_basis
from soco.pivots import pivot_factors
from soco.reporting import LayerReport
from soco.surgery import (
    bias_of,
    output_head,
    replace_modules,
    shape_of,
    untie_head,
    weight_of,
    with_weight,
)

# Layer to its factors, to the weight it stays dense with, or to None: as it was; and to its bias.
Placed = Mapping[str, tuple[Factors | Tensor | None, Tensor | None]]


def install(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    placed: Placed,
    groups: Sequence[tuple[str, ...]],
    *,
    pivoted: bool,
) -> tuple[dict[str, CompressedLinear], dict[str, nn.Module]]:
    """Put low-rank layers where there are factors, and new dense ones where there are weights.

    Args:
        model: with its dense layers in place.
        targets: name to dense layer.
        placed: what becomes of each; factors are rounded to the layer's dtype.
        groups: layers that share their ``down``.
        pivoted: whether to store pivot rows and what combines them.

    Returns:
        Name to the layers that are low-rank now, and to the dense ones with other weights.
    """
    head = output_head(model)
    if head is not None and head in placed and placed[head][0] is not None:
        untie_head(model)
    made: dict[str, CompressedLinear] = {}
    redone: dict[str, nn.Module] = {}
    for name, module in targets.items():
        weight, bias = placed[name]
        if isinstance(weight, Factors):
            dtype = weight_of(module).dtype
            if pivoted:
                pivots = pivot_factors(weight, name=name).to(dtype)
                made[name] = PivotedLinear.from_factors(pivots, bias)
            else:
                made[name] = LowRankLinear.from_factors(weight.to(dtype), bias)
        elif weight is not None:
            redone[name] = with_weight(module, weight)
    share_bases(made, groups)
    replace_modules(model, {**made, **redone})
    return made, redone


def share_bases(made: Mapping[str, CompressedLinear], groups: Sequence[tuple[str, ...]]) -> None:
    """Let compressed layers, by name, use one ``down`` in each group."""
    for group in groups:
        layers = [layer for name in group if isinstance(layer := made.get(name), LowRankLinear)]
        if len(layers) > 1:
            share_basis(layers)


def layer_reports(
    targets: Mapping[str, nn.Module],
    made: Mapping[str, CompressedLinear],
    groups: Sequence[tuple[str, ...]],
    scores: Mapping[str, tuple[float, float]],
) -> tuple[LayerReport, ...]:
    """One line for every target; a shared basis counts in equal parts for those that share it."""
    sharing = {name: group for group in groups for name in group}
    reports = []
    for name, module in targets.items():
        rows, columns = shape_of(module)
        layer = made.get(name)
        low, high = scores.get(name, (None, None))
        if layer is None:
            reports.append(LayerReport(name, (rows, columns), None, rows * columns, low, high))
            continue
        params = layer.up.weight.numel() + layer.rank * columns
        group = sharing.get(name, (name,))
        if len(group) > 1:
            part, rest = divmod(layer.rank * columns, len(group))
            params = layer.up.weight.numel() + part + (group.index(name) < rest)
        reports.append(LayerReport(name, (rows, columns), layer.rank, params, low, high))
    return tuple(reports)


def new_biases(targets: Mapping[str, nn.Module], made: Mapping[str, CompressedLinear]) -> list[str]:
    """Layers that have a bias now, and had none."""
    return [
        n for n, layer in made.items() if layer.bias is not None and bias_of(targets[n]) is None
    ]


def size_of(model: nn.Module) -> tuple[int, int]:
    """Parameters of a model, and the bytes it takes to store them, each tensor once.

    The bytes count the pivots of pivoted layers, too; the one-element sentinels are not counted.
    """
    parameters = list(model.parameters())
    pivots = [m.pivots for m in model.modules() if isinstance(m, PivotedLinear)]
    return (
        sum(p.numel() for p in parameters),
        sum(p.numel() * p.element_size() for p in (*parameters, *pivots)),
    )


def bytes_beside(
    model: nn.Module, layers: Mapping[str, nn.Module], has_bias: Mapping[str, bool], width: int
) -> int:
    """What all but the weights of some layers takes to store.

    Args:
        model: holds the layers.
        layers: name to linear layer, dense or compressed.
        has_bias: name to whether the layer will have a bias, whatever it has now.
        width: bytes of a floating-point parameter, as it will be stored.
    """
    inside = {part for layer in layers.values() for part in layer.modules()}
    beside = {p for m in model.modules() if m not in inside for p in m.parameters(recurse=False)}
    biases = sum(shape_of(layer)[0] for name, layer in layers.items() if has_bias[name])
    return biases * width + sum(
        p.numel() * (width if p.is_floating_point() else p.element_size()) for p in beside
    )
