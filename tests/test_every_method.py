"""Every method on every architecture: budgets are met, folders load again, odd data is named."""

import pytest
import torch

from soco.allocators import ALLOCATORS
from soco.methods import METHODS, DobiSVD, SoCo
from soco.modules import PivotedLinear
from soco.pipeline import compress
from soco.refinement import Refinement
from soco.reporting import report
from soco.surgeon import SVDSurgeon
from soco.surgery import low_rank_layers
from tiny_models import NEEDS_5, logits, tiny_model

ARCHITECTURES = ("llama", "mistral", "qwen2", "phi3", "gpt2", "opt", "bert", "mixtral", "qwen2_moe")
# Those that train, with as few steps as show that they run.
QUICK = {"soco": SoCo(steps=3, batch_size=4, fisher_warmup=1), "dobi-svd": DobiSVD(steps=2)}
WINDOWS = torch.randint(3, 96, (12, 10), generator=torch.Generator().manual_seed(5))
OPTIONS = {"calibration": WINDOWS, "samples": 12, "length": 10, "progress": False}


def made(name, method, ratio=0.4, **changes):
    model = tiny_model(name)
    return compress(model, ratio, method=QUICK.get(method, method), **{**OPTIONS, **changes})


@pytest.mark.filterwarnings("ignore:.*layers saw fewer calibration tokens")
@pytest.mark.filterwarnings("ignore:.*see other tokens in the compressed model")
@pytest.mark.filterwarnings("ignore:.*layers saw no calibration token")
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("method", METHODS)
def test_compressed_saved_and_loaded(method, name, tmp_path):
    model = made(name, method)
    done = report(model)
    assert done.method == method
    budget = int(0.6 * done.params_before)
    assert budget - max(sum(layer.shape) for layer in done.layers) * 2 < done.params_after
    assert done.params_after <= budget
    assert low_rank_layers(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    state, other = model.state_dict(), again.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in state.items())
    found = logits(again)
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found, logits(model), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("rule", ALLOCATORS)
def test_every_allocator_from_the_outside(rule, monkeypatch):
    monkeypatch.setattr("soco.learning.SoCo", lambda seed, **_: QUICK["soco"])
    done = report(made("llama", "svd-llm", allocator=rule))
    assert done.settings["allocator"] == rule
    assert 0.4 <= done.removed < 0.45


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("basis-sharing", "dobi-svd")])
def test_pivoted_layers_hold_more_rank(method):
    plain, pivoted = (made("llama", method, pivoted=each) for each in (False, True))
    layers = low_rank_layers(pivoted)
    assert {type(layer) for layer in layers.values()} == {PivotedLinear}
    assert report(pivoted).settings["pivoted"] is True
    total = [sum(layer.rank or 0 for layer in report(model).layers) for model in (plain, pivoted)]
    dense = [
        sum(layer.rank is None for layer in report(model).layers) for model in (plain, pivoted)
    ]
    assert total[1] > total[0] or dense[0] > dense[1]
    assert report(pivoted).params_after <= int(0.6 * report(pivoted).params_before)


@pytest.mark.filterwarnings("ignore:.*layers saw fewer calibration tokens")
def test_trained_scales_may_be_fitted_again():
    model, plain = made("llama", "soco", surgeon=True), made("llama", "soco")
    assert "surgeon" in report(model).seconds
    assert report(model).settings["surgeon"]["damping"] > 0
    assert report(model).params_after == report(plain).params_after
    assert [x.rank for x in report(model).layers] == [x.rank for x in report(plain).layers]


@pytest.mark.filterwarnings("ignore:.*layers saw fewer calibration tokens")
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("method", ["svd-llm", "basis-sharing", "kfac-svd", "soco", "dobi-svd"])
def test_refined(method, name):
    settings = Refinement(steps=3, batch_size=4, evaluate_every=1, learning_rate=1e-3)
    model = made(name, method, refine=settings)
    done = report(model)
    assert done.settings["refine"]["steps"] == 3
    assert "refinement" in done.seconds
    assert done.history["stage"][-1] == "tuning"
    if method == "basis-sharing":
        assert any(getattr(layer, "basis", None) for layer in low_rank_layers(model).values())


def test_rescaled():
    plain, rescaled = made("llama", "svd"), made("llama", "svd", surgeon=True)
    assert report(rescaled).settings["surgeon"]["damping"] == SVDSurgeon().damping
    own = report(made("llama", "svd-surgeon")).settings
    assert own["surgeon"] == report(rescaled).settings["surgeon"]
    wild = made("llama", "svd", surgeon=SVDSurgeon(validation="none", clip=None, held_out=0))
    ups = [dict(model.named_parameters())["model.layers.0.mlp.up_proj.up.weight"]
           for model in (plain, wild)]  # fmt: skip
    assert not torch.equal(*ups)
    downs = [dict(m.named_parameters())["model.layers.0.mlp.up_proj.down.weight"]
             for m in (plain, wild)]  # fmt: skip
    torch.testing.assert_close(*downs)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"method": "basis-sharing", "pivoted": True}, "basis-sharing shares its bases, which"),
        ({"method": "dobi-svd", "pivoted": True}, "dobi-svd cannot count pivoted factors"),
        (
            {"method": "basis-sharing", "allocator": "learned"},
            '"learned" takes a method without shared bases',
        ),
        ({"method": "svd", "surgeon": 3}, "surgeon must be True, False or an SVDSurgeon, got 3"),
        ({"method": "svd", "refine": "yes"}, "refine must be True, False or a Refinement"),
        ({"method": "svd", "refine": True, "calibration": None}, "svd learns from text"),
        ({"method": "svd", "surgeon": True, "calibration": None}, "svd learns from text"),
        ({"method": "svd", "allocator": "lems", "calibration": None}, "svd learns from text"),
    ],
)
def test_what_does_not_go_together_is_refused(options, text):
    model = tiny_model("llama")
    before = logits(model)
    with pytest.raises(ValueError, match=text):
        compress(model, 0.4, **{**OPTIONS, **options})
    assert torch.equal(logits(model), before)
    assert not low_rank_layers(model)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "svd"])
def test_a_gram_of_rank_three_is_said_and_borne(method):
    """Twelve tokens that are three: no whitener has an inverse, no curvature full rank."""
    model = tiny_model("llama")
    few = WINDOWS[:1, :3].repeat(4, 1)
    with pytest.warns(UserWarning, match="fewer") as told:
        compress(
            model, 0.4, method=QUICK.get(method, method), calibration=few, samples=12, length=3,
            progress=False,
        )  # fmt: skip
    assert any("fewer" in str(each.message) for each in told)
    assert bool(logits(model).isfinite().all())
    assert report(model).warnings


@NEEDS_5
@pytest.mark.parametrize("method", [m for m in METHODS if m != "svd"])
def test_an_expert_without_tokens_is_named(method):
    """One token only, so that two of the four experts of each block see nothing."""
    model = tiny_model("mixtral")
    alone = torch.full((12, 10), 7)
    with pytest.warns(UserWarning, match="saw") as told:
        compress(
            model, 0.4, method=QUICK.get(method, method), calibration=alone, samples=12, length=10,
            progress=False,
        )  # fmt: skip
    text = next(str(w.message) for w in told if "saw no calibration token" in str(w.message))
    assert text.startswith("8 layers")
    assert ".experts." in text
    assert bool(logits(model).isfinite().all())
    assert report(model).removed >= 0.4
