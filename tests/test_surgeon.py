"""The second-order update: its theorem, its gradients, and that validation keeps it from harm."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from soco.calibration import collect
from soco.component_gradients import Sums
from soco.linalg import Factors, whitened_svd
from soco.modules import LowRankLinear
from soco.objectives import HiddenStates, TokenDistribution, draw_seeds
from soco.ranks import (
    allocate,
    is_dense,
    parameter_budget,
    relative_energy,
    uniform_ranks,
)
from soco.sampling import sample_from_model
from soco.steps import frozen
from soco.surgeon import (
    SVDSurgeon,
    _applied,
    _collect,
    _deltas,
    quadratic,
    removal_cost,
    rescale,
    saliency,
    scale_update,
)
from soco.surgery import bias_of, find_linears, replace_module, shape_of, weight_of
from tiny_models import drawn as of_seeds
from tiny_models import tiny_model

PLAIN = SVDSurgeon(damping=0.0, validation="none", held_out=0.0, clip=None)


def gradients(samples=40, rows=5, columns=4, seed=0):
    """A weight, and a gradient of it per sample, float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    # Correlated from entry to entry, as gradients are: or nothing could make up for anything.
    mixing = torch.randn(rows * columns, rows * columns, generator=generator, dtype=torch.float64)
    noise = torch.randn(samples, rows * columns, generator=generator, dtype=torch.float64)
    return weight, (noise @ mixing).view(samples, rows, columns)


def system(weight, G, factors):
    """H and b of the scales of ``factors``, by their definition."""
    g = torch.einsum("noi,or,ri->nr", G, factors.up, factors.down)
    r = torch.einsum("noi,oi->n", G, weight - factors.product())
    return g.T @ g / len(G), g.T @ r / len(G), g, r


def test_equals_the_published_formula_on_one_svd():
    weight, G = gradients()
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    kept = 2
    H, b, _, _ = system(weight, G, Factors(U[:, :kept] * S[:kept], Vh[:kept]))
    s = torch.einsum("or,noi,ri->nr", U, G, Vh)  # of sigma, all components
    Hs = s.T @ s / len(G)
    change = torch.linalg.solve(Hs[:kept, :kept], Hs[:kept, kept:] @ S[kept:])
    torch.testing.assert_close(scale_update(H, b, 0.0) * S[:kept], change)


def test_the_quadratic_is_the_mean_square_and_falls_to_its_least():
    weight, G = gradients()
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    H, b, g, r = system(weight, G, Factors(U[:, :3] * S[:3], Vh[:3]))
    delta = scale_update(H, b, 0.0)
    rest = r.square().mean() / 2
    values = []
    for strength in (0.0, 0.1, 0.5, 0.9, 1.0):
        value = quadratic(strength * delta, H, b)
        direct = (strength * g @ delta - r).square().mean() / 2
        torch.testing.assert_close(value + rest, direct)
        values.append(float(value))
    assert values == sorted(values, reverse=True)
    assert values[0] == 0.0
    assert values[-1] < -0.01 * float(rest)
    for i in range(3):  # no neighbour is lower
        for step in (-1e-3, 1e-3):
            other = delta.clone()
            other[i] += step
            assert float(quadratic(other, H, b)) > values[-1]


@pytest.mark.parametrize("damping", [0.01, 1.0, 100.0])
def test_damped_updates_lower_the_quadratic_too(damping):
    weight, G = gradients(samples=6)
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    H, b, _, _ = system(weight, G, Factors(U[:, :3] * S[:3], Vh[:3]))
    delta = scale_update(H, b, damping)
    extra = damping * float(H.diagonal().mean())
    torch.testing.assert_close(H @ delta + extra * delta, b)
    assert float(quadratic(delta, H, b)) < 0


