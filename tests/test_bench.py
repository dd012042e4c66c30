"""soco-bench: that the commands measure what they say and write it down. No test asserts a time."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import soco
from soco.bench import timing
from soco.bench.app import app, main
from soco.bench.lowrank import Weights, ways
from soco.bench.model import random_model
from soco.bench.shapes import SHAPES, rank_for
from soco.bench.timing import MOST, Memory, copies_for, percentiles, read_rate, side_by_side
from soco.packing import weight_bytes

CPU = torch.device("cpu")


def run(*arguments):
    return CliRunner().invoke(app, [*arguments, "--device", "cpu"], catch_exceptions=False)


def record(path):
    text = path.read_text()
    assert str(path.parent) not in text  # a record does not say where a machine keeps its files
    return json.loads(text)


def test_percentiles_by_hand():
    times = [i * 1e-6 for i in range(1, 11)]
    assert percentiles(times) == {"median_us": 6.0, "p10_us": 2.0, "p90_us": 10.0}


def test_everything_is_run_in_turn_on_cold_copies():
    seen = []
    runs = {name: (lambda i, name=name: seen.append((name, i))) for name in "ab"}
    found = side_by_side(runs, 3, CPU, 4)
    assert found.keys() == runs.keys()
    assert seen[2:] == [(name, i % 3) for i in range(4) for name in "ab"]


def test_enough_copies_for_the_cache():
    assert copies_for(10**12, CPU) == 3
    assert copies_for(1, CPU) == MOST


def test_copies_leave_room_in_memory(monkeypatch):
    """A processor's cache of 480 MB that a small virtual machine is shown."""
    monkeypatch.setattr(timing, "cache_bytes", lambda _: 480 * 2**20)
    monkeypatch.setattr(timing, "memory_bytes", lambda _: 24 * 2**30)
    assert copies_for(20 * 2**20, CPU) == 38  # in 8 bits 760 MB, in float32 and dense eight times
    monkeypatch.setattr(timing, "memory_bytes", lambda _: 2**40)
    assert copies_for(20 * 2**20, CPU) == 96  # four times the cache


def test_memory_is_read_at_some_rate():
    assert 0.1 < read_rate(CPU) < 10_000


def test_memory_is_read_whole():
    memory = Memory(3 * 2**24 + 5)
    assert memory.nbytes == 3 * 2**24
    with torch.inference_mode():
        sums = {memory.read(number).item() for number in range(40)}
    assert sums == {memory.nbytes / 4}  # of ones
    assert Memory(1).nbytes == 2**24


@pytest.mark.parametrize("shape", [s for s in SHAPES if s != "tiny"])
def test_shapes_have_the_parameters_of_their_names(shape):
    """Counted with embeddings, within what such names are rounded to."""
    found = SHAPES[shape]
    layers = found.blocks * sum(m * n for group in found.groups.values() for m, n in group)
    total = layers + found.vocabulary * found.hidden * (1 if found.tied else 2)
    named = float(shape.split("-")[-1].removesuffix("b")) * 1e9
    assert 0.92 * named < total < 1.25 * named


def test_ranks_keep_the_fraction():
    assert rank_for(4096, 4096, 0.5) == 1024
    assert rank_for(11008, 4096, 0.8) == 2388
    assert rank_for(10, 10, 0.001 + 0.2) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_ways_compute_the_same(dtype):
    weights = Weights([(64, 128), (32, 128)], 0.8, dtype, CPU, dense=True)
    x = torch.randn(3, 128).to(dtype)
    names = ["pairs", "grouped", "soco", "int8", "float8", "torch int8", "compiled", "dependent"]
    made = ways(weights, x, names)
    assert "dependent" not in made  # on a CPU
    assert set(made) >= {"pairs", "grouped", "soco", "int8", "float8", "compiled"}
    with torch.inference_mode():
        expected = torch.cat(list(made["pairs"](1)), -1)
        for name, way in made.items():
            y = way(1)
            y = y if isinstance(y, torch.Tensor) else torch.cat(list(y), -1)
            error = (y - expected).norm() / expected.norm()
            assert error < {"int8": 0.03, "torch int8": 0.05, "float8": 0.1}.get(name, 0.01), name


