"""soco.decompose: a model in memory and its folder, what is written, and what is refused."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

import soco
from soco import decomposition, keeping, workfolder
from soco.decomposition import CONTENTS, Decomposition, decompose
from soco.linalg import SVD
from soco.surgery import find_linears, weight_of
from soco.workfolder import WorkFolder
from tiny_models import NEEDS_5, tiny_mixture, tiny_model


def product(svd):
    return svd.U * svd.S @ svd.Vh


def check(found, model, rtol=1e-5):
    layers = find_linears(model)
    assert list(found) == list(layers)
    for name, module in layers.items():
        weight = weight_of(module).float()
        torch.testing.assert_close(product(found[name]), weight, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_and_its_folder_give_the_same(name, tmp_path):
    """GPT-2 keeps its weights transposed."""
    model = tiny_model(name)
    check(decompose(model, tmp_path / "a", progress=False), model)
    model.save_pretrained(tmp_path / "model")
    found = decompose(tmp_path / "model", tmp_path / "b", progress=False)
    check(found, model)
    for layer, svd in Decomposition(tmp_path / "a").items():
        assert all(torch.equal(a, b) for a, b in zip(svd, found[layer], strict=True))


@NEEDS_5
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_are_layers(name, tmp_path):
    """From memory and from a folder; the model stays as it is."""
    model = tiny_mixture(name)
    model.save_pretrained(tmp_path / "model")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    one = decompose(model, tmp_path / "one", kept=0.5, progress=False)
    other = decompose(tmp_path / "model", tmp_path / "other", kept=0.5, progress=False)
    assert list(one) == list(other)
    expert = "model.layers.1.mlp.experts.3.down_proj"
    assert expert in one
    for layer in one:
        for ours, theirs in zip(one[layer], other[layer], strict=True):
            assert torch.equal(ours, theirs)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    weight = model.state_dict()["model.layers.1.mlp.experts.down_proj"][3]
    weight = weight.T if name == "gpt_oss" else weight
    values = torch.linalg.svdvals(weight)
    torch.testing.assert_close(one[expert].S, values[: len(one[expert].S)])


def test_a_folder_in_shards_with_the_names_of_the_base_model(tmp_path):
    model = tiny_model("gpt2")
    model.transformer.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    config = json.loads((tmp_path / "model/config.json").read_text())
    config["architectures"] = ["GPT2LMHeadModel"]
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    check(decompose(tmp_path / "model", tmp_path / "out", progress=False), model)


def test_kept_method_and_dtype(tmp_path):
    model = tiny_model("llama", torch.bfloat16)
    found = decompose(
        model, tmp_path / "out", kept=0.5, method="randomized", dtype=torch.bfloat16,
        include="*q_proj", progress=False,
    )  # fmt: skip
    assert all(name.endswith("q_proj") for name in found)
    for name, svd in found.items():
        weight = weight_of(model.get_submodule(name)).detach().float()
        rank = min(weight.shape) // 2
        assert svd.S.shape == (rank,)
        assert (svd.U.dtype, svd.S.dtype) == (torch.bfloat16, torch.float32)
        values = torch.linalg.svdvals(weight)
        energy = float(values[:rank].square().sum() / values.square().sum())
        assert found.layers[name].energy == pytest.approx(energy, rel=1e-2)
        torch.testing.assert_close(svd.S, values[:rank], rtol=5e-2, atol=1e-3)
    described = json.loads((tmp_path / "out" / CONTENTS).read_text())
    assert (described["method"], described["kept"]) == ("randomized", 0.5)


def test_no_more_than_three_groups_at_once(tmp_path, threads, monkeypatch):
    """One is read while one is worked on, whatever the number of layers; files stay small."""
    threads(2)
    model = tiny_model("llama", num_hidden_layers=6)
    model.save_pretrained(tmp_path / "model")
    alive, most = set(), []
    read = decomposition.StoredModel.weight

    def counted(stored, name):
        alive.add(name)
        most.append(len(alive))
        return read(stored, name)

    apart = decomposition.truncated_svd

    def taken(stacked, *args, **options):
        assert len(stacked) <= 2
        found = apart(stacked, *args, **options)
        for key in sorted(alive)[: len(stacked)]:
            alive.discard(key)
        return found

    monkeypatch.setattr(decomposition.StoredModel, "weight", counted)
    monkeypatch.setattr(decomposition, "truncated_svd", taken)
    monkeypatch.setattr(decomposition, "SHARD_BYTES", 30_000)
    found = decompose(tmp_path / "model", tmp_path / "out", progress=False)
    monkeypatch.undo()
    check(found, model)
    assert len(most) == 6 * 7
    assert max(most) <= 4  # two groups of two layers
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert max(file.stat().st_size for file in files) < 90_000


def test_a_decomposition_is_replaced_as_a_whole(tmp_path, monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(decomposition, "SHARD_BYTES", 10_000)
    decompose(model, tmp_path / "out", progress=False)
    monkeypatch.undo()
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    decompose(model, tmp_path / "out", kept=0.1, progress=False)
    assert len(list((tmp_path / "out").iterdir())) == 2  # nothing of the old one is left
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 2] = torch.nan
    with pytest.raises(
        ValueError, match=r"layers\.1\.mlp\.up_proj\.weight .* holds NaN or Inf in 1 .* at \(3, 2\)"
    ):
        decompose(model, tmp_path / "out", progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert Decomposition(tmp_path / "out").layers["model.layers.0.mlp.up_proj"].rank >= 1


def held(folder):
    """Layer to its triplets, and how much energy they hold."""
    found = Decomposition(folder)
    return {name: (found.layers[name].energy, *(t.tolist() for t in found[name])) for name in found}


@pytest.mark.parametrize("in_memory", [True, False])
def test_stopped_at_every_file(in_memory, tmp_path, monkeypatch):
    """Every time another file is not written to its end; nothing that is there is made again."""
    monkeypatch.setattr(decomposition, "SHARD_BYTES", 10_000)
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    source = model if in_memory else tmp_path / "model"
    decompose(source, tmp_path / "once", kept=0.5, progress=False)
    put, apart, taken, left = WorkFolder._put, decomposition.truncated_svd, [], [0]

    def counted(stacked, *args, **options):
        taken.append(options["name"])
        return apart(stacked, *args, **options)

    def stopping(work, name, write):
        def partly(path):
            left[0] -= 1
            if left[0] < 0 and not name.startswith("plan"):
                path.write_bytes(b"half")
                raise KeyboardInterrupt
            write(path)

        put(work, name, partly)

    monkeypatch.setattr(WorkFolder, "_put", stopping)
    monkeypatch.setattr(decomposition, "truncated_svd", counted)
    stops = 0
    for _ in range(20):
        left[0] = 3  # the energies of a file and the file, and half of a third
        try:
            decompose(source, tmp_path / "out", kept=0.5, progress=False)
            break
        except KeyboardInterrupt:
            stops += 1
            assert (tmp_path / "out.work" / "plan.json").is_file()
            assert not (tmp_path / "out").exists()
    else:
        pytest.fail("it never ends")
    layers = Counter(layer.file for layer in Decomposition(tmp_path / "out").layers.values())
    assert len(layers) > 3
    # The file that is written when it stops is made again, and the one behind it; no more.
    assert 0 < len(taken) - len(set(taken)) <= 2 * stops * max(layers.values())
    assert held(tmp_path / "out") == held(tmp_path / "once")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model", "once", "out"]


def begun(tmp_path, monkeypatch, **options):
    """Arguments of a decomposition that was stopped before it wrote anything."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(decomposition, "truncated_svd", stop)
        with pytest.raises(KeyboardInterrupt):
            decompose(tmp_path / "model", tmp_path / "out", progress=False, **options)
    return tmp_path / "model", tmp_path / "out"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kept": 0.5}, "kept is 1.0 there and 0.5 here"),
        ({"method": "randomized"}, 'method is "exact" there and "randomized" here'),
        ({"dtype": torch.float64}, 'dtype is "torch.float32" there and "torch.float64" here'),
        ({"seed": 3}, "seed is 0 there and 3 here"),
        ({"exclude": "*mlp*"}, r"layers is .* there and .* here"),
    ],
)
def test_another_run_does_not_go_on_there(tmp_path, monkeypatch, options, message):
    model, out = begun(tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=message):
        decompose(model, out, progress=False, **options)
    assert (tmp_path / "out.work").is_dir()
    with pytest.raises(ValueError, match=r"model\.config\.json is .* there and not given here"):
        decompose(tiny_model("llama"), out, progress=False)  # the same, in memory
    decompose(model, out, progress=False)
    assert not (tmp_path / "out.work").exists()


