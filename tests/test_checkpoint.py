"""soco.checkpoint: what is written can be read, and what is broken is named."""

import copy
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from soco.checkpoint import export_dense, load, mark_compressed, save, write_shards
from soco.experts import find_experts, join_experts, split_experts
from soco.folders import write_checksums
from soco.modules import LowRankLinear, PivotedLinear, share_basis
from soco.surgery import find_linears, low_rank_layers, replace_module, untie_head
from tiny_models import (
    IS_5,
    MIXTURES,
    NEEDS_5,
    compress,
    compress_pivoted,
    compress_shared,
    logits,
    tiny_mixture,
    tiny_model,
    token_inputs,
)

UP_PROJ = "model.layers.1.mlp.up_proj"
NO_SUCH = "model.layers.9.mlp.up_proj"


@pytest.fixture(scope="module")
def model():
    return compress(tiny_model("llama-tied"), report={"method": "svd"})


@pytest.fixture(scope="module")
def original(model, tmp_path_factory):
    """A folder that is in order."""
    folder = tmp_path_factory.mktemp("original") / "model"
    save(model, folder)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    """A copy to break."""
    return shutil.copytree(original, tmp_path / "model")


@pytest.fixture
def sharded(model, tmp_path):
    """The same in several files."""
    save(model, tmp_path / "sharded", max_shard_size="12KB")
    return tmp_path / "sharded"


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_load_knows_the_class(original, model):
    loaded = load(original)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert torch.equal(logits(loaded), logits(model))
    assert load(str(original), dtype=torch.bfloat16, device_map="cpu").dtype == torch.bfloat16
    assert load(original, attn_implementation="eager").config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["gpt2", "t5", "bert"])
def test_load_other_classes(name, tmp_path):
    model = compress(tiny_model(name))
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded), logits(model))


def test_save_writes_what_save_pretrained_writes(model, original, tmp_path):
    """And checksums of it."""
    model.save_pretrained(tmp_path)
    write_checksums(tmp_path)
    assert files(tmp_path) == files(original)


@NEEDS_5
def test_save_with_a_tokenizer(shared_data, tmp_path):
    source = shared_data / "models" / "babyllama105"
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = compress(AutoModelForCausalLM.from_pretrained(source), rank=32)
    save(model, tmp_path / "model", tokenizer)
    again = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert again("Once upon")["input_ids"] == tokenizer("Once upon")["input_ids"]
    tokens = torch.tensor([tokenizer("Once upon a time")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "model")(tokens).logits, model(tokens).logits)
    dense = (source / "model.safetensors").stat().st_size
    assert (tmp_path / "model" / "model.safetensors").stat().st_size < 0.8 * dense


def test_saving_again_replaces(model, original, folder):
    (folder / "notes.txt").write_text("mine")
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"left over")
    save(model, folder)
    assert files(folder) == files(original) | {"notes.txt": b"mine"}
    assert os.listdir(folder.parent) == ["model"]


def test_saving_over_something_else(model, tmp_path):
    dense, notes, file = tmp_path / "dense", tmp_path / "notes", tmp_path / "file"
    tiny_model("llama").save_pretrained(dense)
    notes.mkdir()
    (notes / "a.txt").write_text("mine")
    file.write_text("mine")
    before = files(dense)
    for path in (dense, notes, file):
        with pytest.raises(ValueError, match=f"{path.name} exists and is not the folder of a mod"):
            save(model, path)
    assert files(dense) == before
    assert files(notes) == {"a.txt": b"mine"}
    (notes / "a.txt").unlink()
    save(model, notes)
    assert load(notes)


@pytest.mark.parametrize("error", [OSError("no more space"), KeyboardInterrupt()])
def test_a_crash_leaves_the_old_folder(model, folder, monkeypatch, error):
    before = files(folder)
    write = save_file

    def crash(tensors, filename, **options):
        write(tensors, filename, **options)
        os.truncate(filename, 100)
        raise error

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", crash)
    for target in (folder, folder.with_name("new")):
        with pytest.raises(type(error)):
            save(model, target)
    assert files(folder) == before
    assert os.listdir(folder.parent) == ["model"]


