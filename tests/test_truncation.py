"""Truncated layers, the ratio and the ranks by hand, and that training the positions pays."""

import dataclasses
import math
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from soco.linalg import whitened_svd
from soco.objectives import HiddenStates, TokenDistribution
from soco.ranks import layer_params, parameter_budget, uniform_ranks
from soco.steps import checkpointed
from soco.surgery import weight_of
from soco.truncation import (
    PositionSettings,
    TruncatedLinear,
    choose_ranks,
    out_of_range,
    parameter_ratio,
    soft_mask,
    train_positions,
    update_weights,
)

SHAPES = [(6, 9), (9, 6), (7, 7)]  # (out, in)
QUICK = PositionSettings(steps=30, batch_size=4, learning_rate=0.06)


def normal(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype)


def make(shape=(6, 9), kept=3.0, bias=True, dtype=torch.float32, **settings):
    settings = {"steepness": 20.0, **settings}  # so steep that a whole position is a hard cut
    return TruncatedLinear(
        normal(*shape, dtype=dtype),
        normal(shape[0], seed=1, dtype=dtype) if bias else None,
        kept,
        PositionSettings(**settings),
    )


def set_kept(layer, kept):
    layer.position.data.fill_(kept / layer.full_rank)


def hard_cut(y, rank):
    """The best rank of a matrix (tokens, out)."""
    U, S, Vh = torch.linalg.svd(y, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


@pytest.mark.parametrize("kept", [1.0, 2.0, 2.5, 3.0, 4.5])
def test_mask_sums_to_what_is_kept(kept):
    mask = soft_mask(torch.tensor(kept, dtype=torch.float64), 9, 10.0)
    assert float(mask.sum()) == pytest.approx(kept, abs=1e-3)
    assert bool((mask.diff() <= 0).all())
    assert float(soft_mask(torch.tensor(3.3), 9, 1.0).sum()) == pytest.approx(3.3, abs=0.02)


def test_mask_is_the_published_formula():
    """With gamma half a component above."""
    gamma = 3.5 + 0.2
    mine = soft_mask(torch.tensor(gamma - 0.5), 6, 10.0)
    expected = [0.5 * math.tanh(10.0 * (gamma - i)) + 0.5 for i in range(1, 7)]
    assert mine.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_whole_position_cuts_the_outputs_but_not_the_bias(shape, bias, dtype):
    layer = make(shape, 3.0, bias, dtype)
    x = normal(4, 10, shape[1], seed=2, dtype=dtype)
    y = hard_cut(F.linear(x, layer.weight).reshape(40, -1), 3).reshape(4, 10, -1)
    expected = y if layer.bias is None else y + layer.bias
    torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_full_position_is_the_dense_layer(shape):
    layer = make(shape, float(min(shape)))
    x = normal(4, 10, shape[1], seed=2)
    expected = F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)
    layer.dense = True
    assert torch.equal(layer(x), expected)


