"""soco.planning: numbers worked by hand, what folders and arguments do, memory as it is."""

import json
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from soco.calibration import OF_GRADIENTS
from soco.choices import choose
from soco.experts import experts_apart, find_experts
from soco.methods import SoCo
from soco.planning import Plan, demands, duration, learning, plan
from soco.planning.rates import Rates, measured_rates
from soco.planning.setting import Demand, Passes, Setting
from soco.planning.tracing import KEPT, Trace, Work, without_values
from soco.refinement import Refinement
from soco.surgery import find_linears, shape_of
from tiny_models import MIXTURES, NEEDS_5, tiny_mixture

TINY: dict[str, Any] = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
)  # fmt: skip
FEW: dict[str, Any] = dict(samples=4, length=16, batch_size=2)


def folder(tmp_path, **changes):
    """A folder with a config and nothing else."""
    LlamaConfig(**{**TINY, **changes}).save_pretrained(tmp_path)
    return tmp_path


def test_parameters_and_disk_by_hand(tmp_path):
    found = plan(folder(tmp_path, dtype="bfloat16"), 0.5, method="svd", **FEW)
    block = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32  # q, o; k, v; gate, up, down
    assert found.target_params == 2 * block
    assert found.params == 2 * block + 2 * 96 * 32 + 5 * 32  # embeddings, head, norms
    assert found.dense_bytes == 2 * found.params
    assert found.compressed_bytes == 2 * found.params_after
    after = found.params_after - found.params + found.target_params
    assert block - 80 < after <= block  # half, but for less than a rank
    assert (found.dtype, found.work_bytes) == ("bfloat16", 0)


@NEEDS_5
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures(name, stream, tmp_path):
    """Their experts are layers, which are sent as many tokens each; all passes are planned."""
    model = tiny_mixture(name)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    for method in ("kfac-svd", "soco"):
        found = plan(tmp_path, 0.4, method=method, stream=stream, **FEW)
        assert found.notes == ()
        assert found.params == sum(p.numel() for p in model.parameters())
        with experts_apart(model):
            layers = find_linears(model)
        assert found.target_params == sum(math.prod(shape_of(m)) for m in layers.values())
        by_name = {phase.name: phase for phase in found.phases}
        assert by_name["statistics"].peak_bytes > found.base_bytes + found.dense_bytes // 4
        if method == "soco":
            assert by_name["training"].cpu_seconds > by_name["statistics"].cpu_seconds > 0


def test_tokens_of_experts_are_shared_evenly():
    model = tiny_mixture("mixtral")
    with experts_apart(model):
        experts = next(iter(find_experts(model).values()))
        chosen = torch.zeros(10, dtype=torch.long)
        assert experts.counts(chosen) == [10, 0, 0, 0]
        with without_values(model.to("meta")):
            assert experts.counts(chosen) == [3, 3, 2, 2]
        assert experts.counts(chosen) == [10, 0, 0, 0]


def test_phases_of_each_way(tmp_path):
    place = folder(tmp_path)

    def phases(**options):
        return [phase.name for phase in plan(place, **FEW, **options).phases]

    end = ["factors", "writing", "checking"]
    assert phases(method="svd") == ["loading", "decomposition", *end]
    assert phases(method="svd-llm") == ["loading", "statistics", "decomposition", *end]
    trained = ["loading", "statistics", "decomposition", "written text", "training", "factors"]
    assert phases() == [*trained, *end[1:]]
    assert phases(effort="best")[-3:] == ["refinement", *end[1:]]
    assert phases(method="svd", stream=True) == ["decomposition", "writing"]
    assert phases(method="svd-llm", stream=True) == ["statistics", "decomposition", "writing"]
    assert phases(stream=True) == [*trained[1:5], "writing"]


def test_the_work_folder_by_hand(tmp_path):
    found = plan(folder(tmp_path), 0.5, method="svd-llm", stream=True, **FEW)
    states = 2 * 4 * 16 * 32 * 4  # twice: sequences, length, hidden, float32
    factors = 4 * (found.params_after - found.params + found.target_params)
    spectra = 4 * 2 * (2 * 32 + 2 * 16 + 3 * 32)
    assert found.work_bytes == states + factors + spectra


