"""soco.compress_folder: the same weights as in memory, whatever happens on the way."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import soco
from soco import chain, checkpoint, dismantling, keeping, streaming
from soco.methods import KFACSVD, SVDLLM, BasisSharing, SoCo
from soco.streaming import compress_folder
from soco.surgery import find_linears, low_rank_layers
from soco.workfolder import WorkFolder, opened
from tiny_models import MIXTURES, NEEDS_5, tiny_mixture, tiny_model

IDS = torch.randint(3, 96, (6, 16), generator=torch.Generator().manual_seed(0))


class Greedy(BasisSharing):
    """Would want the gradients of a group."""

    @property
    def needs(self):
        return KFACSVD().needs


STREAMED = [
    "llama", "llama-tied", "mistral", "qwen2", "phi3", "gpt2", "opt", "gpt_neox", "gptj", "bloom",
    "bert", "roberta",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _few_samples():
    """The texts here are short, which is warned of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*saw fewer calibration tokens")
        yield


def dense(folder, name="llama", dtype=torch.float32, **changes):
    """A model in a folder."""
    model = tiny_model(name, dtype, **changes)
    model.save_pretrained(folder)
    return model


def stream(folder, output, ratio=0.4, **options):
    return compress_folder(
        folder, output, ratio, **{"calibration": IDS, "samples": 6, "progress": False} | options
    )


def tensors(folder):
    return {
        k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()
    }


def check_same(folder, model, ratio=0.4, **options):
    """The folder holds what the model becomes in memory."""
    options = {"method": "svd-llm", "calibration": IDS, "samples": 6, "progress": False} | options
    soco.compress(model, ratio, **options)
    loaded = soco.load(folder)
    expected = model.state_dict()
    found = loaded.state_dict()
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor), key
    ours, theirs = soco.report(loaded), soco.report(model)
    for name in ("method", "ratio", "layers", "calibration", "settings", "warnings"):
        assert getattr(ours, name) == getattr(theirs, name)
    for name in ("model_params_before", "model_params_after", "model_bytes_after"):
        assert getattr(ours, name) == getattr(theirs, name)


@pytest.mark.parametrize("name", STREAMED)
def test_the_same_weights_as_in_memory(name, tmp_path):
    model = dense(tmp_path / "dense", name)
    stream(tmp_path / "dense", tmp_path / "out")
    check_same(tmp_path / "out", model)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["dense", "out"]


