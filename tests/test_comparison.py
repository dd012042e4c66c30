"""Comparisons: rows are what compress and evaluate say, none is made twice, failures are told."""

import copy
import dataclasses
import json
import re
import time
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import AutoModel

import soco
from soco import comparison, objectives
from soco.comparison import DEFAULT_METHODS, OPTIONS, Entry, compare
from soco.methods import METHODS
from soco.methods.bases import Plain
from soco.record import RECORD, Comparison
from tiny_models import tiny_mixture, tiny_model

TOKENS = torch.randint(3, 96, (600,), generator=torch.Generator().manual_seed(0))
TEXT, OTHER = TOKENS[:100], TOKENS[100:180]
SETTINGS: dict[str, Any] = dict(
    calibration=TOKENS[200:], text={"main": TEXT, "other": OTHER}, samples=6, length=16, windows=4
)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def done(model, tmp_path_factory):
    """A comparison of three entries at two ratios, and its folder."""
    folder = tmp_path_factory.mktemp("done")
    methods = ["svd", "svd-llm@energy", "kfac-svd"]
    return compare(model, methods, [0.3, 0.5], output=folder, seed=3, **SETTINGS), folder


@pytest.fixture
def calls(monkeypatch):
    """What ``compress`` is called with."""
    found = []

    def counted(model, ratio, **options):
        found.append((options["method"], ratio))
        return compress(model, ratio, **options)

    compress = comparison.compress
    monkeypatch.setattr(comparison, "compress", counted)
    return found


def without_times(row):
    volatile = ("seconds", "phases", "peak_bytes")
    return {key: value for key, value in row.items() if key not in volatile}


# ---- entries


@pytest.mark.parametrize(
    "text", ["svd", "svd-llm@energy", "svd@lems+pivoted", "soco:fast", "soco:best+unpivoted+refine"]
)
def test_entries_are_written_as_they_are_read(text):
    assert str(Entry.parse(f" {text} ")) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("magic", "'magic' names no method 'magic': choose from aa-svd, "),
        ("", "'' names no method ''"),
        ("soco:magic", "names no effort 'magic': choose from balanced, best, fast"),
        ("svd+pivoted+unpivoted", "is pivoted and unpivoted: take one"),
        ("svd@magic", "names no allocator 'magic': choose from adacr, "),
        ("svd@", "names no allocator ''"),
        ("svd+magic", "names no option 'magic': choose from pivoted"),
        ("svd+", "names no option ''"),
    ],
)
def test_entries_that_are_refused(text, expected):
    with pytest.raises(ValueError, match=re.escape(expected)):
        Entry.parse(text)


def test_every_method_is_compared_unless_others_are_named():
    assert {Entry.parse(text).method for text in DEFAULT_METHODS} == set(METHODS)
    assert "pivoted" in OPTIONS
    assert Entry.parse("svd@lems+pivoted").arguments() == {
        "method": "svd", "allocator": "lems", "pivoted": True
    }  # fmt: skip
    assert Entry.parse("soco:fast+unpivoted").arguments() == {
        "method": "soco", "effort": "fast", "pivoted": False
    }  # fmt: skip


# ---- rows


def test_a_row_is_what_compress_and_evaluate_say(model, done):
    row = next(r for r in done[0].rows if (r["method"], r["ratio"]) == ("svd-llm@energy", 0.3))
    made = soco.compress(
        copy.deepcopy(model), 0.3, method="svd-llm", allocator="energy", seed=3,
        calibration=SETTINGS["calibration"], samples=6, length=16,
    )  # fmt: skip
    report = soco.report(made)
    for text, told in ((TEXT, row), (OTHER, row["texts"]["other"])):
        found = soco.evaluate(made, text, dense=model, length=16, windows=4, progress=False)
        for name in ("perplexity", "kl", "top1", "distance", "tokens"):
            assert told[name] == getattr(found, name)
    assert row["ranks"] == {layer.name: layer.rank for layer in report.layers}
    assert row["params"] == {layer.name: layer.params for layer in report.layers}
    assert row["kept_params"] == sum(row["params"].values()) == report.params_after
    assert row["bytes"] == report.model_bytes_after
    assert row["settings"] == report.settings
    assert row["removed"] >= 0.3


def test_the_dense_model_is_measured_and_stays_as_it_is(model, done):
    assert all(
        map(torch.equal, model.state_dict().values(), tiny_model("llama").state_dict().values())
    )
    dense = done[0].dense
    for text, told in ((TEXT, dense), (OTHER, dense["texts"]["other"])):
        found = soco.evaluate(model, text, length=16, windows=4, progress=False)
        assert told["perplexity"] == found.perplexity
    assert dense["params"] == sum(p.numel() for p in model.parameters())
    assert dense["kept_params"] == dense["target_params"] == done[0].rows[0]["target_params"]


