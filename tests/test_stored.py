"""Models that stay in their folder: what is read, when, and what is refused."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from soco import stored as stored_module
from soco.experts import split_experts
from soco.headers import Entry
from soco.stored import StoredModel, _rows_in
from tiny_models import MIXTURES, NEEDS_5, tiny_mixture, tiny_model

CPU = torch.device("cpu")


def stored(tmp_path, name="llama", dtype=torch.float32, **changes):
    model = tiny_model(name, dtype, **changes)
    model.save_pretrained(tmp_path / "model")
    return StoredModel(tmp_path / "model"), model


def edit(folder, change):
    file = folder / "model.safetensors"
    held = load_file(file)
    change(held)
    save_file(held, file, metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "opt", "bloom", "bert"])
def test_parameters_are_empty_and_buffers_are_not(name, tmp_path):
    found, model = stored(tmp_path, name)
    assert not found.model.training
    assert all(parameter.is_meta for parameter in found.model.parameters())
    ours, theirs = dict(found.model.named_buffers()), dict(model.named_buffers())
    assert ours.keys() == theirs.keys()
    for key, buffer in theirs.items():
        assert torch.equal(ours[key], buffer), key
    found.check_complete()


def test_buffers_that_are_stored_are_read(tmp_path, monkeypatch):
    """Few models have such: the routers of DeepSeek, say."""
    made = LlamaRMSNorm.__init__

    def with_buffer(self, *arguments, **options):
        made(self, *arguments, **options)
        self.register_buffer("shift", torch.zeros(2))

    monkeypatch.setattr(LlamaRMSNorm, "__init__", with_buffer)
    model = tiny_model("llama")
    model.model.norm.shift.copy_(torch.tensor([3.0, 4.0]))
    model.save_pretrained(tmp_path / "model")
    found = StoredModel(tmp_path / "model")
    assert found.model.model.norm.shift.tolist() == [3.0, 4.0]
    assert found.model.model.layers[0].input_layernorm.shift.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_is_that_of_the_config_or_of_the_files(dtype, tmp_path):
    found, _ = stored(tmp_path, dtype=dtype)
    assert found.dtype == dtype
    config = tmp_path / "model" / "config.json"
    described = json.loads(config.read_text())
    for key in ("dtype", "torch_dtype"):
        described.pop(key, None)
    config.write_text(json.dumps(described))
    assert StoredModel(tmp_path / "model").dtype == dtype
    assert torch.get_default_dtype() == torch.float32


def test_some_in_memory(tmp_path):
    found, model = stored(tmp_path)
    names = ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"]
    with found.in_memory(names, torch.float64, CPU):
        there = {n: p for n, p in found.model.named_parameters() if not p.is_meta}
        assert sorted(there) == sorted(names)
        for name, parameter in there.items():
            assert parameter.dtype == torch.float64
            assert not parameter.requires_grad
            assert torch.equal(parameter, model.state_dict()[name].double())
    assert all(parameter.is_meta for parameter in found.model.parameters())


def test_what_is_broken_is_named_and_nothing_stays_in_memory(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    key = "model.layers.1.mlp.up_proj.weight"
    edit(tmp_path / "model", lambda held: held[key][0, 1].fill_(float("inf")))
    found = StoredModel(tmp_path / "model")
    names = ["model.norm.weight", key]
    with (
        pytest.raises(ValueError, match=rf"{key} .* holds NaN or Inf"),
        found.in_memory(names, torch.float32, CPU),
    ):
        pass
    assert all(parameter.is_meta for parameter in found.model.parameters())


def test_names_with_and_without_the_prefix(tmp_path):
    model = tiny_model("gpt2")
    model.transformer.save_pretrained(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    described = json.loads(config.read_text()) | {"architectures": ["GPT2LMHeadModel"]}
    config.write_text(json.dumps(described))
    found = StoredModel(tmp_path / "model")
    assert found.key("transformer.wte.weight") == "wte.weight"
    assert found.key("lm_head.weight") is None  # tied
    found.check_complete()


@NEEDS_5
def test_names_that_transformers_saves_by(tmp_path):
    found, model = stored(tmp_path, "gpt_neox")
    head = next(n for n, p in model.named_parameters() if p is model.get_output_embeddings().weight)
    assert found.key(head) is not None
    found.check_complete()


@NEEDS_5
@pytest.mark.parametrize("name", MIXTURES)
def test_experts_are_layers(name, tmp_path):
    """As soco splits them in memory, whatever they are in the files."""
    model = tiny_mixture(name)
    model.save_pretrained(tmp_path / "model")
    found = StoredModel(tmp_path / "model")
    fused = found.split_experts()
    assert fused.keys() == split_experts(model).keys()
    found.check_complete()
    experts = [n for n in model.state_dict() if n.startswith(tuple(f"{each}." for each in fused))]
    assert experts
    for key, tensor in model.state_dict().items():
        held = found.read(found.require(key, tuple(tensor.shape)), floating=False)
        assert torch.equal(held, tensor), key
    for name in experts:
        if name.endswith("weight"):
            weight = found.weight(name.removesuffix(".weight"))
            assert torch.equal(weight, model.state_dict()[name])
    stored_as = {key for name in fused for key in found.sources(f"{name}.")}
    assert stored_as <= found.entries.keys()
    assert sum(found.entries[key].shape != () for key in stored_as) > 0
    ours = sum(model.state_dict()[name].numel() for name in experts)
    assert ours == sum(math.prod(found.entries[key].shape) for key in stored_as)


@pytest.mark.parametrize(
    ("part", "rows"),
    [
        (slice(0, 3), range(3)), (slice(2, 6), range(2, 6)), (slice(0, 0), range(0)),
        ([1, 0], range(0)), ([0, 2], range(0)),
    ],
)  # fmt: skip
def test_rows_in_their_order(part, rows):
    numbers = torch.arange(6)[:, None].expand(6, 4)
    assert _rows_in(numbers[part], weights=True) == rows
    assert _rows_in(numbers[part][:, 0], weights=False) == rows
    if len(rows) > 1:
        assert _rows_in(numbers[part].T, weights=True) == range(0)  # turned


@NEEDS_5
@pytest.mark.parametrize("turn", ["rows", "two experts", "columns", "half", "one"])
def test_experts_that_are_stored_in_another_way(turn, tmp_path, monkeypatch):
    """What transformers may come to one day is refused, and not read wrongly."""
    tiny_mixture("gpt_oss").save_pretrained(tmp_path / "model")
    saved = stored_module.saved_as

    def other(model, name, tensor):
        parts = saved(model, name, tensor)
        if turn == "rows":
            parts = {key: part.flip(1) for key, part in parts.items()}
        elif turn == "columns":
            parts = {key: part.mT.reshape(part.shape) for key, part in parts.items()}
        elif turn == "one":  # the first expert's rows, of all that are stored one by one
            parts = {
                f"{key}.{expert}": part[expert].flip(0) if expert == 0 else part[expert]
                for key, part in parts.items()
                for expert in range(len(part))
            }
        elif turn == "half":  # of each expert
            parts = {
                f"{key}.{expert}": part[expert, : part.shape[1] // 2]
                for key, part in parts.items()
                for expert in range(len(part))
            }
        else:
            halves = tensor.flatten(0, 1).chunk(2)
            parts = {f"{name}.{half}": part for half, part in enumerate(halves)}
        entries = {key: Entry(tmp_path, "F32", tuple(part.shape)) for key, part in parts.items()}
        found.entries = {**found.entries, **entries}
        return parts

    found = StoredModel(tmp_path / "model")
    monkeypatch.setattr(stored_module, "saved_as", other)
    with pytest.raises(
        ValueError, match=r"of which the experts model\.layers\.0\.mlp\.experts would"
    ):
        found.split_experts()


def test_a_model_without_experts(tmp_path):
    found, _ = stored(tmp_path)
    assert found.split_experts() == {}
    assert found.sources("model.") == []


def test_what_is_missing_is_named(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    edit(tmp_path / "model", lambda held: held.pop("lm_head.weight"))
    found = StoredModel(tmp_path / "model")
    with pytest.raises(ValueError, match=r"holds no lm_head.weight of shape \(96, 32\)"):
        found.check_complete()


def test_another_shape_is_named(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    key = "model.norm.weight"
    edit(tmp_path / "model", lambda held: held.update({key: torch.ones(33)}))
    with pytest.raises(ValueError, match=rf"holds no {key} of shape \(32,\)"):
        StoredModel(tmp_path / "model").check_complete()


def test_only_floats_are_weights(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    key = "model.norm.weight"
    edit(tmp_path / "model", lambda held: held.update({key: torch.ones(32, dtype=torch.int64)}))
    found = StoredModel(tmp_path / "model")
    with pytest.raises(ValueError, match=rf"holds {key} in I64, which is no float"):
        found.read(key)
    assert found.read(key, floating=False).dtype == torch.int64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["NoSuchModel"]}, "names the architecture NoSuchModel"),
        ({"architectures": []}, "must name one class"),
        ({"hidden_size": "wide"}, "describes no model"),
        ({"num_attention_heads": 0}, "describes no model"),
        ({"quantization_config": {"quant_method": "gptq"}}, "is quantized or compressed already"),
    ],
)
def test_configs_that_describe_no_model(changes, message, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        StoredModel(tmp_path / "model")
    assert torch.get_default_dtype() == torch.float32


def test_no_folder(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        StoredModel(tmp_path / "nothing")
