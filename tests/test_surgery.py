"""soco.surgery: finding and replacing layers in the trees of many architectures."""

import pytest
import torch
from torch import nn
from transformers import ZambaConfig, ZambaForCausalLM
from transformers.pytorch_utils import Conv1D

from soco.modules import LowRankLinear
from soco.surgery import (
    bias_of,
    context_length,
    find_linears,
    fused_experts,
    output_head,
    replace_module,
    replace_modules,
    replaced,
    sequence_length,
    shape_of,
    untie_head,
    weight_of,
)
from tiny_models import CONFIGS, compress, logits, tiny_model

# Linear layers in the blocks of each tiny model (two blocks; albert has one, used twice).
COUNTS = {
    "llama": 14,
    "llama-tied": 14,
    "mistral": 14,
    "qwen2": 14,
    "phi3": 8,
    "gpt2": 8,
    "opt": 12,
    "gpt_neox": 8,
    "gptj": 12,
    "bloom": 8,
    "mamba": 8,
    "t5": 32,
    "bert": 12,
    "roberta": 12,
    "albert": 6,
}


def zamba():
    """Blocks two and four of four are tied, as parameters."""
    config = ZambaConfig(
        vocab_size=96,
        hidden_size=32,
        attention_hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_mamba_heads=2,
        mamba_d_state=4,
        mamba_d_conv=2,
        mamba_dt_rank=4,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        pad_token_id=0,
        use_mamba_kernels=False,
    )
    torch.manual_seed(0)
    return ZambaForCausalLM(config).eval()


@pytest.mark.parametrize("name", COUNTS)
def test_every_linear_of_the_blocks_is_found(name):
    model = tiny_model(name)
    found = find_linears(model)
    assert len(found) == COUNTS[name]
    in_tree = [key for key, module in model.named_modules() if type(module) in (nn.Linear, Conv1D)]
    assert list(found) == [key for key in in_tree if key in found]
    outside = [key for key in in_tree if key not in found]
    assert all(".0." not in key for key in outside), outside


def test_shapes_of_the_unusual_ones():
    shapes = {key: shape_of(layer) for key, layer in find_linears(tiny_model("phi3")).items()}
    assert shapes["model.layers.0.self_attn.qkv_proj"] == (64, 32)
    assert shapes["model.layers.1.mlp.gate_up_proj"] == (96, 32)
    llama = find_linears(tiny_model("llama"))["model.layers.0.self_attn.k_proj"]
    assert shape_of(llama) == tuple(weight_of(llama).shape) == (16, 32)
    assert bias_of(llama) is None
    conv = find_linears(tiny_model("gpt2"))["transformer.h.0.attn.c_attn"]
    assert isinstance(conv, Conv1D)
    assert shape_of(conv) == tuple(weight_of(conv).shape) == (96, 32)
    assert weight_of(conv).data_ptr() == conv.weight.data_ptr()
    assert bias_of(conv) is conv.bias
    with pytest.raises(ValueError, match=r"expected nn\.Linear or Conv1D, got LayerNorm"):
        weight_of(nn.LayerNorm(3))


@pytest.mark.parametrize("name", [*COUNTS, "mixtral", "qwen2_moe"])
def test_full_rank_changes_nothing(name):
    model = tiny_model(name)
    before = logits(model)
    exclude = "*.dt_proj" if name == "mamba" else None  # its code multiplies by the weight itself
    compress(model, rank=96, exclude=exclude)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)


def test_conv1d_becomes_a_low_rank_linear():
    model = compress(tiny_model("gpt2"))
    assert isinstance(model.transformer.h[0].attn.c_attn, LowRankLinear)
    assert bias_of(model.transformer.h[0].attn.c_attn) is not None


def test_fused_experts_are_told():
    experts = fused_experts(tiny_model("mixtral"))
    linears = find_linears(tiny_model("mixtral"))
    if experts:  # transformers 5
        assert experts["model.layers.0.mlp.experts.gate_up_proj"] == (4, 96, 32)
        assert len(experts) == 4
        assert len(linears) == 8
    else:  # transformers 4: linear layers like others, and a linear router
        assert "model.layers.0.block_sparse_moe.experts.3.w2" in linears
    assert fused_experts(tiny_model("mamba")) == {}
    assert fused_experts(tiny_model("llama")) == {}