def test_only_what_is_compressed_is_saved(model, tmp_path):
    with pytest.raises(ValueError, match="the model is not compressed by soco"):
        save(tiny_model("llama"), tmp_path / "model")
    changed = copy.deepcopy(model)
    changed.model.layers[0].mlp.up_proj.down = nn.Sequential()
    with pytest.raises(
        ValueError, match=r"0\.mlp\.up_proj\.down is a torch\.nn.*Sequential: merge"
    ):
        save(changed, tmp_path / "model")
    replace_module(changed, "model.layers.0.mlp.up_proj", nn.Linear(32, 48))
    with pytest.raises(
        ValueError, match=r"layer model\.layers\.0\.mlp\.up_proj of rank 4 is in th"
    ):
        save(changed, tmp_path / "model")
    changed = copy.deepcopy(model)
    del changed.config.quantization_config.layers[UP_PROJ]
    with pytest.raises(ValueError, match=r"compressed layer model\.layers\.1\.mlp\.up_proj is not"):
        save(changed, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_marks_have_to_be_true():
    model = tiny_model("llama")
    replace_module(model, UP_PROJ, LowRankLinear(32, 48, 3, bias=False))
    for layers, message in (
        ({}, "rank none in layers, but 3 in the model"),
        ({UP_PROJ: 4}, "rank 4 in layers, but 3 in the model"),
        ({UP_PROJ: 3, "lm_head": 2}, "lm_head has rank 2 in layers, but is not compressed in the"),
    ):
        with pytest.raises(ValueError, match=message):
            mark_compressed(model, layers)
    for report in ({"loss": float("nan")}, {"tensor": torch.ones(1)}):
        with pytest.raises(ValueError, match="the report is not plain JSON"):
            mark_compressed(model, {UP_PROJ: 3}, report)
    assert not hasattr(model.config, "quantization_config")
    mark_compressed(model, {UP_PROJ: 3}, {"shape": (48, 32)})
    assert model.config.quantization_config.report == {"shape": [48, 32]}


def test_a_tied_head_has_to_be_untied():
    model = tiny_model("llama-tied")
    with pytest.raises(ValueError, match="ties the compressed layer lm_head to the embeddings"):
        compress(model, include="lm_head")
    model = tiny_model("llama-tied")
    untie_head(model)
    compress(model, include="lm_head")


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "qwen2", "opt", "mixtral"])
def test_export_dense(name, tmp_path):
    model = compress(tiny_model(name))
    before = logits(model)
    save(model, tmp_path / "compact")
    (tmp_path / "compact" / "tokenizer.json").write_text("{}")
    export_dense(model, tmp_path / "one")
    export_dense(tmp_path / "compact", tmp_path / "two")
    assert low_rank_layers(model)  # still compressed
    assert torch.equal(logits(model), before)
    stock, info = type(model).from_pretrained(tmp_path / "one", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert find_linears(stock).keys() == find_linears(tiny_model(name)).keys()
    torch.testing.assert_close(logits(stock), before, rtol=1e-4, atol=1e-5)
    assert "soco" not in (tmp_path / "one" / "config.json").read_text()
    one, two = files(tmp_path / "one"), files(tmp_path / "two")
    assert two == one | {"tokenizer.json": b"{}"}
    tiny_model(name).save_pretrained(tmp_path / "stock")
    shapes = {key: tensor.shape for key, tensor in load_file(weights(tmp_path / "stock")).items()}
    assert {k: t.shape for k, t in load_file(weights(tmp_path / "one")).items()} == shapes


def weights(folder):
    return folder / "model.safetensors"


def test_export_dense_refuses(model, original, tmp_path):
    with pytest.raises(ValueError, match="model exists and is not empty"):
        export_dense(model, original)
    with pytest.raises(ValueError, match="the model is not compressed by soco"):
        export_dense(tiny_model("llama"), tmp_path / "out")
    with pytest.raises(ValueError, match=r"no_such is not a folder"):
        export_dense(tmp_path / "no_such", tmp_path / "out")
    offloaded = copy.deepcopy(model).to("meta")
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight is offloaded"):
        export_dense(offloaded, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bias_that_the_stock_layer_has_not(tmp_path):
    model = tiny_model("llama")
    layer = LowRankLinear.from_factors((torch.ones(48, 3), torch.ones(3, 32)), torch.arange(48.0))
    replace_module(model, UP_PROJ, layer)
    mark_compressed(model, {UP_PROJ: 3}, new_biases=[UP_PROJ])
    save(model, tmp_path / "model")
    assert torch.equal(logits(load(tmp_path / "model")), logits(model))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(stock), logits(model))
    for source in (model, tmp_path / "model"):
        with pytest.raises(ValueError, match=r"1\.mlp\.up_proj has a bias, for which the stock"):
            export_dense(source, tmp_path / "dense")
    before = logits(model)
    torch.testing.assert_close(logits(model.dequantize()), before, rtol=1e-4, atol=1e-5)


# Every defect: how it is made, what is said, and whether plain from_pretrained says it, too: some
# things transformers decides before the plug-in is asked.


def in_config(change):
    def apply(folder):
        file = folder / "config.json"
        config = json.loads(file.read_text())
        change(config)
        file.write_text(json.dumps(config))

    return apply


def in_layers(change):
    return in_config(lambda config: change(config["quantization_config"]["layers"]))


def in_described(change):
    return in_config(lambda config: change(config["quantization_config"]))


def in_tensors(change):
    def apply(folder):
        tensors = load_file(weights(folder))
        change(tensors)
        tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(tensors, weights(folder), metadata={"format": "pt"})

    return apply


def truncate(folder):
    os.truncate(weights(folder), weights(folder).stat().st_size - 5)


def pickled(folder):
    tensors = load_file(weights(folder))
    weights(folder).unlink()
    torch.save(tensors, folder / "pytorch_model.bin")


def change_tensor(key, change):
    return in_tensors(lambda tensors: tensors.update({key: change(tensors[key])}))


BOTH, LOAD = True, False
SINCE_5 = IS_5  # transformers 4 opens the file before it asks the plug-in
DOWN, UP = f"{UP_PROJ}.down.weight", f"{UP_PROJ}.up.weight"
FILE = r"model\.safetensors"
DEFECTS = {
    "truncated": (truncate, rf"{FILE} is truncated: .*weight ends at byte \d+ of \d+", SINCE_5),
    "factor missing": (
        in_tensors(lambda t: t.pop(DOWN)),
        rf"{FILE} lacks {DOWN}, which the model needs with shape \[4, 32\]",
        BOTH,
    ),
    "sentinel missing": (
        in_tensors(lambda t: t.pop(f"{UP_PROJ}.weight")),
        rf"{FILE} lacks {UP_PROJ}\.weight",
        BOTH,
    ),
    "dense tensor missing": (
        in_tensors(lambda t: t.pop("model.norm.weight")),
        rf"{FILE} lacks model\.norm\.weight",
        BOTH,
    ),
    "embeddings missing": (
        in_tensors(lambda t: t.pop("model.embed_tokens.weight")),
        rf"{FILE} lacks model\.embed_tokens\.weight",
        BOTH,
    ),
    "unknown tensor": (
        in_tensors(lambda t: t.update(more=torch.ones(2))),
        rf"{FILE} holds more, which the model has no place for",
        BOTH,
    ),
    "unknown tensor of a layer": (
        in_tensors(lambda t: t.update({f"{UP_PROJ}.bias": torch.ones(48)})),
        rf"{FILE} holds {UP_PROJ}\.bias, which the model has no place for",
        BOTH,
    ),
    "wrong shape": (
        change_tensor(UP, lambda t: t[:-1]),
        rf"{FILE} holds {UP} with shape \[47, 4\], but .* \[48, 4\]",
        BOTH,
    ),
    "wrong dense shape": (
        change_tensor("model.norm.weight", lambda t: t[:-1]),
        rf"{FILE} holds model\.norm\.weight with shape \[31\], but .* \[32\]",
        BOTH,
    ),
    "wrong dtype": (
        change_tensor(UP, lambda t: t.to(torch.int8)),
        rf"{FILE} holds {UP} as I8, which is no floating-point number",
        BOTH,
    ),
    "wrong rank": (
        in_layers(lambda layers: layers[UP_PROJ].update(rank=5)),
        rf"{FILE} holds {DOWN} with shape \[4, 32\], but .* config\.json need \[5, 32\]",
        BOTH,
    ),
    "rank too high": (
        in_layers(lambda layers: layers[UP_PROJ].update(rank=33)),
        rf"config\.json gives layer {UP_PROJ} the rank 33, .* \[48, 32\]",
        BOTH,
    ),
    "rank 0": (
        in_layers(lambda layers: layers[UP_PROJ].update(rank=0)),
        rf"config\.json must have a whole number, .* of layer {UP_PROJ}, got 0",
        BOTH,
    ),
    "rank as text": (
        in_layers(lambda layers: layers[UP_PROJ].update(rank="4")),
        rf"config\.json .* of layer {UP_PROJ}, got '4'",
        BOTH,
    ),
    "no rank": (
        in_layers(lambda layers: layers[UP_PROJ].clear()),
        rf'config\.json must say \{{"rank": \.\.\.\}} of layer {UP_PROJ}, got \{{\}}',
        BOTH,
    ),
    "layer that is not there": (
        in_layers(lambda layers: layers.update({NO_SUCH: {"rank": 4}})),
        rf"config\.json names a compressed layer {NO_SUCH}, which LlamaForCausalLM does not have",
        BOTH,
    ),
    "layer that is no linear": (
        in_layers(lambda layers: layers.update({"model.layers.1.mlp": {"rank": 4}})),
        r"config\.json names a compressed layer model\.layers\.1\.mlp, which is a LlamaMLP in",
        BOTH,
    ),
    "dense layer called compressed": (
        in_config(
            lambda config: [
                config["quantization_config"]["layers"].update({"lm_head": {"rank": 4}}),
                config.update(tie_word_embeddings=False),
            ]
        ),
        rf"{FILE} lacks lm_head\.(down\.)?weight, which the model needs",
        BOTH,
    ),
    "compressed layer called dense": (
        in_layers(lambda layers: layers.pop(UP_PROJ)),
        rf"{FILE} holds {DOWN}, but config\.json names no layer {UP_PROJ}",
        BOTH,
    ),
    "tied head": (
        in_layers(lambda layers: layers.update({"lm_head": {"rank": 4}})),
        r"config\.json ties the compressed layer lm_head to the embeddings",
        BOTH,
    ),
    "newer version": (
        in_described(lambda described: described.update(format_version=3, inner={})),
        r"config\.json has format_version 3, and this soco reads up to 2: upgrade soco",
        BOTH,
    ),
    "wrong version": (
        in_described(lambda described: described.update(format_version="1")),
        r"config\.json has a format_version that is none: '1'",
        BOTH,
    ),
    "no version": (
        in_described(lambda described: described.pop("format_version")),
        r"config\.json has no format_version",
        BOTH,
    ),
    "unknown field": (
        in_described(lambda described: described.update(inner={})),
        r"config\.json has an unknown field 'inner'",
        BOTH,
    ),
    "layers as a list": (
        in_described(lambda described: described.update(layers=[UP_PROJ])),
        r"config\.json must have an object of layers, got \[",
        BOTH,
    ),
    "another method": (
        in_described(lambda described: described.update(quant_method="other")),
        r"config\.json does not describe a model compressed by soco",
        LOAD,
    ),
    "not compressed": (
        in_config(lambda config: config.pop("quantization_config")),
        r"config\.json does not describe a model compressed by soco",
        LOAD,
    ),
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        r"config\.json is missing",
        LOAD,
    ),
    "broken config": (
        lambda folder: (folder / "config.json").write_text("{"),
        r"config\.json is not JSON",
        LOAD,
    ),
    "no architecture": (
        in_config(lambda config: config.pop("architectures")),
        r"config\.json must name one class in architectures, got None",
        LOAD,
    ),
    "unknown architecture": (
        in_config(lambda config: config.update(architectures=["LlamaForCooking"])),
        r"config\.json names the architecture LlamaForCooking, which is not in",
        LOAD,
    ),
    "no weights": (
        lambda folder: weights(folder).unlink(),
        rf"holds neither {FILE} nor {FILE}\.index\.json",
        LOAD,
    ),
    "pickled": (pickled, rf"holds neither {FILE} nor", LOAD),
}