def test_a_singular_curvature_gives_the_shortest_minimum():
    H = torch.diag(torch.tensor([2.0, 0.0], dtype=torch.float64))
    b = torch.tensor([1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(scale_update(H, b, 0.0), torch.tensor([0.5, 0.0]).double())
    assert torch.equal(scale_update(0 * H, 0 * b, 0.3), torch.zeros(2).double())
    # A sum of three float32 products, of which Cholesky would take the rounding for curvature.
    g = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    r = torch.randn(3, generator=torch.Generator().manual_seed(1))
    wanted = torch.linalg.pinv(g.double()) @ r.double()
    found = scale_update(g.T @ g, g.T @ r, 0.0)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_removal_cost_is_the_least_quadratic_with_that_component_gone():
    weight, G = gradients(samples=60)
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    H, _, _, _ = system(weight, G, Factors(U * S, Vh))
    torch.testing.assert_close(removal_cost(H, 0.0), 1 / (2 * torch.linalg.inv(H).diagonal()))
    s = torch.einsum("or,noi,ri->nr", U, G, Vh)
    inverse = torch.linalg.inv(s.T @ s / len(G)).diagonal()
    torch.testing.assert_close(removal_cost(H, 0.0), S.square() / (2 * inverse))
    for damping in (0.0, 0.2):
        extra = damping * H.diagonal().mean()
        found = removal_cost(H, damping)
        for i in range(len(H)):
            others = [j for j in range(len(H)) if j != i]
            held = H[others][:, others] + extra * torch.eye(len(others)).double()
            best = torch.linalg.solve(held, H[others, i])
            delta = -torch.eye(len(H)).double()[i]
            delta[others] = best
            cost = delta @ H @ delta / 2 + extra * best.square().sum() / 2
            torch.testing.assert_close(found[i], cost)
    assert bool((removal_cost(H, 0.0) < H.diagonal() / 2).all())
    torch.testing.assert_close(removal_cost(H, 1e5), H.diagonal() / 2, rtol=1e-3, atol=0)
    assert torch.equal(removal_cost(0 * H, 0.1), torch.zeros(len(H)).double())


def windows(count=6, length=8, seed=2):
    return torch.randint(3, 96, (count, length), generator=torch.Generator().manual_seed(seed))


def sharp(name, **changes):
    """A tiny model whose predictions differ from token to token."""
    model: Any = tiny_model(name, **changes)
    with torch.no_grad():
        module: Any
        for module in find_linears(model).values():
            module.weight.mul_(8)
        model.get_output_embeddings().weight.mul_(20)
    return model.requires_grad_(False)


def truncated(model, rank=5, include=None):
    """Targets of a model, and the leading components of each."""
    targets = find_linears(model, include)
    spectra = {name: whitened_svd(weight_of(each), None) for name, each in targets.items()}
    return targets, {
        name: each.truncate(min(rank, len(each.sigma))) for name, each in spectra.items()
    }


def drawn(objective, model, ids, seed, labels=1):
    """The gradients (labels, sequences) x name -> (out, in), one sequence at a time."""
    generator = torch.Generator().manual_seed(seed)
    targets = find_linears(model)
    with torch.no_grad():
        dense = objective.outputs(model, ids)
    found = []
    for _ in range(labels):
        seeds = draw_seeds(len(ids), generator)
        variance = dense.var() * dense.shape[-1] / 2
        if isinstance(objective, TokenDistribution):
            chances = dense.exp().flatten(0, -2).cumsum(-1)
            point = of_seeds(torch.rand, seeds, ids.shape[1], 1).flatten(0, 1)
            label = torch.searchsorted(chances, point * chances[:, -1:], right=True)
            label = label.clamp_max(chances.shape[-1] - 1).view(*ids.shape, 1)
        else:
            noise = of_seeds(torch.randn, seeds, *dense.shape[1:])
            label = dense + noise * variance.sqrt()
        for k in range(len(ids)):
            with frozen(model):
                weights = [
                    each.get_parameter("weight").requires_grad_(True) for each in targets.values()
                ]
                out = objective.outputs(model, ids[k : k + 1])
                if isinstance(objective, TokenDistribution):
                    loss = -out.gather(-1, label[k : k + 1]).sum()
                else:
                    loss = (label[k : k + 1] - out).square().sum() / (2 * variance)
                grads = torch.autograd.grad(loss, weights)
            found.append(
                {
                    name: grad if type(module) is nn.Linear else grad.T
                    for (name, module), grad in zip(targets.items(), grads, strict=True)
                }
            )
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "qwen2", "opt"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_sums_equal_those_of_weight_gradients(name, checkpointing):
    """Against autograd, one sequence at a time, with the labels that were drawn."""
    model, ids = sharp(name), windows(5)
    objective = HiddenStates() if name == "bert" else TokenDistribution()
    targets, factors = truncated(model)
    settings = SVDSurgeon(batch_size=5, labels=2, checkpointing=checkpointing)
    generator = torch.Generator().manual_seed(settings.seed)
    sums = _collect(model, factors, targets, ids, objective, settings, generator, lambda done: None)
    G = drawn(objective, model, ids, settings.seed, labels=2)
    assert sums.keys() == targets.keys()
    for name, (up, down) in factors.items():
        residual = weight_of(targets[name]) - up @ down
        each = torch.stack([grad[name] for grad in G])
        g = torch.einsum("noi,or,ri->nr", each, up, down)
        r = torch.einsum("noi,oi->n", each, residual)
        for fold in (0, 1):
            mine = [k for k in range(10) if k % 5 % 2 == fold]
            assert sums[name].samples[fold] == len(mine)
            H, b = g[mine].T @ g[mine], g[mine].T @ r[mine]
            near = 2e-4 * float(H.abs().max())
            torch.testing.assert_close(sums[name].curvature[fold], H, rtol=2e-3, atol=near)
            near = 2e-3 * float((g.norm(dim=1) * r.abs()).max())
            torch.testing.assert_close(sums[name].pull[fold], b, rtol=2e-3, atol=near)


def test_folds_follow_the_sequences_over_batches_and_draws():
    model, ids = sharp("llama"), windows(7)
    targets, factors = truncated(model)
    results = []
    for size in (2, 3, 7):
        settings = SVDSurgeon(batch_size=size)
        sums = _collect(
            model, factors, targets, ids, TokenDistribution(), settings,
            torch.Generator().manual_seed(0), lambda done: None,
        )  # fmt: skip
        results.append({name: each.samples for name, each in sums.items()})
    assert results[0] == results[1] == results[2]
    assert set(map(tuple, results[0].values())) == {(8, 6)}


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "qwen2"])
def test_the_updated_weight_is_the_closed_form(name):
    model, ids = sharp(name), windows()
    objective = HiddenStates() if name == "bert" else TokenDistribution()
    targets, factors = truncated(model, rank=3)
    settings = dataclasses.replace(PLAIN, labels=3, strength=0.5, damping=0.2)
    result = rescale(model, factors, targets, ids, objective, settings)
    G = drawn(objective, model, ids, settings.seed, labels=3)
    for name, before in factors.items():
        each = torch.stack([grad[name] for grad in G]).double()
        wide = Factors(before.up.double(), before.down.double())
        H, b, _, _ = system(weight_of(targets[name]).double(), each, wide)
        delta = scale_update(H, b, 0.2)
        assert float(delta.abs().max()) > 1e-4
        up, down = result[name]
        torch.testing.assert_close(up.double(), wide.up * (1 + 0.5 * delta), rtol=2e-3, atol=2e-5)
        assert down is before.down
        assert up.dtype == before.up.dtype