@pytest.mark.parametrize("method", ["kfac-svd", "fwsvd"])
@pytest.mark.parametrize("name", STREAMED)
def test_gradients_block_by_block(name, method, tmp_path):
    """From the last block back to the first; the loss is that of the whole model."""
    model = dense(tmp_path / "dense", name)
    options = {"method": method, "batch_size": 2, "seed": 3}
    stream(tmp_path / "dense", tmp_path / "out", **options)
    check_same(tmp_path / "out", model, **options)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["dense", "out"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_gradients_in_other_dtypes(dtype, tmp_path):
    model = dense(tmp_path / "dense", dtype=dtype, num_hidden_layers=3)
    stream(tmp_path / "dense", tmp_path / "out", method="kfac-svd")
    check_same(tmp_path / "out", model, method="kfac-svd")


@pytest.mark.parametrize("include", ["*layers.0*", "*layers.1*", "*layers.2.mlp*"])
def test_gradients_of_some_blocks(include, tmp_path):
    """Gradients come through blocks that have no layer to compress."""
    model = dense(tmp_path / "dense", num_hidden_layers=3)
    options = {"method": "kfac-svd", "include": include}
    stream(tmp_path / "dense", tmp_path / "out", **options)
    check_same(tmp_path / "out", model, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["svd", "svd-llm", "kfac-svd"])
@pytest.mark.parametrize("ratio", [0.05, 0.4])
def test_pivoted(method, ratio, dtype, tmp_path):
    model = dense(tmp_path / "dense", dtype=dtype)
    options = {"method": method, "pivoted": True}
    stream(tmp_path / "dense", tmp_path / "out", ratio, **options)
    check_same(tmp_path / "out", model, ratio, **options)


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox"])
def test_pivoted_with_biases(name, tmp_path):
    model = dense(tmp_path / "dense", name)
    stream(tmp_path / "dense", tmp_path / "out", pivoted=True, allocator="energy")
    check_same(tmp_path / "out", model, pivoted=True, allocator="energy")


def test_sampled_gradients(tmp_path):
    """A basis that takes the outputs' side from an eighth of the calibration."""
    method = KFACSVD()
    sampled = dataclasses.replace(method.components, sampled=True)
    changed = type("Sampled", (KFACSVD,), {"components": property(lambda self: sampled)})()
    model = dense(tmp_path / "dense", num_hidden_layers=3)
    stream(tmp_path / "dense", tmp_path / "out", method=changed, batch_size=1)
    check_same(tmp_path / "out", model, method=changed, batch_size=1)
    other = dense(tmp_path / "dense", num_hidden_layers=3)
    with pytest.raises(AssertionError):
        check_same(tmp_path / "out", other, method=method, batch_size=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype, tmp_path):
    model = dense(tmp_path / "dense", dtype=dtype)
    stream(tmp_path / "dense", tmp_path / "out")
    check_same(tmp_path / "out", model)


def test_computed_in_another_dtype_than_stored(tmp_path):
    model = dense(tmp_path / "dense", dtype=torch.bfloat16)
    stream(tmp_path / "dense", tmp_path / "out", dtype=torch.float32)
    model = model.float()
    soco.compress(model, 0.4, method="svd-llm", calibration=IDS, samples=6, progress=False)
    found = soco.load(tmp_path / "out").state_dict()
    for key, tensor in model.state_dict().items():
        assert torch.equal(found[key], tensor.bfloat16()), key


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("allocator", ["energy", "v2", "effective-rank"])
def test_allocators(allocator, batch_size, tmp_path):
    model = dense(tmp_path / "dense", num_hidden_layers=3)
    options = {"allocator": allocator, "batch_size": batch_size}
    stream(tmp_path / "dense", tmp_path / "out", **options)
    check_same(tmp_path / "out", model, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "svd", "calibration": None},
        {"method": "svd", "calibration": None, "allocator": "energy"},
        {"method": "asvd", "allocator": "uniform"},
        {"method": "svd-llm-v2"},
        {"method": SVDLLM(route="qr")},
        {"method": "svd-llm", "include": "*.layers.1.*", "exclude": "*up_proj"},
        {"method": "svd-llm", "allocator": "adacr"},
        {"method": "adasvd", "batch_size": 2},
        {"method": "adasvd", "allocator": "uniform", "pivoted": True},
        {"method": "tfwsvd"},
        {"method": "tfwsvd", "allocator": "energy", "batch_size": 2},
    ],
)
def test_methods_and_patterns(options, tmp_path):
    model = dense(tmp_path / "dense", num_hidden_layers=3)
    stream(tmp_path / "dense", tmp_path / "out", **options)
    check_same(tmp_path / "out", model, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "aa-svd"},
        {"method": "saes", "allocator": "energy", "batch_size": 2},
        {"method": SVDLLM(update=True), "pivoted": True, "batch_size": 4},
        {"method": "aa-svd", "include": ["*.layers.1.*", "*.layers.3.mlp.*"]},
    ],
    ids=["aa-svd", "saes", "svd-llm", "some"],
)
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert"])
def test_fits_behind_compressed_blocks(name, options, tmp_path):
    """Two models walk, the dense one and the compressed one; a block of either is in memory."""
    if "include" in options and name != "llama":
        pytest.skip("names of layers of one architecture")
    changes: dict[str, Any] = {"num_hidden_layers": 4} if name == "llama" else {}
    model = dense(tmp_path / "dense", name, **changes)
    stream(tmp_path / "dense", tmp_path / "out", **options)
    check_same(tmp_path / "out", model, **options)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["dense", "out"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ratio", [0.2, 0.5])  # from 0.4 on coefficients are fitted again
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": BasisSharing(size=3), "batch_size": 2},
        {"method": BasisSharing(size=4, private=()), "allocator": "energy"},
        {"allocator": "adacr"},
        {"method": BasisSharing(size=1)},
    ],
    ids=["two", "three", "all", "adacr", "one"],
)
def test_bases_that_blocks_share(options, ratio, dtype, tmp_path):
    """One of them comes to files of its own; there are five blocks, so that one is left over."""
    model = dense(tmp_path / "dense", dtype=dtype, num_hidden_layers=5)
    options = {"method": "basis-sharing"} | options
    stream(tmp_path / "dense", tmp_path / "out", ratio, **options)
    check_same(tmp_path / "out", model, ratio, **options)
    shared = {layer.basis is not None for layer in low_rank_layers(model).values()}
    assert shared == ({False} if options["method"] == BasisSharing(size=1) else {False, True})
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["dense", "out"]


