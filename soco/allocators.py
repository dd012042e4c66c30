"""Rules that share one budget of parameters among layers: spectra and sensitivities -> ranks."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_matrix
from torch import Tensor

from soco.ranks import (
    Shape,
    allocate,
    is_dense,
    layer_params,
    proportional_ranks,
    rank_at,
    relative_energy,
    uniform_ranks,
)


@dataclass(frozen=True)
class Problem:
    """What an allocator may know. A unit is a layer, or a group of layers that share a basis."""

    shapes: Mapping[str, Shape]  # unit to (out, in); a group's weights are stacked
    sigma: Mapping[str, Tensor]  # unit to the singular values of its method, (min(out, in),)
    budget: int  # parameters that all units may hold together
    in_loss: bool  # whether squared singular values of different units are in one unit of measure
    pivoted: bool  # whether factors will be pivoted, which hold less
    kinds: Mapping[str, str]  # unit to its name without the number of its block
    blocks: Mapping[str, int]  # unit to the number of its block, counted from 0
    tokens: int  # of the calibration: sums of squares are this times the squares of ``sigma``
    similarity: Callable[[], Mapping[str, float]]  # unit to how alike its inputs and outputs are
    probe: Callable[[str, int], float]  # KL to the dense model, one unit alone cut to a rank
    learn: Callable[[], Mapping[str, int]]  # ranks that SoCo learns, for these components

    def cost(self, unit: str, rank: int) -> int:
        """Parameters of a unit at a rank."""
        return layer_params(self.shapes[unit], rank, self.pivoted)

    def losses(self, unit: str) -> Tensor:
        """What is lost of the squared singular values with 0, 1, ... components kept."""
        energy = self.sigma[unit].double().square().cpu()
        return torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])

    def rank_at(self, unit: str, kept: float) -> int:
        """The rank, at least 1, at which a unit keeps about a fraction of its parameters."""
        rows, columns = self.shapes[unit]
        rank = max(1, int(rank_at((rows, columns), kept * rows * columns, self.pivoted) + 1e-9))
        return min(rank, rows, columns)

    def by_shares(self, shares: Mapping[str, float]) -> dict[str, int]:
        """Ranks whose kept fractions are as the shares, as large as fit."""
        return proportional_ranks(shares, self.shapes, self.budget, pivoted=self.pivoted)


@runtime_checkable
class Allocator(Protocol):
    """A rule, as a small frozen dataclass."""

    name: ClassVar[str]  # as users write it

    @property
    def needs(self) -> frozenset[str]:
        """The statistics it reads, of ``calibration.KINDS``."""
        ...

    def ranks(self, problem: Problem) -> dict[str, int]:
        """A rank, at least 1, for every unit; ``min(out, in)`` is dense. The budget is met."""
        ...


class _NeedsNothing:
    @property
    def needs(self) -> frozenset[str]:
        """Nothing beyond the spectra."""
        return frozenset()


@dataclass(frozen=True)
class Uniform(_NeedsNothing):
    """The same kept fraction everywhere (``ranks.uniform_ranks``)."""

    name: ClassVar[str] = "uniform"

    def ranks(self, problem: Problem) -> dict[str, int]:
        """Equal fractions."""
        return uniform_ranks(problem.shapes, problem.budget, pivoted=problem.pivoted)


@dataclass(frozen=True)
class Energy(_NeedsNothing):
    """Best gain per parameter first, over all layers, with dense fallback (``ranks.allocate``).

    The gain of a component is its squared singular value: as it is where the method measures the
    loss with it (kfac-svd), else as a fraction of its layer's sum.
    """

    name: ClassVar[str] = "energy"

    relative: bool | None = None  # to the layer's sum; None: as the method's components ask for

    def ranks(self, problem: Problem) -> dict[str, int]:
        """The greedy optimum on convex hulls."""
        relative = not problem.in_loss if self.relative is None else self.relative
        values = (
            relative_energy(problem.sigma)
            if relative
            else {name: sigma.double().square() for name, sigma in problem.sigma.items()}
        )
        return allocate(values, problem.shapes, problem.budget, pivoted=problem.pivoted)


@dataclass(frozen=True)
class AdaCR:
    """Kept fractions by importance: ``least + importance / mean importance (target - least)``.

    The importance of a layer is how similar its outputs are to its inputs: the cosine between the
    two as kernels on tokens, ``|Y X^T|_F^2 / (|X X^T|_F |Y Y^T|_F)``, which is defined for any
    sizes and follows from the Gram matrix. (The paper speaks of a cosine similarity and does not
    say what it is where outputs and inputs differ in size.)

    Source: adaCR of AdaSVD, arXiv:2502.01403.
    """

    name: ClassVar[str] = "adacr"

    least: float = 0.5  # kept fraction of an unimportant layer, as a fraction of the target

    def __post_init__(self) -> None:
        """Refuse what is no fraction."""
        if not 0 <= self.least <= 1:
            raise ValueError(f"least must be from 0 to 1, got {self.least}")

    @property
    def needs(self) -> frozenset[str]:
        """The inputs' Gram matrix."""
        return frozenset({"gram"})

    def ranks(self, problem: Problem) -> dict[str, int]:
        """Shares by importance, scaled to the budget."""
        importance = problem.similarity()
        mean = sum(importance.values()) / len(importance)
        shares = {
            name: self.least + (value / mean if mean > 0 else 1.0) * (1 - self.least)
            for name, value in importance.items()
        }
        return problem.by_shares({name: max(share, 1e-3) for name, share in shares.items()})