def test_nothing_removed_nothing_changed():
    model, ids = sharp("llama"), windows()
    targets, _ = truncated(model)
    whole = {name: whitened_svd(weight_of(m), None) for name, m in targets.items()}
    whole = {name: each.truncate(len(each.sigma)) for name, each in whole.items()}
    settings = dataclasses.replace(PLAIN, damping=0.1)
    result = rescale(model, whole, targets, ids, TokenDistribution(), settings)
    for name, (up, _) in result.items():
        torch.testing.assert_close(up, whole[name].up, rtol=1e-4, atol=1e-6)


def test_the_model_is_left_as_it_was():
    model = sharp("llama").train()
    parameters = dict(model.named_parameters())
    parameters["model.norm.weight"].requires_grad_(True)
    before = {name: p.clone() for name, p in parameters.items()}
    targets, factors = truncated(model)
    rescale(model, factors, targets, windows(), TokenDistribution(), SVDSurgeon())
    assert model.training
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["model.norm.weight"]
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def fold(g, r):
    return g.T @ g, g.T @ r


def sums_of(*folds):
    return Sums([h for h, _ in folds], [b for _, b in folds], [1 for _ in folds])


def test_validation_refuses_what_the_other_half_contradicts():
    rank, generator = 8, torch.Generator().manual_seed(0)
    g = torch.randn(60, rank, generator=generator)
    truth = torch.linspace(-0.3, 0.3, rank)
    good = sums_of(fold(g[:30], g[:30] @ truth), fold(g[30:], g[30:] @ truth))
    few = torch.randn(6, rank, generator=generator)  # fewer samples than components, all noise
    noise = torch.randn(6, generator=generator)
    bad = sums_of(fold(few[:3], noise[:3]), fold(few[3:], -noise[3:]))
    settings = SVDSurgeon(damping=1e-3)
    by_layer = _deltas({"good": good, "bad": bad}, settings)
    torch.testing.assert_close(by_layer["good"].float(), truth, rtol=0.05, atol=1e-3)
    for name, each in (("good", good), ("bad", bad)):
        for own, other in ((0, 1), (1, 0)):
            delta = scale_update(each.curvature[own], each.pull[own], settings.damping)
            value = quadratic(
                _applied(delta, 1.0, settings), each.curvature[other], each.pull[other]
            )
            assert (float(value) < 0) == (name == "good")
    assert float(by_layer["bad"].abs().max()) == 0.0
    free = _deltas({"bad": bad}, dataclasses.replace(settings, validation="none"))
    assert float(free["bad"].abs().max()) > 0.1
    together = _deltas(
        {"good": good, "bad": bad}, dataclasses.replace(settings, validation="model")
    )
    ratios = {name: float(together[name].norm()) for name in together}
    assert (ratios["good"] > 0) == (ratios["bad"] > 0)  # one fraction for both