def test_the_record_says_what_was_done(model, done):
    found, folder = done
    assert Comparison.read(folder / RECORD) == found
    assert [(r["ratio"], r["method"]) for r in found.rows] == [
        (ratio, method) for ratio in (0.3, 0.5) for method in ("svd", "svd-llm@energy", "kfac-svd")
    ]
    setup = found.setup
    assert (setup["class"], setup["dtype"]) == ("LlamaForCausalLM", "float32")
    assert setup["calibration"] == {"source": "Tensor", "sequences": 6, "length": 16, "seed": 3}
    assert {t: (each["windows"], each["tokens"]) for t, each in setup["texts"].items()} == {
        "main": (4, 64), "other": (4, 64)
    }  # fmt: skip
    assert set(setup["statistics"]["kinds"]) >= {"gram", "grad_gram"}
    assert found.machine["threads"] == torch.get_num_threads()
    assert found.date.startswith("20")


def test_spectra_are_of_one_layer_of_every_kind(model, done):
    spectra = done[0].spectra
    assert sorted(spectra) == sorted(n for n in done[0].shapes if n.startswith("model.layers.1."))
    name = "model.layers.1.mlp.up_proj"
    weight = model.get_submodule(name).weight.detach()
    assert spectra[name]["plain"] == pytest.approx(torch.linalg.svdvals(weight).tolist(), rel=1e-4)
    assert spectra[name]["at"] == list(range(1, 33))
    whitened = spectra[name]["whitened"]
    assert whitened == sorted(whitened, reverse=True)
    assert whitened != spectra[name]["plain"]


def test_long_spectra_are_thinned(model, monkeypatch, tmp_path):
    monkeypatch.setattr(comparison, "_SPECTRUM_POINTS", 5)
    settings = {**SETTINGS, "calibration": None, "include": "*up_proj"}
    found = compare(model, ["svd"], [0.5], output=tmp_path, **settings)
    (spectrum,) = found.spectra.values()
    assert spectrum["at"] == [1, 9, 17, 24, 32]
    assert len(spectrum["plain"]) == 5
    assert "whitened" not in spectrum


def test_the_seed_reaches_the_methods(model, monkeypatch, tmp_path):
    seeds = []

    def fake(model, ratio, **options):
        seeds.append(options["seed"])
        raise ValueError("enough")

    monkeypatch.setattr(comparison, "compress", fake)
    compare(model, ["svd"], [0.5], output=tmp_path, seed=7, **SETTINGS)
    assert seeds == [7]


def test_what_rows_share_counts_for_each(model, monkeypatch, tmp_path):
    """A decomposition, and a probe, that only the first row has to make."""
    slow, layers = 0.05, 4
    take_apart, divergence = Plain.spectrum, objectives.TokenDistribution.divergence

    def spectrum(*args, **options):
        time.sleep(slow)
        return take_apart(*args, **options)

    def diverge(*args, **options):
        time.sleep(slow)
        return divergence(*args, **options)

    monkeypatch.setattr(Plain, "spectrum", spectrum)
    monkeypatch.setattr(objectives.TokenDistribution, "divergence", diverge)
    settings = {**SETTINGS, "include": ["*k_proj", "*v_proj"]}
    methods = ["svd", "svd@sensitivity"]
    first, probed, second, again = compare(
        model, methods, [0.5, 0.4], output=tmp_path, **settings
    ).rows
    assert first["seconds"] > slow * layers
    assert second["seconds"] > slow * layers > second["phases"]["decomposition"]
    assert probed["phases"]["ranks"] > slow * layers
    assert again["seconds"] > slow * layers + probed["phases"]["ranks"] / 2
    assert again["phases"]["ranks"] < probed["phases"]["ranks"]


def test_encoders_go_by_their_states(tmp_path):
    torch.manual_seed(0)
    bert = AutoModel.from_config(tiny_model("bert").config)
    found = compare(bert, ["svd", "svd-llm"], [0.5], output=tmp_path, **SETTINGS)
    assert found.yardstick == "distance"
    assert found.dense["perplexity"] is None
    for row in found.rows:
        assert row["perplexity"] is row["kl"] is None
        assert row["distance"] > 0


def test_without_calibration(model, tmp_path):
    settings = {**SETTINGS, "calibration": None}
    found = compare(model, ["svd"], [0.5], output=tmp_path / "svd", **settings)
    assert found.rows[0]["kl"] > 0
    assert found.setup["calibration"] == {}
    with pytest.raises(ValueError, match="method svd-llm learns from text: give calibration="):
        compare(model, ["svd", "svd-llm"], [0.5], output=tmp_path / "two", **settings)
    assert not (tmp_path / "two").exists()


