"""Ranks and factors of whole models: identities between methods, budgets, sequential fits."""

import copy
import dataclasses
import warnings
from typing import Any

import pytest
import torch

from soco.allocators import ALLOCATORS, Energy, Uniform
from soco.experts import split_experts
from soco.factorization import choose_ranks, groups_of, kind_of, make_factors, stacked_shapes
from soco.fitting import best_share, refit_up
from soco.linalg import whitened_svd
from soco.methods import (
    AASVD,
    KFACSVD,
    METHODS,
    SAESSVD,
    SVDLLM,
    TFWSVD,
    AdaSVD,
    BasisSharing,
)
from soco.modules import LowRankLinear
from soco.ranks import layer_params, parameter_budget, uniform_ranks
from soco.sequential import collect_behind, stages
from soco.surgery import find_linears, replace_module, weight_of
from soco.workbench import Workbench
from tiny_models import tiny_mixture, tiny_model

WINDOWS = torch.randint(3, 96, (24, 12), generator=torch.Generator().manual_seed(2))


def bench_of(name="llama", **changes):
    model = tiny_model(name, **changes)
    model.requires_grad_(False)
    return Workbench(model, find_linears(model), WINDOWS, batch_size=4)


def run(
    bench, method, ratio=0.4, rule=None, pivoted=False
) -> tuple[dict[str, int], dict[str, Any]]:
    """Ranks by unit and factors by layer."""
    groups = groups_of(method, bench.shapes)
    bench.statistics(method.needs | {"gram"})
    spectra = bench.spectra(method.components, groups)
    budget = parameter_budget(bench.shapes, ratio)
    rule = rule or Uniform()
    ranks = choose_ranks(bench, method, rule, groups, spectra, budget, pivoted, dict)
    factors = make_factors(bench, method, groups, spectra, ranks, ratio=ratio, pivoted=pivoted)
    return ranks, factors


def assert_same(found, wanted, tolerance=1e-4):
    assert found.keys() == wanted.keys()
    for name, each in found.items():
        other = wanted[name]
        assert (each is None) == (other is None), name
        if each is not None and other is not None:
            torch.testing.assert_close(
                each.product().float(), other.product().float(), atol=tolerance, rtol=tolerance
            )


def test_kinds():
    assert kind_of("model.layers.11.mlp.up_proj") == kind_of("model.layers.2.mlp.up_proj")
    assert kind_of("h.0.attn.c_attn") == "h.*.attn.c_attn"


def test_groups_of_one_are_svd_llm():
    bench = bench_of()
    method = BasisSharing(size=1, refit_from=1.0)
    assert groups_of(method, bench.shapes) == [(name,) for name in bench.targets]
    assert_same(run(bench, method)[1], run(bench, SVDLLM())[1], 0)


def test_neighbours_share_and_writers_do_not():
    bench = bench_of(num_hidden_layers=5)
    groups = groups_of(BasisSharing(), bench.shapes)
    assert sorted(name for group in groups for name in group) == sorted(bench.targets)
    by_first = {group[0]: group for group in groups}
    layer = "model.layers.{}.{}".format
    for kind in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.gate_proj"):
        assert by_first[layer(0, kind)] == (layer(0, kind), layer(1, kind))
        assert by_first[layer(4, kind)] == (layer(4, kind),)
    for kind in ("self_attn.o_proj", "mlp.down_proj"):
        assert by_first[layer(1, kind)] == (layer(1, kind),)
    three = groups_of(BasisSharing(size=3), bench.shapes)
    assert max(len(group) for group in three) == 3


def test_a_shared_basis_is_one_tensor_within_the_budget():
    bench = bench_of(num_hidden_layers=4)
    method = BasisSharing(refit_from=1.0)
    ranks, factors = run(bench, method)
    shapes = stacked_shapes(bench.shapes, groups_of(method, bench.shapes))
    spent = sum(layer_params(shapes[unit], rank) for unit, rank in ranks.items())
    assert spent <= parameter_budget(bench.shapes, 0.4)
    q = [factors[f"model.layers.{block}.self_attn.q_proj"] for block in range(4)]
    assert q[0].down is q[1].down
    assert q[1].down is not q[2].down


def test_sharing_keeps_more_rank_than_one_layer_alone():
    bench = bench_of(num_hidden_layers=4)
    shared, alone = run(bench, BasisSharing(refit_from=1.0))[0], run(bench, SVDLLM())[0]
    name = "model.layers.0.self_attn.q_proj"
    assert shared[name] > alone[name]


