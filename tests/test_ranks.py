"""soco.ranks against every possible choice of ranks, where those can be counted."""

import itertools
import math
import time
from fractions import Fraction

import pytest
import torch

from soco.ranks import (
    allocate,
    is_dense,
    layer_params,
    parameter_budget,
    relative_energy,
    uniform_ranks,
)

# Square, wide, tall, GQA-narrow, one row, one column, and so small that rank 1 is dense.
SMALL = {
    "square": (5, 5),
    "wide": (4, 9),
    "tall": (8, 4),
    "narrow": (2, 6),
    "row": (1, 5),
    "column": (3, 1),
    "tiny": (2, 2),
}
LLAMA = {
    f"{block}.{kind}": shape
    for block in range(4)
    for kind, shape in {"q": (64, 64), "k": (8, 64), "up": (172, 64), "down": (64, 172)}.items()
}


def some(*names):
    return {name: SMALL[name] for name in names}


def random_values(shapes, seed, zeros=0.0):
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name, shape in shapes.items():
        value = torch.rand(min(shape), generator=generator, dtype=torch.float64) ** 2
        scale = torch.randn((), generator=generator, dtype=torch.float64).exp()
        alive = torch.rand(min(shape), generator=generator) >= zeros
        values[name] = value * scale * alive
    return values


def total_params(shapes, ranks):
    return sum(layer_params(shapes[name], rank) for name, rank in ranks.items())


def total_loss(values, ranks):
    """What the components lose that are not among the largest, in plain Python."""
    return math.fsum(
        sum(sorted(values[name].tolist(), reverse=True)[rank:]) for name, rank in ranks.items()
    )


def options(shape):
    """Every rank that makes a difference: below break-even, and dense."""
    return [rank for rank in range(1, min(shape)) if not is_dense(shape, rank)] + [min(shape)]


def every_choice(values, shapes):
    """(cost, loss, ranks) of every combination, cheapest first."""
    table = []
    for combination in itertools.product(*(options(shape) for shape in shapes.values())):
        ranks = dict(zip(shapes, combination, strict=True))
        table.append((total_params(shapes, ranks), total_loss(values, ranks), ranks))
    return sorted(table, key=lambda row: row[:2])


def lower_hull(table):
    """The vertices of the lower convex hull of (cost, loss), cheapest first."""
    hull = []
    for cost, loss, ranks in table:
        if hull and loss >= hull[-1][1]:
            continue
        while len(hull) > 1:
            (cost0, loss0, _), (cost1, loss1, _) = hull[-2:]
            if (loss1 - loss0) * (cost - cost0) < (loss - loss0) * (cost1 - cost0):
                break
            hull.pop()
        hull.append((cost, loss, ranks))
    return hull


# ---- what a rank costs ---------------------------------------------------------------------------


def test_cost_and_break_even_by_hand():
    assert [layer_params((4, 6), rank) for rank in (1, 2, 3, 4)] == [10, 20, 24, 24]
    assert [is_dense((4, 6), rank) for rank in (1, 2, 3, 4)] == [False, False, True, True]
    assert is_dense((4, 4), 2)  # two factors of as many parameters are no gain
    assert is_dense((1, 9), 1)
    assert layer_params((1, 9), 1) == 9


# ---- the budget ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.01, 0.123, 0.987])
@pytest.mark.parametrize("side", [10, 1000, 300_000])
def test_budget_is_exact_in_decimals(ratio, side):
    total = side * side
    least = 2 * side
    if total * (1 - ratio) >= least:
        wanted = math.floor(total * (1 - Fraction(str(ratio))))
        assert parameter_budget({"w": (side, side)}, ratio) == wanted


def test_budget_by_hand():
    assert parameter_budget({"a": (10, 10), "b": (10, 10)}, 0.5) == 100
    assert parameter_budget({"a": (10, 10)}, 0.333) == 66  # of 66.7: at least the ratio is removed
    assert parameter_budget({"a": (100, 100)}, 0.9) == 1000  # 999.99..98 in binary