@dataclass(frozen=True)
class LossByType(_NeedsNothing):
    """Among layers of one kind, the removed fraction goes by ``1 / log(loss)``.

    The loss is that of the truncation at the target, ``|(W - W') X|_F`` over the whole calibration;
    a kind's removed fractions ``n R (1 / log L_i) / sum_j (1 / log L_j)`` have the target R as
    their mean. Losses below e, whose logarithm would turn the order around, count as e.

    Source: SVD-LLM V2, arXiv:2503.12340, section 3.1. That the whole is scaled to the budget, and
    the bound, are ours.
    """

    name: ClassVar[str] = "v2"

    def ranks(self, problem: Problem) -> dict[str, int]:
        """Shares by loss, kind by kind."""
        even = uniform_ranks(problem.shapes, problem.budget, pivoted=problem.pivoted)
        total = sum(rows * columns for rows, columns in problem.shapes.values())
        removed = 1 - min(1.0, problem.budget / total)
        together = defaultdict(list)
        for unit in problem.shapes:
            together[problem.kinds[unit]].append(unit)
        shares = {}
        for units in together.values():
            inverse = {}
            for unit in units:
                lost = float(problem.losses(unit)[even[unit]]) * problem.tokens
                inverse[unit] = 1 / math.log(max(math.sqrt(max(lost, 0.0)), math.e))
            whole = sum(inverse.values())
            for unit in units:
                shares[unit] = max(0.01, 1 - len(units) * removed * inverse[unit] / whole)
        return problem.by_shares(shares)


@dataclass(frozen=True)
class EffectiveRank(_NeedsNothing):
    """Rank ``k_g`` in proportion to ``sqrt(R_g / w_g)``: many alike singular values get more.

    ``R = exp(-sum p log p)`` with ``p = sigma^2 / sum sigma^2`` is a unit's effective rank, and
    ``w`` the parameters of one rank: the Lagrangian of ``sum R_g / k_g`` under the budget. Then a
    fraction of the ranks of queries and keys moves to the values. Where uniform ranks lose less of
    ``sum sigma^2``, those are taken.

    Source: D-Rank, arXiv:2509.25622.
    """

    name: ClassVar[str] = "effective-rank"

    moved: float = 0.3  # fraction of the ranks of givers that goes to takers, by parameters
    givers: tuple[str, ...] = ("*q_proj", "*k_proj", "*.query", "*.key")  # glob patterns
    takers: tuple[str, ...] = ("*v_proj", "*.value")

    def ranks(self, problem: Problem) -> dict[str, int]:
        """Shares by effective rank, unless uniform ones are better."""
        size = {unit: rows * columns for unit, (rows, columns) in problem.shapes.items()}
        kept = {}  # parameters, up to a common factor
        for unit, (rows, columns) in problem.shapes.items():
            energy = problem.sigma[unit].double().square()
            part = energy / energy.sum().clamp_min(torch.finfo(torch.float64).tiny)
            entropy = -(part * part.clamp_min(1e-300).log()).sum()
            kept[unit] = math.sqrt(float(entropy.exp()) * (rows + columns))
        self._move(kept, problem.blocks)
        found = problem.by_shares({unit: kept[unit] / size[unit] for unit in kept})
        even = uniform_ranks(problem.shapes, problem.budget, pivoted=problem.pivoted)

        def lost(ranks: Mapping[str, int]) -> float:
            return sum(float(problem.losses(unit)[rank]) for unit, rank in ranks.items())

        return found if lost(found) <= lost(even) else even

    def _move(self, kept: dict[str, float], blocks: Mapping[str, int]) -> None:
        """Shift parameters from givers to takers within every block."""
        for block in set(blocks.values()):
            here = [unit for unit in kept if blocks[unit] == block]
            takers = [u for u in here if any(fnmatchcase(u, p) for p in self.takers)]
            givers = [u for u in here if any(fnmatchcase(u, p) for p in self.givers)]
            if takers and givers:
                given = sum(kept[unit] * self.moved for unit in givers)
                for unit in givers:
                    kept[unit] *= 1 - self.moved
                for unit in takers:
                    kept[unit] += given / len(takers)