@pytest.mark.parametrize(("make", "message", "both"), DEFECTS.values(), ids=DEFECTS.keys())
def test_defects(folder, make, message, both):
    make(folder)
    message = message.replace("layers.1.mlp.up_proj", r"layers\.1\.mlp\.up_proj")
    with pytest.raises(ValueError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    if both:
        with pytest.raises(ValueError, match=message):
            AutoModelForCausalLM.from_pretrained(folder)
    else:
        stranger = (OSError, ValueError, RuntimeError, SafetensorError)
        if "architecture" not in message:
            with pytest.raises(stranger):
                AutoModelForCausalLM.from_pretrained(folder)


SHARD_DEFECTS = {
    "shard missing": (
        lambda folder, shard: shard.unlink(),
        r"model-00002-of-\d+\.safetensors is missing, where model\.safetensors\.index\.json places",
    ),
    "shard truncated": (
        lambda folder, shard: os.truncate(shard, shard.stat().st_size - 1),
        r"model-00002-of-\d+\.safetensors is truncated",
    ),
    "index that names absent files": (
        lambda folder, shard: edit_index(folder, lambda m: m.update(more="more.safetensors")),
        r"more\.safetensors is missing, where model\.safetensors\.index\.json places more",
    ),
    "index that names absent tensors": (
        lambda folder, shard: edit_index(folder, lambda m: m.update(more=shard.name)),
        r"model-00002-of-\d+\.safetensors lacks more, which model\.safetensors\.index\.json places",
    ),
    "index that leaves a tensor out": (
        lambda folder, shard: edit_index(folder, lambda m: m.pop("model.norm.weight")),
        r"holds model\.norm\.weight, which model\.safetensors\.index\.json does not name",
    ),
}


def edit_index(folder, change):
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


@pytest.mark.parametrize(("make", "message"), SHARD_DEFECTS.values(), ids=SHARD_DEFECTS.keys())
def test_defects_of_shards(sharded, make, message):
    load(sharded)
    make(sharded, next(sharded.glob("model-00002-*")))
    with pytest.raises(ValueError, match=message):
        load(sharded)


def test_tensor_missing_from_shards(sharded):
    shard = next(path for path in sharded.glob("model-*.safetensors") if DOWN in load_file(path))
    tensors = load_file(shard)
    tensors.pop(DOWN)
    save_file(tensors, shard, metadata={"format": "pt"})
    edit_index(sharded, lambda weight_map: weight_map.pop(DOWN))
    for read in (load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(
            ValueError, match=r"model\.safetensors\.index\.json lacks model\.layers\."
        ):
            read(sharded)


def test_not_a_folder(tmp_path):
    with pytest.raises(ValueError, match="no_such is not a folder"):
        load(tmp_path / "no_such")
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        load(tmp_path)


# ---- pivots and shared bases --------------------------------------------------------------------

KINDS = {"pivoted": compress_pivoted, "shared": compress_shared}
FIRST = "model.layers.0.mlp.up_proj"  # has the basis of UP_PROJ in a model of kind "shared"


@pytest.fixture(scope="module")
def other_kinds(tmp_path_factory):
    """Kind to a model and a folder that is in order."""
    made = {}
    for kind, compressed in KINDS.items():
        folder = tmp_path_factory.mktemp(kind) / "model"
        model = compressed(tiny_model("llama-tied"))
        save(model, folder)
        made[kind] = model, folder
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_load_and_save(other_kinds, kind, tmp_path):
    model, folder = other_kinds[kind]
    loaded = load(folder)
    assert torch.equal(logits(loaded), logits(model))
    save(loaded, tmp_path / "again")
    assert files(tmp_path / "again") == files(folder)
    save(model, tmp_path / "sharded", max_shard_size="12KB")
    assert torch.equal(logits(load(tmp_path / "sharded")), logits(model))
    assert load(folder, dtype=torch.bfloat16, device_map="cpu").dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["qwen2", "gpt2", "phi3"])
def test_export_other_kinds_dense(name, kind, tmp_path):
    model = KINDS[kind](tiny_model(name))
    before = logits(model)
    save(model, tmp_path / "compact")
    export_dense(model, tmp_path / "one")
    export_dense(tmp_path / "compact", tmp_path / "two")
    assert torch.equal(logits(model), before)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    stock, info = type(model).from_pretrained(tmp_path / "one", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(logits(stock), before, rtol=1e-4, atol=1e-5)


def test_kinds_are_seen_in_the_model():
    model = tiny_model("llama")
    replace_module(model, FIRST, LowRankLinear(32, 48, 3, bias=False))
    replace_module(model, UP_PROJ, LowRankLinear(32, 48, 3, bias=False))
    replace_module(model, NO_SUCH.replace("9", "1").replace("up", "gate"), PivotedLinear(32, 48, 3))
    first, second = model.get_submodule(FIRST), model.get_submodule(UP_PROJ)
    second.down.weight = first.down.weight
    ranks = {name: 3 for name in low_rank_layers(model)}
    gate = next(name for name in ranks if "gate" in name)
    mark_compressed(model, ranks)
    layers = model.config.quantization_config.layers
    assert layers == {FIRST: {"rank": 3}, UP_PROJ: {"rank": 3}, gate: {"rank": 3, "pivoted": True}}
    share_basis([second, first])
    mark_compressed(model, ranks, new_biases=[gate, FIRST])
    config = model.config.quantization_config
    assert config.format_version == 2
    assert config.layers == {
        FIRST: {"rank": 3, "basis": UP_PROJ, "bias": True},
        UP_PROJ: {"rank": 3},
        gate: {"rank": 3, "pivoted": True, "bias": True},
    }
    replace_module(model, UP_PROJ, nn.Linear(32, 48))
    del ranks[UP_PROJ]
    with pytest.raises(ValueError, match=f"layer {FIRST} uses the basis of a layer that is not in"):
        mark_compressed(model, ranks)


def test_a_kind_that_changed_after_the_marks(other_kinds, tmp_path):
    changed = copy.deepcopy(other_kinds["shared"][0])
    changed.get_submodule(UP_PROJ).down = nn.Linear(32, 4, bias=False)
    with pytest.raises(ValueError, match=f"layer {UP_PROJ} is a layer that shares a basis in the"):
        save(changed, tmp_path / "model")
    replace_module(changed, UP_PROJ, PivotedLinear(32, 48, 4, bias=False))
    with pytest.raises(ValueError, match=f"layer {UP_PROJ} is pivoted in the model or in the conf"):
        save(changed, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def in_layer(change):
    return in_layers(lambda layers: change(layers[UP_PROJ]))


def write_pivots(*values, dtype=torch.int64):
    return in_tensors(lambda t: t.update({PIVOTS: torch.tensor(values, dtype=dtype)}))


PIVOTS = f"{UP_PROJ}.pivots"
BROKEN = rf"the files of {UP_PROJ} are broken: "
GIVES = rf"config\.json gives layer {UP_PROJ} the basis of "
OTHER_DEFECTS = {
    "pivots missing": (
        "pivoted",
        in_tensors(lambda t: t.pop(PIVOTS)),
        rf"{FILE} lacks {PIVOTS}, which the model needs with shape \[4\]",
    ),
    "pivots of a wrong shape": (
        "pivoted",
        change_tensor(PIVOTS, lambda t: t[:-1]),
        rf"{FILE} holds {PIVOTS} with shape \[3\], but .* \[4\]",
    ),
    "pivots of a wrong dtype": (
        "pivoted",
        write_pivots(0, 1, 2, 3, dtype=torch.int32),
        rf"{FILE} holds {PIVOTS} as I32, where I64 is needed",
    ),
    "pivots out of range": (
        "pivoted",
        write_pivots(0, 1, 48, 3),
        rf"{BROKEN}pivots hold 48, which is no output of 48",
    ),
    "negative pivots": (
        "pivoted",
        write_pivots(0, 1, -2, 3),
        rf"{BROKEN}pivots hold -2, which is no output of 48",
    ),
    "a pivot twice": ("pivoted", write_pivots(7, 1, 2, 7), rf"{BROKEN}pivots hold 7 twice"),
    "rank of a dense layer": (
        "pivoted",
        in_layers(lambda layers: layers["model.layers.1.self_attn.k_proj"].update(rank=16)),
        r"gives the pivoted layer .*\.1\.self_attn\.k_proj the rank 16, .* below its 16 outputs",
    ),
    "wrong rank": (
        "pivoted",
        in_layer(lambda layer: layer.update(rank=5)),
        rf"{FILE} holds {PIVOTS} with shape \[4\], but .* \[5\]",
    ),
    "pivots that config.json does not know": (
        "pivoted",
        in_layer(lambda layer: layer.pop("pivoted")),
        rf"{FILE} holds {UP} with shape \[44, 4\], but .* \[48, 4\]",
    ),
    "pivoted, but not in the files": (
        "shared",
        in_layers(lambda layers: layers.update({UP_PROJ: {"rank": 4, "pivoted": True}})),
        rf"{FILE} (lacks {PIVOTS}|lacks {DOWN}|holds {UP} with shape)",
    ),
    "pivoted as a number": (
        "pivoted",
        in_layer(lambda layer: layer.update(pivoted=1)),
        rf"config\.json can only have true for pivoted of layer {UP_PROJ}",
    ),
    "unknown field": (
        "pivoted",
        in_layer(lambda layer: layer.update(bits=4)),
        rf"config\.json has an unknown field 'bits' of layer {UP_PROJ}",
    ),
    "older version": (
        "pivoted",
        in_described(lambda described: described.update(format_version=1)),
        r"config\.json has format_version 1, which knows no pivoted layers, .*: it must be 2",
    ),
    "older version with a basis": (
        "shared",
        in_described(lambda described: described.update(format_version=1)),
        r"config\.json has format_version 1, which knows no pivoted layers, .*: it must be 2",
    ),
    "basis that is not there": (
        "shared",
        in_layer(lambda layer: layer.update(basis=NO_SUCH)),
        rf"{GIVES}'{NO_SUCH}', which is no compressed layer",
    ),
    "basis that is dense": (
        "shared",
        in_layer(lambda layer: layer.update(basis="lm_head")),
        rf"{GIVES}'lm_head', which is no compressed layer",
    ),
    "basis that has one itself": (
        "shared",
        in_layer(lambda layer: layer.update(basis="model.layers.1.mlp.gate_proj")),
        rf"{GIVES}model\.layers\.1\.mlp\.gate_proj, which has one of another layer itself",
    ),
    "basis of itself": (
        "shared",
        in_layer(lambda layer: layer.update(basis=UP_PROJ)),
        rf"{GIVES}{UP_PROJ}, which has one of another layer itself",
    ),
    "basis of another rank": (
        "shared",
        in_layer(lambda layer: layer.update(rank=3)),
        rf"{GIVES}{FIRST}, but their ranks are 3 and 4",
    ),
    "basis of other inputs": (
        "shared",
        in_layer(lambda layer: layer.update(basis="model.layers.0.mlp.down_proj")),
        rf"{GIVES}model\.layers\.0\.mlp\.down_proj, but they have 32 and 48 inputs",
    ),
    "pivoted with a basis": (
        "shared",
        in_layer(lambda layer: layer.update(pivoted=True)),
        rf"{GIVES}{FIRST}, but a pivoted layer shares none",
    ),
    "basis missing": (
        "shared",
        in_tensors(lambda t: t.pop(f"{FIRST}.down.weight")),
        rf"{FILE} lacks {FIRST}\.down\.weight, which the model needs with shape \[4, 32\]",
    ),
    "second factor missing": (
        "shared",
        in_tensors(lambda t: t.pop(UP)),
        rf"{FILE} lacks {UP}, which the model needs with shape \[48, 4\]",
    ),
    "a basis too much": (
        "shared",
        in_tensors(lambda t: t.update({DOWN: torch.ones(4, 32)})),
        rf"{FILE} holds {DOWN}, which the model has no place for",
    ),
    "basis that config.json does not know": (
        "shared",
        in_layer(lambda layer: layer.pop("basis")),
        rf"{FILE} lacks {DOWN}, which the model needs with shape \[4, 32\]",
    ),
    "compressed layer called dense": (
        "shared",
        in_layers(lambda layers: layers.pop(UP_PROJ)),
        rf"{FILE} holds {UP}, but config\.json names no layer {UP_PROJ}",
    ),
}


@pytest.mark.parametrize(
    ("kind", "make", "message"), OTHER_DEFECTS.values(), ids=OTHER_DEFECTS.keys()
)
def test_defects_of_other_kinds(other_kinds, tmp_path, kind, make, message):
    folder = shutil.copytree(other_kinds[kind][1], tmp_path / "model")
    make(folder)
    for read in (load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=message) as caught:
            read(folder)
        assert "\n" not in str(caught.value)


# ---- mixtures of experts -------------------------------------------------------------------------

EXPERTS = "model.layers.0.mlp.experts"
FUSED = "model.layers.1.mlp.experts"


@NEEDS_5
@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_save_load_and_export(name, tmp_path):
    model = tiny_mixture(name)
    split_experts(model)
    compress(model)
    before = logits(model)
    save(model, tmp_path / "compact")
    loaded = copy.deepcopy(load(tmp_path / "compact"))  # aligned in memory, which rounding sees
    assert torch.equal(logits(loaded), before)
    export_dense(model, tmp_path / "one")
    export_dense(tmp_path / "compact", tmp_path / "two")
    assert find_experts(model)  # still split
    assert torch.equal(logits(model), before)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    tiny_model(name).save_pretrained(tmp_path / "stock")
    shapes = {key: tensor.shape for key, tensor in load_file(weights(tmp_path / "stock")).items()}
    assert {k: t.shape for k, t in load_file(weights(tmp_path / "one")).items()} == shapes
    stock, info = type(model).from_pretrained(
        tmp_path / "one", output_loading_info=True, experts_implementation="eager"
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(logits(stock), before, rtol=1e-4, atol=1e-5)


@NEEDS_5
def test_an_exported_mixture_needs_no_soco(tmp_path):
    model = tiny_mixture("mixtral")
    split_experts(model)
    export_dense(compress(model), tmp_path / "one")
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A; "
        "assert 'soco.plugin' not in sys.modules; "
        f"m, i = A.from_pretrained({str(tmp_path / 'one')!r}, output_loading_info=True, "
        "experts_implementation='eager'); "
        "assert not i['missing_keys'] and not i['unexpected_keys'], i; "
        "ids = torch.load(sys.argv[1]); torch.save(m(ids).logits.detach(), sys.argv[1])"
    )
    tokens = token_inputs(model)["input_ids"]
    torch.save(tokens, tmp_path / "tensor.pt")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"SOCO_AUTOLOAD": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(tmp_path / "tensor.pt")]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path, capture_output=True)
    found = torch.load(tmp_path / "tensor.pt")
    torch.testing.assert_close(found, logits(model), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A folder with one module of experts split and one fused, in order."""
    if not IS_5:
        pytest.skip("transformers 4 has no fused experts")
    model = tiny_mixture("qwen2_moe")
    fused = split_experts(model)
    compress(model, include=f"{EXPERTS}.*.gate_up_proj")
    join_experts(model, fused)
    mark_compressed(model, {name: layer.rank for name, layer in low_rank_layers(model).items()})
    folder = tmp_path_factory.mktemp("mixture") / "model"
    save(model, folder)
    return folder


def in_experts(change):
    return in_described(lambda described: change(described["experts"]))


GATE_UP = f"{EXPERTS}.3.gate_up_proj"
EXPERT_DEFECTS = {
    "experts that are not there": (
        in_experts(lambda experts: experts.append("model.layers.9.mlp.experts")),
        r"config\.json names experts model\.layers\.9\.mlp\.experts, which Qwen2MoeFor.* not have",
    ),
    "experts that are none": (
        in_experts(lambda experts: experts.append("model.layers.1.mlp.gate")),
        r"names experts model\.layers\.1\.mlp\.gate, which are a Qwen2MoeTopKR.* not fused",
    ),
    "experts as text": (
        in_described(lambda described: described.update(experts=EXPERTS)),
        r"config\.json must have a list of names for its experts, got 'model",
    ),
    "experts as numbers": (
        in_described(lambda described: described.update(experts=[0])),
        r"config\.json must have a list of names for its experts, got \[0\]",
    ),
    "experts twice": (
        in_experts(lambda experts: experts.append(EXPERTS)),
        r"config\.json names the same experts twice: \['model",
    ),
    "a layer of experts that are not split": (
        in_experts(lambda experts: experts.remove(EXPERTS)),
        r"names a compressed layer .*\.0\.gate_up_proj, but not model\.layers\.0\.mlp\.experts ",
    ),
    "a layer of other experts": (
        in_layers(lambda layers: layers.update({f"{FUSED}.1.down_proj": {"rank": 4}})),
        r"names a compressed layer .*1\.down_proj, but not model\.layers\.1\.mlp\.experts ",
    ),
    "a layer of an expert that is not there": (
        in_layers(lambda layers: layers.update({f"{EXPERTS}.4.down_proj": {"rank": 4}})),
        r"names a compressed layer .*\.4\.down_proj, which Qwen2MoeForCausalLM does not have",
    ),
    "fused experts called split": (
        in_experts(lambda experts: experts.append(FUSED)),
        r"model\.safetensors lacks model\.layers\.1\.mlp\.experts\.0\.gate_up_proj\.weight",
    ),
    "split layer missing": (
        in_tensors(lambda tensors: tensors.pop(f"{EXPERTS}.3.down_proj.weight")),
        r"model\.safetensors lacks model\.layers\.0\.mlp\.experts\.3\.down_proj\.weight",
    ),
    "factor of an expert missing": (
        in_tensors(lambda tensors: tensors.pop(f"{GATE_UP}.down.weight")),
        r"model\.safetensors lacks model\.layers\.0\.mlp\.experts\.3\.gate_up_proj\.down\.weight",
    ),
    "split layer of another shape": (
        change_tensor(f"{EXPERTS}.3.down_proj.weight", lambda tensor: tensor[:-1]),
        r"model\.safetensors holds .*3\.down_proj\.weight with shape \[31, 16\], but .* \[32, 16\]",
    ),
    "expert too many": (
        in_tensors(lambda t: t.update({f"{EXPERTS}.4.down_proj.weight": torch.ones(32, 16)})),
        r"model\.safetensors holds .*4\.down_proj\.weight, which the model has no place for",
    ),
}


@pytest.mark.parametrize(("make", "message"), EXPERT_DEFECTS.values(), ids=EXPERT_DEFECTS.keys())
def test_defects_of_experts(mixture, tmp_path, make, message):
    folder = shutil.copytree(mixture, tmp_path / "model")
    assert list(find_experts(load(folder))) == [EXPERTS]
    make(folder)
    for read in (load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=message) as caught:
            read(folder)
        assert "\n" not in str(caught.value)


@NEEDS_5
def test_only_the_experts_of_the_config_are_saved(mixture, tmp_path):
    model = load(mixture)
    split_experts(model)
    with pytest.raises(ValueError, match=rf"the experts {FUSED} are split in the model only: mark"):
        save(model, tmp_path / "model")
    model = load(mixture)
    model.config.quantization_config.experts.append(FUSED)
    with pytest.raises(ValueError, match=rf"the experts {FUSED} are split in the config only"):
        save(model, tmp_path / "model")


def test_shards_by_hand(tmp_path):
    held = {"a": torch.ones(3), "b": torch.zeros(2, 2, dtype=torch.bfloat16), "c": torch.ones(1)}
    seen = []
    write_shards(
        tmp_path, [["x", "y"], ["z"]],
        {"x": {"a": held["a"], "b": held["b"]}, "y": {}, "z": {"c": held["c"]}}.__getitem__,
        seen.append,
    )  # fmt: skip
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert index["weight_map"] == {"a": first, "b": first, "c": second}
    assert index["metadata"] == {"total_size": 12 + 8 + 4}
    assert seen == [1, 2]
    found = {**load_file(tmp_path / first), **load_file(tmp_path / second)}
    assert all(torch.equal(found[name], tensor) for name, tensor in held.items())