@pytest.mark.parametrize("ratio", [0.2, 0.5])
@pytest.mark.parametrize("name", ["gpt2", "opt", "bert", "phi3"])
def test_shared_bases_of_other_models(name, ratio, tmp_path):
    model = dense(tmp_path / "dense", name)
    stream(tmp_path / "dense", tmp_path / "out", ratio, method="basis-sharing")
    check_same(tmp_path / "out", model, ratio, method="basis-sharing")


def test_only_what_waits_for_its_unit_is_kept(tmp_path, monkeypatch):
    """Grams of a block wait in files until the last block of the group, and go then."""
    dense(tmp_path / "dense", num_hidden_layers=6)
    block, left = dismantling.Dismantling.block, []

    def watching(self, names, statistics):
        block(self, names, statistics)
        left.append(len(list(self.work.path.glob("means-*"))))

    monkeypatch.setattr(dismantling.Dismantling, "block", watching)
    stream(tmp_path / "dense", tmp_path / "out", method=BasisSharing(size=3))
    assert left == [5, 10, 0, 5, 10, 0]  # all but the two that write into the residual stream


def test_shards_and_names_of_the_base_model(tmp_path):
    model = tiny_model("gpt2")
    model.transformer.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    config = tmp_path / "dense" / "config.json"
    described = json.loads(config.read_text()) | {"architectures": ["GPT2LMHeadModel"]}
    config.write_text(json.dumps(described))
    (tmp_path / "dense" / "notes.txt").write_text("kept")
    stream(tmp_path / "dense", tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "kept"
    check_same(tmp_path / "out", model)


@pytest.mark.parametrize(
    ("method", "pivoted"),
    [
        ("svd-llm", False),
        ("kfac-svd", True),
        ("aa-svd", False),
        ("adasvd", True),
        ("basis-sharing", False),
    ],
)
def test_a_trained_model(method, pivoted, model_dir, tmp_path):
    folder = model_dir("books-llama-1m")
    ids = torch.randint(0, 1000, (8, 64), generator=torch.Generator().manual_seed(0))
    options = {"calibration": ids, "samples": 8, "allocator": "energy"}
    options |= {"method": method, "pivoted": pivoted}
    stream(folder, tmp_path / "out", **options)
    check_same(tmp_path / "out", AutoModelForCausalLM.from_pretrained(folder), **options)
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.parametrize("method", ["svd-llm", "kfac-svd"])
def test_one_block_at_a_time(method, tmp_path, monkeypatch):
    """While a block runs, all others are empty; afterwards it is, too."""
    dense(tmp_path / "dense", num_hidden_layers=4)
    held, models = [], []
    collect = chain.collect

    def watched(block, layers, *arguments, **options):
        run = options["run"]

        def watching(number, ids):
            names = [n for n, p in models[0].named_parameters() if not p.is_meta]
            held.append({n.split(".")[2] for n in names if ".layers." in n})
            return run(number, ids)

        return collect(block, layers, *arguments, **options | {"run": watching})

    empty = streaming.StoredModel._empty

    def noted(self):
        model, dtype = empty(self)
        models.append(model)
        return model, dtype

    monkeypatch.setattr(streaming.StoredModel, "_empty", noted)
    monkeypatch.setattr(chain, "collect", watched)
    stream(tmp_path / "dense", tmp_path / "out", batch_size=2, method=method)
    order = range(4) if method == "svd-llm" else range(4)[::-1]
    assert held == [{str(block)} for block in order for _ in range(3)]
    assert all(parameter.is_meta for parameter in models[0].parameters())


def test_what_lies_outside_of_the_blocks_is_read_once(tmp_path, monkeypatch):
    dense(tmp_path / "dense", num_hidden_layers=4)
    read, seen = streaming.StoredModel.read, []

    def counting(self, key, **options):
        seen.append(key)
        return read(self, key, **options)

    monkeypatch.setattr(streaming.StoredModel, "read", counting)
    stream(tmp_path / "dense", tmp_path / "out")
    assert seen.count("model.embed_tokens.weight") == 2  # to run, and to be written
    assert seen.count("lm_head.weight") == 1  # to be written
    assert seen.count("model.layers.3.mlp.up_proj.weight") == 2  # to run, and to be taken apart


# Mixtures of experts ------------------------------------------------------------------------------

FEW = SoCo(steps=4, fisher_warmup=1, batch_size=2)
MIXED = {
    "svd-llm": {"method": "svd-llm"},
    "kfac-svd": {"method": "kfac-svd", "pivoted": True},
    "aa-svd": {"method": "aa-svd"},
    "soco": {"method": FEW},
    "one block": {"method": "svd", "include": "*layers.0*"},
    "no experts": {"method": "svd-llm", "exclude": "*experts*"},
    "basis-sharing": {"method": "basis-sharing", "allocator": "energy"},
}


@NEEDS_5
@pytest.mark.filterwarnings("ignore:.*saw no calibration token", "ignore:.*see other tokens")
@pytest.mark.parametrize("case", MIXED)
@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures(name, case, tmp_path):
    """Experts are stored one by one or fused, turned or not, and are layers here."""
    model = tiny_mixture(name)
    model.save_pretrained(tmp_path / "dense")
    options = MIXED[case] | {"batch_size": 2}
    stream(tmp_path / "dense", tmp_path / "out", **options)
    check_same(tmp_path / "out", model, **options)
    ours, theirs = soco.report(soco.load(tmp_path / "out")), soco.report(model)
    assert ours.left_dense == theirs.left_dense
    assert bool(ours.left_dense) == (case in ("one block", "no experts"))


@NEEDS_5
@pytest.mark.parametrize("name", MIXTURES)
def test_experts_that_stay_dense_with_other_numbers(name, tmp_path):
    """They are written as layers, and compute what they compute in memory, where they are fused."""
    model = tiny_mixture(name)
    model.save_pretrained(tmp_path / "dense")
    options: dict[str, Any] = {"method": FEW, "exclude": "*down_proj", "batch_size": 2}
    stream(tmp_path / "dense", tmp_path / "out", 0.02, **options)
    soco.compress(model, 0.02, calibration=IDS, samples=6, progress=False, **options)
    with torch.no_grad():
        assert torch.equal(
            soco.load(tmp_path / "out", experts_implementation="eager")(input_ids=IDS).logits,
            model(input_ids=IDS).logits,
        )


@NEEDS_5
def test_experts_in_files_that_lack_one(tmp_path):
    tiny_mixture("mixtral").save_pretrained(tmp_path / "dense")
    key = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    edit(tmp_path / "dense", lambda held: held.pop(key))
    with pytest.raises(
        ValueError, match=rf"holds no {re.escape(key)} of shape .*, of which the ex"
    ):
        stream(tmp_path / "dense", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# What is no chain of blocks -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("t5", "has an encoder and a decoder"),
        ("albert", "is no chain of blocks .* runs more than once"),
        ("mamba", "dt_proj is never called, because its module reads the weight itself"),
    ],
)
def test_models_that_cannot_be_streamed(name, message, tmp_path):
    dense(tmp_path / "dense", name)
    with pytest.raises(ValueError, match=message):
        stream(tmp_path / "dense", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mamba_without_what_it_reads_itself(tmp_path):
    model = dense(tmp_path / "dense", "mamba")
    stream(tmp_path / "dense", tmp_path / "out", exclude="*dt_proj")
    check_same(tmp_path / "out", model, exclude="*dt_proj")


def test_blocks_that_read_what_earlier_ones_gave(tmp_path, monkeypatch):
    """Found by giving something else for what the blocks before the last one put out."""
    dense(tmp_path / "dense", num_hidden_layers=3)
    forward, first = LlamaDecoderLayer.forward, []

    def skipping(self, hidden_states, *arguments, **options):
        if self.self_attn.layer_idx == 2:
            hidden_states = hidden_states + first[-1]
        return forward(self, hidden_states, *arguments, **options)

    def remembering(self, *arguments, **options):
        output = self._call_impl(*arguments, **options)
        if self.self_attn.layer_idx == 0:
            first.append(output)
        return output

    monkeypatch.setattr(LlamaDecoderLayer, "forward", skipping)
    monkeypatch.setattr(LlamaDecoderLayer, "__call__", remembering)
    with pytest.raises(
        ValueError, match=r"no chain of blocks \(model.layers.2 runs more than once"
    ):
        stream(tmp_path / "dense", tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "dobi-svd"}, "method dobi-svd needs the whole model in memory: stream soco"),
        ({"method": SoCo.preset("best")}, "surgeon and refine need the whole model"),
        ({"method": Greedy()}, "method basis-sharing shares bases and asks for more than inputs"),
        ({"method": "asvd"}, "the allocator 'sensitivity' runs the whole model"),
        ({"method": "svd-surgeon"}, "surgeon and refine need the whole model"),
        ({"calibration": None}, "method svd-llm learns from text: give calibration="),
        ({"calibration": None, "method": "soco"}, "method soco learns from text: give calibration"),
        ({"ratio": 1.5}, "ratio is the fraction"),
        ({"batch_size": 0}, "batch_size must be a positive whole number"),
        ({"include": "lm_head"}, "lm_head lies outside of the blocks"),
    ],
)
def test_what_cannot_be_asked_for(options, message, tmp_path):
    dense(tmp_path / "dense")
    with pytest.raises(ValueError, match=message):
        stream(tmp_path / "dense", tmp_path / "out", **options)
    assert [entry.name for entry in tmp_path.iterdir()] == ["dense"]


