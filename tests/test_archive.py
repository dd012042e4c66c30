"""Statistics on disk: the same back, nothing of another model, and damage that is named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

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
    assert fetch(directory, key, {**shapes, "lm_head": (96, 32)}) is None


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


FIRST = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (change_record(lambda r: r.update(format=9)), "of format 9, not 1"),
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