@dataclass(frozen=True)
class Sensitivity(_NeedsNothing):
    """Ranks by how much each layer alone can bear: one threshold on the divergence for all.

    Every layer is cut alone to several kept fractions, and the divergence of the model from the
    dense one measured. Each layer then gets the smallest fraction whose divergence is below a
    threshold, and the threshold is the lowest at which the whole fits into the budget.

    Source: sensitivity-based truncation rank searching of ASVD, arXiv:2312.05821, section 3.4 (by
    perplexity; the divergence orders alike, and needs no labels).
    """

    name: ClassVar[str] = "sensitivity"

    kept: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # fractions tried

    def ranks(self, problem: Problem) -> dict[str, int]:
        """Shares by threshold, scaled to the budget."""
        harm = {
            unit: [problem.probe(unit, problem.rank_at(unit, kept)) for kept in self.kept]
            for unit in problem.shapes
        }

        def chosen(threshold: float) -> dict[str, float]:
            return {
                unit: next((k for k, h in zip(self.kept, row, strict=True) if h <= threshold), 1.0)
                for unit, row in harm.items()
            }

        def params(shares: Mapping[str, float]) -> float:
            return sum(
                shares[unit] * rows * columns for unit, (rows, columns) in problem.shapes.items()
            )

        steps = sorted({h for row in harm.values() for h in row})
        low, high = 0, len(steps) - 1  # the fewest parameters are at the last step
        while low < high:
            middle = (low + high) // 2
            if params(chosen(steps[middle])) <= problem.budget:
                high = middle
            else:
                low = middle + 1
        return problem.by_shares(chosen(steps[low]))


@dataclass(frozen=True)
class LEMS(_NeedsNothing):
    """An integer program: one rank per layer from a menu, the least summed error that fits.

    The error of layer l at rank r is its share of lost energy, relative to that at a tenth of its
    parameters, times the divergence of the model when layer l alone is cut to that tenth, times a
    weight that falls with depth, ``1 + depth_weight d_l / max d`` with
    ``d_l = sum_{k >= l} 1 / (k + 1)^decay``. Dense has error 0. What the menu leaves of the budget
    is spent on single ranks.

    Source: LEMS, ICML 2026 (code lems-svd/lems; there by Gurobi or CBC, with parameters tuned in 10
    trials; here by HiGHS, with their defaults).
    """

    name: ClassVar[str] = "lems"

    menu: int = 32  # ranks to choose from in every layer, dense among them
    least: float | None = None  # kept fraction of any layer; None: 0.3, or 0.1 below half kept
    decay: float = 0.0  # exponent of the depth
    depth_weight: float = 5.0
    seconds: float = 60.0  # for the solver; the best choice found by then is taken

    def ranks(self, problem: Problem) -> dict[str, int]:
        """Solve, and spend the rest."""
        errors = self._errors(problem)
        least = self.least
        whole = sum(rows * columns for rows, columns in problem.shapes.values())
        if least is None:
            least = 0.3 if problem.budget >= 0.5 * whole else 0.1
        while True:
            menus = {unit: self._menu(problem, unit, least) for unit in problem.shapes}
            smallest = sum(problem.cost(unit, menu[0]) for unit, menu in menus.items())
            if smallest <= problem.budget or least == 0:
                break
            least = 0.0 if least < 0.01 else least / 2
        chosen = _solve(problem, menus, errors, self.seconds)
        return _spend(problem, chosen, errors)

    def _menu(self, problem: Problem, unit: str, least: float) -> list[int]:
        """Ranks from the least to the last below dense, evenly spaced, and dense."""
        full = min(problem.shapes[unit])
        first = problem.rank_at(unit, least) if least else 1
        below = [
            r for r in range(first, full) if not is_dense(problem.shapes[unit], r, problem.pivoted)
        ]
        places = np.unique(np.linspace(0, len(below) - 1, self.menu - 1).round().astype(int))
        return [*(below[i] for i in places), full] if below else [full]

    def _errors(self, problem: Problem) -> dict[str, Tensor]:
        """Unit to its error with 0, 1, ... components kept."""
        depths = sorted(set(problem.blocks.values()))
        tails = {d: sum(1 / (k + 1) ** self.decay for k in depths if k >= d) for d in depths}
        largest = max(tails.values())
        errors = {}
        for unit in problem.shapes:
            tenth = problem.rank_at(unit, 0.1)
            losses = problem.losses(unit)
            scale = float(losses[tenth]) or 1.0
            harm = max(problem.probe(unit, tenth), 0.0)
            weight = 1 + self.depth_weight * tails[problem.blocks[unit]] / largest
            errors[unit] = losses / scale * harm * weight
            errors[unit][-1] = 0.0
        return errors


