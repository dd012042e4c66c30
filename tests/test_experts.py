"""soco.experts: mixtures taken apart into linear layers, and put together again."""

import copy
import pickle

import pytest
import torch
from torch import nn

from soco import experts
from soco.calibration import collect, uncalled
from soco.experts import (
    Experts,
    experts_split,
    find_experts,
    fuse_experts,
    is_fused,
    join_experts,
    split_experts,
)
from soco.modules import LowRankLinear
from soco.surgery import (
    bias_of,
    find_linears,
    fused_experts,
    replace_module,
    weight_of,
    with_weight,
)
from tiny_models import IS_5, MIXTURES, logits, tiny_mixture, tiny_model, token_inputs

if not IS_5:
    pytest.skip("transformers 4 has no fused experts", allow_module_level=True)

FIRST = {name: 0 for name in MIXTURES} | {"deepseek_v3": 1, "nemotron_h": 1}  # layer with experts
PATH = "model.layers.{}.{}.experts"
NAMES = {
    name: PATH.format(layer, "mixer" if name == "nemotron_h" else "mlp")
    for name, layer in FIRST.items()
}


def lowrank(layer, rank=3):
    """Random factors in the shape of ``layer``."""
    out_features, in_features = weight_of(layer).shape
    torch.manual_seed(3)
    factors = torch.randn(out_features, rank), torch.randn(rank, in_features)
    return LowRankLinear.from_factors(factors, bias_of(layer))


def identities(model):
    return {name: id(part) for name, part in [*model.named_modules(), *model.named_parameters()]}


@pytest.mark.parametrize("name", MIXTURES)
def test_split_experts_compute_the_same(name):
    """To the bit, but where transposed weights make the library multiply in another order."""
    model = tiny_mixture(name)
    before, parameters = logits(model), sum(p.numel() for p in model.parameters())
    fused = split_experts(model)
    assert NAMES[name] in fused
    assert fused_experts(model) == {}
    first = "up_proj" if name == "nemotron_h" else "gate_up_proj"
    for expert in range(4):
        for layer in (first, "down_proj"):
            found = model.get_submodule(f"{NAMES[name]}.{expert}.{layer}")
            assert type(found) is nn.Linear
            assert (found.bias is not None) == (name == "gpt_oss")
            assert f"{NAMES[name]}.{expert}.{layer}" in find_linears(model)
    assert sum(p.numel() for p in model.parameters()) == parameters
    after = logits(model)
    if name == "gpt_oss":
        torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)
    else:
        assert torch.equal(after, before)
    fuse_experts(model)
    assert find_experts(model) == {}
    assert {type(model.get_submodule(n)) for n in fused} == {type(m) for m in fused.values()}
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_views_of_the_fused_parameters(name):
    """Nothing is copied, and every layer can be changed alone."""
    model = tiny_mixture(name)
    (path, fused), *_ = split_experts(model).items()
    layer = model.get_submodule(f"{path}.2.gate_up_proj")
    whole = fused.get_parameter("gate_up_proj").detach()
    assert layer.weight.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    assert isinstance(layer.weight, nn.Parameter)
    assert layer.weight.is_leaf
    part = whole[2].T if name == "gpt_oss" else whole[2]
    assert torch.equal(layer.weight, part)
    if name == "gpt_oss":
        assert torch.equal(layer.bias, fused.get_parameter("gate_up_proj_bias")[2])
    replace_module(model, f"{path}.2.gate_up_proj", lowrank(layer))
    part = whole[1].T if name == "gpt_oss" else whole[1]
    assert torch.equal(model.get_submodule(f"{path}.1.gate_up_proj").weight, part)


def fused_module(name="mixtral"):
    return tiny_mixture(name).get_submodule(NAMES[name])


@pytest.mark.parametrize("name", MIXTURES)
def test_tokens_go_where_they_are_sent(name):
    """Experts without a token, tokens without an expert, one expert for all, no token at all."""
    fused = fused_module(name).requires_grad_(False)
    split = Experts(fused)
    torch.manual_seed(0)
    x = torch.randn(5, 32)
    weights = torch.rand(5, 2)
    for index in ([[0, 3]] * 5, [[2, 1], [1, 2], [0, 1], [1, 0], [2, 0]], [[3, 0]] * 5):
        chosen = torch.tensor(index)
        expected = fused(x, chosen, weights)
        torch.testing.assert_close(split(x, chosen, weights), expected, rtol=1e-6, atol=1e-6)
    assert split(x[:0], chosen[:0], weights[:0]).shape == (0, 32)