def test_coefficients_are_fitted_to_the_compressed_inputs():
    bench = bench_of(num_hidden_layers=2)
    start = run(bench, BasisSharing(refit_from=1.0))[1]
    places = dict(bench.model.named_modules())
    fitted = run(bench, BasisSharing(refit_from=0.0))[1]
    assert dict(bench.model.named_modules()) == places
    for name, factors in fitted.items():
        if factors is not None:
            torch.testing.assert_close(factors.down, start[name].down)
    # A private layer of the first block: nothing is compressed before it, and nothing shared.
    name = "model.layers.0.self_attn.o_proj"
    assert_same({name: fitted[name]}, {name: start[name]}, 1e-3)
    assert any(
        (fitted[n].up - start[n].up).abs().max() > 1e-3
        for n in fitted
        if ".1." in n and fitted[n] is not None
    )


@pytest.mark.parametrize("method", [SVDLLM(update=True), AASVD(damping=0.0), SAESSVD(damping=0.0)])
def test_behind_nothing_the_sequential_methods_are_svd_llm(method):
    bench = bench_of()
    found, wanted = run(bench, method)[1], run(bench, SVDLLM())[1]
    first = {name: each for name, each in found.items() if ".0." in name}
    assert_same(first, {name: wanted[name] for name in first}, 1e-3)


@pytest.mark.parametrize("method", [SVDLLM(update=True), AASVD(damping=0.0)])
def test_sequential_methods_come_closer_to_the_dense_outputs(method):
    bench = bench_of(num_hidden_layers=3)
    plain, fitted = run(bench, SVDLLM(), 0.6)[1], run(bench, method, 0.6)[1]
    block, names = stages(bench.model, bench.targets)[2]
    # What block 2 sees behind blocks 0 and 1 as this method leaves them.
    model = copy.deepcopy(bench.model)
    targets = dict(find_linears(model))
    for name, factors in fitted.items():
        if factors is not None and ".2." not in name:
            layer = LowRankLinear.from_factors(factors.to(torch.float32))
            replace_module(model, name, layer)
    place = next(n for n, m in bench.model.named_modules() if m is block)
    seen = collect_behind(model, targets, model.get_submodule(place), names, WINDOWS, 4)

    def loss(name, factors):
        weight = weight_of(bench.targets[name]).double()
        best = weight @ seen[name].cross
        cut = factors.product().double()
        # |W X0 - W' X|^2 up to a constant
        return float(((cut @ seen[name].gram) * cut).sum() - 2 * (best * cut).sum())

    for name in names:
        if fitted[name] is not None:
            assert loss(name, fitted[name]) <= loss(name, plain[name]) + 1e-9, name


def test_the_update_is_the_least_squares_fit():
    bench = bench_of()
    method = SVDLLM(update=True)
    weight, gram = torch.randn(6, 5).double(), torch.eye(5).double()
    cross = torch.randn(5, 5).double()
    start = whitened_svd(weight, gram).truncate(2)
    found = method.refit(weight, start, gram, cross, name="w")
    torch.testing.assert_close(found.up, refit_up(weight, start.down, gram, cross))
    torch.testing.assert_close(found.down, start.down)
    assert bench.targets


def test_adasvd_without_stacks_is_svd_llm():
    bench = bench_of()
    found, wanted = run(bench, AdaSVD(stack=False))[1], run(bench, SVDLLM())[1]
    assert_same(found, wanted)


def test_adasvd_with_stacks_fits_the_stacks():
    bench = bench_of()
    stacked, plain = run(bench, AdaSVD())[1], run(bench, AdaSVD(stack=False))[1]
    for name, factors in stacked.items():
        if factors is None:
            continue
        weight, gram = weight_of(bench.targets[name]).double(), bench.means(name)["stacked_gram"]

        def loss(each, weight=weight, gram=gram):
            change = weight - each.product().double()
            return float(((change @ gram) * change).sum())

        assert loss(factors) <= loss(plain[name]) * (1 + 1e-6)