def test_what_is_larger_takes_more(tmp_path):
    place = folder(tmp_path)
    little = plan(place, method="kfac-svd", **FEW)
    for more in ({"batch_size": 4}, {"length": 32}):
        other = plan(place, method="kfac-svd", **{**FEW, **more})
        assert phase(other, "statistics") > phase(little, "statistics")
    wide = plan(place, method="kfac-svd", dtype=torch.float64, **FEW)
    assert phase(wide, "loading") > phase(little, "loading")


def phase(found: Plan, name: str) -> int:
    """Bytes of a phase without what Python takes."""
    return next(p.peak_bytes for p in found.phases if p.name == name) - found.base_bytes


def test_a_config_is_enough(tmp_path):
    by_folder = plan(folder(tmp_path), method="svd", **FEW)
    by_config = plan(LlamaConfig(**TINY), method="svd", **FEW)
    assert by_config.params == by_folder.params
    assert by_config.to_dict().keys() == by_folder.to_dict().keys()
    json.dumps(by_config.to_dict(), allow_nan=False)


def test_checkpointing_and_micro_batches_take_less(tmp_path):
    place = folder(tmp_path, num_hidden_layers=4, vocab_size=8)
    few: dict[str, Any] = {"samples": 8, "length": 64}
    usual = phase(plan(place, method=SoCo(steps=2), **few), "training")
    parts = phase(plan(place, method=SoCo(steps=2, micro_batch=1), **few), "training")
    again = phase(plan(place, method=SoCo(steps=2, checkpointing=True), **few), "training")
    assert parts < usual
    assert again < usual


def test_blocks_that_are_not_run_count_like_the_third(tmp_path):
    """Of six blocks three run; of four and of five, the difference is one block's."""

    def of(layers):
        place = folder(tmp_path, num_hidden_layers=layers, vocab_size=8)
        return plan(place, method="kfac-svd", samples=8, length=64, batch_size=8)

    four, five, six = (phase(of(layers), "statistics") for layers in (4, 5, 6))
    assert six - five == pytest.approx(five - four, abs=8)
    three = phase(of(3), "statistics")  # which all run
    assert four - three == pytest.approx(five - four, abs=8)


def test_what_processes_share_by_hand():
    """Jobs that follow on each other in lists: each list takes as long as the busiest process."""
    demand = Demand("x", 0, Work(), [[1.0, 1.0, 1.0], [4.0, 2.0, 2.0, 1.0]])
    assert demand.share(1) == 1
    assert demand.share(2) == (2 + 5) / 12
    assert demand.share(3) == (1 + 4) / 12
    assert Demand("x", 0, Work()).share(2) == 1


def test_the_time_of_several_gpus(tmp_path):
    """Four batches of one sequence, fourteen layers, batches of eight sequences; text by one."""
    options: dict[str, Any] = {"samples": 4, "length": 16, "batch_size": 1}
    method = SoCo(batch_size=6, written=1.0)
    for stream in (False, True):
        found = plan(folder(tmp_path), method=method, gpus=4, stream=stream, **options)
        shares = {p.name: p.gpus_seconds / p.gpu_seconds for p in found.phases if p.gpu_seconds}
        assert shares["statistics"] == pytest.approx(1 / 4)
        assert shares["training"] == pytest.approx(2 / 6)
        assert shares["written text"] == 1
        assert 1 / 4 < shares["decomposition"] < 1 / 2
        assert found.gpus_seconds < found.gpu_seconds
    alone = plan(folder(tmp_path), method=method, **options)
    assert all(p.gpus_seconds == p.gpu_seconds for p in alone.phases)
    with pytest.raises(ValueError, match="gpus must be a positive whole number, got 0"):
        plan(folder(tmp_path), gpus=0)


