"""soco.plugin: plain transformers and its neighbours on compressed models."""

import copy
import pickle
import re
import warnings
from typing import cast

import peft
import pytest
import torch
import transformers
from datasets import Dataset
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto

from soco.checkpoint import mark_compressed
from soco.experts import Experts, find_experts, join_experts, split_experts
from soco.headers import read_headers, weight_files
from soco.modules import LowRankLinear, PivotedLinear, share_basis
from soco.plugin import SocoConfig, SocoQuantizer, _stored_pivots, register
from soco.surgery import find_linears, low_rank_layers, output_head, shape_of, untie_head
from tiny_models import (
    MIXTURES,
    NEEDS_5,
    compress,
    compress_pivoted,
    compress_shared,
    logits,
    mark,
    tiny_mixture,
    tiny_model,
    token_inputs,
)

Q_PROJ = "model.layers.0.self_attn.q_proj"
OLD_NAMES = transformers.__version__.startswith("5.0.")  # of BERT's norms, written after loading
IGNORE_PEFT = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A compressed model and its folder."""
    model = compress(tiny_model("llama"), report={"method": "svd", "ratio": 0.5})
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return model, folder


def reload(model, folder, **options):
    """Through the class of the model; nothing may be missing or left over."""
    loaded, info = type(model).from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return loaded


NAMES = ["llama", "llama-tied", "mistral", "qwen2", "phi3", "gpt2", "opt", "gpt_neox", "gptj"]
NAMES += ["bloom", "mamba", "mixtral", "qwen2_moe", "t5", "bert", "roberta", "albert"]


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_is_the_same(name, tmp_path):
    exclude = "*.dt_proj" if name == "mamba" else None
    model = compress(tiny_model(name), exclude=exclude)
    before = logits(model)
    model.save_pretrained(tmp_path / "a")
    loaded = reload(model, tmp_path / "a")
    assert torch.equal(logits(loaded), before)
    assert low_rank_layers(loaded).keys() == low_rank_layers(model).keys()
    loaded.save_pretrained(tmp_path / "b")
    assert torch.equal(logits(reload(model, tmp_path / "b")), before)
    for file in ("config.json", "model.safetensors"):
        same = (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
        assert same or OLD_NAMES


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "opt", "bert", "roberta"])
def test_a_compressed_head(name, tmp_path):
    model = tiny_model(name)
    untie_head(model)
    compress(model, include=["*.0.*", output_head(model)])
    model.save_pretrained(tmp_path)
    loaded = reload(model, tmp_path)
    assert output_head(loaded) in low_rank_layers(loaded)
    assert torch.equal(logits(loaded), logits(model))


@NEEDS_5  # 4 does not save what it does not list as tied
def test_tied_blocks(tmp_path):
    from test_surgery import zamba

    model = compress(zamba(), include="*.shared_transf.*")
    model.save_pretrained(tmp_path / "a")
    loaded = reload(model, tmp_path / "a")
    assert torch.equal(logits(loaded), logits(model))
    assert len(low_rank_layers(loaded)) == len(low_rank_layers(model)) == 7
    first, second = (loaded.model.layers[i].shared_transf.self_attn.q_proj for i in (1, 3))
    assert first is second
    loaded.save_pretrained(tmp_path / "b")
    assert torch.equal(logits(reload(model, tmp_path / "b")), logits(model))


def test_the_folder(saved):
    model, folder = saved
    entries = read_headers(weight_files(folder))
    assert entries[f"{Q_PROJ}.down.weight"].shape == (4, 32)
    assert entries[f"{Q_PROJ}.up.weight"].shape == (32, 4)
    assert entries[f"{Q_PROJ}.weight"].shape == (1,)
    described = AutoModelForCausalLM.from_pretrained(folder).config.quantization_config
    assert described.to_dict() == {
        "quant_method": "soco",
        "format_version": 1,
        "layers": {name: {"rank": 4} for name in find_linears(tiny_model("llama"))},
        "report": {"method": "svd", "ratio": 0.5},
    }
    assert described.layers.keys() == low_rank_layers(model).keys()


def test_biases_keep_their_names(tmp_path):
    compress(tiny_model("qwen2")).save_pretrained(tmp_path)
    entries = read_headers(weight_files(tmp_path))
    assert entries[f"{Q_PROJ}.bias"].shape == (32,)
    assert f"{Q_PROJ}.up.bias" not in entries


def test_size_on_disk(saved):
    model, folder = saved
    params = sum(p.numel() for p in model.parameters())
    dense = sum(p.numel() for p in tiny_model("llama").parameters())
    targets = [shape_of(layer) for layer in find_linears(tiny_model("llama")).values()]
    removed = sum(out * inp - 4 * (out + inp) for out, inp in targets)
    assert params == dense - removed
    file = folder / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size == header + 4 * (params + len(targets))  # and the sentinels


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, "auto"])
def test_dtypes(saved, dtype):
    _, folder = saved
    one = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    other = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert torch.equal(logits(one), logits(other))
    expected = torch.float32 if dtype == "auto" else dtype
    assert {p.dtype for p in one.parameters()} == {expected}
    assert one.get_submodule(Q_PROJ).weight.dtype == expected


def test_saved_in_bfloat16(saved, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(saved[1], dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = reload(model, tmp_path, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(logits(loaded), logits(model))


def test_t5_keeps_its_float32_parts(tmp_path):
    model = compress(tiny_model("t5"))
    model.save_pretrained(tmp_path)
    half = reload(model, tmp_path, dtype=torch.float16)
    wo = half.encoder.block[0].layer[1].DenseReluDense.wo
    assert wo.up.weight.dtype == wo.weight.dtype == torch.float32
    assert torch.isfinite(logits(half)).all()


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_maps(saved, device_map):
    model, folder = saved
    loaded = reload(model, folder, device_map=device_map)
    if loaded.device.type == "cpu":
        assert torch.equal(logits(loaded), logits(model))


def test_shards(saved, tmp_path):
    model, _ = saved
    model.save_pretrained(tmp_path, max_shard_size="12KB")
    assert len(weight_files(tmp_path)) >= 4
    assert torch.equal(logits(reload(model, tmp_path)), logits(model))


OFFLOADED = {
    "model.embed_tokens": "cpu",
    "model.layers.0.self_attn": "disk",
    "model.layers.0.mlp": "cpu",
    "model.layers.0.input_layernorm": "cpu",
    "model.layers.0.post_attention_layernorm": "cpu",
    "model.layers.1": "disk",
    "model.norm": "disk",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_offloaded_to_disk(name, tmp_path):
    model = compress(tiny_model(name))
    model.save_pretrained(tmp_path / "a")
    loaded = reload(model, tmp_path / "a", device_map=OFFLOADED, offload_folder=tmp_path / "off")
    assert loaded.get_submodule(f"{Q_PROJ}.down").weight.is_meta
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the memory that saving takes
        loaded.save_pretrained(tmp_path / "b")
    assert torch.equal(logits(reload(model, tmp_path / "b")), logits(model))
    with pytest.raises(ValueError, match=rf"{re.escape(Q_PROJ)} cannot become dense: .* offloaded"):
        loaded.dequantize()


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "opt"])
def test_other_classes(name, tmp_path):
    model = tiny_model(name)
    untie_head(model)
    compress(model, include=["*.0.*", output_head(model)])
    model.save_pretrained(tmp_path / "a")
    blocks = len(low_rank_layers(model)) - 1
    base = AutoModel.from_pretrained(tmp_path / "a")
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "a")
    inputs = token_inputs(model, rows=1)
    with torch.no_grad():
        hidden = base(**inputs).last_hidden_state
        expected = model(**inputs, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(hidden, expected)
    for other, directory in ((base, tmp_path / "b"), (classifier, tmp_path / "c")):
        assert len(low_rank_layers(other)) == blocks
        assert other.config.quantization_config.layers.keys() == low_rank_layers(other).keys()
        other.save_pretrained(directory)
        again = reload(other, directory)
        torch.testing.assert_close(again(**inputs)[0], other(**inputs)[0])
    if name != "bert":  # whose masked model has no pooler
        head = type(model).from_pretrained(tmp_path / "b")  # from the base: a new, dense head
        assert len(low_rank_layers(head)) == blocks


def test_generate(saved):
    model, folder = saved
    loaded = reload(model, folder)
    tokens = token_inputs(model)["input_ids"]
    kwargs = dict(max_new_tokens=5, do_sample=False, attention_mask=torch.ones_like(tokens))
    assert torch.equal(loaded.generate(tokens, **kwargs), model.generate(tokens, **kwargs))


def test_exports(saved):
    model, folder = saved
    inputs = token_inputs(model)
    loaded = reload(model, folder)
    program = torch.export.export(loaded, (), {**inputs, "use_cache": False}, strict=False)
    assert not [node for node in program.graph.nodes if "soco" in str(node.target)]
    exported = program.module()(**inputs, use_cache=False).logits
    torch.testing.assert_close(exported, logits(model), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles(saved):
    model, folder = saved
    inputs = token_inputs(model)
    compiled = torch.compile(reload(model, folder), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        out = compiled(**inputs, use_cache=False).logits
    torch.testing.assert_close(out, logits(model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "phi3"])
def test_dequantize(name, tmp_path):
    model = compress(tiny_model(name))
    before = logits(model)
    dense = model.dequantize()
    assert dense is model
    assert not low_rank_layers(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    assert torch.equal(logits(reload(model, tmp_path)), logits(model))
    assert {type(m) for m in find_linears(model).values()} <= {nn.Linear, Conv1D}
    assert model.to(torch.float64).half().dtype == torch.float16  # refused for quantized models


def test_dequantize_to_a_dtype(saved):
    model = reload(saved[0], saved[1])
    model.hf_quantizer.dequantize(model, torch.bfloat16)  # transformers 5: model.dequantize(dtype)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@IGNORE_PEFT
def test_lora(saved, tmp_path):
    model, folder = saved
    base = reload(model, folder)
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj.down", "q_proj.up"], lora_dropout=0.0)
    adapted = peft.get_peft_model(base, settings)
    tokens = token_inputs(model)["input_ids"]
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):  # lora_B starts at zero, and lora_A's gradient with it
        adapted(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.eval()
    trained = logits(adapted)
    assert (trained - logits(model)).abs().max() > 1e-4
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(reload(model, folder), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), trained)
    merged = cast(LlamaForCausalLM, adapted.merge_and_unload())  # type: ignore[operator]
    torch.testing.assert_close(logits(merged), trained, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(reload(model, tmp_path / "merged")), logits(merged))


@IGNORE_PEFT
def test_lora_finds_all_factors(saved):
    model, folder = saved
    adapted = peft.get_peft_model(
        reload(model, folder), peft.LoraConfig(r=2, target_modules="all-linear")
    )
    wrapped = [m for m in adapted.modules() if isinstance(m, peft.tuners.lora.Linear)]
    assert len(wrapped) == 2 * len(low_rank_layers(model))


def training(folder, **options):
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        save_steps=2,
        save_strategy="steps",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=0,
        **options,
    )
    tokens = torch.randint(3, 96, (8, 8), generator=torch.Generator().manual_seed(2)).tolist()
    data = Dataset.from_dict({"input_ids": tokens, "labels": tokens})
    return arguments, data


def test_trainer(saved, tmp_path):
    model, folder = saved
    arguments, data = training(tmp_path / "run", max_steps=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Trainer's own
        trainer = Trainer(model=reload(model, folder), args=arguments, train_dataset=data)
        trainer.train()
        assert trainer.model is not None
        through = logits(trainer.model.eval())
        again = Trainer(model=reload(model, folder), args=arguments, train_dataset=data)
        again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert (through - logits(model)).abs().max() > 1e-3
    assert again.model is not None
    assert torch.equal(logits(again.model.eval()), through)
    checkpoint = reload(model, tmp_path / "run" / "checkpoint-4")
    assert torch.equal(logits(checkpoint), through)


@NEEDS_5
def test_pipeline(shared_data, tmp_path):
    source = shared_data / "models" / "stories260K"
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = compress(AutoModelForCausalLM.from_pretrained(source), rank=24)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    generator = pipeline("text-generation", model=str(tmp_path), device="cpu")
    assert isinstance(generator.model.model.layers[0].mlp.up_proj, LowRankLinear)
    told = generator("Once upon a time", max_new_tokens=8, do_sample=False)[0]["generated_text"]
    assert told.startswith("Once upon a time")
    assert len(told) > len("Once upon a time")


@pytest.mark.parametrize(
    "name", ["stories260K", "babyllama105", "gpt-nano-sort-gpt2", "books-llama-1m"]
)
def test_trained_models(shared_data, name, tmp_path):
    dense = AutoModelForCausalLM.from_pretrained(shared_data / "models" / name)
    model = compress(dense, rank=16)
    tokens = torch.arange(3).repeat(2, 3)
    with torch.no_grad():
        before = model(tokens).logits
        model.save_pretrained(tmp_path)
        loaded = reload(model, tmp_path, dtype="auto")
        assert loaded.dtype == model.dtype
        assert torch.equal(loaded(tokens).logits, before)


def test_configs_that_mean_nothing():
    layer = {"a.b": {"rank": 3}}
    good = {"quant_method": "soco", "format_version": 1, "layers": layer}
    config = SocoConfig.from_dict(good)
    assert isinstance(config, SocoConfig)
    assert config.to_dict() == good | {"report": None}
    config = SocoConfig.from_dict(good | {"experts": ["a"], "format_version": 2})
    assert isinstance(config, SocoConfig)
    assert config.to_dict() == good | {"report": None, "experts": ["a"], "format_version": 2}
    where = "quantization_config in config.json"
    bad = {
        "has no format_version": {k: v for k, v in good.items() if k != "format_version"},
        "has no layers": {k: v for k, v in good.items() if k != "layers"},
        "has format_version 3, and this soco reads up to 2": good | {"format_version": 3},
        "has a format_version that is none: '1'": good | {"format_version": "1"},
        "has a format_version that is none: True": good | {"format_version": True},
        "has a format_version that is none: 0": good | {"format_version": 0},
        "has an unknown field 'inner'": good | {"inner": {}},
        "is of 'awq', not of 'soco'": good | {"quant_method": "awq"},
        "has a report that is no object: 3": good | {"report": 3},
        "must have an object of layers, got ['a.b']": good | {"layers": ["a.b"]},
        "must have a list of names for its experts, got 'a.b'": good | {"experts": "a.b"},
        "must have a list of names for its experts, got [1]": good | {"experts": [1]},
        "must have a list of names for its experts, got {'a.b': 4}": good | {"experts": {"a.b": 4}},
        "must have a list of names for its experts, got None": good | {"experts": None},
        "names the same experts twice: ['a', 'a']": good | {"experts": ["a", "a"]},
        'must say {"rank": ...} of layer a.b, got 3': good | {"layers": {"a.b": 3}},
        'must say {"rank": ...} of layer a.b, got {}': good | {"layers": {"a.b": {}}},
        "has an unknown field 'bits' of layer a.b": good
        | {"layers": {"a.b": {"rank": 3, "bits": 4}}},
        "must say {\"rank\": ...} of layer a.b, got {'pivoted': True}": good
        | {"layers": {"a.b": {"pivoted": True}}},
        "can only have true for pivoted of layer a.b": good
        | {"layers": {"a.b": {"rank": 3, "pivoted": 1}}},
        "has format_version 1, which knows no pivoted layers, no shared basis": good
        | {"layers": {"a.b": {"rank": 3, "pivoted": True}}},
        "can only have true for the bias of layer a.b": good
        | {"layers": {"a.b": {"rank": 3, "bias": False}}},
    }
    for rank in (0, -1, True, "3", 3.0, None):
        bad[f"for the rank of layer a.b, got {rank!r}"] = good | {"layers": {"a.b": {"rank": rank}}}
    for message, data in bad.items():
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            SocoConfig.from_dict(data)
        assert where in str(caught.value)
    with pytest.raises(ValueError, match="has an unknown field 'bits'"):
        SocoConfig(layer, bits=4)


def test_bases_that_mean_nothing():
    layers = {"a": {"rank": 3}, "b": {"rank": 3, "basis": "a"}, "p": {"rank": 3, "pivoted": True}}
    good = {"quant_method": "soco", "format_version": 2, "layers": layers}
    config = SocoConfig.from_dict(good)
    assert isinstance(config, SocoConfig)
    assert config.to_dict() == good | {"report": None}
    bad = {
        "of 'z', which is no compressed layer": {"rank": 3, "basis": "z"},
        "of 3, which is no compressed layer": {"rank": 3, "basis": 3},
        "of ['a'], which is no compressed layer": {"rank": 3, "basis": ["a"]},
        "of b, which has one of another layer itself": {"rank": 3, "basis": "b"},
        "of c, which has one of another layer itself": {"rank": 3, "basis": "c"},
        "of a, but their ranks are 4 and 3": {"rank": 4, "basis": "a"},
        "of p, but a pivoted layer shares none": {"rank": 3, "basis": "p"},
        "of a, but a pivoted layer shares none": {"rank": 3, "basis": "a", "pivoted": True},
    }
    for message, layer in bad.items():
        message = f"quantization_config in config.json gives layer c the basis {message}"
        with pytest.raises(ValueError, match=re.escape(message) + "$"):
            SocoConfig.from_dict(good | {"layers": layers | {"c": layer}})


def test_a_folder_says_the_oldest_format_that_has_it_all():
    plain, pivoted = {"a": {"rank": 3}}, {"a": {"rank": 3, "pivoted": True}}
    assert SocoConfig(plain).format_version == 1
    assert SocoConfig({}).format_version == 1
    assert SocoConfig(pivoted).format_version == 2
    assert SocoConfig(plain | {"b": {"rank": 3, "basis": "a"}}).format_version == 2
    assert SocoConfig(plain, format_version=2).format_version == 2  # nothing wrong with that


def test_registering_twice():
    register()
    register()
    assert auto.AUTO_QUANTIZER_MAPPING["soco"] is SocoQuantizer
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["soco"] is SocoConfig


def test_another_quantizer_is_refused(saved):
    other = auto.AUTO_QUANTIZATION_CONFIG_MAPPING["quanto"](weights="int8")
    with pytest.raises(ValueError, match="quantized with SocoConfig but you are passing a Quanto"):
        AutoModelForCausalLM.from_pretrained(saved[1], quantization_config=other)


def test_the_config_given_back_changes_nothing(saved):
    model, folder = saved
    stored = reload(model, folder).config.quantization_config
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        again = reload(model, folder, quantization_config=stored)
    assert torch.equal(logits(again), logits(model))


def test_nothing_is_compressed_while_loading(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="require the model to be pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=SocoConfig({}))


def test_no_layers_at_all(tmp_path):
    model = tiny_model("llama")
    mark_compressed(model, {})
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(reload(model, tmp_path)), logits(model))


# ---- pivots and shared bases --------------------------------------------------------------------

KINDS = {"pivoted": compress_pivoted, "shared": compress_shared}
SECOND = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module", params=KINDS)
def other_kind(request, tmp_path_factory):
    """A model of one of the two kinds, and its folder."""
    model = KINDS[request.param](tiny_model("llama"))
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder


def share(model, *names):
    """Let compressed layers have one basis, and mark the model anew."""
    layers = [cast(LowRankLinear, model.get_submodule(name)) for name in names]
    for layer in layers:
        layer.down.weight = layers[0].down.weight
    share_basis(layers)
    mark(model)


def described(model):
    """Kind, rank and basis of every compressed layer; what shares a basis has to share storage."""
    layers = low_rank_layers(model)
    found = {}
    for name, layer in layers.items():
        basis = layer.basis if isinstance(layer, LowRankLinear) else None
        if basis is not None:
            assert layer.down.weight.data_ptr() == basis.down.weight.data_ptr()
            basis = next(other for other in layers if layers[other] is basis)
        found[name] = type(layer), layer.rank, basis
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "phi3", "bert", "t5"])
def test_other_kinds_saved_and_loaded(name, kind, tmp_path):
    model = KINDS[kind](tiny_model(name))
    assert any(type(m) is PivotedLinear or m.basis for m in low_rank_layers(model).values())
    before = logits(model)
    model.save_pretrained(tmp_path / "a")
    loaded = reload(model, tmp_path / "a")
    assert torch.equal(logits(loaded), before)
    assert described(loaded) == described(model)
    loaded.save_pretrained(tmp_path / "b")
    for file in ("config.json", "model.safetensors"):
        same = (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
        assert same or OLD_NAMES
    torch.testing.assert_close(logits(loaded.dequantize()), before, rtol=1e-4, atol=1e-5)
    assert not low_rank_layers(loaded)


def test_what_the_folders_hold(other_kind):
    model, folder = other_kind
    entries = read_headers(weight_files(folder))
    config = model.config.quantization_config.to_dict()
    assert config["format_version"] == 2
    params = sum(p.numel() for p in model.parameters())
    held = sum(torch.Size(entry.shape).numel() for entry in entries.values())
    layers = low_rank_layers(model)
    if isinstance(layers[SECOND], PivotedLinear):
        assert config["layers"][SECOND] == {"rank": 4, "pivoted": True}
        assert entries[f"{SECOND}.pivots"].shape == (4,)
        assert entries[f"{SECOND}.pivots"].dtype == "I64"
        assert entries[f"{SECOND}.up.weight"].shape == (28, 4)
        assert held == params + sum(1 + layer.rank for layer in layers.values())
    else:
        assert config["layers"][Q_PROJ] == {"rank": 4}
        assert config["layers"][SECOND] == {"rank": 4, "basis": Q_PROJ}
        assert f"{Q_PROJ}.down.weight" in entries
        assert f"{SECOND}.down.weight" not in entries
        assert held == params + len(layers)


@pytest.mark.parametrize(
    "options",
    [{"dtype": torch.bfloat16}, {"device_map": "cpu"}, {"device_map": "auto"}, {"dtype": "auto"}],
    ids=str,
)
def test_other_kinds_loaded_in_other_ways(other_kind, options):
    model, folder = other_kind
    loaded, again = reload(model, folder, **options), reload(model, folder, **options)
    assert described(loaded) == described(model)
    assert torch.equal(logits(loaded), logits(again))
    half = options.get("dtype") == torch.bfloat16
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16 if half else torch.float32}
    if not half and loaded.device.type == "cpu":
        assert torch.equal(logits(loaded), logits(model))
    for layer in low_rank_layers(loaded).values():
        if isinstance(layer, PivotedLinear):
            assert layer.pivots.dtype == torch.int64


def test_shards_of_other_kinds(other_kind, tmp_path):
    model, _ = other_kind
    model.save_pretrained(tmp_path, max_shard_size="12KB")
    assert len(weight_files(tmp_path)) >= 3
    loaded = reload(model, tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert described(loaded) == described(model)


def test_other_kinds_offloaded_to_disk(other_kind, tmp_path):
    model, folder = other_kind
    loaded = reload(model, folder, device_map=OFFLOADED, offload_folder=tmp_path / "off")
    assert loaded.get_submodule(f"{SECOND}.down").weight.is_meta
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the memory that saving takes
        loaded.save_pretrained(tmp_path / "b")
    assert torch.equal(logits(reload(model, tmp_path / "b")), logits(model))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_other_kinds_in_other_classes(name, kind, tmp_path):
    model = KINDS[kind](tiny_model(name))
    model.save_pretrained(tmp_path / "a")
    base = AutoModel.from_pretrained(tmp_path / "a")
    inputs = token_inputs(model, rows=1)
    with torch.no_grad():
        hidden = base(**inputs).last_hidden_state
        expected = model(**inputs, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(hidden, expected)
    base.save_pretrained(tmp_path / "b")
    again = reload(base, tmp_path / "b")
    assert described(again) == described(base)
    torch.testing.assert_close(again(**inputs)[0], base(**inputs)[0])
    if name != "bert":  # whose masked model has no pooler
        head = type(model).from_pretrained(tmp_path / "b")  # from the base: a new, dense head
        assert described(head) == described(model)


@NEEDS_5  # 4 does not save what it does not list as tied
@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_in_tied_blocks(kind, tmp_path):
    from test_surgery import zamba

    model = zamba()
    if kind == "pivoted":
        compress_pivoted(model, include="*.shared_transf.*")
    else:  # one basis for the three of the attention
        compress(model, include="*.shared_transf.*")
        attention = "model.layers.1.shared_transf.self_attn"
        share(model, *(f"{attention}.{name}_proj" for name in "qkv"))
    model.save_pretrained(tmp_path / "a")
    loaded = reload(model, tmp_path / "a")
    assert torch.equal(logits(loaded), logits(model))
    assert described(loaded) == described(model)
    first, second = (loaded.model.layers[i].shared_transf.self_attn.k_proj for i in (1, 3))
    assert first is second
    loaded.save_pretrained(tmp_path / "b")
    assert torch.equal(logits(reload(model, tmp_path / "b")), logits(model))


def test_other_kinds_generate(other_kind):
    model, folder = other_kind
    test_generate((model, folder))


def test_other_kinds_export(other_kind):
    test_exports(other_kind)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_other_kinds_compile(other_kind):
    test_compiles(other_kind)


@IGNORE_PEFT
def test_lora_on_other_kinds(other_kind, tmp_path):
    """An adapter on a basis belongs to every layer that uses it, merged or not."""
    test_lora(other_kind, tmp_path)
    model, folder = other_kind
    adapted = peft.get_peft_model(
        reload(model, folder), peft.LoraConfig(r=2, target_modules=["q_proj.down"])
    )
    inside = "base_model.model"
    first, second = (adapted.get_submodule(f"{inside}.{name}") for name in (Q_PROJ, SECOND))
    assert isinstance(second.down, peft.tuners.lora.Linear)
    assert (first.down is second.down) == (not isinstance(second, PivotedLinear))


@IGNORE_PEFT
def test_lora_finds_all_factors_of_other_kinds(other_kind):
    model, folder = other_kind
    adapted = peft.get_peft_model(
        reload(model, folder), peft.LoraConfig(r=2, target_modules="all-linear")
    )
    wrapped = [m for m in adapted.modules() if isinstance(m, peft.tuners.lora.Linear)]
    layers = low_rank_layers(model).values()
    own = [layer for layer in layers if not isinstance(layer, LowRankLinear) or not layer.basis]
    assert len(wrapped) == len(layers) + len(own)


def test_trainer_on_other_kinds(other_kind, tmp_path):
    """Trained, resumed and loaded from a checkpoint; a basis is trained by all that use it."""
    test_trainer(other_kind, tmp_path)


def test_the_basis_has_to_be_in_the_class(tmp_path):
    """A base model of which only the layers without the basis are there."""
    model = tiny_model("llama")
    compress(model, include=["lm_head", "*.0.mlp.up_proj"])
    share(model, "lm_head", "model.layers.0.mlp.up_proj")
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(reload(model, tmp_path)), logits(model))
    with pytest.raises(ValueError, match=r"up_proj the basis of lm_head, which LlamaModel does no"):
        AutoModel.from_pretrained(tmp_path)


def test_pivots_are_read_before_loading(tmp_path):
    """What transformers 4 needs for layers that are offloaded."""
    model = compress_pivoted(tiny_model("llama"))
    model.save_pretrained(tmp_path)
    entries, key = read_headers(weight_files(tmp_path)), f"{SECOND}.pivots"
    assert torch.equal(_stored_pivots(entries, key, 4), model.get_submodule(SECOND).pivots)
    for wrong in (_stored_pivots(entries, key, 3), _stored_pivots({}, key, 3)):
        assert wrong.tolist() == [-1, -1, -1]
    assert _stored_pivots(entries, f"{SECOND}.weight", 1).tolist() == [-1]


# ---- mixtures of experts -------------------------------------------------------------------------

PARTS = {
    "all": None,
    "one layer of one expert": "*.experts.2.down_proj",
    "all but the second layers": ["*.experts.*.gate_up_proj", "*.experts.*.up_proj"],
}


def aligned(model):
    """A copy: loaded weights lie in memory as in the file, and odd places round otherwise."""
    return copy.deepcopy(model)


def compressed_mixture(name, include=None):
    """A compressed mixture; modules in which nothing was compressed are fused again."""
    model = tiny_mixture(name)
    fused = split_experts(model)
    patterns = [include] if isinstance(include, str) else include
    if patterns is not None:  # every pattern has to match
        first = "up_proj" if name == "nemotron_h" else "gate_up_proj"
        patterns = [p for p in patterns if p.endswith((f".{first}", "down_proj"))]
    compress(model, include=patterns)
    join_experts(model, fused)
    layers = {layer: module.rank for layer, module in low_rank_layers(model).items()}
    mark_compressed(model, layers)
    return model


@NEEDS_5
@pytest.mark.parametrize("include", PARTS.values(), ids=PARTS.keys())
@pytest.mark.parametrize("name", MIXTURES)
def test_experts_are_saved_and_loaded(name, include, tmp_path):
    """Dense layers beside compressed ones have names that stock folders merge."""
    model = compressed_mixture(name, include)
    before = logits(model)
    model.save_pretrained(tmp_path / "a")
    loaded = reload(model, tmp_path / "a")
    assert torch.equal(logits(aligned(loaded)), before)
    stored, kept = loaded.state_dict(), model.state_dict()
    assert stored.keys() == kept.keys()
    assert all(torch.equal(tensor, stored[key]) for key, tensor in kept.items())
    assert low_rank_layers(loaded).keys() == low_rank_layers(model).keys()
    assert find_experts(loaded).keys() == find_experts(model).keys()
    loaded.save_pretrained(tmp_path / "b")
    assert torch.equal(logits(aligned(reload(model, tmp_path / "b"))), before)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@NEEDS_5
@pytest.mark.parametrize("include", PARTS.values(), ids=PARTS.keys())
@pytest.mark.parametrize("name", MIXTURES)
def test_experts_in_other_classes(name, include, tmp_path):
    model = compressed_mixture(name, include)
    model.save_pretrained(tmp_path / "a")
    base, info = AutoModel.from_pretrained(
        tmp_path / "a", output_loading_info=True, experts_implementation="eager"
    )
    assert not info["missing_keys"]
    assert info["unexpected_keys"] == {"lm_head.weight"}
    assert len(base.config.quantization_config.experts) == len(find_experts(model))
    inputs = token_inputs(model, rows=1)
    with torch.no_grad():
        hidden = aligned(base)(**inputs).last_hidden_state
        assert torch.equal(model.get_output_embeddings()(hidden), model(**inputs).logits)
    base.save_pretrained(tmp_path / "b")
    again = reload(base, tmp_path / "b", experts_implementation="eager")
    with torch.no_grad():
        assert torch.equal(aligned(again)(**inputs).last_hidden_state, hidden)
    head, info = type(model).from_pretrained(
        tmp_path / "b", output_loading_info=True, experts_implementation="eager"
    )  # a new, dense head
    assert info["missing_keys"] == {"lm_head.weight"}
    with torch.no_grad():
        assert torch.equal(aligned(head).base_model(**inputs).last_hidden_state, hidden)


@NEEDS_5
def test_split_and_fused_experts_in_one_model(tmp_path):
    model = compressed_mixture("qwen2_moe", "*.0.*.experts.1.down_proj")
    assert list(find_experts(model)) == ["model.layers.0.mlp.experts"]
    model.save_pretrained(tmp_path, max_shard_size="12KB")
    entries = read_headers(weight_files(tmp_path))
    assert entries["model.layers.0.mlp.experts.0.gate_up_proj.weight"].shape == (32, 32)
    assert entries["model.layers.1.mlp.experts.0.gate_proj.weight"].shape == (16, 32)  # as stock
    loaded = reload(model, tmp_path, experts_implementation="eager")
    assert torch.equal(logits(aligned(loaded)), logits(model))
    assert list(find_experts(loaded)) == ["model.layers.0.mlp.experts"]
    assert type(loaded.get_submodule("model.layers.1.mlp.experts")).__name__ == "Qwen2MoeExperts"
    again = pickle.loads(pickle.dumps(loaded))  # with what transformers keeps for saving it
    again.save_pretrained(tmp_path / "again", max_shard_size="12KB")
    assert read_headers(weight_files(tmp_path / "again")).keys() == entries.keys()


@NEEDS_5
@IGNORE_PEFT
def test_a_loaded_mixture_is_an_ordinary_model(tmp_path):
    """bfloat16, a device map, generate, training, LoRA on the factors, pickle."""
    model = compressed_mixture("mixtral")
    model.save_pretrained(tmp_path)
    loaded = reload(model, tmp_path, dtype=torch.bfloat16, device_map={"": "cpu"})
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert not loaded.hf_quantizer.is_compileable
    loaded = reload(model, tmp_path)
    tokens = token_inputs(model)["input_ids"]
    options = dict(max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(tokens))
    assert torch.equal(loaded.generate(tokens, **options), model.generate(tokens, **options))
    assert torch.equal(logits(pickle.loads(pickle.dumps(loaded))), logits(model))
    loaded(input_ids=tokens, labels=tokens).loss.backward()
    experts = next(iter(find_experts(loaded).values()))
    grads = [p.grad for p in experts.parameters()]
    assert any(g is not None and float(g.abs().max()) > 0 for g in grads)
    adapted = peft.get_peft_model(loaded, peft.LoraConfig(r=2, target_modules=["down_proj.up"]))
    wrapped = [m for m in adapted.modules() if isinstance(m, peft.tuners.lora.Linear)]
    assert len(wrapped) == 8


@NEEDS_5
@pytest.mark.parametrize("name", MIXTURES)
def test_dequantize_fuses_experts(name, tmp_path):
    model = compressed_mixture(name)
    before = logits(model)
    stock = {key: part.shape for key, part in tiny_mixture(name).state_dict().items()}
    dense = model.dequantize()
    assert not find_experts(dense)
    assert {key: part.shape for key, part in dense.state_dict().items()} == stock
    torch.testing.assert_close(logits(dense), before, rtol=1e-4, atol=1e-5)
    dense.set_experts_implementation("batched_mm")  # it asks the config of the model
    torch.testing.assert_close(logits(dense), before, rtol=1e-4, atol=1e-5)
    dense.save_pretrained(tmp_path)
    again = reload(model, tmp_path, experts_implementation="batched_mm")
    assert torch.equal(logits(aligned(again)), logits(dense))


def test_experts_that_are_layers_already(tmp_path):
    """As all are in transformers 4: nothing to split."""
    model = compress(tiny_model("llama"))
    assert not any(isinstance(module, Experts) for module in model.modules())
    model.save_pretrained(tmp_path)
    assert "experts" not in (tmp_path / "config.json").read_text()