def test_where_the_work_folder_is(tmp_path, monkeypatch):
    model, out = begun(tmp_path, monkeypatch, work=tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "plan.json").is_file()
    with pytest.raises(ValueError, match="out is the output: choose another work folder"):
        decompose(model, out, progress=False, work=out)
    monkeypatch.setattr(Path, "hardlink_to", refused)  # as between two disks
    decompose(model, out, progress=False, work=tmp_path / "elsewhere")
    check(Decomposition(out), tiny_model("llama"))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model", "out"]


def refused(*_):
    raise OSError("no links here")


def test_what_a_killed_run_left_is_cleared_away(tmp_path, monkeypatch):
    model, out = begun(tmp_path, monkeypatch)
    left = tmp_path / ".out.12345678"
    left.mkdir()
    (tmp_path / "out.work" / keeping.UNFINISHED).write_text(json.dumps(left.name))
    decompose(model, out, progress=False)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model", "out"]


def test_a_full_disk(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(workfolder, "save_file", full)
        message = r"out\.work/decomposition-00001\.safetensors cannot be written \(No space left"
        with pytest.raises(OSError, match=message):
            decompose(tiny_model("llama"), tmp_path / "out", progress=False)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.work"]
    found = decompose(tiny_model("llama"), tmp_path / "out", progress=False)
    check(found, tiny_model("llama"))


def test_bad_arguments(tmp_path):
    model = tiny_model("llama")
    for kept in (0, -1, 1.5):
        with pytest.raises(ValueError, match=f"kept must be above 0 and at most 1, got {kept}"):
            decompose(model, tmp_path / "out", kept=kept)
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="there exists and is no decomposition"):
        decompose(model, tmp_path / "there")
    with pytest.raises(ValueError, match="none is not a folder"):
        decompose(tmp_path / "none", tmp_path / "out")
    with pytest.raises(ValueError, match="method must be exact, randomized or auto, got 'fast'"):
        decompose(model, tmp_path / "out", method=cast(Any, "fast"), progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"there"}


