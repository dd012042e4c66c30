"""soco.contents: which tensors a model needs, by whatever names its files call them."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from soco.checkpoint import load
from soco.contents import find_entries
from soco.headers import read_headers, weight_files
from soco.surgery import low_rank_layers
from tiny_models import CONFIGS, NEEDS_5, compress, compress_pivoted, compress_shared, tiny_model

UP_PROJ = "model.layers.1.mlp.up_proj"


def drop(folder, key):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors.pop(key)
    save_file(tensors, file, metadata={"format": "pt"})


def written_by(folder, version):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"transformers_version": version}))


@pytest.fixture
def folder(tmp_path):
    compress(tiny_model("llama")).save_pretrained(tmp_path)
    return tmp_path


def test_factors_are_checked_in_every_class(folder):
    drop(folder, f"{UP_PROJ}.up.weight")
    for cls in (AutoModel, AutoModelForCausalLM):
        with pytest.raises(ValueError, match=r"lacks .*layers\.1\.mlp\.up_proj\.up\.weight"):
            cls.from_pretrained(folder)


def test_a_base_model_ignores_the_head(folder):
    drop(folder, "lm_head.weight")
    assert low_rank_layers(AutoModel.from_pretrained(folder))
    with pytest.raises(ValueError, match=r"lacks lm_head\.weight"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_other_tensors_are_transformers_business_in_other_versions(folder):
    written_by(folder, "4.57.0")
    drop(folder, "model.norm.weight")
    AutoModelForCausalLM.from_pretrained(folder)  # says MISSING in its log, as for any model
    with pytest.raises(ValueError, match=r"lacks model\.norm\.weight"):
        load(folder)
    drop(folder, f"{UP_PROJ}.up.weight")
    with pytest.raises(ValueError, match=rf"lacks {UP_PROJ}\.up\.weight"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_layer_that_another_class_does_not_have_has_to_be_in_the_files(folder):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["layers"]["score"] = {"rank": 1}
    file.write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match="names a compressed layer score, which LlamaModel does no"
    ):
        AutoModel.from_pretrained(folder)


def test_weights_from_memory_are_not_checked(folder):
    state = load_file(folder / "model.safetensors")
    config = transformers.AutoConfig.from_pretrained(folder)
    cls = type(tiny_model("llama"))
    try:
        model = cls.from_pretrained(None, config=config, state_dict=state)
    except TypeError:
        pytest.skip("this transformers wants a name")
    assert torch.equal(model.state_dict()[f"{UP_PROJ}.up.weight"], state[f"{UP_PROJ}.up.weight"])


def test_only_safetensors(tmp_path):
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is not safetensors, and soco reads"):
        find_entries(tiny_model("llama"), [str(tmp_path / "pytorch_model.bin")])


def qwen2_vl():
    config = transformers.Qwen2VLConfig(
        text_config=CONFIGS["llama"]
        | dict(rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2]})
        | dict(rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]}),
        vision_config=dict(depth=2, embed_dim=32, hidden_size=32, num_heads=2),
        image_token_id=90,
        video_token_id=91,
        vision_start_token_id=92,
        vision_end_token_id=93,
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


@NEEDS_5  # 4 writes no architectures for this one
def test_renamed_tensors_are_found(tmp_path):
    """Files keep the names that an architecture was first published with."""
    model = compress(qwen2_vl())
    model.save_pretrained(tmp_path)
    layer = next(name for name in low_rank_layers(model) if "language" in name)
    entries = read_headers(weight_files(tmp_path))
    assert f"{layer}.down.weight" not in entries
    loaded = load(tmp_path)
    assert low_rank_layers(loaded).keys() == low_rank_layers(model).keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor)
    drop(tmp_path, next(key for key in entries if key.endswith("q_proj.down.weight")))
    with pytest.raises(ValueError, match=r"lacks .*q_proj\.down\.weight"):
        load(tmp_path)


def test_models_first_published_with_other_names(tmp_path):
    """BERT's norms were gamma and beta once, and such files are still about."""
    model = tiny_model("bert")
    model.save_pretrained(tmp_path / "old")
    file = tmp_path / "old" / "model.safetensors"
    tensors = load_file(file)
    renamed = {
        key.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): tensor
        for key, tensor in tensors.items()
    }
    assert renamed.keys() != tensors.keys()
    save_file(renamed, file, metadata={"format": "pt"})
    again = compress(type(model).from_pretrained(tmp_path / "old"))
    again.save_pretrained(tmp_path / "new")  # some versions write the old names again
    for loaded in (type(model).from_pretrained(tmp_path / "new"), load(tmp_path / "new")):
        for key, tensor in again.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], tensor)


def test_a_layer_missing_and_another_too_much_is_found_by_load(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["more"] = tensors.pop("model.norm.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks model\.norm\.weight"):
        load(folder)


@pytest.mark.parametrize(
    ("compressed", "key"),
    [
        (compress_shared, f"{UP_PROJ}.up.weight"),
        (compress_shared, f"{UP_PROJ.replace('1', '0')}.down.weight"),
        (compress_pivoted, f"{UP_PROJ}.pivots"),
    ],
)
def test_other_kinds_are_checked_in_every_class_and_version(compressed, key, tmp_path):
    """Each has tensors that others have not, and all of them count."""
    compressed(tiny_model("llama")).save_pretrained(tmp_path)
    written_by(tmp_path, "4.57.0")
    assert low_rank_layers(AutoModel.from_pretrained(tmp_path))
    drop(tmp_path, key)
    for cls in (AutoModel, AutoModelForCausalLM):
        with pytest.raises(ValueError, match=f"lacks {key}, which the model needs"):
            cls.from_pretrained(tmp_path)


@NEEDS_5  # 4 writes no architectures for this one
@pytest.mark.parametrize("compressed", [compress_pivoted, compress_shared])
def test_renamed_tensors_of_other_kinds(compressed, tmp_path):
    model = compressed(qwen2_vl(), include="*language_model*_proj")
    model.save_pretrained(tmp_path)
    layer = [name for name in low_rank_layers(model) if name.endswith("up_proj")][1]
    entries = read_headers(weight_files(tmp_path))
    assert f"{layer}.up.weight" not in entries
    loaded = load(tmp_path)
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor)
    last = "pivots" if compressed is compress_pivoted else "up.weight"
    drop(tmp_path, next(key for key in entries if key.endswith(f"1.mlp.up_proj.{last}")))
    with pytest.raises(ValueError, match=rf"lacks .*1\.mlp\.up_proj\.{last}"):
        load(tmp_path)


def test_a_basis_too_much_is_found_in_every_class(tmp_path):
    compress_shared(tiny_model("llama")).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    more = {f"{UP_PROJ}.down.weight": torch.ones(4, 32)}
    save_file(load_file(file) | more, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"holds {UP_PROJ}\.down\.weight, which the model has no"):
        AutoModel.from_pretrained(tmp_path)
