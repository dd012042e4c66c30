"""Inputs behind compressed blocks, beside those of the dense model."""

import pytest
import torch

from soco.experts import split_experts
from soco.modules import LowRankLinear
from soco.sequential import Walk, collect_behind, stages
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


def through(model, step):
    """Ask ``step`` for each block's inputs, then compress the block; all answers by layer."""
    layers = find_linears(model)
    found = {}
    for block, names in stages(model, layers):
        found |= step(model, layers, block, names)
        for name in names:
            replace_module(model, name, cut(layers[name], 3))
    return found


def assert_same_behind(one, other):
    assert one.keys() == other.keys()
    for name, each in one.items():
        torch.testing.assert_close(each.gram, other[name].gram, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(each.cross, other[name].cross, rtol=1e-5, atol=1e-7)
        assert (each.tokens, each.aligned) == (other[name].tokens, other[name].aligned)


def from_the_start(model, layers, block, names):
    return collect_behind(model, layers, block, names, WINDOWS, 2)


class Walking:
    def __init__(self):
        self.walk: Walk | None = None

    def __call__(self, model, layers, block, names):
        self.walk = self.walk or Walk(model, layers, WINDOWS, 2)
        return self.walk.collect(block, names)


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "opt", "bert", "qwen2", "phi3", "mixtral", "albert", "t5"]
)
def test_going_on_is_the_same_as_running_from_the_start(name):
    models = [tiny_model(name), tiny_model(name)]
    for model in models:
        split_experts(model)
    walking = Walking()
    found = through(models[0], walking)
    assert_same_behind(found, through(models[1], from_the_start))
    assert walking.walk is not None
    assert walking.walk.chained == (name not in ("albert", "t5"))


def test_layers_that_see_the_same_share_their_sums():
    model = tiny_model("llama")
    layers = find_linears(model)
    block, names = stages(model, layers)[0]
    found = collect_behind(model, layers, block, names, WINDOWS, 2)
    q, k, o = (f"model.layers.0.self_attn.{kind}_proj" for kind in "qko")
    assert torch.equal(found[q].gram, found[k].gram)
    assert not torch.equal(found[q].gram, found[o].gram)


def test_each_step_runs_the_next_blocks_only():
    model = tiny_model("llama", num_hidden_layers=6)
    runs = []
    for number, block in enumerate(model.model.layers):
        block.input_layernorm.register_forward_hook(lambda *_, number=number: runs.append(number))
    steps = []

    def counted(*arguments):
        runs.clear()
        found = walking(*arguments)
        steps.append(list(runs))
        return found

    walking = Walking()
    through(model, counted)
    batches = 3  # of 5 sequences: one alone, and two of two
    # The dense model runs this block, the other one the block before as well; one sequence tries
    # both from the start, and its first run goes on to the end: whether it may stop is seen there.
    for number in range(2, 6):
        assert steps[number].count(number) == 2 * batches + 2
        assert steps[number].count(number - 1) == batches + 2
        assert len(steps[number]) == 3 * batches + 2 * (number + 1) + (5 - number)


def test_blocks_that_use_more_than_the_one_before_run_from_the_start():
    models = [tiny_model("llama", num_hidden_layers=4) for _ in range(2)]
    for model in models:
        memory = {}

        def remember(module, inputs, output, memory=memory):
            memory["first"] = output

        def recall(module, inputs, output, memory=memory):
            return output + memory["first"]

        model.model.layers[0].mlp.register_forward_hook(remember)
        model.model.layers[2].mlp.register_forward_hook(recall)
    walking = Walking()
    found = through(models[0], walking)
    assert walking.walk is not None
    assert not walking.walk.chained
    assert_same_behind(found, through(models[1], from_the_start))