@pytest.mark.parametrize("ratio", [0, 1, -1, 0.0, 1.0, 1.5, -0.1, math.nan, math.inf])
def test_ratios_out_of_range(ratio):
    with pytest.raises(ValueError, match=rf"above 0 and below 1, got {ratio}$"):
        parameter_budget(LLAMA, ratio)


@pytest.mark.parametrize("ratio", [True, False, "0.5", "abc", None, [0.5], 0.5j])
def test_ratios_that_are_no_numbers(ratio):
    with pytest.raises(ValueError, match="ratio is the fraction of parameters to remove") as caught:
        parameter_budget(LLAMA, ratio)
    assert str(caught.value).endswith(f"got {ratio!r}")


@pytest.mark.parametrize("side", [3, 7, 12, 999])
def test_the_largest_ratio_that_is_told_can_be_met(side):
    shapes = {"a": (side, 4 * side), "b": (side, side)}
    least = 7 * side
    with pytest.raises(ValueError, match=f"rank 1 in each of the 2 layers takes {least:,}") as told:
        parameter_budget(shapes, 0.99999)
    largest = str(told.value).split()[-1]
    budget = parameter_budget(shapes, float(largest))
    assert total_params(shapes, allocate(random_values(shapes, 0), shapes, budget)) <= budget
    with pytest.raises(ValueError, match="rank 1 in each"):
        parameter_budget(shapes, float(largest) + 0.0001)


def test_budget_at_rank_one_everywhere():
    assert parameter_budget({"a": (10, 10)}, 0.8) == 20
    with pytest.raises(ValueError, match=r"leaves 19 parameters.*largest.* met is 0\.8000$"):
        parameter_budget({"a": (10, 10)}, 0.81)
    with pytest.raises(ValueError, match=r"largest ratio that can be met is 0\.0000$"):
        parameter_budget(some("row", "column", "tiny"), 0.1)


# ---- uniform ranks -------------------------------------------------------------------------------


@pytest.mark.parametrize("shapes", [SMALL, LLAMA, some("wide")], ids=["small", "llama", "one"])
def test_uniform_ranks_meet_every_budget(shapes):
    least = total_params(shapes, dict.fromkeys(shapes, 1))
    total = sum(rows * columns for rows, columns in shapes.values())
    for budget in range(least, total + 2, max(1, total // 500)):
        ranks = uniform_ranks(shapes, budget)
        assert list(ranks) == list(shapes)
        assert all(rank in options(shapes[name]) for name, rank in ranks.items())
        left = budget - total_params(shapes, ranks)
        assert left >= 0
        growing = [name for name in shapes if ranks[name] < min(shapes[name])]
        assert not growing or left < max(sum(shapes[name]) for name in growing)


@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.5, 0.8, 0.93])
def test_uniform_ranks_keep_the_same_fraction(ratio):
    budget = parameter_budget(LLAMA, ratio)
    for name, rank in uniform_ranks(LLAMA, budget).items():
        rows, columns = LLAMA[name]
        exact = (1 - ratio) * rows * columns / (rows + columns)
        assert exact - 1 < rank < exact + 1 or (
            is_dense((rows, columns), rank) and exact > rank - 1
        )


def test_uniform_ranks_share_what_the_narrow_ones_take_too_much():
    shapes = {"small": (100, 100), "large": (400, 400)} | {f"k{i}": (2, 50) for i in range(20)}
    # 10 %: 1,000 + 16,000 + 20 * 10, ranks 5 and 20; but rank 1 of a k takes 52, together 840 more.
    ranks = uniform_ranks(shapes, 17_200)
    assert ranks == {"small": 4, "large": 19} | {f"k{i}": 1 for i in range(20)}