# Weights and numbers that are broken --------------------------------------------------------------


def edit(folder, change):
    file = folder / "model.safetensors"
    held = load_file(file)
    change(held)
    save_file(held, file, metadata={"format": "pt"})


@pytest.mark.parametrize("method", ["svd", "svd-llm"])
def test_a_weight_that_is_not_finite_is_named(method, tmp_path):
    dense(tmp_path / "dense")
    key = "model.layers.1.mlp.up_proj.weight"
    edit(tmp_path / "dense", lambda held: held[key][3, 2].fill_(float("nan")))
    with pytest.raises(ValueError, match=rf"{key} .* holds NaN or Inf in 1 of its entries"):
        stream(tmp_path / "dense", tmp_path / "out", method=method)
    assert not (tmp_path / "out").exists()


def test_inputs_that_are_not_finite_are_named(tmp_path):
    dense(tmp_path / "dense")
    key = "model.layers.0.input_layernorm.weight"
    edit(tmp_path / "dense", lambda held: held[key].fill_(1e38))
    with pytest.raises(ValueError, match=r"the inputs of .* hold NaN or Inf"):
        stream(tmp_path / "dense", tmp_path / "out")


def test_a_layer_of_zeros(tmp_path):
    model = dense(tmp_path / "dense")
    key = "model.layers.1.mlp.up_proj.weight"
    edit(tmp_path / "dense", lambda held: held[key].zero_())
    model.state_dict()[key].zero_()
    stream(tmp_path / "dense", tmp_path / "out")
    check_same(tmp_path / "out", model)


