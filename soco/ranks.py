"""A budget in parameters -> one rank per weight."""

import heapq
import math
from collections.abc import Mapping
from fractions import Fraction

import torch
from torch import Tensor

Shape = tuple[int, int]  # (out, in) of a weight


def layer_params(shape: Shape, rank: int) -> int:
    """Parameters a weight (out, in) holds at ``rank``: its factors', or its own where that is less.

    >>> layer_params((4, 4), 1), layer_params((4, 4), 2), layer_params((4, 4), 4)
    (8, 16, 16)
    """
    out_features, in_features = shape
    return min(rank * (out_features + in_features), out_features * in_features)


def is_dense(shape: Shape, rank: int) -> bool:
    """Whether a weight at ``rank`` is stored as it is: two factors would not be smaller."""
    out_features, in_features = shape
    return rank * (out_features + in_features) >= out_features * in_features


def parameter_budget(shapes: Mapping[str, Shape], ratio: float) -> int:
    """How many parameters the weights may keep together: the one definition of ``ratio``.

    Args:
        shapes: name to (out, in) of every target weight.
        ratio: fraction of the targets' parameters that is *removed*, in (0, 1).

    Returns:
        The largest count that removes at least ``ratio`` of them (biases are not counted).

    Raises:
        ValueError: ``ratio`` is not between 0 and 1, or leaves less than rank 1 everywhere.
    """
    if not isinstance(ratio, int | float) or not 0 < ratio < 1:
        raise ValueError(
            f"ratio is the fraction of parameters to remove and must be above 0 and below 1, got "
            f"{ratio!r}"
        )
    total = sum(rows * columns for rows, columns in shapes.values())
    # As the number is written: in binary 10 * (1 - 0.9) would be 0.99..98, and the budget 0.
    budget = math.floor(total * (1 - Fraction(str(ratio))))
    least = sum(layer_params(shape, 1) for shape in shapes.values())
    if budget < least:
        raise ValueError(
            f"ratio {ratio} leaves {budget:,} parameters, but rank 1 in each of the {len(shapes)} "
            f"layers takes {least:,}: the largest ratio that can be met is "
            f"{(total - least) * 10_000 // total / 10_000:.4f}"
        )
    return budget


def uniform_ranks(shapes: Mapping[str, Shape], budget: int) -> dict[str, int]:
    """The same kept fraction for every weight: rank = floor(kept * out * in / (out + in)).

    What the rounding down leaves over is given out one rank at a time, the largest remainder first,
    so that the whole meets ``budget`` to within one rank of one weight.

    Args:
        shapes: name to (out, in).
        budget: parameters that all factors may hold together.

    Returns:
        name to rank, at least 1, in the order of ``shapes``; ``min(out, in)`` means dense.

    Raises:
        ValueError: ``budget`` is below rank 1 everywhere.

    >>> uniform_ranks({"q": (4, 4), "k": (2, 4)}, budget=14)
    {'q': 1, 'k': 1}
    """
    _check_budget(shapes, budget)
    kept = budget / sum(rows * columns for rows, columns in shapes.values())
    exact = {n: kept * rows * cols / (rows + cols) for n, (rows, cols) in shapes.items()}
    ranks = {name: max(1, int(rank + 1e-9)) for name, rank in exact.items()}
    spent = sum(layer_params(shapes[name], rank) for name, rank in ranks.items())
    while spent > budget:  # layers lifted to rank 1 have more than their share: the others pay
        name = max((n for n in shapes if ranks[n] > 1), key=lambda n: ranks[n] / exact[n])
        spent -= layer_params(shapes[name], ranks[name])
        ranks[name] -= 1
        spent += layer_params(shapes[name], ranks[name])
    remainder = {name: exact[name] - ranks[name] for name in shapes}
    for name in sorted(shapes, key=lambda name: -remainder[name]):
        step = layer_params(shapes[name], ranks[name] + 1) - layer_params(shapes[name], ranks[name])
        if remainder[name] > 0 and step <= budget - spent:
            ranks[name] += 1
            spent += step
    return {n: min(shapes[n]) if is_dense(shapes[n], rank) else rank for n, rank in ranks.items()}


def allocate(
    values: Mapping[str, Tensor], shapes: Mapping[str, Shape], budget: int
) -> dict[str, int]:
    """Choose the rank of every weight that loses least together under one budget of parameters.

    A weight (out, in) that keeps its ``k`` most valuable components costs ``min(k (out + in),
    out in)`` parameters and loses the values of the others. From break-even ``out in / (out + in)``
    on it is dense, and then keeps everything for the price of ``out in``. So the best set lies on
    the lower convex hull of (cost, loss) of each weight: a run of single ranks, best first, and
    then one jump from some rank to dense. The steps of all hulls are taken in the order of their
    gain per parameter until one does not fit, and what is left is spent on single ranks and jumps
    that do. If nothing is left, no choice of that cost loses less; otherwise the loss exceeds the
    least possible one by less than what the step that did not fit would have gained.

    Args:
        values: name to what each component is worth in the loss, (min(out, in),), any order, not
            negative; e.g. squared singular values, or score squared times Fisher information.
        shapes: name to (out, in), the same names.
        budget: parameters that all weights may hold together (a count, not bytes; biases not
            included).

    Returns:
        name to rank in the order of ``shapes``, at least 1; ``min(out, in)`` means dense. The sum
        of ``layer_params`` is at most ``budget``, and short of it by less than one rank of any
        weight that is not dense.

    Raises:
        ValueError: names or lengths differ, a value is negative or not finite, or ``budget`` is
            below rank 1 everywhere.

    Source: greedy marginal gain on convex hulls (the Lagrangian of the separable problem; Everett
    1963); the dense jump is ours.

    >>> values = {"q": torch.tensor([9.0, 1.0, 0.0, 0.0]), "v": torch.tensor([4.0, 4.0, 4.0, 4.0])}
    >>> allocate(values, {"q": (4, 4), "v": (4, 4)}, budget=24)
    {'q': 1, 'v': 4}
    """
    _check_values(values, shapes)
    spent = _check_budget(shapes, budget)
    losses = {name: _losses(values[name]) for name in shapes}
    steps = torch.cat([_hull_steps(i, shapes[n], losses[n]) for i, n in enumerate(shapes)])
    steps = steps[torch.argsort(steps[:, 0], descending=True, stable=True)]
    steps = steps[: int((spent + steps[:, 3].cumsum(0) <= budget).sum())]
    start = [min(shape) if is_dense(shape, 1) else 1 for shape in shapes.values()]  # (1, n): dense
    taken = steps.new_tensor(start).scatter_reduce(0, steps[:, 1].long(), steps[:, 2], "amax")
    ranks = dict(zip(shapes, taken.long().tolist(), strict=True))
    _fill(ranks, budget - spent - int(steps[:, 3].sum()), shapes, losses)
    return ranks