def test_what_is_not_planned_is_said(tmp_path):
    place = folder(tmp_path)
    assert "dobi-svd is not planned" in " ".join(plan(place, method="dobi-svd", **FEW).notes)
    assert "surgeon" in " ".join(plan(place, method="svd", surgeon=True, **FEW).notes)
    for stream in (False, True):
        told = plan(place, method="aa-svd", stream=stream, **FEW).notes
        assert "fits of aa-svd behind compressed blocks are not planned" in " ".join(told)
        told = plan(place, method="tfwsvd", stream=stream, **FEW).notes
        assert "fits of tfwsvd at a layer's rank are not planned" in " ".join(told)
    assert plan(place, method="svd-llm", **FEW).notes == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.5}, "must be above 0 and below 1, got 1.5"),
        ({"ratio": 0.999}, "the largest ratio that can be met"),
        ({"method": "magic"}, "there is no method 'magic'"),
        ({"samples": 0}, "samples must be a positive whole number, got 0"),
        ({"batch_size": True}, "batch_size must be a positive whole number, got True"),
        ({"length": 65}, "length 65 is too much for the model's 64 positions"),
        ({"stream": True, "effort": "best"}, "need the whole model in memory"),
        ({"include": "nothing.*"}, "matches no linear layer"),
    ],
)
def test_bad_arguments(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        plan(folder(tmp_path), **{**FEW, **options})


def test_bad_models(tmp_path):
    with pytest.raises(ValueError, match=r"is no model: it has no config\.json"):
        plan(tmp_path)
    with pytest.raises(ValueError, match=r"a folder with config\.json or a config .*, got a int"):
        plan(3)
    (tmp_path / "config.json").write_text('{"architectures": ["Unheard"]}')
    with pytest.raises(ValueError, match="not in the installed transformers"):
        plan(tmp_path)
    folder(tmp_path, quantization_config={"quant_method": "soco"})
    with pytest.raises(ValueError, match="quantized or compressed already"):
        plan(tmp_path)


def test_the_model_has_no_values_and_comes_back(tmp_path):
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    before = model.weight
    with without_values(model):
        assert model.weight.device.type == "cpu"
        assert model(torch.ones(2, 4)).shape == (2, 4)
    assert model.weight is before


def test_a_trace_counts_what_is_alive_at_once():
    x = torch.ones(64, 32)
    with Trace() as trace:
        y = x + 1  # 8192 bytes
        z = y * 2
        del y
        w = z @ torch.ones(32, 16)  # 2048 bytes, and 4096
    assert trace.work.peak == 2 * 64 * 32 * 4
    assert trace.alive == 64 * 32 * 4 + w.nbytes
    assert trace.work.products == {torch.float32: 2 * 64 * 32 * 16}


def test_a_trace_counts_eigendecompositions_and_where_they_work():
    x = torch.eye(10, dtype=torch.float64)
    with Trace() as trace:
        torch.linalg.eigh(x)
    assert trace.work.cubes == 1000
    assert trace.work.peak == 8 * (10 + 100 + 2 * 100)  # values, vectors, LAPACK's own
    twice = trace.work.scaled(2)
    assert twice.cubes == 8000
    assert twice.peak == 4 * trace.work.peak


def test_work_adds_up():
    one, other = Work(5, 1, {torch.float32: 1.0}, 2.0), Work(3, 2, {torch.float64: 4.0}, 1.0)
    assert one.then(other) == Work(5, 2, {torch.float32: 1.0, torch.float64: 4.0}, 3.0)
    assert one.times(3) == Work(5, 1, {torch.float32: 3.0}, 6.0)


def test_rates():
    rates = Rates({torch.float32: 2.0, torch.float64: 1.0}, cubes=10.0)
    assert rates.seconds({torch.float32: 4.0, torch.bfloat16: 2.0, torch.float64: 1.0}, 20.0) == 6
    assert min(measured_rates(torch.float16).products.values()) > 0


def test_durations():
    assert duration(59) == "59 s"
    assert duration(3600) == "60 min"


def test_setting_counts_the_layers_that_are_factored():
    shapes = {"a": (4, 4), "b": (8, 8)}
    setting = Setting(
        model=nn.Linear(2, 2), targets={}, shapes=shapes, ranks={"a": 4, "b": 2}, budget=0,
        ratio=0.5, choices=choose("svd"), samples=3, length=1,
        batch_size=2, dtype=torch.float32, stored=torch.float32, threads=1,
    )  # fmt: skip
    assert setting.factored == ["b"]
    assert (setting.factors(2), setting.batches) == (64, 2)


# ---- phases by hand: the passes, and what it takes to take a weight apart, are given -------------

BLOCK = 4 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)  # its layers; it has two norms as well
WEIGHTS = 2 * (BLOCK + 4 * 2 * 32) + 4 * (2 * 96 * 32 + 32)
GRAMS = 8 * (3 * 32 * 32 + 48 * 48)  # of a block: before q, k, v; o; gate, up; and down
GRADIENTS = 8 * (2 * 32 * 32 + 2 * 16 * 16 + 2 * 48 * 48 + 32 * 32)
SPECTRA = 4 * (2 * (32 * 64 + 32) + 2 * (16 * 48 + 16) + 3 * (32 * 80 + 32))  # of a block
DOWN = 4 * (32 * 80 + 32)
HIDDEN = 4 * 16 * 32  # of a sequence
GROUPS = [
    [f"model.layers.{block}.{name}" for name in names]
    for block in (0, 1)
    for names in (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",),
    )
]  # fmt: skip


