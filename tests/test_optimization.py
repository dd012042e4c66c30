"""soco.optimize: the same model, faster; on models of many architectures."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import soco
from soco.checkpoint import load, save
from soco.optimization import optimize
from soco.packing import GATED, LayerGroup
from soco.surgery import find_linears, low_rank_layers
from tiny_models import (
    CONFIGS,
    IS_5,
    MIXTURES,
    compress,
    compress_pivoted,
    compress_shared,
    logits,
    tiny_mixture,
    tiny_model,
    token_inputs,
)

WAYS = [compress, compress_pivoted, compress_shared]


def groups(model):
    """The names of the layers that are computed together."""
    names = {layer: name for name, layer in low_rank_layers(model).items()}
    found = []
    for layer in names:
        if isinstance(layer.fast, LayerGroup) and layer is layer.fast.layers[0]:
            found.append([names[member] for member in layer.fast.layers])
    return found


def gated(model):
    return [name for name, module in model.named_modules() if GATED in module.__dict__]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CONFIGS)
def test_gives_the_same_logits(name, way):
    if way is compress_shared and name in ("albert", "opt"):
        pytest.skip("it has one block, or layers whose names differ in a number")
    exclude = "*.dt_proj" if name == "mamba" else None  # its code multiplies with that weight
    model = way(tiny_model(name), exclude=exclude)
    expected = logits(model)
    assert optimize(model) is model
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    one = {key: value[:, :1] for key, value in token_inputs(model).items()}
    with torch.no_grad():
        few = model(**one).logits
    torch.testing.assert_close(few, copy.deepcopy(model)(**one).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not IS_5, reason="needs transformers 5")
@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_give_the_same_logits(name):
    from soco.experts import split_experts

    model = tiny_mixture(name)
    split_experts(model)
    compress(model)
    expected = logits(model)
    optimize(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


def test_layers_with_one_input_are_grouped():
    model = optimize(compress_pivoted(tiny_model("llama")))
    layer = "model.layers.0."
    assert groups(model)[:4] == [
        [f"{layer}self_attn.{name}_proj" for name in "qkv"],
        [f"{layer}self_attn.o_proj"],
        [f"{layer}mlp.gate_proj", f"{layer}mlp.up_proj"],
        [f"{layer}mlp.down_proj"],
    ]
    assert gated(model) == ["model.layers.0.mlp", "model.layers.1.mlp"]


def test_what_is_dense_stays_out_of_the_groups():
    model = optimize(compress(tiny_model("llama"), exclude=["*.k_proj", "*.up_proj"]))
    assert [len(group) for group in groups(model)] == [2, 1, 1, 1] * 2
    assert gated(model) == []


@pytest.mark.parametrize("name", ["gpt2", "bert", "opt"])
def test_blocks_without_a_gate_are_left_alone(name):
    assert gated(optimize(compress(tiny_model(name)))) == []


def test_other_activations_are_left_alone():
    model = compress(tiny_model("llama", hidden_act="gelu"))
    expected = logits(model)
    optimize(model)
    assert gated(model) == []
    assert [len(group) for group in groups(model)] == [3, 1, 2, 1] * 2
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


def test_a_block_that_does_more_is_left_alone():
    model = compress(tiny_model("llama"))
    block = model.model.layers[0].mlp

    class More(type(block)):
        def forward(self, x):
            return super().forward(x) + 1

    block.__class__ = More
    assert gated(optimize(model)) == ["model.layers.1.mlp"]


def test_training_goes_on(tmp_path):
    """One step of an optimized model and of a plain one, and both as they are afterwards."""
    plain = compress(tiny_model("llama"))
    fast = optimize(copy.deepcopy(plain))
    for model in (plain, fast):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        inputs = token_inputs(model)
        model.train()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        model.eval()
    torch.testing.assert_close(logits(fast), logits(plain), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("align", [1, 16])
def test_saving_writes_plain_factors(way, align, tmp_path, monkeypatch):
    model = way(tiny_model("llama"))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    expected = logits(model)
    monkeypatch.setattr(
        "soco.optimization.LayerGroup", lambda layers, weights: LayerGroup(layers, weights, align)
    )
    save(optimize(model), tmp_path / "model")
    loaded = load(tmp_path / "model")
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, state[name])
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-6, atol=1e-6)
    sizes = [f.stat().st_size for f in (tmp_path / "model").glob("*.safetensors")]
    own = {value.data_ptr(): value.nbytes for value in state.values()}
    assert sum(sizes) < 1.2 * sum(own.values()) + 20000  # nothing is in it twice


def test_load_optimizes(tmp_path):
    save(compress(tiny_model("llama")), tmp_path / "model")
    model = load(tmp_path / "model", optimize=True)
    assert len(groups(model)) == 8
    assert not groups(load(tmp_path / "model"))


def test_generates_the_same_text():
    model = compress_pivoted(tiny_model("llama"))
    options = {"max_new_tokens": 12, "do_sample": False}
    inputs = token_inputs(model, rows=1)
    expected = model.generate(**inputs, **options)
    optimize(model)
    assert torch.equal(model.generate(**inputs, **options), expected)
    assert torch.equal(model.generate(**inputs, **options, cache_implementation="static"), expected)


def test_two_threads_may_run_one_model():
    """What one has computed for layers that are still to come is not given to the other."""
    model = optimize(compress_pivoted(tiny_model("llama")))
    inputs = [torch.randint(3, 96, (1, 6 + i)) for i in range(2)]

    @torch.no_grad()
    def run(ids):
        return [model(ids).logits for _ in range(60)]

    expected = [run(ids)[0] for ids in inputs]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(run, inputs))
    for one, many in zip(expected, found, strict=True):
        assert all(torch.equal(logits, one) for logits in many)


def test_layers_that_are_called_more_than_once_stay_alone():
    """Which inputs they share is another question at every call."""
    model = compress(tiny_model("albert"))
    expected = logits(model)
    optimize(model)
    assert groups(model)
    assert all(len(group) == 1 for group in groups(model))
    torch.testing.assert_close(logits(model), expected)


def test_compiles_as_a_whole():
    model = optimize(compress_pivoted(tiny_model("llama")))
    expected = logits(model)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(logits_of(compiled, model), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def logits_of(run, model):
    return run(**token_inputs(model)).logits


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_an_adapter_is_not_passed_over():
    peft = pytest.importorskip("peft")
    model = optimize(compress(tiny_model("llama")))
    before = logits(model)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["up"], init_lora_weights=False)
    ).eval()
    assert not torch.allclose(logits_of(adapted, model), before)


def test_doing_it_again_takes_up_what_has_changed():
    model = optimize(compress(tiny_model("llama")))
    model.double()
    assert logits(model).dtype == torch.float64
    expected = logits(model)
    optimize(model)
    group = low_rank_layers(model)["model.layers.0.mlp.up_proj"].fast
    assert isinstance(group, LayerGroup)
    assert group.dtype == torch.float64
    torch.testing.assert_close(logits(model), expected)


@pytest.mark.parametrize("weights", ["int8", "float8"])
@pytest.mark.parametrize("way", [compress, compress_pivoted])
def test_eight_bits(way, weights, tmp_path):
    model = way(tiny_model("llama"), rank=16)
    before = logits(model)
    optimize(model, weights=weights)
    found = logits(model)
    assert 0 < (found - before).norm() < (0.03 if weights == "int8" else 0.15) * before.norm()
    assert model.generate(**token_inputs(model), max_new_tokens=3).shape[1] > 8
    with pytest.raises(ValueError, match=f"are {weights} since soco.optimize"):
        save(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    with pytest.raises(ValueError, match=f"are {weights} since soco.optimize"):
        optimize(model)
    with pytest.raises(ValueError, match=f"are {weights} since soco.optimize"):
        soco.export_dense(model, tmp_path / "dense")


def test_the_trained_demo_model_keeps_its_perplexity(demo_model):
    model = load_dense(demo_model)
    soco.compress(model, 0.5, method="svd", progress=False)
    options = {"length": 128, "windows": 4, "progress": False}
    tokenizer = tokenizer_of(demo_model)
    demo_text = demo_model / "a-scandal-in-bohemia.txt"
    before = soco.evaluate(model, demo_text, tokenizer=tokenizer, **options).perplexity
    optimize(model)
    exact = soco.evaluate(model, demo_text, tokenizer=tokenizer, **options).perplexity
    assert exact == pytest.approx(before, rel=1e-5)
    optimize(model, weights="int8")
    rounded = soco.evaluate(model, demo_text, tokenizer=tokenizer, **options).perplexity
    assert rounded == pytest.approx(before, rel=0.02)


def load_dense(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def tokenizer_of(folder):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


def test_the_model_is_left_in_the_mode_it_was_in():
    model = compress(tiny_model("llama")).train()
    model.model.layers[0].eval()
    optimize(model)
    assert model.training
    assert not model.model.layers[0].mlp.training
    assert not any(m._forward_hooks for m in model.modules())


def test_wrong_arguments_are_named(tmp_path):
    model = compress(tiny_model("llama"))
    with pytest.raises(ValueError, match="weights must be int8 or float8, or None, got 'int4'"):
        optimize(model, weights="int4")
    with pytest.raises(ValueError, match="no compressed layers"):
        optimize(tiny_model("llama"))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM does not run on these inputs \("):
        optimize(model, inputs={"nonsense": 1})
    with pytest.raises(ValueError, match=r"is float64, which 8-bit weights"):
        optimize(copy.deepcopy(model).double(), weights="int8")
    with pytest.raises(ValueError, match=r"uses another layer's basis: it cannot be kept in 8"):
        optimize(compress_shared(tiny_model("llama")), weights="float8")
    layer = low_rank_layers(model)["model.layers.0.mlp.up_proj"]
    expected = logits(model)
    for wrong in (torch.nan, torch.inf):
        broken = copy.deepcopy(model)
        low_rank_layers(broken)["model.layers.0.mlp.up_proj"].up.weight.data[2, 1] = wrong
        with pytest.raises(ValueError, match=r"0.mlp.up_proj has weights that are not finite"):
            optimize(broken, weights="int8")
        assert not groups(broken)  # as it was
    assert torch.equal(logits(model), expected)
    layer.up.weight = nn.Parameter(layer.up.weight.to("meta"))
    with pytest.raises(ValueError, match=r"mlp.up_proj are offloaded"):
        optimize(model)


def test_inputs_may_be_given():
    model = compress(tiny_model("t5"))
    expected = logits(model)
    optimize(model, inputs=token_inputs(model))
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert find_linears(tiny_model("t5"))  # the model is one that has layers at all
