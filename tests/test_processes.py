"""soco.processes: the work of several processes against that of one, launched by torchrun."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import distributed

import soco
from soco import processes
from tiny_models import tiny_model
from together import KINDS, text

HERE = Path(__file__).parent
COUNTS = (2, 4)

pytestmark = pytest.mark.skipif(
    not distributed.is_available() or not distributed.is_gloo_available(), reason="needs gloo"
)


def begin(folder, count, *words):
    """Start torchrun in a folder; each process has one thread."""
    place = Path(soco.__file__).parents[1]  # of the soco that is tested, which may be installed
    paths = [str(place), str(HERE), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.Popen(
        [*command, "--nproc-per-node", str(count), *map(str, words)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        cwd=folder,  # not the sources, which hold no compiled core
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def launch(folder, count, *words):
    """What torchrun says and returns."""
    ran = begin(folder, count, *words)
    out, err = ran.communicate()
    return subprocess.CompletedProcess(words, ran.returncode, out, err)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Number of processes to what each of them got, in their order."""
    folder = tmp_path_factory.mktemp("together")
    found = {}
    for count in (1, *COUNTS):
        ran = launch(folder, count, HERE / "together.py", folder)
        assert ran.returncode == 0, ran.stderr
        found[count] = [
            torch.load(folder / f"{count}-{number}.pt", weights_only=False)
            for number in range(count)
        ]
    return found


def distance(one, other):
    """The largest relative difference of two trees of tensors; other leaves have to be equal."""
    if isinstance(one, torch.Tensor):
        assert one.shape == other.shape
        gap = (one.double() - other.double()).norm()
        return float(gap / one.double().norm()) if gap > 0 else 0.0
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        return max((distance(one[key], other[key]) for key in one), default=0.0)
    if isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        return max(map(distance, one, other), default=0.0)
    assert one == other
    return 0.0


def without_signs(found):
    """R of a QR decomposition is one of its inputs up to the signs of its rows."""
    return {name: {**each, "root": each["root"].mT @ each["root"]} for name, each in found.items()}


@pytest.mark.parametrize("count", COUNTS)
def test_every_process_has_the_same(results, count):
    first, *others = results[count]
    for number, other in enumerate(others, 1):
        assert other.pop("numbers") == (number, count)
        for key, value in other.items():
            assert distance(value, first[key]) == 0, key


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("key", ["statistics", "few", "encoder", "mixture"])
def test_statistics_up_to_rounding_in_float64(results, key, count):
    """Seven sequences in batches of two, one sequence only, experts that not all processes see."""
    alone, together = (without_signs(results[n][0][key]) for n in (1, count))
    assert {kind for each in alone.values() for kind in each} == {*KINDS, "tokens", "sequences"}
    assert distance(alone, together) < 1e-12


@pytest.mark.parametrize("count", COUNTS)
def test_decompositions_are_the_same_bit_for_bit(results, count):
    assert distance(results[1][0]["svd"], results[count][0]["svd"]) == 0


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("key", ["svd-llm", "again", "soco", "refine"])
def test_methods_up_to_rounding(results, key, count):
    """Ranks are equal; weights differ by what the order of a sum in float32 makes of them."""
    (ranks, weights), (same, others) = (results[n][0][key] for n in (1, count))
    assert ranks == same
    assert distance(weights, others) < 1e-5


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("key", ["measured", "in one batch", "encoder measured"])
def test_evaluation_up_to_rounding_in_float64(results, key, count):
    """Batches are shared; of one batch one process has all."""
    one, other = (results[n][0][key] for n in (1, count))
    assert one.keys() == other.keys()
    for name, value in one.items():
        near = pytest.approx(value, rel=1e-12) if isinstance(value, float) else value
        assert other[name] == near, name
    assert (one["kl"] or one["distance"]) > 0


@pytest.mark.parametrize("count", [1, *COUNTS])
def test_stopped_and_going_on(results, count):
    """Bit for bit what an undisturbed run of as many processes gives."""
    first = results[count][0]
    found, stops = first["stopped"]
    assert distance(first["best"], found) == 0
    collected = ["statistics-grad_gram-gram"] if count < 4 else []  # two turns have one state
    assert stops == [*collected, "training", "refinement"]


