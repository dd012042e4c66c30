"""soco.scoring: streamed, learned scores are those that training in memory gives."""

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import soco
from soco import scoring, training
from soco.learning import learn_scores
from soco.methods import SoCo
from soco.stages import CHOICE_STAGES
from soco.surgery import transformer_blocks
from test_streaming import IDS, STREAMED, check_same, dense, stopped_runs, stream, weights

pytestmark = pytest.mark.filterwarnings("ignore:.*saw fewer calibration tokens")
FEW = SoCo(steps=6, fisher_warmup=1, batch_size=2)


def history(one):
    return soco.report(one).history


def check(tmp_path, model, **options):
    """The weights, the report and every step of the training are the same."""
    stream(tmp_path / "dense", tmp_path / "out", **options)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["dense", "out"]
    check_same(tmp_path / "out", model, **options)
    assert history(model)["loss"]
    assert history(soco.load(tmp_path / "out")) == history(model)


@pytest.mark.parametrize("name", [*STREAMED, "mamba"])
def test_the_same_weights_as_in_memory(name, tmp_path):
    model = dense(tmp_path / "dense", name)
    options = {"method": FEW, "batch_size": 2}
    check(tmp_path, model, **options | ({"exclude": "*dt_proj"} if name == "mamba" else {}))


@pytest.mark.parametrize(
    "method",
    [
        FEW,
        replace(FEW, micro_batch=1),
        replace(FEW, checkpointing=True),
        replace(FEW, basis="whitened", largest_score=float("inf")),
        replace(FEW, basis="scaled", channels=False, pivoted=False),
        replace(FEW, basis="plain", written=0.0),
        replace(FEW, sampled=True, fisher_prior=3.0, written=0.0),
        replace(FEW, stages=CHOICE_STAGES, steps=1, fisher_warmup=4),
        replace(FEW, deviation="mean"),
        SoCo.preset("fast", batch_size=2),
        SoCo.preset("paper", steps=6, batch_size=2, passes=None),
    ],
    ids=lambda method: "",
)
def test_methods(method, tmp_path):
    if method.largest_score == float("inf"):
        method = replace(method, largest_score=4.0)  # inf is no JSON
    model = dense(tmp_path / "dense", num_hidden_layers=3)
    check(tmp_path, model, method=method, batch_size=2)


def test_an_effort(tmp_path):
    """By its name, as of soco.compress."""
    model = dense(tmp_path / "dense")
    stream(tmp_path / "dense", tmp_path / "out", method="soco", effort="fast", seed=2)
    check_same(tmp_path / "out", model, method="soco", effort="fast", seed=2)
    with pytest.raises(ValueError, match='effort is for method="soco"'):
        stream(tmp_path / "dense", tmp_path / "other", effort="fast")


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_trained_deviations_become_biases(name, tmp_path):
    """Also where the dense model has none."""
    model = dense(tmp_path / "dense", name)
    options = {"method": replace(FEW, deviation="vector"), "pivoted": name == "gpt2"}
    check(tmp_path, model, **options)
    biases = [key for key in soco.load(tmp_path / "out").state_dict() if key.endswith("proj.bias")]
    assert biases


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype, tmp_path):
    check(tmp_path, dense(tmp_path / "dense", dtype=dtype), method=FEW)


def test_computed_in_another_dtype_than_stored(tmp_path):
    model = dense(tmp_path / "dense", dtype=torch.bfloat16)
    stream(tmp_path / "dense", tmp_path / "out", dtype=torch.float32, method=FEW)
    model = model.float()
    soco.compress(model, 0.4, method=FEW, calibration=IDS, samples=6, progress=False)
    found = soco.load(tmp_path / "out").state_dict()
    for key, tensor in model.state_dict().items():
        expected = tensor.bfloat16() if tensor.is_floating_point() else tensor
        assert torch.equal(found[key], expected), key


@pytest.mark.parametrize("ratio", [0.02, 0.9])
def test_layers_that_stay_dense(ratio, tmp_path):
    """They get their scales, too."""
    model = dense(tmp_path / "dense")
    stream(tmp_path / "dense", tmp_path / "out", ratio, method=FEW)
    check_same(tmp_path / "out", model, ratio, method=FEW)
    dense_ones = [each for each in soco.report(model).layers if each.rank is None]
    assert bool(dense_ones) == (ratio < 0.1)


def test_some_blocks(tmp_path):
    model = dense(tmp_path / "dense", num_hidden_layers=3)
    check(tmp_path, model, method=FEW, include="*layers.1*", exclude="*up_proj")


