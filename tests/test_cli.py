"""soco.cli: what a user types, and what comes back: stdout, stderr, files and the exit code."""

import gzip
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedTokenizerFast

import soco
from soco import decomposition, dismantling, keeping
from soco.allocators import ALLOCATORS
from soco.cli import commands, comparing, demo, main, sources, streamed
from soco.cli.messages import sentence
from soco.cli.options import (
    ENTRY_OPTIONS,
    AllocatorName,
    Basis,
    Deviation,
    Dtype,
    Effort,
    MethodName,
    Preset,
)
from soco.comparison import DEFAULT_METHODS, OPTIONS
from soco.elastic import ElasticSpectrum
from soco.evaluation import small
from soco.folders import SPECTRUM
from soco.methods import METHODS, SoCo
from soco.methods.soco import EFFORTS, PRESETS
from soco.record import Comparison
from tiny_models import tiny_model

ALPHABET = "abcdefghijklmnopqrstuvwxyz .,"
SENTENCE = "the cat sat on the mat, and the dog saw it. "
SMALL = ["--samples", "8", "--length", "16"]
QUICK = [*SMALL, "--steps", "4"]


@pytest.fixture
def run(capsys):
    """``run(*words)``: exit code, stdout and stderr of ``soco words...``."""

    def call(*words):
        capsys.readouterr()  # what came before is not of this call
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return call


@pytest.fixture
def fails(run):
    """``fails(*words)``: the one line on stderr of a command that fails, without what leads it."""

    def call(*words):
        code, out, err = run(*words)
        lines = [line for line in err.splitlines() if line.startswith("soco: error: ")]
        assert (code, out, len(lines)) == (2, "", 1), err
        return lines[0].removeprefix("soco: error: ")

    return call