def test_a_layer_that_cannot_shrink_is_left_out():
    model = tiny_model("qwen2_moe")  # shared_expert_gate has one output
    assert not [key for key in find_linears(model) if key.endswith("shared_expert_gate")]
    assert len(find_linears(model, include="*.shared_expert_gate")) == 2


def test_patterns():
    model = tiny_model("llama")
    assert list(find_linears(model, include="*.1.*.q_proj")) == ["model.layers.1.self_attn.q_proj"]
    assert list(find_linears(model, include="lm_head")) == ["lm_head"]
    both = find_linears(model, include=["lm_head", "*.0.mlp.up_proj"])
    assert list(both) == ["model.layers.0.mlp.up_proj", "lm_head"]
    assert len(find_linears(model, exclude=["*.mlp.*", "lm_head"])) == 8
    assert len(find_linears(model, include="*", exclude="*.mlp.*")) == 9


def test_patterns_that_match_nothing():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"include='q_proj' matches no .* model\.layers\.0\.self"):
        find_linears(model, include="q_proj")
    with pytest.raises(ValueError, match=r"exclude='\*\.wq' matches no linear layer"):
        find_linears(model, exclude=["*.mlp.*", "*.wq"])
    with pytest.raises(ValueError, match="to compress in LlamaForCausalLM: exclude leaves none"):
        find_linears(model, exclude="*")
    with pytest.raises(ValueError, match="to compress in Sequential: none in blocks"):
        find_linears(nn.Sequential(nn.Linear(8, 8)))


def test_factors_are_no_layers():
    model = compress(tiny_model("llama"), include="*.0.*")
    assert all(".1." in name for name in find_linears(model))
    compress(model)
    with pytest.raises(ValueError, match=r"none in blocks .*, and 14 are compressed already"):
        find_linears(model)
    assert list(find_linears(model, include="*")) == ["lm_head"]