def test_pivoted_layers_are_the_same_products():
    """Every output is a component of z or a product, each once, and the bytes are those stored."""
    weights = Weights([(48, 64), (32, 64)], 0.5, torch.float32, CPU, dense=False)
    x = torch.randn(2, 64)
    with torch.inference_mode():
        y = ways(weights, x, ["pivoted"])["pivoted"](1)
    z = x @ weights.downs[1].mT
    expected = []
    for part, up, rank in zip(
        z.split(weights.ranks, -1), weights.ups[1], weights.ranks, strict=True
    ):
        expected.append(torch.cat((part, part @ up[: len(up) - rank].mT), -1))
    for found, there in zip(y.split([48, 32], -1), expected, strict=True):
        torch.testing.assert_close(found.sort(-1).values, there.sort(-1).values)
    stored = sum(
        (48 + 64 - r) * r if i == 0 else (32 + 64 - r) * r for i, r in enumerate(weights.ranks)
    )
    assert weights.pivoted_bytes == 4 * stored


@torch.inference_mode()
@torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True)
def test_every_shape_is_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager", mode=None))
    for tokens in (1, 2, 3):
        weights = Weights([(8, 16)], 0.5, torch.float32, CPU, dense=False)
        ways(weights, torch.randn(tokens, 16), ["compiled"])["compiled"](0)


def test_a_record_says_how_it_was_made(tmp_path, monkeypatch):
    given = ["lowrank", "--shapes", "tiny", "--kept", "0.5", "--tokens", "1", "--repeats", "1",
             "--ways", "pairs", "--output", str(tmp_path / "it.json")]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["soco-bench", *given])
    monkeypatch.setattr("soco.diagnosis.commit_of", lambda folder: f"that of {folder.name}")
    assert run(*given).exit_code == 0
    written = record(tmp_path / "it.json")
    assert written["command"] == "soco-bench " + " ".join([*given[:-1], "it.json"])
    assert written["commit"] == f"that of {Path(soco.__file__ or '').parents[1].name}"


def test_lowrank(tmp_path):
    path = tmp_path / "lowrank.json"
    found = run(
        "lowrank", "--shapes", "tiny", "--kept", "0.5", "--tokens", "1,4", "--repeats", "2",
        "--dtypes", "float32", "--ways", "dense,pairs,soco", "--output", str(path),
    )  # fmt: skip
    assert found.exit_code == 0
    assert "soco over pairs" in found.stdout
    written = record(path)
    assert written["kind"] == "lowrank"
    assert {"machine", "date", "commit", "command", "read_gb_s"} <= written.keys()
    assert len(written["rows"]) == 4 * 2
    row = written["rows"][0]
    assert row["layers"] == [[64, 64], [32, 64], [32, 64]]
    assert row["ranks"] == [16, 16, 16]  # 16, 10 and 10, rounded up
    assert row["ways"]["soco"]["bytes"] == 4 * 16 * (128 + 96 + 96)
    assert row["ways"]["dense"]["bytes"] == 4 * 64 * 128
    ours = row["ways"]["soco"]
    assert ours["of_roofline"] == pytest.approx(ours["gb_s"] / row["read_gb_s"], abs=1e-3)
    assert "read" not in row["ways"]
    ratio = row["ways"]["pairs"]["median_us"] / ours["median_us"]
    assert ours["times_faster_than"]["pairs"] == pytest.approx(ratio, abs=1e-3)
    assert ours["p10_us"] <= ours["median_us"] <= ours["p90_us"]


def test_model(tmp_path):
    path = tmp_path / "model.json"
    found = run(
        "model", "--shapes", "tiny", "--kept", "0.5", "--ways", "dense,pairs,soco,int8",
        "--prompt", "8", "--generated", "4", "--repeats", "1", "--output", str(path),
    )  # fmt: skip
    assert found.exit_code == 0
    rows = record(path)["rows"]
    assert [(row["model"], row["kept"]) for row in rows] == [
        ("dense", None), ("pairs", 0.5), ("soco", 0.5), ("int8", 0.5),
    ]  # fmt: skip
    for row in rows:
        step = row["decode_step"]["median_us"]
        assert row["decode_tokens_per_s"] == pytest.approx(1e6 / step, rel=0.01)
    sizes = [row["parameter_bytes"] for row in rows]
    assert sizes[1] == sizes[2] < sizes[0]
    assert sizes[3] < sizes[2]