def test_all_sequences_share_one_subspace():
    """Each sequence has rank 1; together they have 2."""
    layer = TruncatedLinear(torch.eye(3), None, 1.0, PositionSettings(steepness=20.0))
    x = torch.zeros(2, 5, 3)
    x[0, :, 0], x[1, :, 1] = 2.0, 1.0
    y = layer(x).detach()
    torch.testing.assert_close(y[0], x[0], atol=1e-3, rtol=1e-3)
    assert float(y[1].abs().max()) < 1e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_by_position_and_by_input(shape):
    layer = make(shape, 2.3, dtype=torch.float64, steepness=2.0)
    x = normal(12, shape[1], seed=2, dtype=torch.float64).requires_grad_()

    def run(x, position):
        return torch.func.functional_call(layer, {"position": position}, (x,))

    assert torch.autograd.gradcheck(run, (x, layer.position.detach().requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    layer = make((9, 6), 3.0, dtype=dtype)
    x = normal(4, 10, 6, seed=2, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    exact = hard_cut(F.linear(x.float(), layer.weight.float()).reshape(40, -1), 3)
    expected = exact.reshape(4, 10, -1) + cast(torch.Tensor, layer.bias).float()
    assert float(((y.float() - expected).norm() / expected.norm()).detach()) < 0.01
    y.float().square().sum().backward()
    assert layer.position.grad is not None  # though tiny, far from the step
    assert bool(layer.position.grad.isfinite())


def test_conv1d_weight():
    conv = Conv1D(9, 6)
    settings = PositionSettings(steepness=20.0)
    layer = TruncatedLinear(weight_of(conv), conv.bias, 6.0, settings)
    x = normal(20, 6)
    torch.testing.assert_close(layer(x), conv(x), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("tokens", [0, 1, 2])
def test_few_tokens(tokens):
    layer = make((6, 9), 4.0)
    x = normal(tokens, 9)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), atol=1e-3, rtol=0)


def test_randomized_solver_is_near_the_exact_one():
    weight = normal(40, 30) * torch.logspace(0, -3, 30)
    layers = [
        TruncatedLinear(weight, None, 6.0, PositionSettings(solver=solver))
        for solver in ("exact", "randomized")
    ]
    x = normal(200, 30, seed=3)
    exact, found = (layer(x) for layer in layers)
    assert float(((exact - found).norm() / exact.norm()).detach()) < 0.01
    grads = [torch.autograd.grad(layer(x).square().sum(), layer.position)[0] for layer in layers]
    torch.testing.assert_close(grads[0], grads[1], rtol=0.02, atol=0)


def test_position_out_of_range_has_the_penalty_s_gradient_only():
    layer = make((6, 9), 1.0)
    set_kept(layer, -1.0)
    layer(normal(20, 9)).square().sum().backward()
    assert float(cast(torch.Tensor, layer.position.grad)) == 0.0
    penalty = out_of_range({"a": layer})
    assert float(penalty.detach()) == pytest.approx(4.0)
    set_kept(layer, 6.0)
    assert float(out_of_range({"a": layer}).detach()) == pytest.approx(0.0, abs=1e-9)
    set_kept(layer, 8.0)
    assert float(out_of_range({"a": layer}).detach()) == pytest.approx(4.0)


def test_ratio_by_hand():
    layers = {"a": make((6, 9), 2.0), "b": make((7, 7), 5.0)}  # b is past break-even, 3.5
    ratio = parameter_ratio(layers)
    assert float(ratio.detach()) == pytest.approx((2 * 15 + 49) / (54 + 49))


def test_ratio_presses_past_break_even():
    """The minimum itself has no gradient there, and the layer would be lost to it."""
    layers = {"a": make((6, 9), 2.0), "b": make((7, 7), 5.0)}
    parameter_ratio(layers).backward()
    for layer in layers.values():
        grad = float(cast(torch.Tensor, layer.position.grad))
        assert grad == pytest.approx(sum(layer.shape) * layer.full_rank / (54 + 49))


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("seed", range(4))
def test_ranks_meet_the_budget(ratio, seed):
    shapes = [(24, 12), (12, 24), (40, 40), (16, 80)]
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for i, shape in enumerate(shapes):
        kept = 1 + float(torch.rand((), generator=generator)) * (min(shape) - 1)
        layers[str(i)] = make(shape, kept)
    wanted = {name: layer.shape for name, layer in layers.items()}
    budget = parameter_budget(wanted, ratio)
    ranks = choose_ranks(layers, budget)
    used = sum(layer_params(wanted[name], rank) for name, rank in ranks.items())
    growing = [sum(wanted[n]) for n, rank in ranks.items() if rank < min(wanted[n])]
    assert used <= budget < used + min(growing, default=math.inf)


def test_whole_positions_that_fit_are_the_ranks():
    layers = {"a": make((40, 40), 5.0), "b": make((40, 60), 11.0), "c": make((80, 40), 2.0)}
    budget = 5 * 80 + 11 * 100 + 2 * 120
    assert choose_ranks(layers, budget) == {"a": 5, "b": 11, "c": 2}


def test_rounding_gives_the_larger_part_more():
    layers = {"a": make((40, 40), 5.9), "b": make((40, 40), 8.1)}
    assert choose_ranks(layers, 14 * 80) == {"a": 6, "b": 8}


def test_positions_past_break_even_become_dense():
    layers = {"a": make((40, 40), 30.0), "b": make((40, 40), 4.0)}
    assert choose_ranks(layers, 1600 + 4 * 80) == {"a": 40, "b": 4}


class Output:
    """What a transformers model returns, as far as the objective reads it."""

    def __init__(self, logits):
        self.logits = logits


class Toy(nn.Module):
    """Embedding, two residual linears, head; the second hardly reaches the logits."""

    def __init__(self, places=1):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(17, 12)
        self.parts: Any = nn.ModuleList(nn.Linear(12, 12) for _ in range(2))
        self.head = nn.Linear(12, 17, bias=False)
        with torch.no_grad():
            for part in self.parts:
                U, S, Vh = torch.linalg.svd(part.weight)
                part.weight.copy_(U * (3 * 0.8 ** torch.arange(len(S))) @ Vh)
            self.head.weight.mul_(3)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        x = x + self.parts[0](x)
        return Output(self.head(x + 0.01 * self.parts[1](x)))


def toy(settings=QUICK, kept_fraction=0.5):
    model = Toy()
    layers = {}
    for i, part in enumerate(model.parts):
        layer = TruncatedLinear(part.weight, part.bias, kept_fraction * 6, settings)
        layers[f"parts.{i}"] = model.parts[i] = layer
    return model, layers, text()


@torch.no_grad()
def text(sequences=32, length=9):
    """Token ids that the dense toy writes: each depends on the one before."""
    generator = torch.Generator().manual_seed(1)
    model = Toy()
    ids = torch.randint(17, (sequences, 1), generator=generator)
    for _ in range(length - 1):
        chances = model(ids[:, -1:]).logits[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], dim=1)
    return ids


def train(settings=QUICK, kept=0.5, on_step=lambda step: None, objective=None):
    model, layers, windows = toy(settings, kept)
    budget = int(kept * 2 * 144)
    history = train_positions(
        model, layers, windows, budget, objective or TokenDistribution(), settings, on_step
    )
    return layers, history, budget


@pytest.mark.parametrize("loss", ["divergence", "cross-entropy", "perplexity"])
def test_ranks_go_where_they_matter(loss):
    settings = dataclasses.replace(QUICK, loss=loss, steps=60)
    layers, history, budget = train(settings)
    ranks = choose_ranks(layers, budget)
    assert ranks["parts.0"] >= 5  # dense is 12, and both at the start have 3
    assert ranks["parts.1"] == 1
    assert history[-1].kept == pytest.approx(0.5, abs=0.1)


def test_trained_positions_beat_uniform_ones():
    settings = dataclasses.replace(QUICK, steps=60)
    model, layers, windows = toy(settings)
    objective = TokenDistribution()
    with torch.no_grad():
        dense = objective.outputs(Toy(), windows)

    def divergence(ranks):
        """Of the model with its outputs projected, on the same windows."""
        made, _ = update_weights(model, layers, ranks, windows, settings)
        small = Toy()
        for name, factors in made.items():
            small.get_submodule(name).weight.data = factors.product().to(torch.float32)
        with torch.no_grad():
            return float(objective.divergence(dense, objective.outputs(small, windows)))

    budget = int(0.5 * 2 * 144)
    uniform = divergence(uniform_ranks({n: (12, 12) for n in layers}, budget))
    train_positions(model, layers, windows, budget, objective, settings)
    assert divergence(choose_ranks(layers, budget)) < 0.5 * uniform


def test_only_positions_are_trained_and_get_gradients():
    model, layers, windows = toy()
    before = {name: p.clone() for name, p in model.named_parameters()}
    train_positions(model, layers, windows, 144, TokenDistribution(), QUICK)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {f"{name}.position" for name in layers}
    got = {n for n, p in model.named_parameters() if p.grad is not None}
    assert got <= changed


def test_a_layer_that_is_not_called_is_fine():
    model, layers, windows = toy()
    layers["spare"] = make((12, 12), 3.0)
    train_positions(model, layers, windows, 216, TokenDistribution(), QUICK)
    assert 0 < choose_ranks(layers, 216)["spare"] <= 12


def test_same_seed_same_result_other_seed_other_result():
    found = []
    for seed in (3, 3, 4):
        layers, _, _ = train(dataclasses.replace(QUICK, seed=seed, steps=8))
        found.append([float(layer.position.detach()) for layer in layers.values()])
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_checkpointing_changes_nothing():
    found = []
    for blocks in (False, True):
        model, layers, windows = toy()
        with checkpointed(list(model.parts) if blocks else []):
            train_positions(model, layers, windows, 144, TokenDistribution(), QUICK)
        found.append([float(layer.position.detach()) for layer in layers.values()])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_micro_batches_train_too():
    layers, history, budget = train(dataclasses.replace(QUICK, micro_batch=2))
    assert len(history) == 30
    assert all(math.isfinite(step.loss) for step in history)
    assert sum(12 * 24 for _ in layers) > budget


def test_callback_sees_every_step():
    seen = []
    _, history, _ = train(on_step=seen.append)
    assert seen == history
    assert [step.step for step in seen] == list(range(1, 31))
    assert {step.stage for step in seen} == {"positions"}


def test_hidden_states_have_a_divergence_only():
    with pytest.raises(ValueError, match='loss "perplexity" is of predicted tokens'):
        train(dataclasses.replace(QUICK, loss="perplexity"), objective=HiddenStates())


def test_too_few_windows():
    model, layers, windows = toy()
    with pytest.raises(ValueError, match="a batch takes 4 sequences, the calibration has 3"):
        train_positions(model, layers, windows[:3], 144, TokenDistribution(), QUICK)


def test_broken_outputs_are_an_error():
    model, layers, windows = toy()
    model.head.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="the outputs of the dense model are not finite"):
        train_positions(model, layers, windows, 144, TokenDistribution(), QUICK)
    assert not any(layer.dense for layer in layers.values())