def test_a_tensor_that_is_missing_is_named(tmp_path):
    dense(tmp_path / "dense")
    edit(tmp_path / "dense", lambda held: held.pop("model.embed_tokens.weight"))
    with pytest.raises(ValueError, match=r"holds no model.embed_tokens.weight of shape \(96, 32\)"):
        stream(tmp_path / "dense", tmp_path / "out")


def test_a_shard_that_cannot_be_read(tmp_path):
    dense(tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is truncated"):
        stream(tmp_path / "dense", tmp_path / "out")


# Stopped on the way -------------------------------------------------------------------------------


def weights(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.glob("model*"))}


def stopped_runs(tmp_path, monkeypatch, by_run, **options):
    """Runs that are stopped in the middle of a file, until one ends: with what "once" holds.

    Yields how many files each run began (two are what a first block puts out), and how many runs
    were stopped.
    """
    stream(tmp_path / "dense", tmp_path / "once", **options)
    put, count = WorkFolder._put, [0]

    def stopping(self, name, write):
        def partly(path):
            if count[0] == 0:
                path.write_bytes(b"half")
                raise KeyboardInterrupt
            write(path)

        count[0] -= 1
        put(self, name, partly)

    monkeypatch.setattr(WorkFolder, "_put", stopping)
    for written in by_run:
        stops = 0
        for _ in range(50):
            count[0] = written
            with suppress(KeyboardInterrupt):
                stream(tmp_path / "dense", tmp_path / "often", **options)
                break
            stops += 1
            assert not (tmp_path / "often").exists()
            assert (tmp_path / "often.work").is_dir()
        yield written, stops
        assert weights(tmp_path / "often") == weights(tmp_path / "once")
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["dense", "often", "once"]
        shutil.rmtree(tmp_path / "often")


