"""What several compressions share: the same result as without, and refusals before any work."""

import copy

import pytest
import torch

from soco import preparation
from soco.pipeline import compress
from soco.preparation import prepare
from soco.reporting import report
from soco.surgery import low_rank_layers
from tiny_models import IS_5, NEEDS_5, logits, tiny_model

WINDOWS = torch.randint(3, 96, (16, 10), generator=torch.Generator().manual_seed(2))
OPTIONS = {"samples": 16, "length": 10, "progress": False}


def factors_of(model):
    return {
        f"{name}.{key}": value
        for name, layer in low_rank_layers(model).items()
        for key, value in layer.state_dict().items()
    }


@pytest.mark.parametrize("method", ["svd", "svd-llm", "kfac-svd", "adasvd", "aa-svd"])
def test_a_shared_workbench_gives_what_each_alone_gives(method):
    dense = tiny_model("llama")
    before = logits(dense)
    bench = prepare(dense, calibration=WINDOWS, **OPTIONS)
    compress(copy.deepcopy(dense), 0.6, method="svd-llm", shared=bench, progress=False)
    shared = compress(copy.deepcopy(dense), 0.4, method=method, shared=bench, progress=False)
    alone = compress(copy.deepcopy(dense), 0.4, method=method, calibration=WINDOWS, **OPTIONS)
    found, wanted = factors_of(shared), factors_of(alone)
    assert found.keys() == wanted.keys()
    # Statistics that are collected together or apart may differ in rounding, factors in sign.
    assert torch.allclose(logits(shared), logits(alone), atol=1e-5)
    assert torch.equal(logits(dense), before)
    assert not low_rank_layers(dense)


def test_bars_are_shown_by_one_process(monkeypatch):
    assert [preparation.hidden(asked) for asked in (True, False, None)] == [False, True, None]
    monkeypatch.setattr(preparation, "number", lambda: 1)
    assert [preparation.hidden(asked) for asked in (True, False, None)] == [True, True, True]


def test_reports_name_the_calibration_of_the_workbench():
    dense = tiny_model("llama")
    bench = prepare(dense, calibration=WINDOWS, seed=5, **OPTIONS)
    done = report(compress(copy.deepcopy(dense), method="svd-llm", shared=bench, progress=False))
    assert done.calibration == {"source": "Tensor", "sequences": 16, "length": 10, "seed": 5}
    assert report(
        compress(copy.deepcopy(dense), method="svd", shared=bench, progress=False)
    ).calibration == {}  # fmt: skip


def test_another_model_is_refused():
    bench = prepare(tiny_model("llama"), calibration=WINDOWS, **OPTIONS)
    for other in (tiny_model("gpt2"), tiny_model("llama", intermediate_size=40)):
        with pytest.raises(ValueError, match="the workbench was prepared for another model"):
            compress(other, method="svd", shared=bench)
        assert not low_rank_layers(other)


def test_a_workbench_without_text_is_enough_for_some():
    dense = tiny_model("llama")
    bench = prepare(dense)
    compress(copy.deepcopy(dense), method="svd", shared=bench)
    with pytest.raises(ValueError, match="method svd-llm learns from text"):
        compress(copy.deepcopy(dense), method="svd-llm", shared=bench)


@NEEDS_5
def test_experts_become_layers_of_the_workbench():
    assert IS_5
    dense = tiny_model("mixtral")
    before = logits(dense)
    bench = prepare(dense, calibration=WINDOWS, **OPTIONS)
    assert any(".experts." in name for name in bench.targets)
    torch.testing.assert_close(logits(dense), before)
    made = compress(copy.deepcopy(dense), 0.5, method="svd-llm", shared=bench, progress=False)
    fresh = compress(
        tiny_model("mixtral"), 0.5, method="svd-llm", calibration=WINDOWS, **OPTIONS
    )  # fmt: skip
    torch.testing.assert_close(logits(made), logits(fresh), atol=1e-5, rtol=1e-4)


def test_quantized_models_are_refused():
    model = compress(tiny_model("llama"), method="svd")
    with pytest.raises(ValueError, match="quantized or compressed already"):
        prepare(model)