def test_a_layer_that_only_one_half_reached_is_left_alone():
    g = torch.eye(3)
    sums = sums_of(fold(g, g @ torch.ones(3)), (torch.zeros(3, 3), torch.zeros(3)))
    sums.samples[1] = 0
    assert _deltas({"expert": sums}, SVDSurgeon()) == {}
    assert "expert" in _deltas({"expert": sums}, PLAIN)


def test_clip_bounds_the_change():
    model, ids = sharp("llama"), windows()
    targets, factors = truncated(model, rank=3)
    free = rescale(model, factors, targets, ids, TokenDistribution(), PLAIN)
    clipped = rescale(
        model, factors, targets, ids, TokenDistribution(), dataclasses.replace(PLAIN, clip=0.01)
    )

    def largest(result):
        changes = [result[n].up / factors[n].up - 1 for n in factors]
        return max(float(change.abs().max()) for change in changes)

    assert largest(free) > 0.05
    assert largest(clipped) == pytest.approx(0.01, rel=1e-3)


def test_rounds_go_on_from_the_last():
    model, ids = sharp("llama"), windows()
    targets, factors = truncated(model, rank=3)
    settings = dataclasses.replace(PLAIN, strength=0.5, damping=0.1)
    seen = []
    twice = rescale(
        model, factors, targets, ids, TokenDistribution(),
        dataclasses.replace(settings, rounds=2), seen.append,
    )  # fmt: skip
    once = rescale(model, factors, targets, ids, TokenDistribution(), settings)
    assert seen == [6, 12]
    assert any(not torch.equal(once[n].up, twice[n].up) for n in factors)


def mixture():
    """A mixture whose experts are linears, which see tokens without a batch dimension."""

    class Expert(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.narrow = nn.Linear(12, 20), nn.Linear(20, 12)

        def forward(self, x):
            return self.narrow(self.wide(x).tanh())

    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.head = nn.Embedding(96, 12), nn.Linear(12, 96)
            self.experts = nn.ModuleList(Expert() for _ in range(3))

        def forward(self, input_ids):
            x = self.embed(input_ids)
            flat = x.reshape(-1, 12)
            which = input_ids.flatten() % 2  # the third expert gets nothing
            y = torch.zeros_like(flat)
            for number, expert in enumerate(self.experts):
                chosen = which == number
                if bool(chosen.any()):
                    y = y.index_put((chosen.nonzero()[:, 0],), expert(flat[chosen]))
            return type("Output", (), {"logits": self.head(x + y.view_as(x)) * 4})

    return Mixture().requires_grad_(False)


def test_experts_give_a_sample_per_batch_and_idle_ones_stay():
    model, ids = mixture(), windows(6)
    targets, factors = truncated(model, rank=2)
    settings = SVDSurgeon(batch_size=2, labels=1)
    sums = _collect(
        model, factors, targets, ids, TokenDistribution(), settings,
        torch.Generator().manual_seed(0), lambda done: None,
    )  # fmt: skip
    assert sums["experts.0.wide"].samples == [2, 1]
    assert not any(name.startswith("experts.2") for name in sums)
    result = rescale(
        model, factors, targets, ids, TokenDistribution(), dataclasses.replace(PLAIN, damping=0.1)
    )
    assert result["experts.2.wide"] == factors["experts.2.wide"]
    assert not torch.equal(result["experts.0.wide"].up, factors["experts.0.wide"].up)
    spectra = {n: whitened_svd(weight_of(m), None) for n, m in targets.items()}
    values = saliency(model, spectra, targets, ids, TokenDistribution(), SVDSurgeon())
    assert float(values["experts.2.wide"].abs().max()) == 0.0
    assert float(values["experts.0.wide"].min()) >= 0.0


def test_mixtral_of_transformers():
    model = sharp("mixtral")
    targets, factors = truncated(model)
    result = rescale(model, factors, targets, windows(), TokenDistribution(), SVDSurgeon())
    assert result.keys() == factors.keys()


def test_outputs_may_be_written_into():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.head = nn.Embedding(96, 12), nn.Linear(12, 96)
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(12, 12))])

        def forward(self, input_ids):
            y = self.blocks[0](self.embed(input_ids))
            y.mul_(2).tanh_()
            return type("Output", (), {"logits": self.head(y)})

    model = Writes().requires_grad_(False)
    targets, factors = truncated(model, rank=2)
    result = rescale(model, factors, targets, windows(), TokenDistribution(), PLAIN)
    assert all(not torch.equal(result[n].up, factors[n].up) for n in factors)