class Block(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.norm = nn.LayerNorm(8)


class Tower(nn.Module):
    """Blocks, a list of leaves that is none, and a stack inside of a block."""

    def __init__(self, *layers):
        super().__init__()
        self.blocks = nn.ModuleList([Block(layer) for layer in layers])
        self.heads = nn.ModuleList([nn.Linear(8, 8)])


def test_one_module_in_two_places_is_one_layer():
    shared = nn.Linear(8, 8)
    tower = Tower(shared, nn.Linear(8, 8), shared)
    assert list(find_linears(tower)) == ["blocks.0.layer", "blocks.1.layer"]
    new = LowRankLinear(8, 8, 2)
    replace_module(tower.train(), "blocks.2.layer", new)
    assert tower.blocks[0].layer is tower.blocks[2].layer is new
    assert tower.blocks[1].layer is not new
    assert new.training
    replace_module(tower.eval(), "blocks.0.layer", shared)
    assert tower.blocks[2].layer is shared
    assert not shared.training


def test_tied_linears_are_one_layer():
    one, other = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    other.weight = one.weight
    tower = Tower(one, other)
    assert list(find_linears(tower)) == ["blocks.0.layer"]
    new = LowRankLinear(8, 8, 2)
    replace_module(tower, "blocks.0.layer", new)
    assert tower.blocks[1].layer is new


def test_many_at_once():
    """As one after the other, twins with them; an unknown name changes nothing."""
    shared, one, other = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
    other.weight, other.bias = one.weight, one.bias
    tower = Tower(shared, one, shared, other).train()
    news = [LowRankLinear(8, 8, 2).eval() for _ in range(3)]
    places: dict[str, nn.Module] = dict(
        zip(("blocks.0.layer", "blocks.3.layer", "heads.0"), news, strict=True)
    )
    with pytest.raises(ValueError, match=r"Tower has no module blocks\.4"):
        replace_modules(tower, places | {"blocks.4": nn.Identity()})
    assert not any(isinstance(module, LowRankLinear) for module in tower.modules())
    replace_modules(tower, places)
    assert tower.blocks[0].layer is tower.blocks[2].layer is news[0]
    assert tower.blocks[1].layer is tower.blocks[3].layer is news[1]
    assert tower.heads[0] is news[2]
    assert all(new.training for new in news)


def test_a_weight_shared_with_something_else_stays():
    one, other = nn.Linear(8, 8), nn.Linear(8, 8)
    other.weight = one.weight  # but not the bias
    tower = Tower(one, other, nn.Linear(8, 8))
    assert list(find_linears(tower)) == ["blocks.2.layer"]
    with pytest.raises(ValueError, match=r"blocks\.0\.layer shares its weight with blocks\.1\.la"):
        find_linears(tower, include="blocks.0.layer")


def test_tied_blocks():
    model = zamba()
    found = [key for key in find_linears(model) if "shared_transf" in key]
    assert len(found) == 7
    assert all(key.startswith("model.layers.1.") for key in found)
    before = logits(model)
    compress(model, rank=96, include="*.shared_transf.*")
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


def test_subclasses_are_left_alone():
    attention = nn.MultiheadAttention(8, 2)  # reads the weight of a subclass of nn.Linear
    assert list(find_linears(Tower(attention, nn.Linear(8, 8)))) == ["blocks.1.layer"]


def test_replacing_what_is_not_there():
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no module model\.layers\.7"):
        replace_module(tiny_model("llama"), "model.layers.7", nn.Identity())


def test_a_tied_head_gets_its_own_weight():
    model = tiny_model("llama-tied")
    assert output_head(model) == "lm_head"
    before = logits(model)
    untie_head(model)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert not model.config.tie_word_embeddings
    assert torch.equal(logits(model), before)
    model.tie_weights()
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    weight = model.lm_head.weight
    untie_head(model)
    assert model.lm_head.weight is weight  # nothing left to do


def test_heads_that_cannot_be_untied():
    with pytest.raises(ValueError, match=r"lm_head of T5ForConditionalGeneration is tied"):
        untie_head(tiny_model("t5"))
    with pytest.raises(ValueError, match="LlamaModel has no output head"):
        untie_head(tiny_model("llama").model)
    assert output_head(tiny_model("llama").model) is None


@pytest.mark.parametrize(
    ("name", "length"),
    [("llama", 64), ("gpt2", 64), ("opt", 64), ("bert", 64), ("roberta", 62), ("mamba", None)],
)
def test_context_length(name, length):
    assert context_length(tiny_model(name)) == length


def test_sequence_length():
    llama, mamba = tiny_model("llama"), tiny_model("mamba")
    assert sequence_length(llama) == sequence_length(llama, 64) == 64
    assert sequence_length(llama, with_start=True) == 63
    assert sequence_length(mamba) == 2048
    assert sequence_length(mamba, 10**6) == 10**6
    with pytest.raises(ValueError, match=r"length 65 is too much for the model's 64 positions$"):
        sequence_length(llama, 65)
    with pytest.raises(ValueError, match="64 positions, one of them for the token it starts with"):
        sequence_length(llama, 64, with_start=True)
    with pytest.raises(ValueError, match="length must be a positive whole number, got 0"):
        sequence_length(llama, 0)


def test_every_tiny_model_is_tested():
    assert CONFIGS.keys() == COUNTS.keys() | {"mixtral", "qwen2_moe"}


def test_replaced_puts_every_module_back():
    """Twins too, each in its own place, and after an error."""
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "c": nn.Linear(3, 3)})
    model["b"].weight, model["b"].bias = model["a"].weight, model["a"].bias
    before = dict(model.named_children())
    newcomer = nn.Identity()

    def fail():
        with replaced(model, {"a": newcomer}):
            assert model["a"] is newcomer
            assert model["b"] is newcomer
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert list(model.named_children()) == list(before.items())
    with replaced(model, {"c": newcomer}):
        assert model["c"] is newcomer
    assert model["c"] is before["c"]


def test_replaced_puts_back_when_a_name_is_wrong():
    model = nn.ModuleDict({"a": nn.Linear(3, 3)})
    first = model["a"]
    newcomers = {"a": nn.Identity(), "z": nn.Identity()}
    with pytest.raises(ValueError, match="has no module z"), replaced(model, newcomers):
        pass
    assert model["a"] is first