def test_uniform_ranks_of_equal_layers_by_hand():
    shapes = {name: (10, 10) for name in "abcd"}
    assert uniform_ranks(shapes, 200) == dict(a=3, b=3, c=2, d=2)  # 2.5 each, 20 a rank
    uneven = {"a": (10, 10), "b": (20, 20)}  # 58 %: 2.9 of 20 parameters, 5.8 of 40; 50 left
    assert uniform_ranks(uneven, 290) == {"a": 3, "b": 5}
    assert uniform_ranks(shapes, 400) == dict.fromkeys(shapes, 10)
    assert uniform_ranks(shapes, 10**6) == dict.fromkeys(shapes, 10)
    assert uniform_ranks(shapes, 80) == dict.fromkeys(shapes, 1)
    with pytest.raises(ValueError, match="rank 1 everywhere takes 80 parameters, the budget is 79"):
        uniform_ranks(shapes, 79)


# ---- the best ranks ------------------------------------------------------------------------------

PROBLEMS = [
    some("square", "wide", "tall", "narrow"),
    some("square", "tall", "row", "tiny"),
    some("wide", "narrow", "column"),
    {"a": (5, 5), "b": (5, 5), "c": (5, 5), "d": (5, 5)},
    {"big": (9, 9), "small": (3, 3)},
]


@pytest.mark.parametrize("shapes", PROBLEMS, ids=lambda shapes: "-".join(shapes))
@pytest.mark.parametrize(("seed", "zeros"), [(0, 0), (1, 0), (2, 0), (3, 0.5)])
def test_against_every_choice_at_every_budget(shapes, seed, zeros):
    """Best of all on a vertex of the hull; between two of them, no worse than the one before.

    So it is above the best by less than what the step to the next vertex gains.
    """
    values = random_values(shapes, seed, zeros)
    table = every_choice(values, shapes)
    hull = lower_hull(table)
    vertices = {cost: loss for cost, loss, _ in hull}
    assert zeros or len(vertices) > 2
    for budget in range(table[0][0], table[-1][0] + 3):
        ranks = allocate(values, shapes, budget)
        assert list(ranks) == list(shapes)
        assert all(rank in options(shapes[name]) for name, rank in ranks.items())
        left = budget - total_params(shapes, ranks)
        growing = [sum(shapes[name]) for name in shapes if ranks[name] < min(shapes[name])]
        assert 0 <= left < min(growing, default=math.inf)
        loss = total_loss(values, ranks)
        best = min(row[1] for row in table if row[0] <= budget)
        before = min(row[1] for row in hull if row[0] <= budget)
        after = max((row[1] for row in hull if row[0] > budget), default=0.0)
        assert best - 1e-9 <= loss <= before + 1e-9
        assert loss - best <= before - after + 1e-9
        if budget in vertices:
            assert loss == pytest.approx(vertices[budget], abs=1e-9)


def test_how_far_from_the_best_it_is_on_average():
    """The greedy choice with its last fill is within a few per cent of the best one."""
    excess = []
    for seed in range(6):
        shapes = PROBLEMS[seed % len(PROBLEMS)]
        values = random_values(shapes, 10 + seed)
        table = every_choice(values, shapes)
        everything = table[0][1]
        for budget in range(table[0][0], table[-1][0]):
            best = min(row[1] for row in table if row[0] <= budget)
            excess.append(
                (total_loss(values, allocate(values, shapes, budget)) - best) / everything
            )
    assert sum(excess) / len(excess) < 0.02


@pytest.mark.parametrize("seed", range(3))
def test_best_of_all_for_a_price_per_parameter(seed):
    """For a price per parameter every layer has its own best rank; their cost is a budget."""
    values = random_values(LLAMA, seed)
    for price in torch.logspace(-6, 0, 40, dtype=torch.float64).tolist():
        ranks = {}
        for name, shape in LLAMA.items():
            descending = sorted(values[name].tolist(), reverse=True)
            ranks[name] = min(
                options(shape),
                key=lambda k: sum(descending[k:]) + price * layer_params(shape, k),
            )
        assert allocate(values, LLAMA, total_params(LLAMA, ranks)) == ranks


