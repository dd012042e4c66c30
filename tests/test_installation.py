"""Results in a model: kinds of layers, what they count, what it takes to store them."""

import pytest
import torch

from soco.installation import install, layer_reports, new_biases, size_of
from soco.linalg import Factors, whitened_svd
from soco.modules import LowRankLinear, PivotedLinear
from soco.ranks import layer_params
from soco.surgery import bias_of, find_linears, weight_of
from tiny_models import logits, tiny_model

FIRST, SECOND = (f"model.layers.{block}.mlp.up_proj" for block in (0, 1))


def cut(layer, rank):
    return whitened_svd(weight_of(layer).detach().double(), None).truncate(rank)


def put(model, rank=4, pivoted=False, groups=()):
    targets = find_linears(model)
    placed = {name: (cut(layer, rank), bias_of(layer)) for name, layer in targets.items()}
    made, _ = install(model, targets, placed, groups, pivoted=pivoted)
    return targets, made


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_pivots_change_nothing_but_the_count(name):
    plain, pivoted = tiny_model(name), tiny_model(name)
    targets, made = put(plain)
    _, other = put(pivoted, pivoted=True)
    assert {type(layer) for layer in made.values()} == {LowRankLinear}
    assert {type(layer) for layer in other.values()} == {PivotedLinear}
    torch.testing.assert_close(logits(pivoted), logits(plain), atol=1e-4, rtol=1e-4)
    for one, two in zip(
        layer_reports(targets, made, (), {}), layer_reports(targets, other, (), {}), strict=True
    ):
        assert one.params == layer_params(one.shape, 4)
        assert two.params == layer_params(two.shape, 4, pivoted=True) == one.params - 16
    saved = 16 * len(made)
    assert size_of(plain)[0] - size_of(pivoted)[0] == saved
    assert size_of(plain)[1] - size_of(pivoted)[1] == 4 * saved - 8 * 4 * len(made)  # the pivots


def test_a_shared_basis_is_counted_once_in_equal_parts():
    model = tiny_model("llama")
    targets = find_linears(model, include=[FIRST, SECOND])
    down = torch.randn(5, 32)
    placed = {
        name: (Factors(torch.randn(48, 5), down), bias_of(layer)) for name, layer in targets.items()
    }
    before = size_of(model)[0]
    made, _ = install(model, targets, placed, [(FIRST, SECOND)], pivoted=False)
    first, second = layer_reports(targets, made, [(FIRST, SECOND)], {})
    assert first.params + second.params == 2 * 48 * 5 + 5 * 32
    assert abs(first.params - second.params) <= 1
    assert size_of(model)[0] == before - 2 * 48 * 32 + first.params + second.params
    assert made[SECOND].basis is made[FIRST]


def test_a_group_with_dense_layers_shares_among_the_others():
    model = tiny_model("llama")
    targets = find_linears(model, include=[FIRST, SECOND])
    placed = {FIRST: (cut(targets[FIRST], 3), None), SECOND: (None, None)}
    made, _ = install(model, targets, placed, [(FIRST, SECOND)], pivoted=False)
    assert list(made) == [FIRST]
    assert model.get_submodule(SECOND) is targets[SECOND]


def test_a_weight_is_set_and_a_new_bias_is_told():
    model = tiny_model("llama")
    targets = find_linears(model, include=[FIRST, SECOND])
    weight = torch.randn(48, 32)
    placed = {FIRST: (cut(targets[FIRST], 3), torch.ones(48)), SECOND: (weight, None)}
    old = weight_of(targets[SECOND]).detach().clone()
    made, redone = install(model, targets, placed, (), pivoted=False)
    assert list(redone) == [SECOND]
    assert model.get_submodule(SECOND) is redone[SECOND]
    assert torch.equal(weight_of(redone[SECOND]), weight)
    assert torch.equal(weight_of(targets[SECOND]), old)  # the dense model's own
    assert new_biases(targets, made) == [FIRST]
    one, two = layer_reports(targets, made, (), {FIRST: (0.5, 1.5)})
    assert (one.rank, one.score_min, one.score_max) == (3, 0.5, 1.5)
    assert (two.rank, two.params) == (None, 48 * 32)


def test_a_compressed_head_is_untied():
    model = tiny_model("llama-tied")
    targets = find_linears(model, include=["lm_head"])
    placed = {"lm_head": (cut(targets["lm_head"], 4), None)}
    install(model, targets, placed, (), pivoted=False)
    assert model.config.tie_word_embeddings is False
    assert model.get_input_embeddings().weight.shape == (96, 32)
