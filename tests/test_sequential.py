"""Inputs behind compressed blocks, beside those of the dense model."""

import pytest
import torch

from soco.modules import LowRankLinear
from soco.sequential import collect_behind, stages
from soco.surgery import bias_of, find_linears, replace_module, weight_of
from tiny_models import tiny_model

WINDOWS = torch.randint(3, 96, (5, 9), generator=torch.Generator().manual_seed(2))


def cut(layer, rank):
    U, S, Vh = torch.linalg.svd(weight_of(layer).detach(), full_matrices=False)
    return LowRankLinear.from_factors((U[:, :rank] * S[:rank], Vh[:rank]), bias_of(layer))


def seen_by(model, names, windows):
    """The inputs of layers, by plain hooks: (tokens, in)."""
    found = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, inputs, name=name: found[name].append(inputs[0].flatten(0, -2))
        )
        for name in names
    ]
    with torch.no_grad():
        model(windows)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(rows) for name, rows in found.items()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert", "mixtral"])
def test_stages_are_blocks_in_order(name):
    model = tiny_model(name)
    layers = find_linears(model)
    found = stages(model, layers)
    assert [each for _, names in found for each in names] == list(layers)
    assert len(found) == 2
    for block, names in found:
        inside = {id(module) for module in block.modules()}
        assert all(id(layers[each]) in inside for each in names)


def test_layers_outside_of_blocks_come_last():
    model = tiny_model("llama")
    layers = find_linears(model, include=["*q_proj", "lm_head"])
    found = stages(model, layers)
    assert found[-1] == (model, ["lm_head"])
    behind = collect_behind(model, layers, model, ["lm_head"], WINDOWS, 2)
    assert behind["lm_head"].tokens == WINDOWS.numel()


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "bert"])
def test_both_inputs_over_the_same_tokens(name):
    model = tiny_model(name)
    layers = find_linears(model)
    (_, first), (block, second) = stages(model, layers)
    dense = seen_by(model, second, WINDOWS)
    for each in first:
        replace_module(model, each, cut(layers[each], 2))
    behind = seen_by(model, second, WINDOWS)
    places = dict(model.named_modules())
    found = collect_behind(model, layers, block, second, WINDOWS, 2)
    assert dict(model.named_modules()) == places
    for each in second:
        x, x0 = behind[each].double(), dense[each].double()
        assert (x - x0).abs().max() > 1e-3
        torch.testing.assert_close(found[each].gram, x.T @ x / len(x), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(found[each].cross, x0.T @ x / len(x), atol=1e-6, rtol=1e-5)
        assert (found[each].tokens, found[each].aligned) == (WINDOWS.numel(), True)


def test_nothing_compressed_before_means_equal_inputs():
    model = tiny_model("llama")
    layers = find_linears(model)
    block, names = stages(model, layers)[0]
    for each in collect_behind(model, layers, block, names, WINDOWS, 2).values():
        assert torch.equal(each.gram, each.cross)


def test_later_blocks_do_not_run():
    model = tiny_model("llama", num_hidden_layers=4)
    layers = find_linears(model)
    block, names = stages(model, layers)[1]
    ran = []
    hook = model.model.layers[2].register_forward_hook(lambda *_: ran.append(1))
    collect_behind(model, layers, block, names, WINDOWS, 1)
    hook.remove()
    assert len(ran) == 1  # the very first run shows that the block is called once


def test_a_block_that_is_called_again_runs_to_the_end():
    model = tiny_model("albert")
    layers = find_linears(model)
    (block, names), *_ = stages(model, layers)
    found = collect_behind(model, layers, block, names, WINDOWS, 2)
    calls = model.config.num_hidden_layers
    assert {each.tokens for each in found.values()} == {calls * WINDOWS.numel()}


def test_broken_inputs_are_named():
    model = tiny_model("llama")
    layers = find_linears(model)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(float("inf"))
    block, names = stages(model, layers)[1]
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj hold NaN or Inf behind"):
        collect_behind(model, layers, block, names, WINDOWS, 2)