def test_numbers_from_the_count_on_mean_no_expert():
    """As where the experts are spread over devices."""
    fused = fused_module()
    x, weights = torch.randn(5, 32), torch.rand(5, 2)
    chosen = torch.tensor([[0, 4], [4, 1], [4, 4], [2, 3], [3, 4]])
    with torch.no_grad():
        expected, found = fused(x, chosen, weights), Experts(fused)(x, chosen, weights)
    assert torch.equal(found, expected)
    assert float(found[2].abs().max()) == 0


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h"])
def test_gradients_are_those_of_the_fused_module(name):
    fused = fused_module(name)
    split = Experts(fused)
    torch.manual_seed(0)
    x, weights = torch.randn(6, 32, requires_grad=True), torch.rand(6, 2, requires_grad=True)
    chosen = torch.tensor([[0, 1], [1, 3], [3, 0], [0, 3], [1, 0], [3, 1]])  # none to expert 2
    inputs = []
    for module in (fused, split):
        x.grad = weights.grad = None
        module(x, chosen, weights).square().sum().backward()
        inputs.append((x.grad, weights.grad))
    for one, other in zip(*inputs, strict=True):
        torch.testing.assert_close(one, other)
    assert split.get_submodule("2.down_proj").weight.grad is None
    for index in (0, 1, 3):
        found = split.get_submodule(f"{index}.down_proj").weight.grad
        expected = fused.down_proj.grad[index]
        torch.testing.assert_close(found, expected.T if fused.is_transposed else expected)


def test_bfloat16_and_flags():
    model = tiny_mixture("mixtral", dtype=torch.bfloat16).train()
    fused = model.get_submodule(NAMES["mixtral"])
    fused.down_proj.requires_grad_(False)
    before = logits(model)
    split_experts(model)
    split = model.get_submodule(NAMES["mixtral"])
    assert split.training
    assert not split.get_submodule("1.down_proj").weight.requires_grad
    assert split.get_submodule("1.gate_up_proj").weight.requires_grad
    assert torch.equal(logits(model), before)
    fuse_experts(model)
    again = model.get_submodule(NAMES["mixtral"])
    assert again.training
    assert not again.down_proj.requires_grad
    assert again.down_proj.dtype == torch.bfloat16


def test_generate_compile_copy_and_pickle():
    model = tiny_mixture("mixtral")
    tokens = token_inputs(model)["input_ids"]
    options = dict(max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(tokens))
    expected = model.generate(tokens, **options)
    before = logits(model)
    split_experts(model)
    assert torch.equal(model.generate(tokens, **options), expected)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(again), before)
        shell = again.get_submodule(NAMES["mixtral"])._shell[0]
        assert shell.config is again.config  # so that what is set there counts after fusing
        fuse_experts(again)
        assert torch.equal(logits(again), before)
    compiled = torch.compile(model.get_submodule(NAMES["mixtral"]), backend="aot_eager")
    x, chosen, weights = torch.randn(5, 32), torch.tensor([[0, 3]] * 5), torch.rand(5, 2)
    with torch.no_grad():
        expected = model.get_submodule(NAMES["mixtral"])(x, chosen, weights)
        torch.testing.assert_close(compiled(x, chosen, weights), expected)


def test_what_is_no_common_module_stays():
    """Anything that does more than the common form has: its outputs would change."""
    fused = fused_module()
    assert is_fused(fused)
    changes = {
        "another parameter": lambda m: m.register_parameter("scale", nn.Parameter(torch.ones(1))),
        "a buffer": lambda m: m.register_buffer("scale", torch.ones(1)),
        "a child with weights": lambda m: m.add_module("norm", nn.LayerNorm(4)),
        "a norm at the end": lambda m: setattr(m, "has_post_expert_norm", True),
        "biases that are not there": lambda m: setattr(m, "has_bias", True),
        "no word on the layout": lambda m: delattr(m, "is_transposed"),
        "a wrapped forward": lambda m: setattr(m, "forward", lambda *x: x[0]),
        "a forward of its own": lambda m: setattr(m, "__class__", Louder),
    }

    class Louder(type(fused)):
        def forward(self, *inputs):
            return 2 * super().forward(*inputs)

    for what, change in changes.items():
        other = copy.deepcopy(fused)
        change(other)
        assert not is_fused(other), what
        with pytest.raises(ValueError, match="does not hold fused experts"):
            Experts(other)
    model = tiny_mixture("mixtral")
    model.get_submodule(NAMES["mixtral"]).has_post_expert_norm = True
    assert list(split_experts(model)) == [NAMES["mixtral"].replace(".0.", ".1.")]
    assert len(fused_experts(model)) == 2
    for name in ("llama", "gpt2", "mamba", "t5"):
        assert split_experts(tiny_model(name)) == {}


