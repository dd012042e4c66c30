"""soco.verify: every way in which a folder can be another model than was written is found."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import soco
from soco.folders import CHECKSUMS
from soco.stored import StoredModel
from soco.surgery import find_linears, low_rank_layers, weight_of
from tiny_models import (
    MIXTURES,
    NEEDS_5,
    compress,
    compress_pivoted,
    compress_shared,
    tiny_mixture,
    tiny_model,
)

IDS = torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(0))


def folders(tmp_path, name="llama", how=compress, dtype=torch.float32, **options):
    """A dense model and a compressed one."""
    model = tiny_model(name, dtype)
    model.save_pretrained(tmp_path / "dense")
    how(model, **options)
    soco.save(model, tmp_path / "small")
    return tmp_path / "small", tmp_path / "dense"


def edit(folder, change):
    file = folder / "model.safetensors"
    held = load_file(file)
    change(held)
    save_file(held, file, metadata={"format": "pt"})


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", [compress, compress_pivoted, compress_shared])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_a_sound_folder(name, how, stream, tmp_path):
    small, dense = folders(tmp_path, name, how, rank=12)
    found = soco.verify(small, dense, text=IDS, stream=stream)
    assert found.problems == ()
    assert found.ok
    assert set(found.files.values()) == {"as written"}
    assert {"config.json", "model.safetensors"} <= found.files.keys()
    model, whole = soco.load(small), tiny_model(name)
    layers = {each.name: each for each in found.layers}
    assert list(layers) == list(find_linears(whole))
    for layer, each in layers.items():
        weight = weight_of(whole.get_submodule(layer))
        ours = weight_of(low_rank_layers(model)[layer].to_linear())
        expected = float((weight - ours).detach().norm() / weight.detach().norm())
        assert each.weight_error == pytest.approx(expected, rel=1e-4)
    assert json.loads(json.dumps(found.to_dict()))["files"] == found.files
    assert "all outputs finite" in found.summary()


@pytest.mark.parametrize("how", [compress, compress_pivoted, compress_shared])
def test_streamed_it_is_the_same(how, tmp_path):
    small, dense = folders(tmp_path, how=how, rank=12, dtype=torch.float64)
    options = {"text": IDS, "samples": 3}
    assert soco.verify(small, dense, **options, stream=True) == soco.verify(small, dense, **options)


@pytest.mark.parametrize(
    ("name", "path"),
    [("llama", "model.layers.0.self_attn.q_proj"), ("gpt2", "transformer.h.0.attn.c_attn")],
)
def test_the_output_error_by_hand(name, path, tmp_path):
    """Of the first layers, whose inputs are those of the dense model; a bias is no error."""
    small, dense = folders(tmp_path, name)
    if name == "gpt2":
        for folder in (small, dense):
            edit(folder, lambda held: held[f"{path}.bias"].fill_(100))
        (small / CHECKSUMS).unlink()
    found = soco.verify(small, dense, text=IDS, samples=4)
    model, inputs = soco.load(small), []
    layer = low_rank_layers(model)[path]
    layer.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    with torch.no_grad():
        model(input_ids=IDS)
        wanted = inputs[0] @ weight_of(tiny_model(name).get_submodule(path)).mT
        bias = 0 if layer.bias is None else layer.bias
        gap = layer(inputs[0]) - bias - wanted
    expected = float(gap.norm() / wanted.norm())
    each = next(each for each in found.layers if each.name == path)
    assert each.output_error == pytest.approx(expected, rel=1e-3)


def test_without_a_dense_model_and_text(tmp_path):
    small, _ = folders(tmp_path)
    found = soco.verify(small)
    assert found.ok
    assert found.layers == ()
    assert found.tokens == 4 * 64


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_was_changed(name, stream, tmp_path):
    small, dense = folders(tmp_path)
    file = small / name
    if name == "config.json":
        file.write_text(file.read_text().replace('"use_cache": true', '"use_cache": false'))
    else:
        data = bytearray(file.read_bytes())
        data[-3] ^= 1  # one bit of one number
        file.write_bytes(data)
    found = soco.verify(small, dense, text=IDS, stream=stream)
    assert found.files[name] == "changed"
    assert found.problems == found.broken == (f"{name} is changed",)


def test_files_that_are_missing_or_not_recorded(tmp_path):
    small, _ = folders(tmp_path)
    record = json.loads((small / CHECKSUMS).read_text())
    (small / CHECKSUMS).write_text(json.dumps({**record, "model-2.safetensors": "sha256:0"}))
    found = soco.verify(small)
    assert found.problems == ("model-2.safetensors is missing",)
    (small / CHECKSUMS).unlink()
    found = soco.verify(small)
    assert found.ok
    assert set(found.files.values()) == {"not recorded"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("key", ["model.layers.1.mlp.up_proj.up.weight", "model.norm.weight"])
def test_numbers_that_are_not_finite(key, stream, tmp_path):
    small, dense = folders(tmp_path)
    edit(small, lambda held: held[key].view(-1)[0].fill_(float("nan")))
    found = soco.verify(small, dense, text=IDS, stream=stream)
    assert f"{key} holds NaN or Inf" in found.problems


@pytest.mark.parametrize("stream", [False, True])
def test_outputs_that_overflow(stream, tmp_path):
    small, _ = folders(tmp_path, dtype=torch.float16)
    edit(small, lambda held: held["model.norm.weight"].fill_(60000))
    edit(small, lambda held: held["lm_head.weight"].fill_(60000))
    found = soco.verify(small, text=IDS, stream=stream)
    assert found.problems[-1].startswith("the outputs of the model hold NaN or Inf")


@pytest.mark.parametrize("stream", [False, True])
def test_layers_that_changed_places(stream, tmp_path):
    """Of the same shapes: nothing else can see it."""
    small, dense = folders(tmp_path, rank=12)
    one, other = (f"model.layers.{i}.mlp.up_proj" for i in (0, 1))

    def swap(held):
        for part in ("up.weight", "down.weight"):
            a, b = f"{one}.{part}", f"{other}.{part}"
            held[a], held[b] = held[b].clone(), held[a].clone()

    edit(small, swap)
    (small / CHECKSUMS).unlink()
    assert soco.verify(small, text=IDS, stream=stream).ok
    found = soco.verify(small, dense, text=IDS, stream=stream)
    assert len(found.problems) == len(found.far) == 2
    assert found.broken == ()
    for name, problem in zip((one, other), found.problems, strict=True):
        assert problem.startswith(f"{name} is no nearer to the dense layer than zeros are")


def test_another_dense_model(tmp_path):
    small, _ = folders(tmp_path)
    tiny_model("llama", intermediate_size=56).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"other is another model: model.layers.0.mlp.gate"):
        soco.verify(small, tmp_path / "other")
    tiny_model("gpt2").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match=r"is another model: it has no layer model.layers.0"):
        soco.verify(small, tmp_path / "gpt2")


def test_a_dense_model_with_nan_is_named(tmp_path):
    small, _ = folders(tmp_path)
    broken = tiny_model("llama")
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    broken.save_pretrained(tmp_path / "nan")
    with pytest.raises(ValueError, match=r"nan: model.layers.1.mlp.up_proj.weight .* holds NaN"):
        soco.verify(small, tmp_path / "nan")


@pytest.mark.parametrize("stream", [False, True])
def test_a_folder_that_does_not_load(stream, tmp_path):
    small, dense = folders(tmp_path)
    edit(small, lambda held: held.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"lacks model.norm.weight"):
        soco.verify(small, stream=stream)
    with pytest.raises(ValueError, match=r"compressed by soco"):
        soco.verify(dense, stream=stream)


def test_the_beginning_of_a_text_is_run(tmp_path):
    """Of a long one no more is read; of a short one all there is."""
    small, dense = folders(tmp_path)
    ids = IDS.flatten().repeat(10)
    found = soco.verify(small, dense, text=ids, samples=2)
    assert found.tokens == 2 * 64
    known = soco.verify(small, dense, text=ids[:128].view(2, 64), samples=2)
    assert known.layers == found.layers
    assert soco.verify(small, text=ids[:20]).tokens == 20


@NEEDS_5
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures(name, stream, tmp_path):
    """Every expert is compared, however the dense model is stored."""
    model = tiny_mixture(name)
    model.save_pretrained(tmp_path / "dense")
    soco.compress(model, 0.2, method="svd", progress=False)
    soco.save(model, tmp_path / "small")
    found = soco.verify(tmp_path / "small", tmp_path / "dense", text=IDS, stream=stream)
    experts = [each for each in found.layers if ".experts." in each.name]
    assert len(experts) > 3
    for each in experts:
        layer = low_rank_layers(model)[each.name]
        stored = StoredModel(tmp_path / "dense")
        stored.split_experts()
        dense = stored.weight(each.name)
        error = (dense - layer.to_linear().weight.detach()).norm() / dense.norm()
        assert each.weight_error == pytest.approx(float(error), rel=1e-4)
    assert {each.output_error is not None for each in experts} <= {True, False}
    assert any(each.output_error for each in experts)


@NEEDS_5
def test_experts_without_tokens(tmp_path):
    """Say nothing of their outputs."""
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path / "dense")
    ids = IDS[:1, :4]
    soco.compress(model, 0.4, method="svd", progress=False)
    soco.save(model, tmp_path / "small")
    found = soco.verify(tmp_path / "small", text=ids, samples=1)
    assert found.ok


def test_a_trained_model(model_dir, shared_data, tmp_path):
    """A whitened truncation of a real one, with text of its kind."""
    place = model_dir("books-llama-1m")
    model = AutoModelForCausalLM.from_pretrained(place)
    tokenizer = AutoTokenizer.from_pretrained(place)
    text = shared_data / "books" / "arthur-conan-doyle_the-adventures-of-sherlock-holmes.txt.gz"
    soco.compress(
        model, 0.6, method="svd-llm", tokenizer=tokenizer, calibration=text, samples=32, length=128,
        progress=False,
    )  # fmt: skip
    soco.save(model, tmp_path / "small", tokenizer)
    found = soco.verify(tmp_path / "small", place, text=text, tokenizer=tokenizer)
    assert found.ok
    for each in found.layers:
        assert each.output_error is not None
        assert 0 < each.output_error < min(0.9, each.weight_error)


def test_saving_again_and_exporting(tmp_path):
    """A new save has new checksums; the dense export has none."""
    small, _ = folders(tmp_path)
    model = soco.load(small)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    soco.save(model, small)
    assert soco.verify(small).ok
    soco.export_dense(small, tmp_path / "stock")
    assert not (tmp_path / "stock" / CHECKSUMS).exists()