def test_tfwsvd_lowers_the_weighted_error_of_fwsvd():
    bench = bench_of()
    start, end = run(bench, TFWSVD(iterations=0))[1], run(bench, TFWSVD())[1]
    for name, factors in end.items():
        if factors is not None:
            weight, fisher = weight_of(bench.targets[name]), bench.means(name)["fisher"]

            def loss(each, weight=weight, fisher=fisher):
                return float((fisher * (weight - each.product()).double().square()).sum())

            assert loss(factors) < loss(start[name])


@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("soco", "dobi-svd")])
@pytest.mark.parametrize("pivoted", [False, True])
def test_every_method_meets_the_budget(name, pivoted):
    if pivoted and name == "basis-sharing":
        pytest.skip("shared bases are not pivoted")
    bench = bench_of()
    method = METHODS[name]()
    budget = parameter_budget(bench.shapes, 0.5)
    ranks, factors = run(bench, method, 0.5, Energy(), pivoted)
    shapes = stacked_shapes(bench.shapes, groups_of(method, bench.shapes))
    spent = sum(layer_params(shapes[unit], rank, pivoted) for unit, rank in ranks.items())
    assert 0 <= budget - spent < max(map(sum, shapes.values()))
    for layer, each in factors.items():
        if each is not None:
            assert each.up.shape[1] == each.down.shape[0]
            assert bool(each.product().isfinite().all()), layer


def test_an_allocator_that_overspends_is_refused():
    class Greedy:
        name = "greedy"
        needs = frozenset()

        def ranks(self, problem):
            return {unit: min(shape) for unit, shape in problem.shapes.items()}

    with pytest.raises(ValueError, match="allocator greedy gave"):
        run(bench_of(), SVDLLM(), rule=Greedy())


@pytest.mark.parametrize("rule", ["energy", "v2", "lems", "uniform"])
def test_experts_that_no_token_reached_get_what_uniform_ranks_give(rule):
    model = tiny_mixture("mixtral", num_local_experts=6)
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):  # the router: the last two experts are never among the best
            with torch.no_grad():
                module.weight.abs_()
                module.weight[4:].neg_()
    for block in model.model.layers:
        block.post_attention_layernorm.register_forward_hook(lambda module, inputs, y: y.abs())
    split_experts(model)
    bench = Workbench(model, find_linears(model), WINDOWS)
    method = KFACSVD()
    groups = groups_of(method, bench.shapes)
    spectra = bench.spectra(method.components, groups)
    budget = parameter_budget(bench.shapes, 0.5)
    ranks = choose_ranks(bench, method, ALLOCATORS[rule](), groups, spectra, budget, False, dict)
    uniform = uniform_ranks(bench.shapes, budget)
    unseen = [name for name in ranks if bench.saw_nothing((name,))]
    assert len(unseen) == 2 * 2 * 2 or len(unseen) == 2 * 2 * 3
    assert {name: ranks[name] for name in unseen} == {name: uniform[name] for name in unseen}
    assert list(ranks) == list(bench.targets)
    spent = sum(layer_params(bench.shapes[name], rank) for name, rank in ranks.items())
    assert spent <= budget
    if rule in ("energy", "lems"):
        assert any(ranks[name] != uniform[name] for name in ranks)


def test_the_share_of_saes_is_the_adaptive_one():
    generator = torch.Generator().manual_seed(9)
    weight, x, noise = (
        torch.randn(*shape, generator=generator).double() for shape in ((7, 6), (6, 40), (6, 40))
    )
    gram, cross = (x + noise) @ (x + noise).T, x @ (x + noise).T
    method = SAESSVD(lowest=0.0, highest=1.0)
    wanted = best_share(weight, gram, cross, 2, 0.0, 1.0)
    assert 0.1 < wanted < 0.9
    assert method.share(weight, gram, cross, 2) == wanted


def test_nothing_of_a_method_is_lost_in_settings():
    for name, cls in METHODS.items():
        assert dataclasses.is_dataclass(cls()), name


def test_layers_that_saw_nothing_keep_their_truncation():
    bench = bench_of()
    bench.statistics({"gram", "stacked_gram"})
    name = next(iter(bench.targets))
    old = bench._statistics[name]
    empty = torch.zeros_like(old.gram)
    bench._statistics[name] = dataclasses.replace(old, gram=empty, stacked_gram=empty, tokens=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = run(bench, AdaSVD())[1][name]
    weight = weight_of(bench.targets[name])
    wanted = whitened_svd(weight, None).truncate(found.up.shape[1])
    torch.testing.assert_close(found.product(), wanted.product(), atol=1e-5, rtol=1e-5)