def test_dense_pays_where_the_spectrum_is_flat():
    shapes = {"flat": (8, 8), "steep": (8, 8)}
    values = {"flat": torch.ones(8), "steep": 100 * 0.015 ** torch.arange(8)}
    assert allocate(values, shapes, 64 + 16) == {"flat": 8, "steep": 1}
    # One parameter less, and there is no room for that: single ranks, wherever they gain most.
    assert allocate(values, shapes, 64 + 15) == {"flat": 2, "steep": 2}
    assert allocate(values, shapes, 128) == {"flat": 8, "steep": 8}


def test_a_step_without_room_does_not_stop_the_others():
    shapes = {"large": (40, 40), "flat": (8, 8), "steep": (8, 8)}
    values = {"large": torch.full((40,), 100.0), "flat": torch.full((8,), 1.0)}
    values["steep"] = torch.tensor([2.0, 1.6, 0, 0, 0, 0, 0, 0])
    # 48 more make flat dense and gain 7; 16 more of steep gain 1.6, as many of flat only 1.
    assert allocate(values, shapes, 80 + 64 + 16) == {"large": 1, "flat": 8, "steep": 1}
    assert allocate(values, shapes, 80 + 48 + 16) == {"large": 1, "flat": 2, "steep": 2}


def test_what_is_left_goes_to_the_best_gain_per_parameter():
    shapes = {"large": (40, 40), "narrow": (4, 30), "wide": (30, 30)}
    values = {name: torch.zeros(min(shape)) for name, shape in shapes.items()}
    values["large"] += 100.0
    values["narrow"][:3] += 1.0  # 34 parameters a rank
    values["wide"][:2] += 1.5  # 60
    assert allocate(values, shapes, 80 + 34 + 60 + 68) == {"large": 1, "narrow": 3, "wide": 1}


def test_order_of_values_and_dtype_do_not_matter():
    values = {name: value.float() for name, value in random_values(LLAMA, 0).items()}
    shuffled = {name: value[torch.randperm(len(value))] for name, value in values.items()}
    budget = parameter_budget(LLAMA, 0.5)
    wanted = allocate(values, LLAMA, budget)
    assert allocate(shuffled, LLAMA, budget) == wanted
    assert allocate({n: v.double() for n, v in values.items()}, LLAMA, budget) == wanted
    reverse = dict(reversed(LLAMA.items()))
    assert allocate(values, reverse, budget) == wanted
    assert list(allocate(values, reverse, budget)) == list(reverse)


def test_values_are_not_changed():
    values = random_values(LLAMA, 0)
    copies = {name: value.clone() for name, value in values.items()}
    allocate(values, LLAMA, parameter_budget(LLAMA, 0.5))
    assert all(torch.equal(values[name], copies[name]) for name in values)


@pytest.mark.parametrize("constant", [0.0, 1.0, 0.1, 1e-30])
@pytest.mark.parametrize("equal", [100, 300])
def test_ties(constant, equal):
    """Nothing to choose by: the budget is met all the same, and always in the same way."""
    shapes = {"a": (2000, 300), "b": (300, 300)}
    values = {name: torch.zeros(300, dtype=torch.float64) for name in shapes}
    for value in values.values():
        value[:equal] = constant  # 0.1: sums of them round, now up and now down
    for budget in range(2900, 690_000, 9973):
        ranks = allocate(values, shapes, budget)
        growing = [sum(shapes[name]) for name in shapes if ranks[name] < 300]
        assert 0 <= budget - total_params(shapes, ranks) < min(growing)
        assert ranks == allocate(values, shapes, budget)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_does_not_matter(scale):
    values = random_values(LLAMA, 0)
    budget = parameter_budget(LLAMA, 0.6)
    scaled = {name: value * scale for name, value in values.items()}
    assert allocate(scaled, LLAMA, budget) == allocate(values, LLAMA, budget)


def test_values_far_apart():
    """The order among tiny values is that of the values, not of rounding in sums with huge ones."""
    shapes = {"huge": (2000, 20), "tiny": (2000, 20)}  # 2020 a rank
    steps = torch.arange(20, 0, -1, dtype=torch.float64)
    values = {"huge": 1e20 * steps, "tiny": 1e-20 * steps}
    values["huge"][2:] = 0.5e-20 * steps[2:]
    assert allocate(values, shapes, 2 * 2020) == {"huge": 1, "tiny": 1}
    assert allocate(values, shapes, 3 * 2020) == {"huge": 2, "tiny": 1}
    assert allocate(values, shapes, 9 * 2020) == {"huge": 2, "tiny": 7}  # 20, 19, .. 14 of the tiny
    assert allocate(values, shapes, 15 * 2020) == {"huge": 3, "tiny": 12}  # .. 9, and 0.5 * 18


