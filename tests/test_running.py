"""soco.running: a model in a folder computes what it computes in memory, a block at a time."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import soco
from soco.experts import join_experts, split_experts
from soco.lending import Lender
from soco.running import compressed_model, stored_model
from soco.surgery import find_linears, transformer_blocks
from test_streaming import STREAMED
from tiny_models import (
    MIXTURES,
    NEEDS_5,
    compress,
    compress_pivoted,
    compress_shared,
    mark,
    tiny_mixture,
    tiny_model,
    token_inputs,
)

HOW = {"dense": None, "factors": compress, "pivots": compress_pivoted, "shared": compress_shared}


def output(model):
    with torch.no_grad():
        return model(**token_inputs(model))[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", [*STREAMED, "t5", "albert"])
def test_the_same_as_in_memory(name, how, dtype, tmp_path):
    """Blocks that run more than once, and encoders with decoders, among them."""
    if how == "shared" and (name in ("opt", "albert") or dtype != torch.float32):
        pytest.skip("layers of one name and several shapes, or no SVD in half precision")
    if how != "dense" and name == "albert":
        pytest.skip("its blocks are one, and layers of it are compressed by test_checkpoint.py")
    model, make = tiny_model(name, dtype), HOW[how]
    if make is None:
        model.save_pretrained(tmp_path / "model")
    else:
        make(model)
        soco.save(model, tmp_path / "model")
        model = soco.load(tmp_path / "model")
    with soco.blockwise(tmp_path / "model") as lent:
        assert torch.equal(output(lent), output(model))
        assert torch.equal(output(lent), output(model))  # and again
        assert not lent.training
    assert all(p.is_meta for p in lent.parameters())


@NEEDS_5
@pytest.mark.parametrize("some", ["all", "one block", "no experts", "none"])
@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures(name, some, tmp_path):
    """Experts that are layers in the files, and those that are fused there or stored one by one."""
    model = tiny_mixture(name)
    if some == "none":
        model.save_pretrained(tmp_path / "model")
    else:
        fused = split_experts(model)
        chosen = {"one block": {"include": "*layers.1*"}, "no experts": {"exclude": "*experts*"}}
        options: dict[str, Any] = chosen.get(some, {})
        compress(model, **options)
        join_experts(model, fused)
        mark(model)
        soco.save(model, tmp_path / "model")
        model = soco.load(tmp_path / "model", experts_implementation="eager")
    with soco.blockwise(tmp_path / "model") as lent:
        found = output(lent)
    split_experts(model)
    assert torch.equal(found, output(model))


def test_one_block_at_a_time(tmp_path, monkeypatch):
    """And the basis of a layer that has it in another block."""
    model = compress_shared(tiny_model("llama", num_hidden_layers=4))
    soco.save(model, tmp_path / "model")
    held, enter = [], Lender._enter

    def watching(self, number):
        enter(self, number)
        held.append([])
        for block in transformer_blocks(self._stored.model):
            filled = [n for n, p in block.named_parameters() if not p.is_meta and p.dim() > 1]
            held[-1].append({name.rsplit(".", 2)[1] for name in filled})

    monkeypatch.setattr(Lender, "_enter", watching)
    with soco.blockwise(tmp_path / "model") as lent:
        output(lent)
    whole, basis, factors = {"up", "down"}, {"down"}, {"up"}
    assert held == [
        [whole, set(), set(), set()],
        [basis, factors, set(), set()],
        [basis, set(), factors, set()],
        [basis, set(), set(), factors],
    ]


def test_in_another_dtype(tmp_path):
    compress(model := tiny_model("llama", torch.bfloat16))
    soco.save(model, tmp_path / "model")
    wide = soco.load(tmp_path / "model", dtype=torch.float32)
    with soco.blockwise(tmp_path / "model", dtype=torch.float32) as lent:
        assert torch.equal(output(lent), output(wide))


def test_text_is_written(tmp_path):
    """Slowly, with all that generate does."""
    compress(model := tiny_model("llama"))
    soco.save(model, tmp_path / "model")
    ids = token_inputs(model)["input_ids"]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with soco.blockwise(tmp_path / "model") as lent:
        written = lent.generate(ids, **options)  # type: ignore[operator]
    assert torch.equal(written, model.generate(ids, **options))


@pytest.mark.filterwarnings("ignore:.*saw fewer calibration tokens")
def test_evaluated(model_dir, tmp_path):
    """A trained model, dense and compressed: the numbers of soco.evaluate are those in memory."""
    place = model_dir("books-llama-1m")
    model = AutoModelForCausalLM.from_pretrained(place)
    ids = torch.randint(0, 1000, (4, 64), generator=torch.Generator().manual_seed(0))
    dense = AutoModelForCausalLM.from_pretrained(place)
    soco.compress(model, 0.4, method="svd-llm", calibration=ids, samples=4, progress=False)
    soco.save(model, tmp_path / "small")
    options = {"length": 64, "progress": False}
    known = soco.evaluate(soco.load(tmp_path / "small"), ids, dense=dense, **options)
    with soco.blockwise(tmp_path / "small") as small, soco.blockwise(place) as large:
        found = soco.evaluate(small, ids, dense=large, **options)
    for name in ("perplexity", "kl", "top1", "tokens", "dtype"):
        assert getattr(found, name) == getattr(known, name)


def edit(folder, change):
    held = load_file(folder / "model.safetensors")
    change(held)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.up.weight", "model.norm.weight"])
def test_what_is_missing_is_named(name, tmp_path):
    compress(model := tiny_model("llama"))
    soco.save(model, tmp_path / "model")
    edit(tmp_path / "model", lambda held: held.pop(name))
    with pytest.raises(ValueError, match=rf"{name}"), soco.blockwise(tmp_path / "model"):
        pass


def test_numbers_that_are_not_finite_are_named(tmp_path):
    """Outside of the blocks at the beginning."""
    compress(model := tiny_model("llama"))
    soco.save(model, tmp_path / "model")
    edit(tmp_path / "model", lambda held: held["lm_head.weight"][0].fill_(float("nan")))
    with pytest.raises(ValueError, match=r"lm_head\.weight"), soco.blockwise(tmp_path / "model"):
        pass


def test_folders_of_other_kinds(tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        stored_model(tmp_path / "nowhere")
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="is not the folder of a model compressed by soco"):
        compressed_model(tmp_path / "dense")
    config = tmp_path / "dense" / "config.json"
    text = config.read_text().replace(
        '"architectures"', '"quantization_config": {}, "architectures"'
    )
    config.write_text(text)
    with pytest.raises(ValueError, match="is quantized or compressed already"):
        stored_model(tmp_path / "dense")


def test_pivots_that_are_broken_are_named(tmp_path):
    compress_pivoted(model := tiny_model("llama"))
    soco.save(model, tmp_path / "model")
    name = next(iter(find_linears(tiny_model("llama"))))
    edit(tmp_path / "model", lambda held: held[f"{name}.pivots"].fill_(7))
    with pytest.raises(ValueError, match=f"the files of {name} are broken"):
        stored_model(tmp_path / "model")