def test_each_warning_is_told_once(model, tmp_path):
    settings = {**SETTINGS, "samples": 2, "length": 8, "windows": 90}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = compare(model, ["svd-llm", "asvd"], [0.5], output=tmp_path, **settings)
    told = [str(warning.message) for warning in caught]
    assert len(told) == len(set(told))
    rare = [text for text in told if "fewer calibration tokens than they have inputs" in text]
    assert len(rare) == 1
    assert [row["warnings"] for row in found.rows] == [rare, rare]
    assert [text for text in told if text not in rare] == list(found.warnings)
    assert "the evaluation data main has 100 tokens: 12 windows of 8" in found.warnings[0]


# ---- going on


def test_rows_that_are_there_are_not_made_again(model, done, calls, tmp_path):
    before, folder = done
    (tmp_path / RECORD).write_bytes((folder / RECORD).read_bytes())
    seen = []
    found = compare(
        model, ["svd", "svd-llm"], [0.5, 0.3], output=tmp_path, seed=3, on_row=seen.append,
        **SETTINGS,
    )  # fmt: skip
    assert calls == [("svd-llm", 0.5), ("svd-llm", 0.3)]
    assert [(row["method"], row["ratio"]) for row in seen] == [
        ("svd", 0.5), ("svd-llm", 0.5), ("svd", 0.3), ("svd-llm", 0.3)
    ]  # fmt: skip
    assert found.rows[: len(before.rows)] == before.rows
    assert len(found.rows) == len(before.rows) + 2
    assert found.dense == before.dense
    assert Comparison.read(tmp_path / RECORD) == found


def test_when_all_is_there_nothing_is_written(model, done, calls):
    before, folder = done
    stamp = (folder / RECORD).stat().st_mtime_ns
    assert compare(model, ["svd"], [0.3], output=folder, seed=3, **SETTINGS) == before
    assert (folder / RECORD).stat().st_mtime_ns == stamp
    assert calls == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"seed": 4}, "another calibration"),
        ({"samples": 5}, "another calibration"),
        ({"length": 8}, "another calibration"),
        ({"windows": 3}, "another windows (4, now 3)"),
        ({"batch_size": 4}, "another batch size (8, now 4)"),
        ({"calibration": TOKENS[190:]}, "another calibration text: its tokens differ"),
        ({"text": {"main": OTHER, "other": OTHER}}, "another text to measure on"),
        ({"text": {"main": TEXT}}, "another text to measure on"),
        ({"exclude": "*k_proj"}, "another layers (14, now 12)"),
        ({"include": "*_proj"}, None),
        ({"name": "other"}, "another model ('LlamaForCausalLM', now 'other')"),
    ],
)
def test_a_record_of_something_else_is_refused(model, done, changes, expected):
    settings = {**SETTINGS, "seed": 3, **changes}
    before = (done[1] / RECORD).read_bytes()
    if expected is None:
        compare(model, ["svd"], [0.3], output=done[1], **settings)
    else:
        with pytest.raises(ValueError, match=re.escape(expected)) as raised:
            compare(model, ["svd"], [0.3], output=done[1], **settings)
        assert str(raised.value).endswith("choose another output folder")
    assert (done[1] / RECORD).read_bytes() == before


def test_a_record_of_other_weights_is_refused(done):
    other = tiny_model("llama", seed=1)
    with pytest.raises(ValueError, match="another model: its weights differ"):
        compare(other, ["svd"], [0.3], output=done[1], seed=3, **SETTINGS)


def test_rows_of_another_machine_say_so(model, done, tmp_path):
    old = dataclasses.replace(done[0], machine={"cpu": "another"})
    old.write(tmp_path / RECORD)
    found = compare(model, ["svd-llm"], [0.5], output=tmp_path, seed=3, **SETTINGS)
    assert found.machine == done[0].machine
    assert [row.get("machine") for row in found.rows] == [{"cpu": "another"}] * 6 + [None]