@pytest.mark.parametrize(
    ("key", "method"),
    [
        ("", "svd-llm"), (" back", "kfac-svd"), (" training", "soco"), (" fits", "adasvd"),
        (" walk", "aa-svd"), (" bases", "basis-sharing"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("count", COUNTS)
def test_from_folder_to_folder(results, count, key, method):
    weights, _ = results[1][0][f"streamed{key}"]
    others, left = results[count][0][f"streamed{key}"]
    assert distance(weights, others) < (1e-5 if method == "soco" else 1e-6)
    assert f"small-{count}-{method}" in left
    assert not [name for name in left if "work" in name]


@pytest.mark.parametrize("count", COUNTS)
def test_a_whole_model_taken_apart(results, count):
    parts, files, _ = results[1][0]["apart"]
    assert files == 2
    others, files, left = results[count][0]["apart"]
    assert files > count + 1
    assert distance(parts, others) == 0
    assert f"parts-{count}" in left
    assert not [name for name in left if "work" in name]


@pytest.fixture
def dense(tmp_path):
    """The folder of a tiny model; calibration text is token ids."""
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    (tmp_path / "ids.json").write_text("\n".join(json.dumps(row) for row in text(8).tolist()))
    return tmp_path / "dense"


def words(dense, method="kfac-svd"):
    place = dense.parent
    return [
        "-m", "soco", "compress", dense, "--method", method, "-c", "self", "--samples", "4",
        "--length", "16", "--batch-size", "2", "-o", place / "out", "--ratio", "0.4",
    ]  # fmt: skip


def test_on_the_command_line_one_process_speaks(dense):
    ran = launch(dense.parent, 2, *words(dense))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("compressed and written") == 1
    assert ran.stderr.count("soco: compressing by kfac-svd on cpu") == 1
    assert soco.load(dense.parent / "out") is not None


def test_a_process_that_fails_says_so_once(dense):
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(dense)
    ran = launch(dense.parent, 2, *words(dense, "svd"))
    assert ran.returncode != 0
    assert ran.stderr.count("soco: error:") == 1
    assert "down_proj.weight (32, 48) holds NaN or Inf" in ran.stderr
    assert "soco/cli" not in ran.stderr  # the traceback there is the launcher's
    assert not (dense.parent / "out").exists()


def test_ctrl_c_is_told_once(dense):
    """The launcher hands it on to its processes."""
    place = dense.parent
    more = ("--steps", "100000", "--work", place / "kept")
    ran = begin(place, 2, *words(dense, "soco"), *more)
    assert ran.stderr is not None
    while "soco: compressing" not in (line := ran.stderr.readline()):
        assert line, "it ended by itself"
    while not (place / "kept" / "plan.json").exists():
        assert ran.poll() is None
        time.sleep(0.1)
    ran.send_signal(signal.SIGINT)
    out, err = ran.communicate()
    assert ran.returncode != 0
    assert out.strip() == ""
    assert err.count("soco: interrupted") == 1
    assert err.count("soco: stopped: the same command goes on from here") == 1
    assert "soco/cli" not in err  # the traceback there is the launcher's
    assert not (place / "out").exists()


def test_a_demo_by_several(tmp_path):
    """They compress, and then one of them compares, while the others have left."""
    words = ["--steps", "2", "--samples", "4", "--length", "32", "--ratio", "0.5", "-o", "out"]
    ran = launch(tmp_path, 2, "-m", "soco", "compress", "demo", *words)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("SVD-LLM, ranks by energy") == 1
    measure = ["evaluate", "out", "--text", "demo", "--windows", "3", "--length", "32", "--json"]
    ran = launch(tmp_path, 2, "-m", "soco", *measure)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["tokens"] == 3 * 31  # told once


# ---- alone --------------------------------------------------------------------------------------


def test_alone_nothing_is_shared(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with soco.together():
        assert (processes.number(), processes.count()) == (0, 1)
        assert list(processes.own(3)) == [0, 1, 2]
        assert processes.part_of(torch.arange(3)).tolist() == [0, 1, 2]
        total = torch.ones(2)
        processes.add_up(total)
        assert total.tolist() == [1, 1]
        assert processes.gathered(3) == [3]
        assert processes.told(3) == 3
        with soco.together():
            assert processes.count() == 1
    assert not distributed.is_initialized()


def test_an_environment_without_an_address(monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(ValueError, match="WORLD_SIZE is 2, but RANK is not set: start"),
        soco.together(),
    ):
        pass


def test_a_torch_that_knows_no_processes(monkeypatch):
    monkeypatch.setattr(distributed, "is_available", lambda: False)
    monkeypatch.delattr(distributed, "is_initialized")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with soco.together():
        assert processes.count() == 1
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "2")
    with pytest.raises(ValueError, match=r"built without torch\.distributed"), soco.together():
        pass


def test_jobs_are_shared_out_by_their_costs(monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 2)
    assert processes.owners([1.0, 4.0, 2.0, 1.0]) == [1, 0, 1, 1]
    assert processes.owners([]) == []
    assert processes.owners([1.0, 1.0, 1.0]) == [0, 1, 0]


def test_results_that_differ_are_refused(monkeypatch):
    monkeypatch.setattr(processes, "gathered", lambda value: [value, "other"])
    with pytest.raises(RuntimeError, match="the ranks differ among the 2 processes"):
        processes.check_same("mine", "the ranks")
