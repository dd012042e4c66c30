"""Every allocator meets every budget, and does what its rule says."""

import dataclasses
import itertools
import math

import pytest
import torch

from soco.allocators import (
    ALLOCATORS,
    LEMS,
    AdaCR,
    Allocator,
    EffectiveRank,
    Energy,
    Learned,
    LossByType,
    Problem,
    Sensitivity,
    Uniform,
    _solve,
)
from soco.ranks import is_dense, layer_params, parameter_budget, uniform_ranks

SHAPES = {
    f"layers.{block}.{kind}": shape
    for block in range(3)
    for kind, shape in {
        "q_proj": (24, 24), "k_proj": (8, 24), "v_proj": (8, 24), "up": (40, 24), "down": (24, 40)
    }.items()
}  # fmt: skip


def spectra(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in shapes.items():
        decay = 0.5 + torch.rand((), generator=generator) * 2
        scale = 10 ** torch.randn((), generator=generator)
        found[name] = scale * torch.arange(1, min(shape) + 1).double() ** -decay
    return found


def problem(ratio=0.4, shapes=SHAPES, **changes):
    sigma = changes.pop("sigma", spectra(shapes))
    energy = {name: value.square() for name, value in sigma.items()}

    def probe(name, rank):
        return float(energy[name][rank:].sum() / energy[name].sum())

    given = {
        "shapes": shapes,
        "sigma": sigma,
        "budget": parameter_budget(shapes, ratio),
        "in_loss": False,
        "pivoted": False,
        "kinds": {name: name.rpartition(".")[2] for name in shapes},
        "blocks": {name: int(name.split(".")[1]) for name in shapes},
        "tokens": 1000,
        "similarity": lambda: {name: 0.1 + i / len(shapes) for i, name in enumerate(shapes)},
        "probe": probe,
        "learn": lambda: uniform_ranks(
            shapes, parameter_budget(shapes, ratio), pivoted=changes.get("pivoted", False)
        ),
    }
    return Problem(**{**given, **changes})


def spent(found, given):
    return sum(layer_params(given.shapes[n], r, given.pivoted) for n, r in found.items())


@pytest.mark.parametrize("name", ALLOCATORS)
@pytest.mark.parametrize("pivoted", [False, True])
def test_every_budget_is_met_and_none_exceeded(name, pivoted):
    for ratio, seed in itertools.product((0.05, 0.2, 0.4, 0.6, 0.8), range(2)):
        given = problem(ratio, sigma=spectra(SHAPES, seed), pivoted=pivoted)
        found = ALLOCATORS[name]().ranks(given)
        assert list(found) == list(SHAPES)
        assert all(1 <= rank <= min(SHAPES[unit]) for unit, rank in found.items())
        left = given.budget - spent(found, given)
        growing = [sum(SHAPES[u]) for u in SHAPES if found[u] < min(SHAPES[u])]
        assert left >= 0
        assert not growing or left < max(growing), (ratio, left)


@pytest.mark.parametrize("name", ALLOCATORS)
def test_table(name):
    rule = ALLOCATORS[name]()
    assert rule.name == name
    assert isinstance(rule, Allocator)
    assert rule.needs == ({"gram"} if name == "adacr" else frozenset())
    with pytest.raises(AttributeError):
        setattr(rule, "name", "other")  # noqa: B010 - frozen


def test_dense_is_written_as_full_rank():
    flat = {name: torch.ones(min(shape)) for name, shape in SHAPES.items()}
    flat["layers.0.up"] = 100 * flat["layers.0.up"]
    found = Energy(relative=False).ranks(problem(0.3, sigma=flat))
    assert found["layers.0.up"] == 24
    assert is_dense((40, 24), 16)
    assert not is_dense((40, 24), 14)


def test_energy_is_relative_unless_the_method_measures_the_loss():
    given = problem(0.6)
    relative, absolute = Energy(relative=True).ranks(given), Energy(relative=False).ranks(given)
    assert relative != absolute
    assert Energy().ranks(given) == relative
    assert Energy().ranks(problem(0.6, in_loss=True)) == absolute
    lost = {
        label: sum(float(given.losses(unit)[rank]) for unit, rank in ranks.items())
        for label, ranks in (("absolute", absolute), ("relative", relative))
    }
    assert lost["absolute"] < lost["relative"]


def test_uniform():
    given = problem(0.5)
    assert Uniform().ranks(given) == uniform_ranks(SHAPES, given.budget)


def test_importance_raises_a_rank_from_the_least():
    shapes = {"layers.0.a": (40, 40), "layers.0.b": (40, 40)}
    even = problem(0.6, shapes, similarity=lambda: dict.fromkeys(shapes, 0.5))
    assert AdaCR().ranks(even) == dict.fromkeys(shapes, 8)
    uneven = problem(0.6, shapes, similarity=lambda: {"layers.0.a": 0.9, "layers.0.b": 0.3})
    # importance 1.5 and 0.5 of the mean; kept (0.5 + 0.5 * 1.5) : (0.5 + 0.5 * 0.5) = 1.25 : 0.75
    assert AdaCR().ranks(uneven) == {"layers.0.a": 10, "layers.0.b": 6}
    assert AdaCR(least=1.0).ranks(uneven) == dict.fromkeys(shapes, 8)
    nothing = problem(0.6, shapes, similarity=lambda: dict.fromkeys(shapes, 0.0))
    assert AdaCR().ranks(nothing) == dict.fromkeys(shapes, 8)
    with pytest.raises(ValueError, match="least must be from 0 to 1, got 2"):
        AdaCR(least=2)


def test_loss_by_type_is_the_published_formula():
    """Two layers of one kind, both far from dense: removed fractions go by 1 / log(loss)."""
    shapes = {"layers.0.w": (100, 100), "layers.1.w": (100, 100)}
    sigma = {"layers.0.w": torch.ones(100).double(), "layers.1.w": 30 * torch.ones(100).double()}
    given = problem(0.6, shapes, sigma=sigma)
    rank = uniform_ranks(shapes, given.budget)["layers.0.w"]
    logs = [math.log(math.sqrt(1000 * (100 - rank)) * scale) for scale in (1, 30)]
    inverse = [1 / log for log in logs]
    kept = [1 - 2 * 0.6 * each / sum(inverse) for each in inverse]
    found = LossByType().ranks(given)
    for name, wanted in zip(shapes, kept, strict=True):
        assert abs(found[name] - wanted * 50) <= 1
    assert found["layers.1.w"] > found["layers.0.w"]


def test_loss_by_type_bears_losses_below_one():
    tiny = {name: 1e-6 * sigma for name, sigma in spectra(SHAPES).items()}
    found, even = LossByType().ranks(problem(0.4, sigma=tiny)), Uniform().ranks(problem(0.4))
    assert all(abs(found[name] - even[name]) <= 1 for name in SHAPES)  # but for rounding


def test_effective_rank_is_the_lagrange_solution():
    shapes = {"layers.0.a": (60, 60), "layers.0.b": (60, 60)}
    few = torch.cat([torch.ones(4), torch.zeros(56)]).double()
    many = torch.cat([torch.ones(16), torch.zeros(44)]).double()
    given = problem(0.7, shapes, sigma={"layers.0.a": few, "layers.0.b": many})
    # Effective ranks 4 and 16: ranks as 2 : 4, of 2160 parameters at 120 each, 18 in all.
    assert EffectiveRank().ranks(given) == {"layers.0.a": 6, "layers.0.b": 12}


def test_effective_rank_falls_back_to_uniform():
    shapes = {"layers.0.a": (60, 60), "layers.0.b": (60, 60)}
    many = {"layers.0.a": 100 * torch.ones(60).double(), "layers.0.b": torch.ones(60).double()}
    many["layers.0.a"][10:] = 60
    given = problem(0.7, shapes, sigma=many)
    assert EffectiveRank().ranks(given) == uniform_ranks(shapes, given.budget)


def test_values_take_ranks_from_queries_and_keys():
    flat = {name: torch.ones(min(shape)).double() for name, shape in SHAPES.items()}
    flat = {n: s * (3.0 if n.endswith("v_proj") else 1.0) for n, s in flat.items()}
    given = problem(0.6, sigma=flat)
    moved, kept = EffectiveRank().ranks(given), EffectiveRank(moved=0.0).ranks(given)

    def total(ranks, kinds):
        return sum(rank for name, rank in ranks.items() if name.endswith(kinds))

    assert total(moved, "v_proj") > total(kept, "v_proj")
    assert total(moved, ("q_proj", "k_proj")) < total(kept, ("q_proj", "k_proj"))


def test_a_layer_that_bears_nothing_stays_dense():
    def probe(name, rank):
        return 10.0 if name == "layers.1.up" else 1 / rank

    found = Sensitivity().ranks(problem(0.4, probe=probe))
    assert found["layers.1.up"] == 24
    assert found["layers.0.up"] < 15


def test_sensitivity_asks_for_every_fraction_once():
    asked = []

    def probe(name, rank):
        asked.append((name, rank))
        return 1 / rank

    given = problem(0.4, probe=probe)
    Sensitivity(kept=(0.25, 0.5, 0.75)).ranks(given)
    assert sorted(asked) == sorted(
        (name, given.rank_at(name, kept)) for name in SHAPES for kept in (0.25, 0.5, 0.75)
    )


def test_the_integer_program_finds_the_best_of_its_menu():
    """Against every choice, with a menu of all ranks, and weights of depth switched off."""
    shapes = {"layers.0.a": (6, 6), "layers.1.b": (6, 9), "layers.2.c": (8, 5)}
    given = problem(0.45, shapes, sigma=spectra(shapes, 3))
    rule = LEMS(menu=50, least=0.0, depth_weight=0.0)
    errors = rule._errors(given)

    def total(ranks):
        return sum(0.0 if is_dense(shapes[n], r) else float(errors[n][r]) for n, r in ranks.items())

    choices = [
        [r for r in range(1, min(s) + 1) if r == min(s) or not is_dense(s, r)]
        for s in shapes.values()
    ]
    fitting = [
        dict(zip(shapes, ranks, strict=True))
        for ranks in itertools.product(*choices)
        if spent(dict(zip(shapes, ranks, strict=True)), given) <= given.budget
    ]
    assert total(rule.ranks(given)) == pytest.approx(min(map(total, fitting)), rel=1e-3)


def test_lems_prefers_layers_that_do_harm_and_early_ones():
    equal = {name: torch.linspace(1, 0.1, min(shape)).double() for name, shape in SHAPES.items()}
    harm = problem(0.5, sigma=equal, probe=lambda name, rank: 5.0 if ".1.up" in name else 1.0)
    found = LEMS(depth_weight=0.0).ranks(harm)
    assert found["layers.1.up"] > found["layers.0.up"]
    depth = problem(0.5, sigma=equal, probe=lambda name, rank: 1.0)
    found = LEMS().ranks(depth)
    assert found["layers.0.up"] > found["layers.2.up"]


def test_lems_errors_by_hand():
    """Losses relative to those at a tenth of the parameters, times the harm there, times depth."""
    shapes = {"layers.0.a": (40, 40), "layers.1.b": (40, 40)}
    sigma = spectra(shapes, 3)
    harms = {"layers.0.a": 0.5, "layers.1.b": 2.0}
    given = problem(0.45, shapes, sigma=sigma, probe=lambda name, rank: harms[name])
    errors = LEMS(depth_weight=3.0, decay=1.0)._errors(given)
    tails = {"layers.0.a": 1 + 1 / 2, "layers.1.b": 1 / 2}  # sums of 1 / (k + 1) from here on
    for name in shapes:
        energy = sigma[name].double().square()
        tenth = 2  # components of 80 parameters: 160 of 1600
        for rank in (1, 2, 17):
            relative = float(energy[rank:].sum() / energy[tenth:].sum())
            weight = 1 + 3 * tails[name] / 1.5
            assert float(errors[name][rank]) == pytest.approx(relative * harms[name] * weight)


def test_the_integer_program_meets_budgets_that_its_solver_cannot_tell_apart():
    """HiGHS takes a constraint for met to within a millionth, which is thousands of parameters."""
    kinds = {"q": (4096, 4096), "k": (1024, 4096), "gate": (14336, 4096), "down": (4096, 14336)}
    shapes = {f"layers.{i}.{kind}": shape for i in range(12) for kind, shape in kinds.items()}
    menus = {name: [64, 256, 400, min(shape)] for name, shape in shapes.items()}
    errors = {}
    for number, (name, shape) in enumerate(shapes.items()):
        steepness = 1 + number % 7
        kept = torch.linspace(0, 1, min(shape) + 1, dtype=torch.float64)
        errors[name] = (1 - kept) ** steepness * (1 + number % 5)
    sigma = {name: torch.ones(1) for name in shapes}
    for ratio in (0.3, 0.45, 0.6):
        loose = problem(ratio, shapes, sigma=sigma)
        cost = spent(_solve(loose, menus, errors, 20.0), loose)
        assert cost <= loose.budget
        for less in (1, 50, 500):  # just below what the best choice costs
            tight = dataclasses.replace(loose, budget=cost - less)
            assert spent(_solve(tight, menus, errors, 20.0), tight) <= cost - less


def test_learned_ranks_are_those_of_the_training():
    given = problem(0.4)
    assert Learned().ranks(given) == dict(given.learn())