def test_float64_values_are_not_rounded():
    shapes = {"a": (9, 9), "b": (9, 9)}
    values = {name: torch.full((9,), 1e-3, dtype=torch.float64) for name in shapes}
    for better in shapes:
        changed = values | {better: values[better] + 1e-12}
        ranks = allocate(changed, shapes, 54)
        assert ranks == dict.fromkeys(shapes, 1) | {better: 2}


def test_every_parameter_less_is_a_worse_or_equal_choice():
    values = random_values(LLAMA, 5)
    budgets = [parameter_budget(LLAMA, ratio / 50) for ratio in range(1, 45)]
    losses = [total_loss(values, allocate(values, LLAMA, budget)) for budget in budgets]
    assert all(more <= less for more, less in itertools.pairwise(losses))
    assert losses[0] < losses[-1] / 100


def test_all_weights_dense_from_the_start():
    shapes = some("row", "column", "tiny")
    ranks = allocate(random_values(shapes, 0), shapes, 12)
    assert ranks == {"row": 1, "column": 1, "tiny": 2}
    with pytest.raises(ValueError, match="rank 1 everywhere takes 12 parameters, the budget is 11"):
        allocate(random_values(shapes, 0), shapes, 11)


def test_wrong_values_are_named():
    shapes = {"q": (4, 4), "v": (4, 4)}
    good = {"q": torch.ones(4), "v": torch.ones(4)}
    with pytest.raises(ValueError, match="name different weights, first 'v'"):
        allocate({"q": torch.ones(4)}, shapes, 16)
    with pytest.raises(ValueError, match="name different weights, first 'k'"):
        allocate(good | {"k": torch.ones(4)}, shapes, 16)
    with pytest.raises(ValueError, match=r"values of v must be .* = \(4,\), got \(3,\)"):
        allocate(good | {"v": torch.ones(3)}, shapes, 16)
    for bad in (math.nan, math.inf, -1e-9):
        with pytest.raises(ValueError, match="values of q must be finite and not negative"):
            allocate(good | {"q": torch.tensor([1.0, bad, 1, 1])}, shapes, 16)


def test_on_any_device(device):
    values = random_values(LLAMA, 0)
    moved = {name: value.to(device) for name, value in values.items()}
    budget = parameter_budget(LLAMA, 0.5)
    assert allocate(moved, LLAMA, budget) == allocate(values, LLAMA, budget)


def test_a_large_model_takes_seconds():
    shapes = {f"{i}": (4096, 11008) if i % 2 else (4096, 4096) for i in range(500)}
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.rand(4096, generator=generator) ** 4 for name in shapes}
    budget = parameter_budget(shapes, 0.5)
    begin = time.process_time()
    ranks = allocate(values, shapes, budget)
    assert time.process_time() - begin < 20  # about 1.5; a loop over all pairs would take minutes
    assert 0 <= budget - total_params(shapes, ranks) < 8192


# ---- relative energy -----------------------------------------------------------------------------


def test_relative_energy():
    spectra = {"a": torch.tensor([2.0, 1.0, 1.0]), "zero": torch.zeros(2)}
    spectra["tiny"] = torch.tensor([3e-25, 4e-25])  # their squares are no float32
    energy = relative_energy(spectra)
    torch.testing.assert_close(energy["a"], torch.tensor([4.0, 1.0, 1.0]).double() / 6)
    assert energy["zero"].tolist() == [0.0, 0.0]
    torch.testing.assert_close(energy["tiny"].float(), torch.tensor([0.36, 0.64]))
    assert spectra["a"].tolist() == [2.0, 1.0, 1.0]