def _solve(
    problem: Problem,
    menus: Mapping[str, Sequence[int]],
    errors: Mapping[str, Tensor],
    seconds: float,
) -> dict[str, int]:
    """The integer program: one rank of every menu."""
    entries = [(u, rank) for u, unit in enumerate(menus) for rank in menus[unit]]
    units = list(menus)
    cost = np.array([problem.cost(units[u], rank) for u, rank in entries], dtype=float)
    error = np.array(
        [
            0.0 if is_dense(problem.shapes[units[u]], rank, problem.pivoted)
            else float(errors[units[u]][rank])
            for u, rank in entries
        ]
    )  # fmt: skip
    rows = np.array([u for u, _ in entries])
    one_each = coo_matrix((np.ones(len(entries)), (rows, np.arange(len(entries)))))
    scale = max(float(error.max()), 1e-300)
    allowed, less = problem.budget, 0
    while True:
        found = milp(
            error / scale,
            integrality=np.ones(len(entries)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each.tocsr(), 1, 1),
                LinearConstraint(cost[None] / problem.budget, -np.inf, allowed / problem.budget),
            ],
            options={"time_limit": seconds, "mip_rel_gap": 1e-4},
        )
        if found.x is None:
            raise ValueError(f"the integer program for the ranks was not solved: {found.message}")
        chosen = found.x > 0.5
        # The solver takes a constraint for met to within a millionth: thousands of parameters.
        excess = int(cost[chosen].sum()) - problem.budget
        if excess <= 0:
            return {units[u]: rank for (u, rank), x in zip(entries, chosen, strict=True) if x}
        less = max(excess, 2 * less)
        allowed -= less


def _spend(
    problem: Problem, ranks: Mapping[str, int], errors: Mapping[str, Tensor]
) -> dict[str, int]:
    """Give out what is left of the budget, one rank at a time, best gain per parameter first."""
    ranks = {unit: ranks[unit] for unit in problem.shapes}
    room = problem.budget - sum(problem.cost(unit, rank) for unit, rank in ranks.items())
    while True:
        steps = []
        for unit, rank in ranks.items():
            full = min(problem.shapes[unit])
            following = rank + 1
            if is_dense(problem.shapes[unit], following, problem.pivoted):
                following = full
            price = problem.cost(unit, following) - problem.cost(unit, rank)
            if rank < full and price <= room:
                gain = float(errors[unit][rank] - errors[unit][following])
                steps.append((-gain / max(price, 1), unit, following, price))
        if not steps:
            return ranks
        _, unit, following, price = min(steps)
        ranks[unit], room = following, room - price


@dataclass(frozen=True)
class Learned(_NeedsNothing):
    """The ranks that SoCo's training finds for the method's components; its scores are not used.

    Source: SoCo, arXiv:2502.15092, which keeps both; this takes the allocation alone.
    """

    name: ClassVar[str] = "learned"

    def ranks(self, problem: Problem) -> dict[str, int]:
        """Train."""
        return dict(problem.learn())


ALLOCATORS: Mapping[str, Callable[..., Allocator]] = {
    cls.name: cls
    for cls in (
        Uniform, Energy, AdaCR, LossByType, EffectiveRank, Sensitivity, LEMS, Learned,
    )
}  # fmt: skip