@pytest.mark.parametrize("method", [FEW, "svd-llm", "svd"])
def test_text_that_the_model_writes_itself(method, tmp_path):
    model = dense(tmp_path / "dense")
    options = {"calibration": "self", "samples": 4, "length": 12, "seed": 3, "method": method}
    stream(tmp_path / "dense", tmp_path / "out", **options)
    check_same(tmp_path / "out", model, **options)
    source = soco.report(model).calibration
    assert source == ({} if method == "svd" else source | {"source": "self", "sequences": 4})


def test_a_trained_model(model_dir, tmp_path):
    folder = model_dir("books-llama-1m")
    ids = torch.randint(0, 1000, (8, 64), generator=torch.Generator().manual_seed(0))
    options = {"calibration": ids, "samples": 8, "method": FEW}
    stream(folder, tmp_path / "out", **options)
    check_same(tmp_path / "out", AutoModelForCausalLM.from_pretrained(folder), **options)


def test_no_whole_model_in_memory(tmp_path, monkeypatch):
    """While the training makes its steps, no more than one block has a matrix."""
    dense(tmp_path / "dense", num_hidden_layers=4)
    held = []
    part = training._part

    def watching(run, *arguments):
        found = part(run, *arguments)
        blocks = [
            number
            for number, block in enumerate(transformer_blocks(run.model))
            for module in block.modules()
            for tensor in (*module._parameters.values(), *module._buffers.values())
            if tensor is not None and tensor.dim() > 1 and not tensor.is_meta
        ]
        held.append(set(blocks))
        return found

    monkeypatch.setattr(training, "_part", watching)
    stream(tmp_path / "dense", tmp_path / "out", method=FEW)
    assert held[0] == {0}  # the way back ends there
    assert all(len(each) == 1 for each in held)
    assert len(held) == 7


def test_states_of_the_dense_model_lie_in_files(tmp_path, monkeypatch):
    dense(tmp_path / "dense")
    seen = []

    def watching(*arguments, **options):
        found = learn_scores(*arguments, **options)
        seen.extend(file.name for file in (tmp_path / "out.work").glob("state-*"))
        return found

    monkeypatch.setattr(scoring, "learn_scores", watching)
    stream(tmp_path / "dense", tmp_path / "out", method=replace(FEW, written=0.0))
    assert sorted(seen) == [f"state-{window}-0.pt" for window in range(6)]


def test_stopped_at_every_file(tmp_path, monkeypatch):
    """Ctrl-C in the middle of each file that is written; then the same call goes on.

    A state of the training is kept at every step here.
    """
    monkeypatch.setattr("soco.keeping.EVERY", 0.0)
    dense(tmp_path / "dense", num_hidden_layers=2)
    by_run = (9, 14)  # as many as it takes to a first state
    for _, stops in stopped_runs(tmp_path, monkeypatch, by_run, method=FEW, batch_size=3):
        assert 4 < stops < 50
        assert history(soco.load(tmp_path / "often")) == history(soco.load(tmp_path / "once"))


RUN = """
import sys, torch
sys.path.insert(0, sys.argv[3])
from soco import keeping
from test_scoring import FEW, stream
torch.set_num_threads(1)
keeping.EVERY = 0.0
stream(sys.argv[1], sys.argv[2], batch_size=2, method=FEW)
"""


def test_killed(tmp_path):
    """SIGKILL while it trains, and once more while the result is put together."""
    dense(tmp_path / "dense", num_hidden_layers=3)
    stream(tmp_path / "dense", tmp_path / "once", batch_size=2, method=FEW)
    tests = Path(__file__).parent
    command = [sys.executable, "-c", RUN, tmp_path / "dense", tmp_path / "often", tests]
    for pattern in ("training-[2-9]*.pt", "folded-*"):
        run = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
        while run.poll() is None and not list((tmp_path / "often.work").glob(pattern)):
            time.sleep(0.002)
        run.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
    stream(tmp_path / "dense", tmp_path / "often", batch_size=2, method=FEW)
    assert weights(tmp_path / "often") == weights(tmp_path / "once")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["dense", "often", "once"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"method": replace(FEW, steps=7)}, "settings.steps is 6 there and 7 here"),
        ({"calibration": "self", "length": 16}, "calibration is .* there and not given here"),
    ],
)
def test_another_run_does_not_go_on_there(changed, message, tmp_path, monkeypatch):
    dense(tmp_path / "dense")

    def stopping(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(scoring, "learn_scores", stopping)
        with pytest.raises(KeyboardInterrupt):
            stream(tmp_path / "dense", tmp_path / "out", method=FEW)
    with pytest.raises(ValueError, match=message):
        stream(tmp_path / "dense", tmp_path / "out", **{"method": FEW} | changed)