def test_a_folder_that_lacks_a_layer(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, tmp_path / "model/model.safetensors")
    with pytest.raises(
        ValueError, match=r"holds no model\.layers\.1\.self_attn\.q_proj\.weight of"
    ):
        decompose(tmp_path / "model", tmp_path / "out", progress=False)
    weights["model.layers.1.self_attn.q_proj.weight"] = torch.ones(
        model.model.layers[1].self_attn.q_proj.weight.shape, dtype=torch.int8
    )
    save_file(weights, tmp_path / "model/model.safetensors")
    with pytest.raises(ValueError, match="in I8, which is no float"):
        decompose(tmp_path / "model", tmp_path / "out", progress=False)


def _edit(path, change, file=CONTENTS):
    described = json.loads((path / file).read_text())
    change(described)
    (path / file).write_text(json.dumps(described))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("architectures"), r"must name one class in architectures, got None"),
        (lambda c: c.update(architectures=["pipeline"]), "architecture pipeline, which is not in"),
        (lambda c: c.update(model_type="kettle"), r"config\.json describes no model: .*kettle"),
        (lambda c: c.update(num_attention_heads="x"), r"config\.json describes no model"),
        (lambda c: c.update(quantization_config={"quant_method": "soco"}), "compressed already"),
    ],
)
def test_configs_that_describe_no_dense_model(change, message, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    _edit(tmp_path / "model", change, "config.json")
    with pytest.raises(ValueError, match=message):
        decompose(tmp_path / "model", tmp_path / "out", progress=False)
    (tmp_path / "model/config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        decompose(tmp_path / "model", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


LAYER = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / CONTENTS).unlink(), "decomposition.json is missing"),
        (lambda f: (f / CONTENTS).write_text("{"), "is not JSON"),
        (lambda f: _edit(f, lambda d: d.pop("layers")), "does not describe layers"),
        (lambda f: _edit(f, lambda d: d.update(layers=[])), "does not describe layers"),
        (lambda f: _edit(f, lambda d: d["layers"].update(x=3)), "does not describe layers"),
        (lambda f: _edit(f, lambda d: d["layers"][LAYER].update(file=5)), "not describe layers"),
        (lambda f: _edit(f, lambda d: d["layers"][LAYER].update(shape=[1])), "not describe layers"),
        (lambda f: _edit(f, lambda d: d["layers"][LAYER].update(rank="2")), "not describe layers"),
        (lambda f: _edit(f, lambda d: d["layers"][LAYER].pop("rank")), "does not describe layers"),
        (
            lambda f: _edit(f, lambda d: d["layers"][LAYER].update(file="../x.safetensors")),
            r"lacks the file '\.\./x\.safetensors'",
        ),
        (lambda f: next(f.glob("*.safetensors")).unlink(), "lacks the file 'decomposition-00001"),
        (
            lambda f: _edit(f, lambda d: d["layers"][LAYER].update(rank=1)),
            rf"should hold {re.escape(LAYER)}\.U of shape",
        ),
        (
            lambda f: _edit(f, lambda d: d["layers"].update(other=d["layers"][LAYER])),
            r"should hold other\.U",
        ),
        (lambda f: next(f.glob("*.safetensors")).write_bytes(b"1234"), "is truncated"),
    ],
)
def test_what_is_broken_is_named(damage, message, tmp_path):
    folder = tmp_path / "out"
    decompose(tiny_model("llama"), folder, progress=False)
    damage(folder)
    with pytest.raises(ValueError, match=message):
        Decomposition(folder)


def test_is_public():
    assert soco.decompose is decompose
    assert soco.Decomposition is Decomposition
    assert SVD._fields == ("U", "S", "Vh")  # names in the files