def test_calls_of_one_layer_add_up():
    """ALBERT's blocks are one block."""
    model, ids = sharp("albert"), windows(4)
    targets, factors = truncated(model)
    settings = SVDSurgeon(batch_size=4, labels=1)
    sums = _collect(
        model, factors, targets, ids, TokenDistribution(), settings,
        torch.Generator().manual_seed(0), lambda done: None,
    )  # fmt: skip
    G = drawn(TokenDistribution(), model, ids, 0)
    for name, (up, down) in factors.items():
        each = torch.stack([grad[name] for grad in G])
        g = torch.einsum("noi,or,ri->nr", each, up, down)
        total = sums[name].curvature[0] + sums[name].curvature[1]
        near = 1e-3 * float((g.T @ g).abs().max())
        torch.testing.assert_close(total, g.T @ g, rtol=2e-3, atol=near)


def test_saliency_of_uncorrelated_components_is_the_fisher_information():
    model, ids = sharp("llama"), windows(6)
    name = "model.layers.0.mlp.up_proj"
    targets = {name: find_linears(model)[name]}
    spectrum = whitened_svd(weight_of(targets[name]), None)
    settings = SVDSurgeon(saliency_damping=1e5, labels=2)
    values = saliency(model, {name: spectrum}, targets, ids, TokenDistribution(), settings)[name]
    G = torch.stack([grad[name] for grad in drawn(TokenDistribution(), model, ids, 0, labels=2)])
    g = torch.einsum("noi,or,ri->nr", G, spectrum.up * spectrum.sigma, spectrum.down)
    expected = g.square().sum(0) / (2 * ids.numel() * 2)
    torch.testing.assert_close(values, expected, rtol=2e-3, atol=1e-4 * float(expected.max()))
    closer = saliency(
        model, {name: spectrum}, targets, ids, TokenDistribution(), SVDSurgeon(saliency_damping=0.1)
    )[name]
    assert bool((closer <= values * 1.001).all())
    assert float(closer.sum()) < 0.99 * float(values.sum())


@torch.no_grad()
def divergence(model, factors, ids):
    objective = TokenDistribution()
    dense = objective.outputs(model, ids)
    old = {name: model.get_submodule(name) for name in factors}
    for name, each in factors.items():
        replace_module(model, name, LowRankLinear.from_factors(each, bias_of(old[name])))
    value = float(objective.divergence(dense, objective.outputs(model, ids)))
    for name, module in old.items():
        replace_module(model, name, module)
    return value


@pytest.fixture(scope="module")
def demo(demo_model):
    """The trained model in the package, its text for calibration and for evaluation, its layers."""
    model: Any = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    model = model.eval().requires_grad_(False)
    text = sample_from_model(model, 72, 32, start=1, seed=0)
    targets = find_linears(model)
    spectra = {name: whitened_svd(weight_of(each), None) for name, each in targets.items()}
    return model, text[:64], text[64:], targets, spectra