def test_a_method_that_cannot_do_it_has_a_row_that_says_why(model, calls, tmp_path):
    methods = ["svd", "svd-llm"]
    found = compare(model, methods, [0.999, 0.5], output=tmp_path, **SETTINGS)
    errors = [row for row in found.rows if "error" in row]
    assert [set(row) for row in errors] == [{"method", "ratio", "error"}] * 2
    assert all("the largest ratio that can be met is" in row["error"] for row in errors)
    assert [row["ratio"] for row in found.rows if "kl" in row] == [0.5, 0.5]
    assert Comparison.read(tmp_path / RECORD) == found
    calls.clear()
    compare(model, methods, [0.999, 0.5], output=tmp_path, **SETTINGS)
    assert calls == []


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_what_is_done_stays_when_something_breaks(model, monkeypatch, tmp_path, kind):
    compress = comparison.compress

    def breaks(model, ratio, **options):
        if options["method"] == "svd-llm":
            raise kind("shapes do not match")
        return compress(model, ratio, **options)

    monkeypatch.setattr(comparison, "compress", breaks)
    with pytest.raises(kind):
        compare(model, ["svd", "svd-llm", "asvd"], [0.5], output=tmp_path, **SETTINGS)
    assert [row["method"] for row in Comparison.read(tmp_path / RECORD).rows] == ["svd"]
    monkeypatch.setattr(comparison, "compress", compress)
    found = compare(model, ["svd", "svd-llm", "asvd"], [0.5], output=tmp_path, **SETTINGS)
    assert [row["method"] for row in found.rows] == ["svd", "svd-llm", "asvd"]
    straight = compare(
        model, ["svd", "svd-llm", "asvd"], [0.5], output=tmp_path / "straight", **SETTINGS
    )
    assert [without_times(row) for row in found.rows] == [
        without_times(row) for row in straight.rows
    ]


@pytest.mark.parametrize(
    ("methods", "ratios", "expected"),
    [
        ([], [0.5], "there is no method to compare"),
        (["svd"], [], "there is no ratio to compare"),
        (["svd"], [0.5, 1.0], "above 0 and below 1, got 1.0"),
        (["svd"], [0], "above 0 and below 1, got 0"),
        (["svd"], ["0.5"], "above 0 and below 1, got '0.5'"),
        (["svd", "magic"], [0.5], "names no method 'magic'"),
        (["svd", "soco@energy"], [0.5], "method soco finds its ranks by training and takes no"),
    ],
)
def test_what_makes_no_sense_is_refused_before_any_work(
    model, monkeypatch, tmp_path, methods, ratios, expected
):
    monkeypatch.setattr(comparison, "prepare", None)
    with pytest.raises(ValueError, match=re.escape(expected)):
        compare(model, methods, ratios, output=tmp_path / "out", **SETTINGS)
    assert not (tmp_path / "out").exists()


def test_an_entry_that_is_named_twice_has_one_row(model, calls, tmp_path):
    compare(model, ["svd", " svd"], [0.5, 0.5], output=tmp_path, **SETTINGS)
    assert calls == [("svd", 0.5)]


def test_json_has_no_infinity(model, monkeypatch, tmp_path):
    real = comparison.evaluate

    def overflows(*args, **options):
        return dataclasses.replace(real(*args, **options), perplexity=float("inf"))

    monkeypatch.setattr(comparison, "evaluate", overflows)
    found = compare(model, ["svd"], [0.5], output=tmp_path, **SETTINGS)
    assert found.rows[0]["perplexity"] == 1e308
    json.loads((tmp_path / RECORD).read_text(), parse_constant=pytest.fail)


def test_a_record_of_another_configuration_is_refused(done, tmp_path):
    other = tiny_model("llama", hidden_act="relu")
    with pytest.raises(ValueError, match="another model: its configuration differs"):
        compare(other, ["svd"], [0.3], output=done[1], seed=3, **SETTINGS)
    # A record from before configurations were noted is taken as it is.
    old = dict(done[0].setup)
    del old["config_hash"]
    dataclasses.replace(done[0], setup=old).write(tmp_path / RECORD)
    compare(tiny_model("llama"), ["svd"], [0.3], output=tmp_path, seed=3, **SETTINGS)


def test_what_differs_in_the_calibration_is_named(done):
    settings: dict[str, Any] = SETTINGS | {"samples": 5}
    with pytest.raises(ValueError, match=r"another calibration: sequences \(6, now 5\): choose"):
        compare(tiny_model("llama"), ["svd"], [0.3], output=done[1], seed=3, **settings)


def test_a_record_with_its_texts_in_another_order_is_refused(done):
    settings: dict[str, Any] = SETTINGS | {"text": {"other": OTHER, "main": TEXT}}
    with pytest.raises(ValueError, match="another text to measure on, or in another order"):
        compare(tiny_model("llama"), ["svd"], [0.3], output=done[1], seed=3, **settings)


@pytest.mark.parametrize("fails", [False, True])
def test_a_mixture_stays_as_it_was(tmp_path, fails):
    model = tiny_mixture("mixtral")
    names = [name for name, _ in model.named_parameters()]
    modules = {name: id(module) for name, module in model.named_modules()}
    settings: dict[str, Any] = (
        SETTINGS | {"samples": 20} | ({"include": "nothing*"} if fails else {})
    )
    with pytest.raises(ValueError, match="matches no") if fails else nullcontext():
        compare(model, ["svd", "svd-llm"], [0.3], output=tmp_path, **settings)
    assert [name for name, _ in model.named_parameters()] == names
    assert {name: id(module) for name, module in model.named_modules()} == modules