@pytest.mark.parametrize(
    ("method", "files", "by_run"),
    [
        ("svd-llm", 21, (4, 5, 11)), ("kfac-svd", 21, (4, 5, 11)), ("adasvd", 42, (4, 5, 11)),
        ("aa-svd", 42, (8, 9, 17)),  # a block that is fitted puts out six
        ("basis-sharing", 42, (8, 9, 17)),
    ],
)  # fmt: skip
def test_stopped_at_every_file(method, files, by_run, tmp_path, monkeypatch):
    """Ctrl-C before and in the middle of each file that is written; then the same call goes on."""
    dense(tmp_path / "dense", num_hidden_layers=3)
    options = {"allocator": "energy", "batch_size": 3, "method": method}
    for written, stops in stopped_runs(tmp_path, monkeypatch, by_run, **options):
        assert files // written < stops < 50


def test_no_layer_is_taken_apart_twice(tmp_path, monkeypatch):
    dense(tmp_path / "dense", num_hidden_layers=3)
    weight, seen = streaming.StoredModel.weight, []

    def counting(self, name):
        seen.append(name)
        if len(seen) == 11:
            raise KeyboardInterrupt
        return weight(self, name)

    monkeypatch.setattr(streaming.StoredModel, "weight", counting)
    with pytest.raises(KeyboardInterrupt):
        stream(tmp_path / "dense", tmp_path / "out")
    stream(tmp_path / "dense", tmp_path / "out")
    names = list(find_linears(tiny_model("llama", num_hidden_layers=3)))
    assert seen == [*names[:11], *names[10:]]


RUN = """
import sys, torch
sys.path.insert(0, sys.argv[3])
from test_streaming import stream
torch.set_num_threads(1)
stream(sys.argv[1], sys.argv[2], batch_size=1)
"""


def test_killed(tmp_path):
    """SIGKILL at several moments; a half-written result of a killed run is cleared away."""
    dense(tmp_path / "dense", num_hidden_layers=6)
    stream(tmp_path / "dense", tmp_path / "once", batch_size=1)
    tests = Path(__file__).parent
    command = [sys.executable, "-c", RUN, tmp_path / "dense", tmp_path / "often", tests]
    markers = tmp_path / "often.work"
    for block in (0, 2, 5):
        run = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
        while run.poll() is None and not (markers / f"block-{block}.json").is_file():
            time.sleep(0.002)
        run.send_signal(signal.SIGKILL)
        run.wait()
        if (tmp_path / "often").exists():
            break
    else:
        left = tmp_path / ".often.12345678"
        left.mkdir()
        (markers / keeping.UNFINISHED).write_text(json.dumps(left.name))
        stream(tmp_path / "dense", tmp_path / "often", batch_size=1)
    assert weights(tmp_path / "often") == weights(tmp_path / "once")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["dense", "often", "once"]


def begun(tmp_path, monkeypatch, **options):
    """A folder and a run that was stopped after its first block."""
    model = dense(tmp_path / "dense", num_hidden_layers=3)
    block = streaming._Run._block

    def stopping(self, number):
        if number == 1:
            raise KeyboardInterrupt
        return block(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(streaming._Run, "_block", stopping)
        with pytest.raises(KeyboardInterrupt):
            stream(tmp_path / "dense", tmp_path / "out", **options)
    return model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.5}, "ratio is 0.4 there and 0.5 here"),
        ({"method": "svd-llm-v2"}, 'method is "svd-llm" there and "svd-llm-v2" here'),
        ({"allocator": "energy"}, 'settings.allocator is "uniform" there and "energy" here'),
        ({"calibration": IDS.flip(0)}, "calibration is .* there and .* here"),
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"batch_size": 2}, "batch_size is 8 there and 2 here"),
        ({"dtype": torch.bfloat16}, 'dtype is "torch.float32" there and "torch.bfloat16" here'),
        ({"exclude": "*up_proj"}, "layers is .* there and .* here"),
    ],
)
def test_another_run_does_not_go_on_there(options, message, tmp_path, monkeypatch):
    model = begun(tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=f"out.work holds the beginning of another run: {message}"):
        stream(tmp_path / "dense", tmp_path / "out", **options)
    stream(tmp_path / "dense", tmp_path / "out")
    check_same(tmp_path / "out", model)