def write_tokenizer(folder):
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {c: i for i, c in enumerate(ALPHABET, start=3)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A dense model with its tokenizer, the same compressed, a text, and a text of three words."""
    place = tmp_path_factory.mktemp("originals")
    tiny_model("llama").save_pretrained(place / "dense")
    write_tokenizer(place / "dense")
    (place / "text.txt").write_text(SENTENCE * 60)
    (place / "short.txt").write_text("three words only")
    words = ["compress", place / "dense", "-o", place / "small", "-c", place / "text.txt", *QUICK]
    assert main([str(word) for word in [*words, "-q"]]) == 0
    return place


@pytest.fixture
def place(originals, tmp_path, monkeypatch):
    """A copy of them to break, and the working directory."""
    shutil.copytree(originals, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def state(folder):
    """Every file below a folder with its bytes."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


# ---- what works


def test_version(run):
    assert run("--version") == (0, f"soco-llm {soco.__version__}\n", "")


@pytest.mark.parametrize(
    "command", [None, "compress", "evaluate", "compare", "report", "export", "info"]
)
def test_help(run, command):
    code, out, err = run(*([command] if command else []), "--help")
    assert (code, err) == (0, "")
    assert "Usage: soco" in out
    if command is None:
        assert run()[1] == out
        for each in ("compress", "evaluate", "compare", "report", "export", "info"):
            assert f" {each} " in out


def test_names_and_defaults_in_help_are_those_of_the_library(run):
    assert {name.value for name in MethodName} == set(METHODS)
    assert {name.value for name in AllocatorName} == set(ALLOCATORS)
    assert ENTRY_OPTIONS == OPTIONS
    assert set(DEFAULT_METHODS) - set(METHODS) == {
        "svd-llm@energy", "kfac-svd+pivoted", "soco:fast"
    }  # fmt: skip
    assert tuple(each.value for each in Effort) == EFFORTS
    assert {each.value for each in (*Effort, *Preset)} == PRESETS.keys()
    assert all(SoCo(basis=basis.value) for basis in Basis)
    assert all(SoCo(deviation=each.value) for each in Deviation)
    assert all(hasattr(torch, dtype.value) for dtype in Dtype if dtype is not Dtype.auto)
    out = " ".join(run("compress", "--help")[1].split())
    assert SoCo().learning_rate is None
    settings = SoCo()
    said = settings.steps, "measured", f"all {settings.batch_size}", settings.basis
    for value in (*said, settings.spacing):
        assert f"[default: ({value})]" in out


def test_compress_writes_a_model_that_transformers_loads(run, place):
    code, out, err = run(
        "compress", "dense", "--ratio", "0.4", "--output", "new/out", "-c", "text.txt", *QUICK
    )
    assert code == 0
    assert err.splitlines() == [
        "soco: loading dense",
        f"soco: compressing by soco on {commands.find_device(None)}",
    ]
    model = AutoModelForCausalLM.from_pretrained(place / "new" / "out")
    report = soco.report(model)
    assert report.method == "soco"
    assert report.ratio == 0.4
    assert report.removed >= 0.4
    assert report.settings["steps"] == 4
    assert report.calibration == {"source": "text.txt", "sequences": 8, "length": 16, "seed": 0}
    assert set(report.summary().splitlines()[:4]) <= set(out.splitlines())
    assert "soco evaluate new/out --text FILE --length 16 --dense dense" in out
    tokenizer = PreTrainedTokenizerFast.from_pretrained(place / "new" / "out")
    assert tokenizer("cat")["input_ids"] == [5, 3, 22]
    assert not list(place.rglob(".*"))


def test_verify(run, fails, place):
    words = ["-o", "out", "--method", "svd-llm", "-c", "text.txt", *SMALL]
    assert run("compress", "dense", "--ratio", "0.4", *words)[0] == 0
    code, out, _ = run("verify", "out")
    assert code == 0
    assert out.startswith("files    2 as written\nrun      ")
    code, out, _ = run("verify", "out", "--against", "dense", "--text", "text.txt")
    assert code == 0
    assert re.search(r"layers   14, outputs off by [\d.]+% to [\d.]+% \(model", out)
    found = json.loads(run("verify", "out", "--against", "dense", "--json")[1])
    assert found["problems"] == []
    assert len(found["layers"]) == 14
    streamed = json.loads(run("verify", "out", "--against", "dense", "--json", "--stream")[1])
    assert streamed == found
    assert "dense is not the folder of a model compressed" in fails("verify", "dense")
    assert "there is no file 'nope'" in fails("verify", "out", "--text", "nope")
    assert "--against takes a folder" in fails("verify", "out", "--against", "nope")
    edit_config(place / "out", use_cache=False)
    code, out, err = run("verify", "out")
    assert code == 2
    assert "PROBLEM  config.json is changed" in out
    assert err.splitlines()[-1] == "soco: error: out: config.json is changed"


@pytest.mark.parametrize("more", [[], ["--stream"]], ids=["", "streamed"])
def test_what_overflows_when_it_is_stored_is_found(more, fails, place):
    """Factors that fit into float32, written as float16 where the model is stored so."""
    edit_config(place / "dense", dtype="float16", torch_dtype="float16")
    edit_weights(place / "dense", lambda held: held["model.norm.weight"].fill_(65000.0))
    edit_weights(place / "dense", lambda held: held["lm_head.weight"].mul_(1000.0))
    words = ["-o", "out", "--method", "svd", "--ratio", "0.4"]
    told = "out was written, and is broken: the outputs"
    assert told in fails("compress", "dense", *words, *more)


def test_a_dense_model_that_only_transformers_can_read(run, place):
    """Of a layer that lies in the files in two parts, say: then layers are not compared."""

    def parted(held):
        held["model.norm.weight"] = held["model.norm.weight"][None]

    words = ["--method", "svd", "--ratio", "0.4"]
    assert run("compress", "dense", "-o", "out", *words)[0] == 0
    edit_weights(place / "dense", parted)
    found = commands.check_written(place / "out", str(place / "dense"), None, None)
    assert found.ok
    assert len(found.layers) == 14  # what is no layer does not matter
    edit_weights(place / "dense", lambda held: held.pop("model.layers.0.mlp.up_proj.weight"))
    found = commands.check_written(place / "out", str(place / "dense"), None, None)
    assert found.ok
    assert found.layers == ()


STREAM = ["--stream", "--method", "svd-llm", "-c", "text.txt", "--samples", "8", "--length", "16"]


SCORES = ["--method", "soco", "--effort", "fast", "--micro-batch", "2", "--seed", "3"]


@pytest.mark.parametrize("more", [[], SCORES, ["-c", "self"]], ids=["svd-llm", "soco", "self"])
def test_a_streamed_model_is_the_same(run, place, more):
    words = [*STREAM, *more, "--ratio", "0.4"]
    code, out, err = run("compress", "dense", "-o", "streamed", *words)
    assert code == 0
    method = "soco" if more == SCORES else "svd-llm"
    assert [line for line in err.splitlines() if "warning" not in line] == [
        f"soco: compressing block by block by {method} on {commands.find_device(None)}",
        "soco: looking at what was written",
    ]
    words.remove("--stream")
    code, whole, _ = run("compress", "dense", "-o", "whole", *words)
    assert code == 0
    one, other = (AutoModelForCausalLM.from_pretrained(place / n) for n in ("streamed", "whole"))
    for key, tensor in other.state_dict().items():
        assert torch.equal(one.state_dict()[key], tensor), key
    lines = [line for line in whole.splitlines() if line.startswith(("method", "target", "their"))]
    assert set(lines) <= set(out.splitlines())
    (checked,) = [line for line in whole.splitlines() if line.startswith("checked")]
    told = r"checked +files as written, outputs finite; of 1[24] layers \d+% to \d+% off"
    assert re.fullmatch(told, checked)
    assert checked in out.splitlines()
    assert PreTrainedTokenizerFast.from_pretrained(place / "streamed")("cat")["input_ids"]
    assert not list(place.rglob(".*"))
    assert not (place / "streamed.work").exists()


def test_a_streamed_run_that_is_stopped_goes_on(run, place, monkeypatch):
    words = ["compress", "dense", "-o", "out", "--work", "kept", *STREAM]
    take_apart, calls = dismantling.Dismantling._take_apart, []

    def stopping(self, *arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        take_apart(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(dismantling.Dismantling, "_take_apart", stopping)
        code, out, err = run(*words)
    assert (code, out) == (130, "")
    assert err.splitlines()[-2:] == [
        "soco: stopped: the same command goes on from here", "soco: interrupted",
    ]  # fmt: skip
    assert (place / "kept" / "plan.json").is_file()
    assert "an earlier run" not in err
    code, _, err = run(*words)
    assert code == 0
    told = "soco: an earlier run was stopped: going on with what is in kept"
    assert told in err.splitlines()
    assert not (place / "kept").exists()
    assert AutoModelForCausalLM.from_pretrained(place / "out") is not None


def test_a_training_that_is_stopped_goes_on(run, place, monkeypatch):
    """In memory; the work folder goes once the model is written."""
    words = [
        "compress", "dense", "--method", "soco", "--steps", "8", "--written", "0", "-c",
        "text.txt", "--length", "16", "--samples", "8", "--ratio", "0.4", "-o",
    ]  # fmt: skip
    assert run(*words, "once")[0] == 0
    monkeypatch.setattr(keeping, "EVERY", 0.0)
    save, calls = keeping.Keeper.save, []

    def stopping(self, *arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        save(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(keeping.Keeper, "save", stopping)
        code, out, err = run(*words, "out", "--work", "kept")
    assert (code, out) == (130, "")
    assert err.splitlines()[-2:] == [
        "soco: stopped: the same command goes on from here", "soco: interrupted",
    ]  # fmt: skip
    assert not (place / "out").exists()
    calls.clear()
    monkeypatch.setattr(keeping.Keeper, "save", lambda *args: (calls.append(args), save(*args)))
    code, _, err = run(*words, "out", "--work", "kept")
    assert code == 0
    assert len(calls) == 5  # from step 3 to 7, and the end
    told = "soco: an earlier run was stopped: going on with what is in kept"
    assert told in err.splitlines()
    assert not (place / "kept").exists()
    one, other = (load_file(place / name / "model.safetensors") for name in ("once", "out"))
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    code, _, err = run(*words, "out", "--work", "dense")
    assert (code, err.splitlines()[-1].endswith("is no work folder: choose another one")) == (
        2,
        True,
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "soco", "--effort", "best"], "surgeon and refine need the whole model"),
        (["--allocator", "lems"], "the allocator 'lems' runs the whole model"),
        (["--refine"], "--refine needs the whole model in memory: leave out --stream"),
        (["--surgeon"], "--surgeon needs the whole model"),
        (["--size", "1MB"], "--size needs the whole model"),
        (["--stats", "stats"], "--stats needs the whole model"),
        (["--steps", "3"], "--steps is for method soco: method svd-llm has no training"),
        (["--ratios", "0.4,0.6"], "--ratios needs the whole model"),
        (["-c", "three.txt"], "the calibration data has 13 tokens, fewer than one window of 16"),
        (["-c", "nope.txt"], "there is no file 'nope.txt'"),
        (["--ratio", "0"], "0 is not above 0 and below 1"),
        (["--ratio", "-1"], "-1 is not above 0 and below 1"),
        (["-o", "dense"], "is not the folder of a model compressed by soco"),
    ],
)
def test_what_cannot_be_streamed(fails, place, words, message):
    (place / "three.txt").write_text("the cat sat..")
    before = state(place)
    assert message in fails("compress", "dense", "-o", "out", *STREAM, *words)
    assert state(place) == before


def test_streaming_without_text(fails, place):
    words = ["compress", "dense", "-o", "x", "--stream", "--method", "svd-llm"]
    assert "method svd-llm learns from text: give --calibration FILE" in fails(*words)


@pytest.mark.parametrize(
    ("damage", "message"),
    [("truncated", "is truncated"), ("nan_weight", "holds NaN"), ("missing_weight", "holds no ")],
)
def test_streaming_what_is_broken_leaves_nothing(fails, place, damage, message):
    """No work folder either, which would be in the way once the model is mended."""
    globals()[damage](place / "dense")
    before = state(place)
    assert message in fails("compress", "dense", "-o", "out", *STREAM)
    assert state(place) == before


def test_streaming_takes_a_folder(fails):
    message = "--stream reads a folder, and no/where is none"
    assert message in fails("compress", "no/where", "-o", "x", *STREAM)


@pytest.mark.parametrize(
    ("words", "stations"),
    [
        (["--spacing", "0.45"], [0.2, 0.282843, 0.4, 0.489898, 0.6]),
        (["--spacing", "1"], [0.2, 0.4, 0.6]),
        ([], [0.2 * 2 ** (i / 9) for i in range(9)] + [0.4 * 1.5 ** (i / 5) for i in range(6)]),
    ],
)
def test_several_sizes_of_one_training(run, place, words, stations):
    code, out, err = run(
        "compress", "dense", "--ratios", "0.6,0.2,0.4", "-o", "out", "-c", "text.txt", *words,
        *QUICK,
    )  # fmt: skip
    assert (code, err.count("error")) == (0, 0)
    names = ["ratio-0.2", "ratio-0.4", "ratio-0.6"]
    assert sorted(path.name for path in (place / "out").iterdir()) == names
    params = []
    for name in names:
        folder = place / "out" / name
        done = soco.report(AutoModelForCausalLM.from_pretrained(folder))
        assert done.ratio == float(name[-3:])
        assert f"out/{name}: {done.model_params_after:,} parameters" in out
        assert f"{done.ratio:g} of the layers removed" in out
        params.append(done.model_params_after)
        assert (folder / "tokenizer.json").exists()
        assert (folder / SPECTRUM).exists() == (name == "ratio-0.2")
    found = ElasticSpectrum.load(place / "out" / names[0] / SPECTRUM).ratios
    assert found == pytest.approx(stations, abs=1e-6)
    assert params == sorted(params, reverse=True)
    code, out, _ = run("resize", "out/ratio-0.2", "--ratio", "0.3", "--output", "between")
    assert code == 0
    found = soco.report(soco.load(place / "between"))
    assert set(found.summary().splitlines()) <= set(out.splitlines())
    assert found.ratio == 0.3
    assert params[1] < found.model_params_after < params[0]
    assert (place / "between" / "tokenizer.json").exists()
    assert not (place / "between" / SPECTRUM).exists()
    assert run("resize", "out/ratio-0.2", "--ratio", "0.4", "--output", "between")[0] == 0
    one, other = (soco.load(place / name) for name in ("between", "out/ratio-0.4"))
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(one(ids).logits, other(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_size_in_bytes(run, place):
    weights = weights_size(place / "dense")
    limit = int(0.8 * weights)
    words = ["-c", "text.txt", *QUICK]
    assert run("compress", "dense", "--size", f"{limit}B", "-o", "out", *words)[0] == 0
    assert soco.report(soco.load(place / "out")).model_bytes_after <= limit


def test_a_size_in_bytes_where_the_cpu_computes_in_another_dtype(run, place, monkeypatch):
    """Stored in bfloat16, computed in float32: the size is that of what is written."""
    dense = AutoModelForCausalLM.from_pretrained(place / "dense", dtype=torch.bfloat16)
    dense.save_pretrained(place / "half")
    shutil.copy(place / "dense" / "tokenizer.json", place / "half")
    monkeypatch.setattr(sources, "is_slow", lambda dtype, device: dtype == torch.bfloat16)
    limit = int(0.8 * weights_size(place / "half"))
    words = ["-c", "text.txt", *QUICK]
    code, _, err = run("compress", "half", "--size", f"{limit}B", "-o", "out", *words)
    assert code == 0
    assert "computing in float32" in err
    found = soco.load(place / "out")
    assert found.dtype == torch.bfloat16
    assert 0.8 * limit < sum(p.numel() * 2 for p in found.parameters()) <= limit


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        (["--effort", "fast"], SoCo.preset("fast")),
        (["--effort", "balanced"], SoCo()),
        (["--preset", "paper"], SoCo.preset("paper")),
        (["--written", "0"], SoCo(written=0.0)),
    ],
)
def test_efforts_and_presets(run, place, words, settings):
    given = ["compress", "dense", "-o", "out", "-c", "text.txt", *words, *QUICK]
    assert run(*given)[0] == 0
    found = soco.report(soco.load(place / "out")).settings
    assert (found["basis"], found["written"]) == (settings.basis, settings.written)
    assert len(found["stages"]) == len(settings.stages)
    assert found.get("pivoted", False) == settings.pivoted


def test_commands_it_proposes_work(run, place):
    words = ["compress", "dense", "-o", "an out", "-c", "self", "--method", "svd-llm", *SMALL]
    lines = run(*words, "-q")[1].splitlines()
    proposed = [line for line in lines if line.startswith("  soco ")]
    assert len(proposed) == 3
    for line in proposed:
        assert run(*shlex.split(line.replace("FILE", "text.txt"))[1:])[0] == 0


def test_the_same_seed_gives_the_same_files(run, place):
    for out in ("one", "two"):
        assert run("compress", "dense", "-o", out, "-c", "self", "--seed", "3", *QUICK)[0] == 0
    weights = [(place / out / "model.safetensors").read_bytes() for out in ("one", "two")]
    assert weights[0] == weights[1]


def test_closed_forms(run, place):
    shared = ["-c", "text.txt", *SMALL, "--allocator", "energy", "--exclude", "*mlp*"]
    assert run("compress", "dense", "-o", "out", "--method", "svd-llm", *shared)[0] == 0
    report = soco.report(soco.load("out"))
    assert report.method == "svd-llm"
    assert report.settings == {
        "route": "output", "update": False, "allocator": "energy", "energy.relative": None
    }  # fmt: skip
    assert not [layer for layer in report.layers if "mlp" in layer.name]


def test_output_of_soco_is_replaced_as_a_whole(run, place):
    (place / "small" / "notes.txt").write_text("mine")
    assert run("compress", "dense", "-o", "small", "--method", "svd", "-r", "0.3")[0] == 0
    assert soco.report(soco.load("small")).method == "svd"
    assert (place / "small" / "notes.txt").read_text() == "mine"


def test_quiet_says_nothing_on_stderr(run, place):
    code, out, err = run("compress", "dense", "-o", "out", "--method", "svd", "-q")
    assert (code, err) == (0, "")
    assert "their parameters" in out


def test_warnings_take_one_line(run, place):
    words = ["-c", "text.txt", "--samples", "10000", "--length", "16", "--method", "svd-llm"]
    code, _, err = run("compress", "dense", "-o", "out", *words)
    told = [line for line in err.splitlines() if line.startswith("soco: warning: ")]
    assert code == 0
    assert len(told) == 1
    assert "fewer than the 10000 asked for" in told[0]


def test_a_model_without_tokenizer(run, fails, place):
    for file in (place / "dense").glob("tokenizer*"):
        file.unlink()
    code, _, err = run("compress", "dense", "-o", "out", "-c", "self", *QUICK)
    assert code == 0
    assert "soco: warning: no tokenizer is written beside the model: dense has no tokenizer" in err
    assert "has no tokenizer" in fails("compress", "dense", "-o", "new", "-c", "text.txt")
    assert "has no tokenizer" in fails("evaluate", "dense", "--text", "text.txt")


def test_encoders_are_loaded_as_what_they_are(run, place):
    tiny_model("bert").save_pretrained(place / "bert")
    write_tokenizer(place / "bert")
    assert run("compress", "bert", "-o", "out", "-c", "text.txt", *QUICK)[0] == 0
    assert type(AutoModelForMaskedLM.from_pretrained("out")).__name__ == "BertForMaskedLM"
    code, out, _ = run(
        "evaluate", "out", "--text", "text.txt", "--dense", "bert", "--length", "16", "--json"
    )
    assert code == 0
    assert json.loads(out)["perplexity"] is None
    assert json.loads(out)["kl"] > 0


def test_evaluate(run, place):
    with gzip.open("text.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": SENTENCE * 20}) + "\n")
    words = ["evaluate", "small", "--text", "text.jsonl.gz", "--dense", "dense", "--length", "16"]
    code, out, err = run(*words, "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    tokenizer = PreTrainedTokenizerFast.from_pretrained("dense")
    dense = AutoModelForCausalLM.from_pretrained("dense")
    found = soco.evaluate(
        soco.load("small"), "text.jsonl.gz", tokenizer=tokenizer, dense=dense, length=16
    )
    expected = {"model": "small", "text": "text.jsonl.gz", "dense": "dense", **found.to_dict()}
    assert {**told, "seconds": 0} == {**expected, "seconds": 0}
    streamed = json.loads(run(*words, "--json", "--stream")[1])
    assert {**told, "seconds": 0} == {**streamed, "seconds": 0}
    lines = run(*words)[1].splitlines()
    assert lines[0] == f"perplexity   {found.perplexity:.4f}"
    assert lines[1] == f"KL to dense  {small(found.kl or 0)} nats per token"


def test_evaluate_by_dtype(run, place):
    words = ["evaluate", "dense", "-t", "text.txt", "--length", "16", "--windows", "2", "--json"]
    told = json.loads(run(*words, "--dtype", "bfloat16")[1])
    assert (told["dtype"], told["windows"], told["tokens"]) == ("bfloat16", 2, 30)


def write_task(folder, *rows):
    folder.mkdir(exist_ok=True)
    (folder / "piqa.validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


PIQA = {"goal": "sit", "sol1": "on the mat", "sol2": "in the sky", "label": 0}


@pytest.fixture
def questions(place):
    """A folder with two questions of a task."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    write_task(place / "data", PIQA, {**PIQA, "goal": "see", "label": 1})
    return ["--tasks", "piqa", "--task-data", "data"]


def test_evaluate_tasks(run, questions):
    code, out, err = run("evaluate", "small", *questions, "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    tokenizer = PreTrainedTokenizerFast.from_pretrained("small")
    found = soco.evaluate_tasks(soco.load("small"), "piqa", tokenizer=tokenizer, data="data")
    told["tasks"]["seconds"] = 0
    expected = {"model": "small", "text": None, "dense": None, "tasks": found.to_dict()}
    expected["tasks"]["seconds"] = 0
    assert told == expected
    code, out, err = run("evaluate", "small", *questions)
    assert (code, err) == (0, "")
    assert out.splitlines()[:-1] == str(found).splitlines()[:-1]
    assert out.splitlines()[-1].startswith(f"lm_eval {found.lm_eval}, all questions, float32, ")


def test_evaluate_tasks_with_options(run, questions):
    words = ["--limit", "1", "--num-fewshot", "1", "--batch-size", "2", "--dtype", "bfloat16"]
    told = json.loads(run("evaluate", "dense", *questions, *words, "--json")[1])["tasks"]
    assert (told["limit"], told["batch_size"], told["dtype"]) == (1, 2, "bfloat16")
    assert [(s["questions"], s["fewshot"]) for s in told["scores"]] == [(1, 1)] * 2


def test_evaluate_a_text_and_tasks_of_two_models(run, questions):
    text = ["--text", "text.txt", "--length", "16", "--windows", "2"]
    words = ["evaluate", "small", "--dense", "dense", *text, *questions]
    told = json.loads(run(*words, "--json")[1])
    assert told["windows"] == 2
    assert told["kl"] > 0
    assert len(told["tasks"]["scores"]) == len(told["dense_tasks"]["scores"]) == 2
    assert told["tasks"] != told["dense_tasks"]
    text, small, dense = run(*words)[1].split("\n\n")
    assert text.startswith("perplexity")
    assert small.startswith("task ")
    assert dense.startswith("dense model\ntask ")


COMPARE = ["-c", "text.txt", "-t", "text.txt", *SMALL, "--windows", "4"]


def test_compare(run, place):
    (place / "other.txt").write_text(SENTENCE[::-1] * 20)
    words = ["compare", "dense", "-m", "svd,svd-llm@energy", "-r", "0.4,0.999", "-o", "an out"]
    code, out, err = run(*words, *COMPARE, "--text", "other.txt", "--exclude", "*o_proj")
    assert code == 0
    assert err.splitlines() == [
        "soco: loading dense",
        "soco: reading the texts",
        "soco: collecting statistics for all methods in one pass",
        "soco: measuring the dense model",
        *(f"soco: {entry} at {x}" for x in ("0.4", "0.999") for entry in words[3].split(",")),
    ]
    names = ["compare.json", "quality.png", "ranks-0.4.png", "report.md", "spectra.png"]
    assert sorted(path.name for path in (place / "an out").iterdir()) == names
    assert all(f"  {name} (" in out for name in names)
    done = Comparison.read(place / "an out" / "compare.json")
    table = [line.split() for line in out.splitlines() if line.startswith("    40%")]
    best, second = done.at(0.4)
    assert [row[1] for row in table] == [best["method"], second["method"]]
    assert float(table[0][3]) == pytest.approx(best["kl"], abs=1e-4)
    assert "svd at 0.999 failed: ratio 0.999 leaves" in out
    assert done.setup["model"] == "dense"
    assert list(done.setup["texts"]) == ["text.txt", "other.txt"]
    assert done.setup["calibration"]["source"] == "text.txt"
    assert done.setup["layers"] == 12
    command = shlex.split(done.command)
    assert command[-2:] == ["--output", "an out"]
    again = run(*command[1:], "--quiet", "--json")
    assert (again[0], again[2]) == (0, "")
    assert json.loads(again[1]) == json.loads((place / "an out" / "compare.json").read_text())


def test_compare_gives_away_no_places(run, place):
    words = [place / "dense", "-m", "svd", "-c", place / "text.txt", "-t", place / "text.txt"]
    assert run("compare", *words, *SMALL, "-r", "0.5", "-o", place / "out" / "one")[0] == 0
    for name in ("compare.json", "report.md"):
        assert str(place) not in (place / "out" / "one" / name).read_text()


def test_compare_of_the_demo_needs_nothing_but_a_folder(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = {}

    def fake(model, methods, ratios, **options):
        seen.update(options, methods=tuple(methods), ratios=list(ratios))
        raise ValueError("enough")

    monkeypatch.setattr(comparing, "compare_methods", fake)
    assert run("compare", "demo", "-o", "out")[0] == 2
    assert seen["methods"] == DEFAULT_METHODS
    assert seen["ratios"] == [0.2, 0.4, 0.6]
    assert (seen["calibration"], seen["samples"], seen["length"]) == ("self", 128, 256)
    assert seen["text"] == {sources.DEMO_TEXT.name: sources.DEMO_TEXT}
    assert seen["command"] == "soco compare demo --ratios 0.2,0.4,0.6 --output out"


def test_compare_goes_on_after_ctrl_c(run, place, monkeypatch):
    from soco import comparison

    def interrupt(model, ratio, **options):
        if options["method"] == "asvd":
            raise KeyboardInterrupt
        return compress(model, ratio, **options)

    compress = comparison.compress
    monkeypatch.setattr(comparison, "compress", interrupt)
    words = ["compare", "dense", "-m", "svd,asvd", "-r", "0.5", "-o", "out", *COMPARE, "-q"]
    assert run(*words) == (
        130,
        "",
        "soco: rows that are done are in out; the same command does the rest\nsoco: interrupted\n",
    )
    monkeypatch.setattr(comparison, "compress", compress)
    code, out, _ = run(*words)
    assert code == 0
    assert "asvd" in out
    rows = Comparison.read(place / "out" / "compare.json").rows
    assert [row["method"] for row in rows] == ["svd", "asvd"]


def test_texts_of_the_same_name_are_told_apart(place):
    (place / "sub").mkdir()
    shutil.copy("text.txt", "sub/text.txt")
    texts = comparing.titled([Path("text.txt"), Path("sub/text.txt"), Path("short.txt")])
    assert texts == {
        "text.txt": Path("text.txt"),
        "sub/text.txt": Path("sub/text.txt"),
        "short.txt": Path("short.txt"),
    }


def test_report(run, place):
    expected = soco.report(soco.load("small"))
    assert run("report", "small") == (0, f"{expected}\n", "")
    code, out, _ = run("report", "small", "--json", "--plot", "picture.png")
    assert code == 0
    assert soco.Report.from_dict(json.loads(out)) == expected
    assert (place / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_export(run, place):
    told = run("export", "small", "--dense", "-o", "out")
    size = commands.format_bytes(weights_size("out"))
    assert told == (0, f"out holds the compressed model in dense form ({size} of weights)\n", "")
    assert "quantization_config" not in json.loads(Path("out/config.json").read_text())
    assert Path("out/tokenizer.json").is_file()
    words = ["evaluate", "out", "-t", "text.txt", "--dense", "small", "--length", "16", "--json"]
    assert json.loads(run(*words)[1])["kl"] < 1e-6


def weights_size(folder):
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


@pytest.mark.parametrize(
    ("machine", "capability", "slow"),
    [
        ("x86_64", "AVX2", (torch.bfloat16, torch.float16)),
        ("x86_64", "DEFAULT", (torch.bfloat16, torch.float16)),
        ("x86_64", "AVX512", (torch.float16,)),
        ("aarch64", "DEFAULT", ()),
    ],
)
def test_where_half_precision_is_slow(monkeypatch, machine, capability, slow):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    assert tuple(d for d in dtypes if sources.is_slow(d, torch.device("cpu"))) == slow
    assert not any(sources.is_slow(d, torch.device("meta")) for d in dtypes)


@pytest.mark.parametrize("slow", [False, True])
def test_half_precision_that_is_slow_is_computed_in_float32(run, place, monkeypatch, slow):
    """CPUs without AVX-512: computed in float32, stored as before."""
    monkeypatch.setattr(sources, "is_slow", lambda dtype, device: slow)
    seen = []
    compress = commands.compress_model

    def watched(model, *arguments, **options):
        seen.append(model.dtype)
        return compress(model, *arguments, **options)

    monkeypatch.setattr(commands, "compress_model", watched)
    model = AutoModelForCausalLM.from_pretrained(place / "dense", dtype=torch.bfloat16)
    model.save_pretrained(place / "half")
    write_tokenizer(place / "half")
    words = ["-c", "text.txt", "--method", "svd-llm", "--samples", "8", "--length", "16"]
    code, _, err = run("compress", "half", *OUT, *words)
    assert code == 0
    assert ("computing in float32: this CPU is slow in bfloat16" in err) == slow
    assert seen == [torch.float32 if slow else torch.bfloat16]
    stored = load_file(place / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    done = soco.report(soco.load(place / "out"))
    size = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    assert done.model_bytes_before == sum(p.numel() * 2 for p in model.parameters())
    assert abs(done.model_bytes_after - size) < 64  # sentinels
    assert done.model_bytes_after == 2 * done.model_params_after
    out = run("evaluate", "out", "-t", "text.txt", "--length", "16")[1]
    assert ("in           float32" in out) == slow
    told = "computing in float32: this CPU is slow in bfloat16"
    _, out, err = run("plan", "half", "--method", "svd", "--json")
    assert (told in err) == slow
    assert json.loads(out)["dtype"] == ("float32" if slow else "bfloat16")
    stream = streamed.compress_folder
    monkeypatch.setattr(
        streamed,
        "compress_folder",
        lambda *given, **options: (seen.append(options["dtype"]), stream(*given, **options))[1],
    )
    assert (told in run("compress", "half", "--stream", *words, "-o", "streamed")[2]) == slow
    assert seen == 2 * [torch.float32 if slow else torch.bfloat16]


def test_info(run):
    code, out, _ = run("info")
    assert code == 0
    assert "Versions" in out
    assert "low_rank_linear" in json.loads(run("info", "--json")[1])["ops"]


def test_plan_takes_a_config_alone(run, tmp_path):
    config = tiny_model("llama").config
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    words = ["plan", tmp_path, "--method", "svd-llm", "--samples", "4", "--length", "16"]
    code, out, err = run(*words, "--ratio", "0.4")
    assert code == 0
    assert err.splitlines() == [
        "soco: planning: this CPU is measured, and the model runs without values"
    ]
    assert "by svd-llm, in float32: a plan, nothing was computed" in out
    for word in ("parameters", "on disk", "peak", "statistics", "decomposition", "never measured"):
        assert word in out
    assert "--gpus N plans for N GPUs" in out
    assert "4 GPUs" not in out
    out = run(*words, "--stream", "--gpus", "4")[1]
    assert "work folder" in out
    assert "4 GPUs" in out
    assert "--gpus N" not in out


def test_plan_as_json(run):
    code, out, _ = run("plan", "demo", "--json", "--steps", "2", "--samples", "8")
    assert code == 0
    told = json.loads(out)
    assert (told["model"], told["method"], told["ratio"]) == ("demo", "soco", 0.5)
    assert told["peak_bytes"] == max(phase["peak_bytes"] for phase in told["phases"])
    assert told["peak_bytes"] > told["base_bytes"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere/at/all"], "there is no folder 'nowhere/at/all'"),
        (["an-id"], "a plan is made from a folder with config.json: an-id is none"),
        (["demo", "--ratio", "2"], "Invalid value for '--ratio'"),
        (["demo", "--method", "svd", "--steps", "3"], "--steps is for method soco"),
        (["demo", "--stream", "--refine"], "surgeon and refine need the whole model in memory"),
        (["demo", "--length", "100000"], "length 100000 is too much for the model's"),
    ],
)
def test_what_cannot_be_planned(fails, words, message):
    assert message in fails("plan", *words)


def test_demo(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "RIVALS", demo.RIVALS[3:5])
    (tmp_path / "story.txt").write_text(sources.DEMO_TEXT.read_text()[:8000])
    monkeypatch.setattr(demo, "DEMO_TEXT", tmp_path / "story.txt")
    words = ["--steps", "6", "--samples", "8", "--length", "64"]
    code, out, err = run("compress", "demo", "--ratio", "0.5", "--output", "out", *words)
    assert code == 0
    assert "which the model has never seen" in err
    rows = [line.rsplit(maxsplit=4) for line in out.splitlines() if "%" in line.split(" ")[-1]]
    table = {row[0]: row[1:] for row in rows if len(row) == 5}
    assert list(table) == ["dense", "SoCo", "SVD-LLM, uniform ranks", "SVD, ranks by energy"]
    assert table["dense"][0] == "737,280"
    assert table["dense"][2:] == ["0.000", "100.0%"]
    assert float(table["SoCo"][2]) < float(table["SVD-LLM, uniform ranks"][2])
    assert all(int(row[0].replace(",", "")) <= 368_640 for row in list(table.values())[1:])
    proposed = next(line for line in out.splitlines() if line.startswith("  soco evaluate"))
    assert proposed == "  soco evaluate out --text demo --length 64 --dense demo"
    assert soco.report(soco.load("out")).calibration["source"] == "self"
    assert weights_size("out") < 0.65 * weights_size(sources.DEMO_MODEL)


# ---- what does not


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["out", "-o", "new"], "give either --ratio or --size"),
        (["out", "-o", "new", "--ratio", "0.3", "--size", "1MB"], "give either --ratio or --size"),
        (["out", "-o", "new", "--ratio", "0.3"], "holds no soco_spectrum.safetensors"),
        (["dense", "-o", "new", "--ratio", "0.3"], "is not the folder of a model compressed by"),
        (["absent", "-o", "new", "--ratio", "0.3"], "there is no folder 'absent'"),
        (["out", "-o", "out", "--ratio", "0.3"], "out is what is read: choose another folder"),
        (["out", "-o", "dense", "--ratio", "0.3"], "dense exists and is not the folder of a"),
    ],
)
def test_resize_refuses(run, place, words, expected):
    assert run("compress", "dense", "-o", "out", "--method", "svd", "-q")[0] == 0
    code, _, err = run("resize", *words)
    assert code == 2
    assert expected in err
    assert not (place / "new").exists()


def test_decompose(run, fails, place):
    code, out, err = run("decompose", "dense", "-o", "parts", "--kept", "0.5", "--quiet")
    assert (code, err) == (0, "")
    assert re.match(r"parts holds 14 layers \(.*\), with \d+\.\d% to .* energy; it took", out)
    assert soco.Decomposition("parts")["model.layers.0.self_attn.q_proj"].S.ndim == 1
    assert "exists and is no decomposition" in fails("decompose", "dense", "-o", "dense")
    assert "there is no folder 'no/where/here'" in fails("decompose", "no/where/here", "-o", "x")
    for option, value, message in (("kept", 2, "kept must be"), ("method", "fast", "method must")):
        assert message in fails("decompose", "dense", "-o", "x", f"--{option}", value)
    message = "text.txt is a file, and should be a folder"
    assert message in fails("decompose", "dense", "-o", "x", "--work", "text.txt")
    assert not (place / "x").exists()


def test_a_decomposition_that_is_stopped_goes_on(run, place, monkeypatch):
    words = ["decompose", "dense", "-o", "parts"]
    with monkeypatch.context() as patch:
        patch.setattr(
            decomposition._Run, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        code, out, err = run(*words)
    assert (code, out) == (130, "")
    assert err.splitlines()[-2:] == [
        "soco: stopped: the same command goes on from here", "soco: interrupted",
    ]  # fmt: skip
    monkeypatch.setattr(decomposition, "truncated_svd", lambda *_, **__: pytest.fail("again"))
    code, out, err = run(*words)
    assert code == 0
    assert err.startswith("soco: an earlier run was stopped: going on with what is in ")
    assert err.endswith("parts.work\n")
    assert "parts holds 14 layers" in out
    assert not (place / "parts.work").exists()


OUT = ["--output", "out"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "Missing argument 'MODEL'. `soco compress --help` lists the options."),
        (["dense"], "Missing option '--output'"),
        (["dense", *OUT, "--ratio", "0"], "0 is not above 0 and below 1 (the fraction of"),
        (["dense", *OUT, "--ratio", "1"], "1 is not above 0 and below 1"),
        (["dense", *OUT, "--ratio", "-1"], "-1 is not above 0 and below 1"),
        (["dense", *OUT, "--ratio", "nan"], "nan is not above 0 and below 1"),
        (["dense", *OUT, "--ratio", "abc"], "'abc' is not a number"),
        (["dense", *OUT, "--ratio", "0.999", "-c", "self"], "the largest ratio that can be met is"),
        (
            ["dense", *OUT, "--method", "magic"],
            "'magic' is not one of 'soco', 'kfac-svd'",
        ),
        (["dense", *OUT, "--ratios", "0.2"], "'0.2' must be two or more different ratios"),
        (["dense", *OUT, "--ratios", "0.2,0.20"], "must be two or more different ratios"),
        (["dense", *OUT, "--ratios", "0.2,x"], "'x' is not a number"),
        (["dense", *OUT, "--ratios", "0.2,2"], "2 is not above 0 and below 1"),
        (
            ["dense", *OUT, "--ratios", "0.2,0.4", "--ratio", "0.3"],
            "--ratio and --ratios both say how small: give one of them",
        ),
        (["dense", *OUT, "--spacing", "0.1"], "--spacing is how far apart sizes between several"),
        (["dense", *OUT, "--ratios", "0.2,0.4", "--spacing", "0"], "Invalid value for '--spacing'"),
        (["dense", *OUT, "--size", "tiny", "-c", "self"], "a size is a positive number of bytes"),
        (["dense", *OUT, "--size", "1kB", "-c", "self"], "size 1kB is too small"),
        (
            ["dense", *OUT, "--ratios", "0.2,0.4", "--method", "svd"],
            "several ratios in one run are for method soco",
        ),
        (["dense", *OUT, "--effort", "fast", "--method", "svd"], 'effort is for method="soco"'),
        (["dense", *OUT, "--effort", "fast", "--preset", "paper"], "are two presets: give one"),
        (["dense", *OUT, "--magic"], "No such option: --magic. `soco compress --help` lists"),
        (["dense", *OUT, "--samples", "0", "-c", "self"], "Invalid value for '--samples'"),
        (["dense", *OUT, "--steps", "x", "-c", "self"], "Invalid value for '--steps'"),
        (["dense", *OUT], "method soco learns from text: give --calibration FILE, or"),
        (["dense", *OUT, "-c", "absent.txt"], "there is no file 'absent.txt'"),
        (["dense", *OUT, "-c", "short.txt"], "the calibration data has 16 tokens, fewer than one"),
        (["dense", *OUT, "-c", "self", "--length", "65"], "length 65 is too much for the model's"),
        (
            ["dense", *OUT, "-c", "self", "--allocator", "energy"],
            "--allocator is for other methods",
        ),
        (["dense", *OUT, "--written", "-1", "-c", "self"], "Invalid value for '--written'"),
        (["dense", *OUT, "--method", "svd", "--written", "1"], "--written is for method soco"),
        (["dense", *OUT, "--method", "svd", "--steps", "3"], "--steps is for method soco"),
        (["dense", *OUT, "--method", "svd", "--include", "*x*"], "matches no linear layer"),
        (["dense", *OUT, "--method", "svd", "--device", "none"], "device 'none' cannot be used"),
        (["dense", *OUT, "--method", "svd", "--dtype", "int8"], "Invalid value for '--dtype'"),
        (["dense", "--output", "text.txt", "-c", "self"], "text.txt is a file"),
        (["dense", "--output", "text.txt/x", "-c", "self"], "text.txt is not a folder to write in"),
        (["dense", "--output", "dense", "-c", "self"], "dense exists and is not the folder of a"),
        (["./absent", *OUT], "there is no folder './absent'"),
        (["a/b/c", *OUT], "there is no folder 'a/b/c'"),
        (["", *OUT], "there is no folder ''"),
        (["text.txt", *OUT], "text.txt is a file: give the folder of a model"),
        ([".", *OUT], ". is no model: it has no config.json"),
        (["small", *OUT, "-c", "self"], "small is quantized or compressed already (soco)"),
    ],
)
def test_what_compress_refuses(fails, place, words, expected):
    before = state(place)
    assert expected in fails("compress", *words)
    assert state(place) == before
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("command", "words", "expected"),
    [
        ("compress", ["--method", "dobi-svd", "--allocator", "energy"], "takes no allocator"),
        ("compress", ["--method", "dobi-svd", "--pivoted"], "dobi-svd cannot count pivoted"),
        ("compress", ["--method", "basis-sharing", "--pivoted"], "bases, which cannot be pivoted"),
        ("compress", ["--calibration", "empty.txt"], "the file 'empty.txt' is empty"),
        ("compress", ["--stats", "text.txt"], "text.txt is a file, and should be a folder"),
        ("compress", ["--work", "text.txt"], "text.txt is a file, and should be a folder"),
        ("compress", ["--work", "text.txt", *STREAM], "text.txt is a file, and should be a folder"),
        ("compare", ["--methods", "svd,basis-sharing+pivoted"], "which cannot be pivoted"),
        ("compare", ["--methods", "basis-sharing@learned"], "a method without shared bases"),
        ("compare", ["--text", "empty.txt"], "the file 'empty.txt' is empty"),
        ("compare", ["--stats", "text.txt"], "text.txt is a file, and should be a folder"),
    ],
)
def test_what_is_refused_before_a_model_is_loaded(
    fails, place, monkeypatch, command, words, expected
):
    (place / "empty.txt").write_text("")
    for module in (commands, comparing):
        monkeypatch.setattr(module, "open_dense", lambda *_: pytest.fail("the model was loaded"))
    usual = ["dense", *OUT, "-c", "text.txt", *(["-t", "text.txt"] if command == "compare" else [])]
    assert expected in fails(command, *usual, *words)
    assert not (place / "out").exists()


def test_a_comparison_in_which_nothing_can_be_made_fails(run, place):
    words = ["-m", "svd", "-r", "0.999", "-t", "text.txt", "-c", "text.txt", *SMALL]
    code, out, err = run("compare", "dense", *OUT, *words)
    assert code == 2
    assert "svd at 0.999 failed: ratio 0.999 leaves 15 parameters" in out  # and why
    assert "error: none of the methods could do what was asked" in err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["dense"], "Missing option '--output'"),
        (["dense", *OUT, "-m", "svd,magic"], "'magic' names no method 'magic': choose from aa-svd"),
        (["dense", *OUT, "-m", "svd@magic"], "'svd@magic' names no allocator 'magic'"),
        (["dense", *OUT, "-m", "svd+magic"], "'svd+magic' names no option 'magic'"),
        (["dense", *OUT, "-m", "soco@energy"], "method soco finds its ranks by training"),
        (["dense", *OUT, "-m", ","], "--methods names no method"),
        (["dense", *OUT, "-r", "abc"], "--ratios takes fractions of parameters to remove, above 0"),
        (["dense", *OUT, "-r", "0.5,0"], "with commas between them, got '0'"),
        (["dense", *OUT, "-r", "1"], "with commas between them, got '1'"),
        (["dense", *OUT, "--ratios=-1"], "with commas between them, got '-1'"),
        (["dense", *OUT, "-r", "nan"], "with commas between them, got 'nan'"),
        (["dense", *OUT, "-r", "0.5,"], "with commas between them, got ''"),
        (["dense", *OUT], "method fwsvd learns from text: give --calibration FILE, or"),
        (["dense", *OUT, "-m", "svd"], "there is no text to measure on: give --text FILE"),
        (["dense", *OUT, "-c", "self", "-t", "absent.txt"], "there is no file 'absent.txt'"),
        (["dense", *OUT, "-c", "absent.txt", "-t", "text.txt"], "there is no file 'absent.txt'"),
        (["dense", *OUT, "-m", "svd", "-t", "short.txt"], "the evaluation data has 16 tokens"),
        (["dense", *OUT, "-m", "svd", "-t", "text.txt", "--include", "*x*"], "matches no linear"),
        (["dense", "-o", "small", "-m", "svd", "-t", "text.txt"], "small exists and is not empty"),
        (["dense", "-o", "text.txt", "-m", "svd", "-t", "text.txt"], "text.txt is a file"),
        (["dense", "-o", "broken", "-m", "svd", "-t", "text.txt"], "compare.json is of format 9"),
        (["small", *OUT, "-m", "svd", "-t", "text.txt"], "compressed already (soco)"),
        (["./absent", *OUT, "-m", "svd", "-t", "text.txt"], "there is no folder './absent'"),
    ],
)
def test_what_compare_refuses(fails, place, words, expected):
    (place / "broken").mkdir()
    (place / "broken" / "compare.json").write_text('{"format": 9}')
    before = state(place)
    assert expected in fails("compare", *words)
    assert state(place) == before
    assert not (place / "out").exists()


def test_a_comparison_is_not_continued_with_another_setting(fails, run, place):
    words = ["compare", "dense", "-m", "svd", "-r", "0.5", "-o", "out", "-t", "text.txt", *SMALL]
    assert run(*words)[0] == 0
    before = state(place)
    said = fails(*words, "--seed", "1", "-q")
    assert said == (
        "out/compare.json was made with another seed (0, now 1): choose another output folder"
    )
    assert state(place) == before


def test_a_full_gpu_leaves_the_rows(fails, place, monkeypatch):
    def overflow(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(comparing, "compare_methods", overflow)
    said = fails("compare", "demo", *OUT)
    assert "try a smaller --batch-size or --length" in said


def test_a_full_gpu_while_streaming_is_told(fails, place, monkeypatch):
    def overflow(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(streamed, "compress_folder", overflow)
    said = fails("compress", "dense", "-o", "out", *STREAM)
    assert "is full: try a smaller --batch-size or --length, --micro-batch 1" in said


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["magic"], "No such command 'magic'. `soco --help` lists the options."),
        (["evaluate", "small", "--text", "absent.txt"], "there is no file 'absent.txt'"),
        (["evaluate", "./absent", "--text", "text.txt"], "there is no folder './absent'"),
        (["evaluate", "./absent", "--text", "text.txt", "--stream"], "there is no folder './abs"),
        (["evaluate", "small", "-t", "text.txt", "--dense", "./absent"], "no folder './absent'"),
        (["evaluate", "small", "-t", "text.txt", "--length", "65"], "too much for the model's"),
        (["evaluate", "small", "-t", "dense"], "there is no file 'dense'"),
        (["report", "absent"], "there is no folder 'absent'"),
        (["report", "dense"], "dense is not the folder of a model compressed by soco"),
        (["report", "small", "--plot", "x.abc"], "pictures are .png, .svg, .pdf files, got 'x.a"),
        (["report", "small", "--plot", "absent/x.png"], "absent/x.png: no such file or directory"),
        (["export", "small", *OUT], "--dense is the one there is"),
        (["export", "small", "--dense", "--output", "dense"], "dense exists and is not empty"),
        (["export", "dense", "--dense", *OUT], "dense is not the folder of a model compressed by"),
    ],
)
def test_what_the_others_refuse(fails, place, words, expected):
    before = state(place)
    assert expected in fails(*words)
    assert state(place) == before
    assert not (place / "out").exists()


def truncated(folder):
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(9000)


def without_weights(folder):
    (folder / "model.safetensors").unlink()


def nan_weight(folder):
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(folder, lambda tensors: tensors[name][2, 3:4].fill_(torch.nan))


def missing_weight(folder):
    edit_weights(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))


def wrong_shape(folder):
    edit_weights(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}))


def not_json(folder):
    (folder / "config.json").write_text('{"model_type": ')


def unknown_type(folder):
    edit_config(folder, model_type="magic")


def wrong_kind(folder):
    edit_config(folder, hidden_size="x")


def broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (truncated, "dense cannot be loaded: "),
        (without_weights, "dense cannot be loaded: "),
        (nan_weight, "dense is broken: model.layers.1.mlp.up_proj.weight (48, 32) holds NaN"),
        (missing_weight, "dense lacks model.layers.1.mlp.up_proj.weight"),
        (wrong_shape, "dense has another shape for model.norm.weight"),
        (not_json, "dense cannot be loaded: "),
        (unknown_type, "dense cannot be loaded: "),
        (wrong_kind, "dense cannot be loaded: "),
        (broken_tokenizer, "dense has no tokenizer that loads: "),
    ],
)
def test_broken_dense_folders(fails, place, damage, expected):
    damage(place / "dense")
    told = fails("compress", "dense", *OUT, "-c", "text.txt", *QUICK)
    assert told.startswith(expected)
    assert len(told) > len(expected)
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (truncated, "small/model.safetensors is truncated"),
        (without_weights, "holds neither model.safetensors nor"),
        (not_json, "small/config.json is not JSON"),
    ],
)
def test_broken_compressed_folders(fails, place, damage, expected):
    damage(place / "small")
    assert expected in fails("evaluate", "small", "--text", "text.txt", "--length", "16")
    assert expected in fails("export", "small", "--dense", *OUT)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--tasks", "piqqa"], "lm_eval has no task 'piqqa': did you mean piqa"),
        (["--tasks", "qqqqqq"], "lm_eval has no task 'qqqqqq' (groups are not taken)"),
        (["--tasks", "piqa,"], "tasks must be names of tasks, got 'piqa,'"),
        (["--tasks", "hellaswag"], "task hellaswag has no questions: data holds no hellaswag.val"),
        (["--task-data", "nowhere"], "there is no folder 'nowhere'"),
        (["--num-fewshot", "2"], "task piqa: 2 examples are wanted, and there are 1"),
        (["--num-fewshot", "-1"], "Invalid value for '--num-fewshot'"),
        (["--limit", "0"], "Invalid value for '--limit'"),
        (["--length", "16"], "--length is for --text"),
        (["--windows", "1"], "--windows is for --text"),
    ],
)
def test_what_evaluate_refuses_of_tasks(fails, questions, words, expected):
    assert expected in fails("evaluate", "dense", *questions, *words)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--tasks", "piqqa"], "lm_eval has no task 'piqqa': did you mean piqa"),
        (["--tasks", "hellaswag"], "task hellaswag has no questions: data holds no hellaswag.val"),
    ],
)
def test_tasks_are_looked_for_before_the_model_is_loaded(
    fails, questions, monkeypatch, words, expected
):
    monkeypatch.setattr(commands, "open_model", lambda *_: pytest.fail("the model was loaded"))
    assert expected in fails("evaluate", "dense", "--text", "text.txt", *questions, *words)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], "piqa.validation.jsonl is empty: it has no questions"),
        ([{"goal": "sit", "sol1": "a", "label": 0}], "does not fit task piqa: it has no 'sol2'"),
        ([{"goal": "sit", "sol1": "a", "sol2": "b"}], "does not fit task piqa: it has no 'label'"),
        ([{**PIQA, "label": 7}], "piqa.validation.jsonl does not fit task piqa: list index out of"),
        ([PIQA, {**PIQA, "label": 7}], "the answer 7 of question 2 is not a choice"),
    ],
)
def test_broken_questions(fails, questions, place, rows, expected):
    write_task(place / "data", *rows)
    assert expected in fails("evaluate", "dense", *questions)


def test_models_that_cannot_answer(fails, questions, place):
    tiny_model("bert").save_pretrained(place / "bert")
    write_tokenizer(place / "bert")
    expected = "tasks take a model that predicts the next token, and BertForMaskedLM does not"
    assert fails("evaluate", "bert", *questions) == expected
    for file in (place / "dense").glob("tokenizer*"):
        file.unlink()
    assert "dense has no tokenizer" in fails("evaluate", "dense", *questions)


def test_tasks_without_the_harness(fails, place, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    expected = 'tasks need lm-evaluation-harness: pip install "soco-llm[eval]"'
    assert fails("evaluate", "dense", "--tasks", "piqa", "--task-data", ".") == expected


def test_evaluate_on_nothing(fails, place):
    expected = "say what to measure on: --text FILE, --tasks NAMES, or both"
    assert fails("evaluate", "dense") == expected
    for option, value in (("--limit", "1"), ("--num-fewshot", "1"), ("--task-data", ".")):
        told = fails("evaluate", "dense", "--text", "text.txt", option, value)
        assert told == f"{option} is for --tasks"


def test_a_report_that_is_missing_or_broken(fails, place):
    config = json.loads((place / "small" / "config.json").read_text())["quantization_config"]
    edit_config(place / "small", quantization_config=config | {"report": None})
    assert fails("report", "small") == "small holds no report of how it was compressed"
    edit_config(place / "small", quantization_config=config | {"report": {"method": "soco"}})
    assert fails("report", "small") == "report lacks the field 'ratio'"


def test_ctrl_c(run, place, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    before = state(place)
    monkeypatch.setattr(commands, "compress_model", interrupt)
    code, out, err = run("compress", "dense", "-o", "small", "-c", "self", "-q")
    assert (code, out, err) == (130, "", "soco: interrupted\n")
    assert state(place) == before


def test_a_full_gpu_names_the_options_that_help(fails, place, monkeypatch):
    def overflow(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(commands, "compress_model", overflow)
    assert "try a smaller --batch-size or --length" in fails("compress", "demo", *OUT)


def test_our_own_mistakes_keep_their_traceback(place, monkeypatch):
    def mistake(*_, **__):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(commands, "compress_model", mistake)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        main(["compress", "dense", "-o", "out", "-c", "self", "-q"])
    assert not (place / "out").exists()


def test_debug_shows_tracebacks(place):
    with pytest.raises(ValueError, match="is a file"):
        main(["--debug", "compress", "text.txt", "-o", "out"])


def test_sentence_of_a_foreign_error():
    assert sentence(ValueError("no such thing\n\nTry another one.")) == "no such thing"
    assert sentence(ValueError("")) == "ValueError"
    assert sentence(FileNotFoundError(2, "No such file", "a.txt")) == "a.txt: no such file"


def test_libraries_are_as_loud_as_before_afterwards(run, place):
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub = are_progress_bars_disabled()
    filters = list(warnings.filters)
    assert run("compress", "dense", "-o", "out", "--method", "svd")[0] == 0
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert are_progress_bars_disabled() == hub
    assert list(warnings.filters) == filters


# ---- as a program of its own


def soco_program(*words, **options):
    # Ctrl-C is ignored by what was started in the background of a shell, as tests may be.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from soco.cli import main; sys.exit(main())"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_help_needs_no_torch():
    code = (
        "import sys; from soco.cli import main; main(['--help']); main(['compress', 'x']); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_hub_id_offline(tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    words = ["compress", "some/model", "-o", tmp_path / "out", "-c", "self"]
    with soco_program(*words, env=environment) as program:
        out, err = program.communicate(timeout=120)
    assert (program.returncode, out) == (2, "")
    lines = err.splitlines()
    assert lines[0] == "soco: loading some/model"
    assert lines[1].startswith(
        "soco: error: some/model is no folder here, and from the hub it cannot be loaded: "
    )
    assert len(lines) == 2
    assert not (tmp_path / "out").exists()


def test_ctrl_c_in_the_middle_of_it(tmp_path):
    words = ["compress", "demo", "-o", tmp_path / "out", "--samples", "2000", "--dtype", "float32"]
    with soco_program(*words) as program:
        assert program.stderr is not None
        assert program.stderr.readline() == "soco: loading demo\n"
        assert program.stderr.readline().startswith("soco: compressing by soco on ")
        time.sleep(0.5)
        program.send_signal(signal.SIGINT)
        try:
            out, err = program.communicate(timeout=60)
        finally:
            program.kill()
    assert (program.returncode, out, err) == (130, "", "soco: interrupted\n")
    assert list(tmp_path.iterdir()) == []