def test_join_puts_back_what_was_not_compressed():
    model = tiny_mixture("mixtral")
    before, expected = identities(model), logits(model)
    fused = split_experts(model)
    join_experts(model, fused)
    assert identities(model) == before
    first, second = fused
    fused = split_experts(model)
    name = f"{first}.2.down_proj"
    replace_module(model, name, lowrank(model.get_submodule(name)))
    after = logits(model)
    join_experts(model, fused)
    assert list(find_experts(model)) == [first]
    assert model.get_submodule(second) is fused[second]
    assert torch.equal(logits(model), after)
    assert not torch.equal(after, expected)
    storages = {p.untyped_storage().data_ptr(): p for p in model.get_submodule(first).parameters()}
    assert len(storages) == 9  # 7 dense weights and 2 factors: no view keeps the whole alive
    for pointer, parameter in storages.items():
        assert parameter.untyped_storage().nbytes() == 4 * parameter.numel()
        assert pointer not in {p.untyped_storage().data_ptr() for p in fused[first].parameters()}


def test_join_keeps_what_training_wrote_into_dense_layers():
    model = tiny_mixture("mixtral")
    path = NAMES["mixtral"]
    model.get_submodule(path).down_proj.requires_grad_(False)
    fused = split_experts(model)
    kept = fused[path].get_parameter("gate_up_proj")
    old = kept.detach().clone()
    layer = model.get_submodule(f"{path}.1.gate_up_proj")
    replace_module(model, f"{path}.1.gate_up_proj", with_weight(layer, torch.ones(96, 32)))
    model.requires_grad_(False)
    join_experts(model, fused)
    joined = model.get_submodule(path)
    assert joined is not fused[path]
    assert torch.equal(joined.gate_up_proj[1], torch.ones(96, 32))
    assert torch.equal(joined.gate_up_proj[0], old[0])
    assert torch.equal(kept, old)  # an error could still put it back
    assert joined.gate_up_proj.requires_grad
    assert not joined.down_proj.requires_grad


def test_fusing_refuses():
    model = tiny_mixture("mixtral")
    split_experts(model)
    name = f"{NAMES['mixtral']}.1.down_proj"
    layer = model.get_submodule(name)
    replace_module(model, name, lowrank(layer))
    with pytest.raises(
        ValueError, match=r"0\.mlp\.experts cannot be fused: 1\.down_proj is a LowRa"
    ):
        fuse_experts(model)
    replace_module(model, name, nn.Linear(48, 32))
    with pytest.raises(
        ValueError, match=r"experts cannot be fused: 1\.down_proj has a bias, for w"
    ):
        fuse_experts(model)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_puts_the_fused_module_back(error):
    model = tiny_mixture("mixtral")
    before, expected = identities(model), logits(model)

    def fail():
        with experts_split(model):
            name = f"{NAMES['mixtral']}.0.down_proj"
            replace_module(model, name, lowrank(model.get_submodule(name)))
            raise error

    with pytest.raises(error):
        fail()
    assert identities(model) == before
    assert torch.equal(logits(model), expected)


def test_an_interruption_while_splitting(monkeypatch):
    model = tiny_mixture("mixtral")
    before = identities(model)

    def interrupt(model, old, new):
        put(model, old, new)
        if isinstance(new, Experts):
            raise KeyboardInterrupt

    put = experts._put
    monkeypatch.setattr(experts, "_put", interrupt)
    with pytest.raises(KeyboardInterrupt), experts_split(model):
        pass
    assert identities(model) == before


@pytest.mark.parametrize("name", MIXTURES)
def test_calibration_sees_the_tokens_of_each_expert(name):
    model = tiny_mixture(name)
    split_experts(model)
    layers = {n: m for n, m in find_linears(model).items() if n.startswith(NAMES[name])}
    assert len(layers) == 8
    # Eight times the same token go to two experts; the others are idle and not to blame.
    assert uncalled(model, layers, torch.zeros(1, 8, dtype=torch.long)) == []
    windows = token_inputs(model, rows=6)["input_ids"]
    stats = collect(model, layers, windows)
    seen = {n: each.tokens for n, each in stats.items()}
    first = [count for n, count in seen.items() if not n.endswith("down_proj")]
    assert sum(first) == 2 * windows.numel()
    assert [count for n, count in seen.items() if n.endswith("down_proj")] == first
    alone = collect(model, layers, torch.zeros(1, 1, dtype=torch.long))
    assert sorted(each.tokens for each in alone.values()) == [0] * 4 + [1] * 4


def test_a_module_in_two_places():
    model = tiny_mixture("mixtral")
    model.model.layers[1].mlp.experts = model.model.layers[0].mlp.experts
    before, expected = identities(model), logits(model)
    fused = split_experts(model)
    assert list(fused) == [NAMES["mixtral"]]
    assert isinstance(model.model.layers[1].mlp.experts, Experts)
    assert model.model.layers[1].mlp.experts is model.model.layers[0].mlp.experts
    assert torch.equal(logits(model), expected)
    join_experts(model, fused)
    assert identities(model) == before
