"""A budget in parameters -> one rank per weight."""

import heapq
import math
from collections.abc import Mapping
from fractions import Fraction

import torch
from scipy.optimize import isotonic_regression
from torch import Tensor

Shape = tuple[int, int]  # (out, in) of a weight


def layer_params(shape: Shape, rank: int, pivoted: bool = False) -> int:
    """Parameters a weight (out, in) holds at ``rank``: its factors', or its own where that is less.

    Pivoted factors (``pivots.py``) hold ``rank (out + in) - rank^2``, which is never more than the
    weight itself.

    >>> layer_params((4, 4), 1), layer_params((4, 4), 2), layer_params((4, 4), 4)
    (8, 16, 16)
    >>> layer_params((4, 4), 1, True), layer_params((4, 4), 2, True), layer_params((4, 4), 4, True)
    (7, 12, 16)
    """
    out_features, in_features = shape
    params = rank * (out_features + in_features) - (rank * rank if pivoted else 0)
    return min(params, out_features * in_features)


def is_dense(shape: Shape, rank: int, pivoted: bool = False) -> bool:
    """Whether a weight at ``rank`` is stored as it is: factors would not be smaller."""
    return layer_params(shape, rank, pivoted) >= shape[0] * shape[1]


def largest_rank(shape: Shape, pivoted: bool = False) -> int:
    """The most components of a weight that is not dense, at least 1.

    >>> largest_rank((4, 4)), largest_rank((4, 4), pivoted=True)
    (1, 3)
    """
    rows, columns = shape
    return max(1, min(rows, columns) - 1 if pivoted else (rows * columns - 1) // (rows + columns))


def rank_at(shape: Shape, params: float, pivoted: bool = False) -> float:
    """The rank, not rounded, at which the factors of a weight (out, in) hold ``params``.

    >>> rank_at((4, 4), 12), rank_at((4, 4), 12, pivoted=True)
    (1.5, 2.0)
    """
    rows, columns = shape
    if not pivoted:
        return params / (rows + columns)
    side = rows + columns
    return (side - math.sqrt(max(0.0, side * side - 4 * params))) / 2


def check_ratio(ratio: float) -> None:
    """Refuse what is no ratio.

    Raises:
        ValueError: it is no number above 0 and below 1.
    """
    if not isinstance(ratio, int | float) or not 0 < ratio < 1:
        raise ValueError(
            f"ratio is the fraction of parameters to remove and must be above 0 and below 1, got "
            f"{ratio!r}"
        )


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
    check_ratio(ratio)
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


def uniform_ranks(
    shapes: Mapping[str, Shape], budget: int, *, pivoted: bool = False
) -> dict[str, int]:
    """The same kept fraction for every weight: rank = floor(kept * out * in / (out + in)).

    What the rounding down leaves over is given out one rank at a time, the largest remainder first,
    so that the whole meets ``budget`` to within one rank of one weight.

    Args:
        shapes: name to (out, in).
        budget: parameters that all factors may hold together.
        pivoted: whether the factors are pivoted ones, which hold less.

    Returns:
        name to rank, at least 1, in the order of ``shapes``; ``min(out, in)`` means dense.

    Raises:
        ValueError: ``budget`` is below rank 1 everywhere.

    >>> uniform_ranks({"q": (4, 4), "k": (2, 4)}, budget=14)
    {'q': 1, 'k': 1}
    """
    return proportional_ranks(dict.fromkeys(shapes, 1.0), shapes, budget, pivoted=pivoted)


def proportional_ranks(
    shares: Mapping[str, float], shapes: Mapping[str, Shape], budget: int, *, pivoted: bool = False
) -> dict[str, int]:
    """Kept fractions in given proportions, as many as fit: ``min(1, t share)`` of every weight.

    Args:
        shares: name to a positive number; twice the share is twice the kept fraction, until the
            weight is dense.
        shapes: name to (out, in), the same names.
        budget: parameters that all factors may hold together.
        pivoted: whether the factors are pivoted ones, which hold less.

    Returns:
        name to rank, at least 1, in the order of ``shapes``; ``min(out, in)`` means dense. The
        whole is short of ``budget`` by less than one rank of one weight.

    Raises:
        ValueError: ``budget`` is below rank 1 everywhere, names differ, or a share is not positive.

    >>> proportional_ranks({"q": 3.0, "k": 1.0}, {"q": (8, 8), "k": (8, 8)}, budget=64)
    {'q': 3, 'k': 1}
    """
    _check_budget(shapes, budget, pivoted)
    _check_names(shares, shapes, "shares")
    for name, share in shares.items():
        if not 0 < share < math.inf:
            raise ValueError(f"the share of {name} must be a positive number, got {share}")

    def cost(name: str, rank: int) -> int:
        return layer_params(shapes[name], rank, pivoted)

    kept = _fill_shares(shares, shapes, budget)
    exact = {
        n: rank_at(shape, kept[n] * shape[0] * shape[1], pivoted) for n, shape in shapes.items()
    }
    ranks = {name: max(1, int(rank + 1e-9)) for name, rank in exact.items()}
    spent = sum(cost(name, rank) for name, rank in ranks.items())
    while spent > budget:  # layers lifted to rank 1 have more than their share: the others pay
        name = max((n for n in shapes if ranks[n] > 1), key=lambda n: ranks[n] / exact[n])
        spent += cost(name, ranks[name] - 1) - cost(name, ranks[name])
        ranks[name] -= 1
    first = True
    while True:
        remainder = {name: exact[name] - ranks[name] for name in shapes}
        steps = {n: cost(n, ranks[n] + 1) - cost(n, ranks[n]) for n in shapes}
        if not first and budget - spent < max(steps.values()):
            break
        for name in sorted(shapes, key=lambda name: -remainder[name]):
            if (remainder[name] > 0 or not first) and steps[name] <= budget - spent:
                ranks[name] += steps[name] > 0
                spent += steps[name]
        if not any(steps.values()):
            break
        first = False
    return {n: min(shapes[n]) if is_dense(shapes[n], r, pivoted) else r for n, r in ranks.items()}


def allocate(
    values: Mapping[str, Tensor],
    shapes: Mapping[str, Shape],
    budget: int,
    *,
    pivoted: bool = False,
) -> dict[str, int]:
    """Choose the rank of every weight that loses least together under one budget of parameters.

    A weight (out, in) that keeps its ``k`` most valuable components costs ``min(k (out + in),
    out in)`` parameters and loses the values of the others. From break-even ``out in / (out + in)``
    on it is dense, and then keeps everything for the price of ``out in``. So the best set lies on
    the lower convex hull of (cost, loss) of each weight: a run of single ranks, best first, and
    then one jump from some rank to dense. (Pivoted factors have no break-even, but each rank costs
    them less than the one before, so that their hull has longer steps.) The steps of all hulls are
    taken in the order of their gain per parameter until one does not fit, and what is left is spent
    on single ranks and jumps that do. If nothing is left, no choice of that cost loses less;
    otherwise the loss exceeds the least possible one by less than what the step that did not fit
    would have gained.

    Args:
        values: name to what each component is worth in the loss, (min(out, in),), any order, not
            negative; e.g. squared singular values, or score squared times Fisher information.
        shapes: name to (out, in), the same names.
        budget: parameters that all weights may hold together (a count, not bytes; biases not
            included).
        pivoted: whether the factors are pivoted ones, which hold less.

    Returns:
        name to rank in the order of ``shapes``, at least 1; ``min(out, in)`` means dense. The sum
        of ``layer_params`` is at most ``budget``, and short of it by less than one rank of any
        weight that is not dense.

    Raises:
        ValueError: names or lengths differ, a value is negative or not finite, or ``budget`` is
            below rank 1 everywhere.

    Source: greedy marginal gain on convex hulls (the Lagrangian of the separable problem; Everett
    1963), each found by isotonic regression of its slopes; the dense jump is ours.

    >>> values = {"q": torch.tensor([9.0, 1.0, 0.0, 0.0]), "v": torch.tensor([4.0, 4.0, 4.0, 4.0])}
    >>> allocate(values, {"q": (4, 4), "v": (4, 4)}, budget=24)
    {'q': 1, 'v': 4}
    """
    _check_values(values, shapes)
    spent = _check_budget(shapes, budget, pivoted)
    losses = {name: _losses(values[name]) for name in shapes}
    steps = torch.cat([_hull_steps(i, shapes[n], losses[n], pivoted) for i, n in enumerate(shapes)])
    steps = steps[torch.argsort(steps[:, 0], descending=True, stable=True)]
    steps = steps[: int((spent + steps[:, 3].cumsum(0) <= budget).sum())]
    start = [min(s) if is_dense(s, 1, pivoted) else 1 for s in shapes.values()]  # (1, n): dense
    taken = steps.new_tensor(start).scatter_reduce(0, steps[:, 1].long(), steps[:, 2], "amax")
    ranks = dict(zip(shapes, taken.long().tolist(), strict=True))
    _fill(ranks, budget - spent - int(steps[:, 3].sum()), shapes, losses, pivoted)
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


def _check_budget(shapes: Mapping[str, Shape], budget: int, pivoted: bool) -> int:
    """Refuse less than rank 1 everywhere; what that takes."""
    least = sum(layer_params(shape, 1, pivoted) for shape in shapes.values())
    if least > budget:
        raise ValueError(f"rank 1 everywhere takes {least:,} parameters, the budget is {budget:,}")
    return least


def _check_names(given: Mapping[str, object], shapes: Mapping[str, Shape], what: str) -> None:
    if set(given) != set(shapes):
        odd = sorted(set(given) ^ set(shapes))
        raise ValueError(f"{what} and shapes name different weights, first {odd[0]!r}")


def _fill_shares(
    shares: Mapping[str, float], shapes: Mapping[str, Shape], budget: int
) -> dict[str, float]:
    """``min(1, t share)`` with the t at which the kept parameters are ``budget``."""
    kept: dict[str, float] = {}
    left = float(budget)
    weight = sum(shares[n] * rows * columns for n, (rows, columns) in shapes.items())
    for name in sorted(shapes, key=lambda n: -shares[n]):  # those that are full first
        size = shapes[name][0] * shapes[name][1]
        kept[name] = min(1.0, left / weight * shares[name]) if weight > 0 else 1.0
        left -= kept[name] * size
        weight -= shares[name] * size
    return kept


def _check_values(values: Mapping[str, Tensor], shapes: Mapping[str, Shape]) -> None:
    _check_names(values, shapes, "values")
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


def _hull_steps(index: int, shape: Shape, loss: Tensor, pivoted: bool) -> Tensor:
    """The steps of the hull above rank 1, in order.

    Returns:
        (steps, 4): gain per parameter (descending), ``index``, rank reached, cost in parameters.
    """
    rows, columns = shape
    last = min(shape)  # the largest rank that is not dense
    last = last - 1 if pivoted else min((rows * columns - 1) // (rows + columns), last)
    if last < 1:
        return loss.new_zeros(0, 4)
    rank = torch.arange(1, last + 1)
    cost = rank * (rows + columns) - (rank * rank if pivoted else 0)
    cost = torch.cat([cost, cost.new_tensor([rows * columns])]).diff().double()
    reached = torch.cat([rank[1:], rank.new_tensor([min(shape)])])
    gain = torch.cat([loss[1:last] - loss[2 : last + 1], loss[last : last + 1]])
    # Slopes that fall are a convex curve; where they do not, the hull passes below.
    hull = isotonic_regression((-gain / cost).numpy(), weights=cost.numpy())
    begin, end = torch.from_numpy(hull.blocks[:-1]), torch.from_numpy(hull.blocks[1:])
    slope = -torch.from_numpy(hull.x)[begin]
    total = torch.cat([cost.new_zeros(1), cost.cumsum(0)])
    return torch.stack(
        [
            slope,
            torch.full_like(slope, index),
            reached[end - 1].double(),
            total[end] - total[begin],
        ],
        dim=1,
    )


def _fill(
    ranks: dict[str, int],
    room: int,
    shapes: Mapping[str, Shape],
    losses: Mapping[str, Tensor],
    pivoted: bool,
) -> None:
    """Spend ``room`` parameters on single ranks and jumps to dense, best gain per cost first."""

    def best_step(name: str) -> tuple[float, str, int, int] | None:
        shape, rank = shapes[name], ranks[name]
        fitting = []
        following = min(shape) if is_dense(shape, rank + 1, pivoted) else rank + 1
        for reached in {following, min(shape)}:
            cost = layer_params(shape, reached, pivoted) - layer_params(shape, rank, pivoted)
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