def relative_energy(spectra: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Squared singular values as fractions of their weight's sum: values for ``allocate``.

    Args:
        spectra: name to singular values, (min(out, in),); whitened ones if the method whitens.

    >>> relative_energy({"q": torch.tensor([3.0, 1.0])})["q"].tolist()
    [0.9, 0.1]
    """
    energies = {name: sigma.double().square() for name, sigma in spectra.items()}
    smallest = torch.finfo(torch.float64).tiny  # a weight of zeros has none
    return {name: energy / energy.sum().clamp_min(smallest) for name, energy in energies.items()}


def _check_budget(shapes: Mapping[str, Shape], budget: int) -> int:
    """Refuse less than rank 1 everywhere; what that takes."""
    least = sum(layer_params(shape, 1) for shape in shapes.values())
    if least > budget:
        raise ValueError(f"rank 1 everywhere takes {least:,} parameters, the budget is {budget:,}")
    return least


def _check_values(values: Mapping[str, Tensor], shapes: Mapping[str, Shape]) -> None:
    if set(values) != set(shapes):
        odd = sorted(set(values) ^ set(shapes))
        raise ValueError(f"values and shapes name different weights, first {odd[0]!r}")
    for name, value in values.items():
        if value.shape != (min(shapes[name]),):
            raise ValueError(
                f"values of {name} must be (min(out, in),) = ({min(shapes[name])},), got "
                f"{tuple(value.shape)}"
            )
        if not bool(torch.isfinite(value).all()) or bool((value < 0).any()):
            raise ValueError(f"values of {name} must be finite and not negative")


def _losses(value: Tensor) -> Tensor:
    """(r + 1,): what is lost when the k most valuable components are kept, k = 0..r."""
    descending = value.double().cpu().sort(descending=True).values
    tail = descending.flip(0).cumsum(0).flip(0)  # summed from the small end: no cancellation
    return torch.cat([tail, tail.new_zeros(1)])


def _hull_steps(index: int, shape: Shape, loss: Tensor) -> Tensor:
    """The steps of the hull above rank 1, in order.

    Returns:
        (steps, 4): gain per parameter (descending), ``index``, rank reached, cost in parameters.
    """
    rows, columns = shape
    per_rank, dense_cost = rows + columns, rows * columns
    last = min((dense_cost - 1) // per_rank, min(shape))  # the largest rank below break-even
    if last < 1:
        return loss.new_zeros(0, 4)
    rank = torch.arange(1, last + 1, dtype=torch.float64)
    slope = loss[1 : last + 1] / (dense_cost - rank * per_rank)  # of the chord to dense
    tangent = last - int(slope.flip(0).argmin())  # from here dense is the better way on
    reached = torch.cat([rank[1:tangent], rank.new_tensor([min(shape)])])
    gain = torch.cat(
        [(loss[1:tangent] - loss[2 : tangent + 1]) / per_rank, slope[tangent - 1 : tangent]]
    )
    cost = torch.full_like(gain, per_rank)
    cost[-1] = dense_cost - tangent * per_rank
    # The minimum so far: rounding must not put a step before the one it builds on.
    return torch.stack([gain.cummin(0).values, torch.full_like(gain, index), reached, cost], dim=1)


def _fill(
    ranks: dict[str, int], room: int, shapes: Mapping[str, Shape], losses: Mapping[str, Tensor]
) -> None:
    """Spend ``room`` parameters on single ranks and jumps to dense, best gain per cost first."""

    def best_step(name: str) -> tuple[float, str, int, int] | None:
        shape, rank = shapes[name], ranks[name]
        fitting = []
        for reached in {min(shape) if is_dense(shape, rank + 1) else rank + 1, min(shape)}:
            cost = layer_params(shape, reached) - layer_params(shape, rank)
            if 0 < cost <= room:
                gain = float(losses[name][rank] - losses[name][reached])
                fitting.append((-gain / cost, name, reached, cost))
        return min(fitting, default=None)

    heap = [step for name in ranks if (step := best_step(name))]
    heapq.heapify(heap)
    while heap:
        _, name, reached, cost = heapq.heappop(heap)
        if cost <= room:
            ranks[name], room = reached, room - cost
        following = best_step(name)  # if it did not fit, one that does
        if following:
            heapq.heappush(heap, following)