def test_a_model_that_was_changed_is_noticed(tmp_path, monkeypatch):
    begun(tmp_path, monkeypatch)
    file = tmp_path / "dense" / "model.safetensors"
    os.utime(file, ns=(0, 10**18))
    with pytest.raises(ValueError, match=r"model.model.safetensors is .* there and .* 10{18}"):
        stream(tmp_path / "dense", tmp_path / "out")
    config = tmp_path / "dense" / "config.json"
    config.write_text(config.read_text().replace("rms_norm_eps", "rms_norm_eps "))
    with pytest.raises(ValueError, match=r"model.config.json is .* there and"):
        stream(tmp_path / "dense", tmp_path / "out")


def test_a_second_run_at_once_is_told(tmp_path, monkeypatch):
    begun(tmp_path, monkeypatch)
    plan = json.loads((tmp_path / "out.work" / "plan.json").read_text())
    with (
        opened(tmp_path / "out.work", plan),
        pytest.raises(ValueError, match=r"another run works in .*out.work"),
    ):
        stream(tmp_path / "dense", tmp_path / "out")


def test_damaged_work_is_named(tmp_path, monkeypatch):
    begun(tmp_path, monkeypatch)
    file = next((tmp_path / "out.work").glob("hidden-1-*.pt"))
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match=f"{re.escape(file.name)} is damaged: delete the folder"):
        stream(tmp_path / "dense", tmp_path / "out")


def test_a_full_disk(tmp_path, monkeypatch):
    """What was done before stays, and the next run goes on."""
    model = dense(tmp_path / "dense", num_hidden_layers=3)
    save, calls = streaming.WorkFolder.put_tensors.__globals__["save_file"], []

    def full(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 9:
            raise OSError(28, "No space left on device")
        save(*arguments, **options)

    monkeypatch.setitem(streaming.WorkFolder.put_tensors.__globals__, "save_file", full)
    with pytest.raises(OSError, match=r"layer-8.safetensors cannot be written \(No space left"):
        stream(tmp_path / "dense", tmp_path / "out")
    assert not list((tmp_path / "out.work").glob(".*.part"))
    stream(tmp_path / "dense", tmp_path / "out")
    check_same(tmp_path / "out", model)


def test_a_full_disk_while_the_result_is_written(tmp_path, monkeypatch):
    model = dense(tmp_path / "dense")
    save = checkpoint.save_file

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left on device"):
        stream(tmp_path / "dense", tmp_path / "out")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["dense", "out.work"]
    monkeypatch.setattr(checkpoint, "save_file", save)
    stream(tmp_path / "dense", tmp_path / "out")
    check_same(tmp_path / "out", model)


def test_what_is_no_result_of_ours_is_not_cleared_away(tmp_path, monkeypatch):
    """Whatever a work folder says."""
    begun(tmp_path, monkeypatch)
    precious = tmp_path / "precious"
    precious.mkdir()
    for name in ("precious", "../precious", str(precious), ".out.work/../precious"):
        (tmp_path / "out.work" / keeping.UNFINISHED).write_text(json.dumps(name))
        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            patch.setattr(
                streaming._Run, "_block", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
            )
            stream(tmp_path / "dense", tmp_path / "out")
        assert precious.is_dir()


def test_does_not_replace_anything_else(tmp_path):
    dense(tmp_path / "dense")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    for output in ("mine", "dense"):
        with pytest.raises(ValueError, match=r"is not the folder of a model compressed by soco"):
            stream(tmp_path / "dense", tmp_path / output)
    with pytest.raises(ValueError, match=r"out is the output: choose another work folder"):
        stream(tmp_path / "dense", tmp_path / "out", work=tmp_path / "out")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["dense", "mine"]


def test_replaces_a_compressed_model_and_keeps_its_files(tmp_path):
    model = dense(tmp_path / "dense")
    stream(tmp_path / "dense", tmp_path / "out", ratio=0.6)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    stream(tmp_path / "dense", tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    check_same(tmp_path / "out", model)
    assert Path(tmp_path / "out").is_dir()