@pytest.fixture
def by_hand(tmp_path, monkeypatch):
    """``by_hand(**options)``: phases to bytes, and the bytes of the factors."""
    loss = [3000]  # what a block and the loss take

    def passes(setting, notes):
        works = [Work(2000, 20), Work(loss[0], 30), Work(4000, 40)]
        if not setting.choices.needs & OF_GRADIENTS:
            works = 3 * [Work()]
        return Passes(GROUPS, Work(1000, 10), works[0], works[1], works[2], object())

    monkeypatch.setattr(demands, "passes_of", passes)
    monkeypatch.setattr(demands, "_taken_apart", lambda *_: Work(5000))
    monkeypatch.setattr(demands, "workers_for", lambda *_: 1)
    monkeypatch.setattr(learning, "_training_passes", lambda *_: 3 * (Work(7000),))
    monkeypatch.setattr(learning, "_refined", lambda *_: Work(9000))

    def of(*, to_the_loss=3000, **options):
        loss[0] = to_the_loss
        found = plan(folder(tmp_path), 0.5, **{**FEW, **options})
        sizes = {p.name: p.peak_bytes - found.base_bytes for p in found.phases}
        return sizes, 4 * (found.params_after - found.params + found.target_params)

    return of


def test_phases_in_memory_by_hand(by_hand):
    found, factors = by_hand(method="svd-llm")
    most = max(2 * SPECTRA + factors, 2 * factors)
    assert found == {
        "loading": WEIGHTS,
        "statistics": WEIGHTS + 2 * GRAMS + 1000 + 10,
        # At the last layer of all, whose sums are the largest; the other spectra are there.
        "decomposition": WEIGHTS + 2 * SPECTRA - DOWN + 8 * 48 * 48 + 5000,
        "factors": WEIGHTS + most + factors,
        "writing": WEIGHTS + factors + KEPT,
        "checking": 2 * (WEIGHTS + factors) - 2 * BLOCK + KEPT,
    }


def test_statistics_of_gradients_by_hand(by_hand):
    found, _ = by_hand(method="kfac-svd", allocator="uniform")
    assert found["statistics"] == WEIGHTS + 2 * GRAMS + 2 * GRADIENTS + 2000 + 20


def test_training_by_hand(by_hand):
    """Spectra, and the dense model's hidden states of two steps and one batch before them."""
    few = {"method": SoCo(steps=2, written=0.0, fisher_warmup=1, batch_size=1, micro_batch=1)}
    found, _ = by_hand(**few)
    assert found["training"] == WEIGHTS + 2 * SPECTRA + 3 * HIDDEN + 7000


def test_refinement_by_hand(by_hand):
    """The factors, the best ones and Adam's two moments: four numbers for each."""
    wanted = Refinement(steps=1, batch_size=2)  # and one of four sequences held out
    found, factors = by_hand(method="svd", refine=wanted)
    assert found["refinement"] == WEIGHTS + 4 * factors + 3 * HIDDEN + 9000