def test_the_update_helps_on_other_text(demo):
    model, ids, other, targets, spectra = demo
    factors = {name: each.truncate(len(each.sigma) // 2) for name, each in spectra.items()}
    updated = rescale(model, factors, targets, ids, TokenDistribution(), SVDSurgeon())
    assert divergence(model, updated, other) < 0.95 * divergence(model, factors, other)


def test_held_out_text_keeps_an_overfit_update_out(demo):
    """Twelve sequences for 64 components and more: the closed form fits them and nothing else."""
    model, ids, _, targets, spectra = demo
    factors = {name: each.truncate(len(each.sigma) // 2) for name, each in spectra.items()}
    settings = dataclasses.replace(PLAIN, labels=1, samples=16)
    held_out = ids[12:16]
    losses = [divergence(model, factors, held_out)]
    for each in (settings, dataclasses.replace(settings, held_out=0.25)):
        if not each.held_out:
            each = dataclasses.replace(each, samples=12)
        updated = rescale(model, factors, targets, ids, TokenDistribution(), each)
        losses.append(divergence(model, updated, held_out))
    assert losses[1] > losses[0]
    assert losses[2] <= losses[0] * (1 + 1e-5)


def test_ranks_by_saliency_beat_uniform_and_energy(demo):
    model, ids, other, targets, _ = demo
    stats = collect(model, targets, ids)
    spectra = {n: whitened_svd(weight_of(m), stats[n].gram) for n, m in targets.items()}
    shapes = {name: shape_of(module) for name, module in targets.items()}
    budget = parameter_budget(shapes, 0.4)
    values = saliency(model, spectra, targets, ids, TokenDistribution(), SVDSurgeon())
    energy = relative_energy({name: each.sigma for name, each in spectra.items()})
    losses = []
    for ranks in (
        uniform_ranks(shapes, budget),
        allocate(energy, shapes, budget),
        allocate(values, shapes, budget),
    ):
        kept = {
            name: spectra[name].truncate(rank)
            for name, rank in ranks.items()
            if not is_dense(shapes[name], rank)
        }
        losses.append(divergence(model, kept, other))
    assert losses[2] < 0.85 * min(losses[:2])


def test_half_precision_models_work():
    model = sharp("llama", dtype=torch.bfloat16)
    targets, factors = truncated(model)
    factors = {name: each.to(torch.bfloat16) for name, each in factors.items()}
    result = rescale(model, factors, targets, windows(), TokenDistribution(), PLAIN)
    assert all(up.dtype == torch.bfloat16 for up, _ in result.values())
    assert any(not torch.equal(result[n].up, factors[n].up) for n in factors)


def test_broken_gradients_name_the_layer():
    model = sharp("llama")
    targets, factors = truncated(model)
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.up_proj").weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"the gradients of model\.layers\.\S+ hold NaN or Inf"):
        rescale(model, factors, targets, windows(), TokenDistribution(), SVDSurgeon())
    assert not any(module._forward_hooks for module in model.modules())


def test_arguments_are_checked():
    model = sharp("llama")
    targets, factors = truncated(model)
    objective = TokenDistribution()
    with pytest.raises(ValueError, match="the factors of lost have no target"):
        rescale(model, {"lost": next(iter(factors.values()))}, targets, windows(), objective, PLAIN)
    name = next(iter(factors))
    wrong = {name: Factors(torch.ones(3, 2), torch.ones(2, 3))}
    with pytest.raises(ValueError, match=f"the factors of {name} must make a weight"):
        rescale(model, wrong, targets, windows(), objective, PLAIN)
    with pytest.raises(ValueError, match="svd-surgeon takes two sequences at least, got 1"):
        rescale(model, factors, targets, windows(1), objective, PLAIN)


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("labels", 0, "labels must be a positive whole number, got 0"),
        ("samples", 1, "samples must be at least 2, or None, got 1"),
        ("damping", -1.0, "damping must be at least 0, got -1.0"),
        ("strength", 1.5, "strength must be above 0 and at most 1, got 1.5"),
        ("held_out", 1.0, "held_out must be at least 0 and below 1, got 1.0"),
        ("clip", 1.0, "clip must be above 0 and below 1, or None, got 1.0"),
        ("validation", "all", "validation must be"),
    ],
)
def test_settings_are_checked(field, value, text):
    with pytest.raises(ValueError, match=text):
        SVDSurgeon(**{field: value})
