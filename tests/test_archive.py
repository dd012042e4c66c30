"""Statistics on disk: the same back, nothing of another model, and damage that is named."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import soco.workbench
from soco.archive import RECORD, TENSORS, fetch, key_of, store
from soco.calibration import KINDS, collect
from soco.surgery import find_linears, shape_of
from soco.workbench import Workbench
from tiny_models import tiny_model

WINDOWS = torch.randint(3, 96, (6, 10), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def model():
    return tiny_model("llama")


@pytest.fixture
def made(model, tmp_path):
    """A stored archive: its folder, its key, the layers' shapes, the statistics."""
    layers = find_linears(model)
    statistics = collect(model, layers, WINDOWS, 3, kinds=KINDS)
    key = key_of(model, WINDOWS, 3, 0)
    store(tmp_path, key, statistics)
    shapes = {name: shape_of(layer) for name, layer in layers.items()}
    return tmp_path, key, shapes, statistics


def test_round_trip(made):
    directory, key, shapes, statistics = made
    found = fetch(directory, key, shapes)
    assert found is not None
    assert found.keys() == statistics.keys()
    for name, each in statistics.items():
        again = found[name]
        assert (again.tokens, again.sequences) == (each.tokens, each.sequences)
        for kind, tensor in each.parts().items():
            assert torch.equal(again.parts()[kind], tensor), (name, kind)


def test_shared_sums_are_stored_and_read_once(made):
    directory, key, shapes, _ = made
    found = fetch(directory, key, shapes)
    assert found is not None
    q, k = (f"model.layers.0.self_attn.{kind}_proj" for kind in "qk")
    assert found[q].gram is found[k].gram
    tensors = load_file(directory / key.folder / TENSORS)
    assert sum(name.endswith(".gram") for name in tensors) == 8  # 2 blocks: qkv, o, gate-up, down


def test_another_model_data_batch_or_seed_is_another_key(model):
    key = key_of(model, WINDOWS, 3, 0)
    assert key == key_of(model, WINDOWS, 3, 0)
    assert key != key_of(model, WINDOWS + 1, 3, 0)
    assert key != key_of(model, WINDOWS.reshape(3, 20), 3, 0)
    assert key != key_of(model, WINDOWS, 2, 0)
    assert key != key_of(model, WINDOWS, 3, 1)
    with torch.no_grad():
        model.model.embed_tokens.weight[5, 3] += 1e-3
    assert key != key_of(model, WINDOWS, 3, 0)


def test_nothing_there(made, tmp_path):
    directory, key, shapes, _ = made
    assert fetch(tmp_path / "nowhere", key, shapes) is None
    assert fetch(directory, key, {"lm_head": (96, 32)}) is None


def test_what_is_there_of_the_layers_is_read(made):
    directory, key, shapes, statistics = made
    found = fetch(directory, key, {**shapes, "lm_head": (96, 32)})
    assert found is not None
    assert found.keys() == statistics.keys()


def test_other_layers_stay(made):
    """Layers of another run with the same model and data are kept beside those of this one."""
    directory, key, shapes, statistics = made
    one = {FIRST: dataclasses.replace(statistics[FIRST], fisher=None)}
    store(directory, key, one)
    found = fetch(directory, key, shapes)
    assert found is not None
    assert found.keys() == statistics.keys()
    assert found[FIRST].fisher is None
    for name in shapes.keys() - {FIRST}:
        for kind, tensor in statistics[name].parts().items():
            assert torch.equal(found[name].parts()[kind], tensor), (name, kind)
    tensors = load_file(directory / key.folder / TENSORS)
    assert sum(name.endswith(".gram") for name in tensors) == 9  # of FIRST, and 8 of before


@pytest.mark.parametrize("change", [{"hidden_act": "relu"}, {"rope_theta": 10.0}])
def test_another_configuration_is_another_key(model, change):
    other = tiny_model("llama", **change)
    assert other.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(other.state_dict()[n], v) for n, v in model.state_dict().items())
    one, two = key_of(model, WINDOWS, 3, 0), key_of(other, WINDOWS, 3, 0)
    assert one != two
    assert one.folder != two.folder
    assert one.model == two.model


def test_where_a_model_lies_does_not_matter(model, tmp_path):
    key = key_of(model, WINDOWS, 3, 0)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert key_of(again, WINDOWS, 3, 0) == key


def test_a_file_in_the_place_of_the_folder(made, tmp_path):
    _, key, shapes, _ = made
    (tmp_path / "stats").mkdir()
    (tmp_path / "stats" / key.folder).write_text("mine")
    with pytest.raises(ValueError, match="should be a folder of statistics, and is a file"):
        fetch(tmp_path / "stats", key, shapes)


def change_record(change):
    def damage(folder):
        record = json.loads((folder / RECORD).read_text())
        change(record)
        (folder / RECORD).write_text(json.dumps(record))

    return damage


def drop_tensor(folder):
    tensors = load_file(folder / TENSORS)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, folder / TENSORS)


def as_integers(folder):
    tensors = load_file(folder / TENSORS)
    save_file({name: tensor.long() for name, tensor in tensors.items()}, folder / TENSORS)


FIRST = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (change_record(lambda r: r.update(format=9)), "of format 9, not 2"),
        (change_record(lambda r: r.update(model="other")), "of another model than its folder's"),
        (change_record(lambda r: r.update(seed=5)), "of another seed than its folder's"),
        (change_record(lambda r: r.pop("layers")), "names no layers"),
        (change_record(lambda r: r["layers"].update({FIRST: 3})), f"describes {FIRST} as 3"),
        (
            change_record(lambda r: r["layers"][FIRST].update(tokens=-1)),
            f"describes {FIRST} as",
        ),
        (
            change_record(lambda r: r["layers"][FIRST]["parts"].pop("gram")),
            f"names no Gram matrix of {FIRST}",
        ),
        (drop_tensor, "does not hold .* with shape"),
        (as_integers, "does not hold .* of .* as float64 with shape"),
        (lambda folder: (folder / TENSORS).unlink(), "statistics.safetensors is missing"),
        (lambda folder: (folder / RECORD).write_text("[" * 100_000), "is nested too deep"),
        (lambda folder: (folder / RECORD).write_text("{"), "is not JSON"),
        (lambda folder: (folder / TENSORS).write_bytes(b"123"), "is truncated in its header"),
        (
            lambda folder: (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-9]),
            "is truncated",
        ),
    ],
)
def test_damage_is_named(made, damage, text):
    directory, key, shapes, _ = made
    damage(directory / key.folder)
    with pytest.raises(ValueError, match=text):
        fetch(directory, key, shapes)


def test_a_workbench_uses_what_is_there_and_adds_what_is_not(model, tmp_path, monkeypatch):
    runs = []

    def watched(*args, **options):
        runs.append(sorted(options["kinds"]))
        return collect(*args, **options)

    monkeypatch.setattr(soco.workbench, "collect", watched)
    layers = find_linears(model)

    def bench():
        return Workbench(model, layers, WINDOWS, directory=tmp_path)

    first = bench().statistics({"gram"})
    assert runs == [["gram"]]
    again = bench().statistics({"gram"})
    assert runs == [["gram"]]
    assert all(torch.equal(first[name].gram, again[name].gram) for name in first)
    more = bench().statistics({"gram", "abs_mean", "grad_gram"})
    assert runs == [["gram"], ["abs_mean", "grad_gram"]]
    assert all(torch.equal(first[name].gram, more[name].gram) for name in first)
    bench().statistics({"abs_mean"})
    assert len(runs) == 2