@pytest.mark.parametrize("inputs", ["dense", "truncated"])
def test_weight_update_in_one_batch_is_svd_llm(inputs):
    """For the second layer on the inputs that the setting says."""
    settings = PositionSettings(batch_size=32, update_inputs=inputs)
    model, layers, windows = toy(settings)
    ranks = {"parts.0": 3, "parts.1": 2}
    made, unseen = update_weights(model, layers, ranks, windows, settings)
    assert unseen == []
    assert all(layer.observer is None and not layer.dense for layer in layers.values())
    with torch.no_grad():
        x = model.embed(windows)
        layers["parts.0"].dense = inputs == "dense"
        seen = {"parts.0": x, "parts.1": x + layers["parts.0"](x)}
    for name, layer in layers.items():
        rows = seen[name].reshape(-1, 12).double()
        best = whitened_svd(layer.weight.detach().double(), rows.T @ rows).truncate(ranks[name])
        torch.testing.assert_close(
            made[name].product().double(), best.product(), atol=1e-4, rtol=1e-4
        )
        assert made[name].up.shape == (12, ranks[name])


def test_weight_update_of_a_wide_layer():
    weight = normal(9, 6, dtype=torch.float64)
    layer = TruncatedLinear(weight, None, 3.0, PositionSettings(batch_size=8))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(17, 6, dtype=torch.float64)
            self.layer = layer

        def forward(self, input_ids):
            return self.layer(self.embed(input_ids))

    torch.manual_seed(0)
    model = Model()
    windows = torch.randint(17, (8, 9), generator=torch.Generator().manual_seed(1))
    made, _ = update_weights(model, {"layer": layer}, {"layer": 2}, windows, layer.settings)
    rows = model.embed(windows).detach().reshape(-1, 6)
    best = whitened_svd(weight, rows.T @ rows).truncate(2).product()
    torch.testing.assert_close(made["layer"].product(), best, atol=1e-8, rtol=1e-8)


