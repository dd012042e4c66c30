"""Folders broken at random are refused in one sentence; some hundreds here, see fuzzing.py."""

import contextlib
import json
import os
import time

import pytest
import torch

import fuzzing  # tests/fuzzing.py
import fuzzing_ops
import soco
from soco.cli.sources import open_dense
from soco.stored import StoredModel
from tiny_models import compress, tiny_model


def test_some_hundred_broken_folders(tmp_path):
    found = fuzzing.run(400, seed=0, scratch=tmp_path)
    assert found["failures"] == []
    outcomes = [name for counts in found["outcomes"].values() for name in counts]
    assert set(outcomes) == {"loaded", "refused"}  # both: the mutations are no walkover


def test_ops_on_some_hundred_random_arguments():
    found = fuzzing_ops.run(800, seed=0)
    assert found["failures"] == []
    assert all(counts["right"] > 50 for counts in found["outcomes"].values())
    assert sum(counts.get("refused", 0) for counts in found["outcomes"].values()) > 10


@pytest.fixture
def folder(tmp_path):
    """Of a compressed model."""
    model = tiny_model("llama")
    compress(model)
    soco.save(model, tmp_path / "small")
    return tmp_path / "small"


@pytest.mark.parametrize("value", [10**9, 2**62, -(10**9)])
@pytest.mark.parametrize("key", ["num_hidden_layers", "num_local_experts"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_billion_layers_are_refused_at_once(nested, key, value, folder):
    file = folder / "config.json"
    described = json.loads(file.read_text())
    described |= {"text_config": {key: value}} if nested else {key: value}
    file.write_text(json.dumps(described))
    begin = time.perf_counter()
    with pytest.raises(ValueError, match=rf"config.json has .*{key} .*, and the files hold"):
        soco.load(folder)
    assert time.perf_counter() - begin < 5  # a hang, not a speed


def test_the_same_of_a_dense_model(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 10**9}))
    with pytest.raises(ValueError, match=r"has num_hidden_layers 1e\+09, and the files hold"):
        StoredModel(tmp_path / "model")


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 10**9}, {"architectures": [["a"]]}])
def test_the_same_where_a_dense_model_is_loaded(changes, tmp_path):
    """By ``soco compress``: the first was a hang, the second a TypeError."""
    tiny_model("llama").save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    if "architectures" in changes:  # transformers may know a way
        with contextlib.suppress(ValueError):
            open_dense(str(tmp_path / "model"), "auto", torch.device("cpu"))
        return
    with pytest.raises(ValueError, match=r"has num_hidden_layers 1e\+09, and the files hold"):
        open_dense(str(tmp_path / "model"), "auto", torch.device("cpu"))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("what", ["device", "pipe", "folder", "loop"])
def test_what_is_no_file_is_not_read(what, name, folder):
    """A device would be read for ever, and a pipe waited for."""
    file = folder / name
    file.unlink()
    if what == "device":
        file.symlink_to("/dev/zero")
    elif what == "pipe":
        os.mkfifo(file)
    elif what == "folder":
        file.mkdir()
    else:
        file.symlink_to(name)
    with pytest.raises(ValueError, match=r"is no file|is missing|holds neither"):
        soco.load(folder)


def test_a_link_to_a_file_is_followed(folder, tmp_path):
    """The hub's cache consists of such links."""
    (folder / "model.safetensors").rename(tmp_path / "blob")
    (folder / "model.safetensors").symlink_to(tmp_path / "blob")
    assert soco.load(folder) is not None


@pytest.mark.parametrize(
    "place", ["../outside.safetensors", "/outside", "a/b", "..", ".", "x" * 5000]
)
def test_an_index_that_leads_elsewhere(place, folder):
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"lm_head.weight": place}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"is not a file name|is missing"):
        soco.load(folder)


@pytest.mark.parametrize("content", ["[" * 200000, '{"a":' * 100000, '{"a": ' + "1" * 9999 + "}"])
def test_json_that_would_exhaust_a_parser(content, folder):
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        soco.load(folder)


def test_a_header_larger_than_any_library_reads(folder):
    """Refused before it is read: the file is sparse, and takes no room."""
    with (folder / "model.safetensors").open("wb") as file:
        file.write((2 * 10**8).to_bytes(8, "little"))
        file.truncate(3 * 10**8)
    with pytest.raises(ValueError, match=r"has a header of 200,000,000 bytes"):
        soco.load(folder)


def test_pickles_are_not_read(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"a": torch.ones(1)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"holds neither model.safetensors nor"):
        soco.load(folder)


def test_whatever_transformers_raises_is_one_sentence(folder):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"initializer_range": ["a"] * 100}))
    with pytest.raises(ValueError, match=r"small cannot be loaded: ") as caught:
        soco.load(folder)
    assert "\n" not in str(caught.value)