def test_phases_block_by_block_by_hand(by_hand):
    block, outside, head = BLOCK + 4 * 2 * 32, 4 * (96 * 32 + 32), 4 * 96 * 32
    found, _ = by_hand(method="svd-llm", stream=True)
    assert found == {
        "statistics": outside + block + GRAMS + 4 * 2 * HIDDEN + 1000 + 10,
        "decomposition": outside + GRAMS + 2 * DOWN,
        # What is outside of the blocks goes into one file, and the largest of it is there twice.
        "writing": 2 * head + 4 * 32 + head + KEPT,
    }
    way_back = {"method": "kfac-svd", "allocator": "uniform", "stream": True}
    found, _ = by_hand(**way_back)
    states = 4 * 2 * HIDDEN
    assert found["statistics"] == outside + block + GRAMS + GRADIENTS + states + 4000 + 20
    found, _ = by_hand(**way_back, to_the_loss=10**9)  # where there are no statistics yet
    assert found["statistics"] == outside + head + states + 10**9 + 20


def test_training_block_by_block_by_hand(by_hand):
    """Components of one block and what is read of its largest layer; states are in files."""
    few = {"method": SoCo(steps=2, written=0.5, fisher_warmup=1, batch_size=1, micro_batch=1)}
    found, _ = by_hand(**few, stream=True)
    beside, norms = 4 * (2 * 96 * 32 + 32), 4 * 2 * 32
    components = SPECTRA - 4 * (5 * 32 + 2 * 16)  # without what a spectrum has beside them
    assert found["training"] == beside + norms + components + 4 * 32 * 48 + 7000
    # A block's weights, keys and values of two sequences, and logits for their next tokens.
    cache = 2 * 2 * 2 * 16 * 16 * 4
    assert found["written text"] == beside + BLOCK + norms + cache + 6 * 2 * 96 * 4 + KEPT


def test_the_work_folder_with_gradients_by_hand(tmp_path):
    """Hidden states in front of every block, behind the last, and what comes back of one.

    Or, at the other end of the way, what has become of the layers.
    """
    more = {"method": "kfac-svd", "allocator": "uniform", "stream": True, **FEW}
    few_layers = plan(folder(tmp_path), 0.5, **more)
    factors = 4 * (few_layers.params_after - few_layers.params + few_layers.target_params)
    sigmas = 4 * 2 * (2 * 32 + 2 * 16 + 3 * 32)
    assert few_layers.work_bytes == factors + sigmas + 2 * 4 * HIDDEN
    long = plan(folder(tmp_path), 0.5, **{**more, "samples": 64})
    assert long.work_bytes == 64 * (2 + 2) * HIDDEN


def test_the_work_folder_of_a_training_by_hand(tmp_path):
    """Components in the dtype that is computed in; states of what is trained on, and factors."""
    method = SoCo(written=0.5, pivoted=False)
    found = plan(folder(tmp_path), 0.5, method=method, stream=True, **FEW)
    components = 2 * (SPECTRA + 4 * (5 * 32 + 2 * 16))  # gain and sigma
    factors = 4 * (found.params_after - found.params + found.target_params)
    assert found.work_bytes == components + 6 * HIDDEN + factors


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_near_to_what_is_measured(tmp_path):
    """A small Llama by svd-llm, planned and compressed in processes of their own."""
    folder(
        tmp_path, hidden_size=512, intermediate_size=1408, num_hidden_layers=4, vocab_size=8000,
        num_attention_heads=8,
    )  # fmt: skip
    planned = max(json.loads(run(PLANNED, tmp_path)).values())
    measured = json.loads(run(MEASURED, tmp_path))
    assert abs(planned / measured - 1) < 0.15


def run(script, place):
    """The last line that a process prints."""
    command = [sys.executable, "-W", "ignore", "-c", script, str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


PLANNED = """
import json, sys, torch, soco
torch.set_num_threads(1)
soco.compress, soco.save
found = soco.plan(sys.argv[1], method="svd-llm", samples=32, length=64)
ends = ("writing", "checking")
print(json.dumps({p.name: p.peak_bytes for p in found.phases if p.name not in ends}))
"""
MEASURED = """
import sys, torch, soco
from transformers import AutoConfig, AutoModelForCausalLM
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(sys.argv[1]))
ids = torch.randint(0, 8000, (32, 64))
soco.compress(model, method="svd-llm", calibration=ids, samples=32)
print(soco.report(model).peak_bytes)
"""