def test_weight_update_leaves_dense_layers_out_and_names_the_unseen():
    settings = PositionSettings(batch_size=32)
    model, layers, windows = toy(settings)
    layers["spare"] = make((12, 12), 3.0)
    ranks = {"parts.0": 12, "parts.1": 2, "spare": 4}
    made, unseen = update_weights(model, layers, ranks, windows, settings)
    assert set(made) == {"parts.1", "spare"}
    assert unseen == ["spare"]
    plain = whitened_svd(layers["spare"].weight, None).truncate(4).product()
    torch.testing.assert_close(made["spare"].product(), plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kept", [0.5, 7.0])
def test_layer_refuses(kept):
    with pytest.raises(ValueError, match="kept must be from 1 to 6"):
        make((6, 9), kept)


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("steps", 0, "steps must be a positive whole number, got 0"),
        ("micro_batch", 9, r"micro_batch must be from 1 to batch_size \(4\), got 9"),
        ("learning_rate", 0.0, "learning_rate must be positive, got 0.0"),
        ("ratio_weight", -1.0, "ratio_weight must not be negative, got -1.0"),
        ("loss", "mse", "loss must be one of divergence, cross-entropy, perplexity, got 'mse'"),
        ("solver", "fast", "solver must be one of exact, randomized, got 'fast'"),
        ("update_inputs", "both", "update_inputs must be one of dense, truncated, got 'both'"),
    ],
)
def test_settings_are_checked(field, value, text):
    with pytest.raises(ValueError, match=text):
        PositionSettings(**{field: value})