def test_random_models_run_and_are_reproducible():
    ids = torch.arange(6)[None]
    models = [random_model("tiny", 2, 16, torch.float32, CPU, kept) for kept in (None, 0.5, 0.5)]
    with torch.no_grad():
        found = [model(ids).logits for model in models]
    assert all(y.isfinite().all() for y in found)
    assert torch.equal(found[1], found[2])
    params = sum(p.numel() for p in models[1].parameters())
    assert weight_bytes(models[1]) == 4 * params


def test_spectral_and_svd(tmp_path):
    path = tmp_path / "s.json"
    found = run("spectral", "--ranks", "8", "--tokens", "4", "--repeats", "1", "-o", str(path))
    assert found.exit_code == 0
    rows = record(path)["rows"]
    assert [row["dtype"] for row in rows] == ["float32", "bfloat16"]
    assert set(rows[0]["ways"]) == {"scaling", "scaling, torch", "layer", "layer, torch"}
    assert set(rows[0]["times_faster"]) == {"scaling, torch", "layer, torch"}
    found = run("svd", "--sizes", "24x16,8x12", "--repeats", "1", "-o", str(path))
    assert found.exit_code == 0
    rows = record(path)["rows"]
    assert [(row["rows"], row["columns"], row["rank"]) for row in rows] == [(24, 16, 4), (8, 12, 2)]
    for row in rows:
        assert abs(row["ways"]["soco exact"]["excess"]) < 1e-6
        assert row["ways"]["soco randomized"]["excess"] > -1e-9
    options = "--spectrum", "whitened", "--kept", "0.2,0.5", "--repeats", "1", "-o", str(path)
    assert run("svd", "--sizes", "150x140", *options).exit_code == 0
    rows = record(path)["rows"]
    assert [row["rank"] for row in rows] == [28, 70]
    assert abs(rows[1]["ways"]["soco exact"]["excess"]) < 1e-6  # over six decades, and yet
    assert rows[1]["ways"]["torch.linalg.eigh"]["excess"] > 1e-3  # what squaring would cost


def test_batched_svd(tmp_path):
    path = tmp_path / "s.json"
    options = "--batches", "1,3", "--repeats", "1", "--dtypes", "float64", "-o", str(path)
    assert run("batched-svd", "--sizes", "5,9", *options).exit_code == 0
    rows = record(path)["rows"]
    assert [(row["side"], row["batch"]) for row in rows] == [(5, 1), (5, 3), (9, 1), (9, 3)]
    for row in rows:
        assert row["ways"]["soco"]["error"] < 1e-14
        assert row["ways"]["soco"]["orthogonality"] < 1e-14


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lowrank", "--shapes", "gpt"], "--shapes knows llama-2-7b, .* got 'gpt'"),
        (["lowrank", "--ways", ","], "--ways is empty"),
        (["lowrank", "--kept", "1.5"], "--kept takes numbers between 0 and 1 .* got '1.5'"),
        (["lowrank", "--tokens", "1,x"], "--tokens takes positive whole numbers .* got '1,x'"),
        (["lowrank", "--tokens", "0"], "--tokens takes positive whole numbers"),
        (["lowrank", "--dtypes", "int4"], "--dtypes knows float32, .* got 'int4'"),
        (["svd", "--sizes", "12"], "--sizes takes sizes like 1024x512 .* got '12'"),
        (["svd", "--sizes", "0x4"], "--sizes takes sizes like"),
        (["model", "--modes", "graphed"], "graphed is for CUDA graphs"),
        (["lowrank", "--output", "/nowhere/x.json"], "/nowhere is not a folder to write in"),
        (["lowrank", "--output", "/"], "is a folder, and should be a file"),
        (["lowrank", "--threads", "abc"], "--threads.*`soco-bench lowrank --help`"),
        (["lowrank", "--threads", "0"], "--threads.*`soco-bench lowrank --help`"),
        (["nonsense"], "No such command 'nonsense'"),
        (["svd", "--kept", "2"], "--kept takes numbers between 0 and 1 .* got '2'"),
        (["svd", "--spectrum", "flat"], "--spectrum.*`soco-bench svd --help`"),
        (["batched-svd", "--sizes", "0"], "--sizes takes positive whole numbers .* got '0'"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, message, capsys):
    assert main([*arguments, "--device", "cpu"]) == 2
    written = capsys.readouterr()
    assert written.out == ""
    assert len(written.err.strip().splitlines()) == 1
    assert re.search(message, written.err)
