"""Every method's theorem, and what the table of methods promises."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from soco.calibration import collect
from soco.linalg import Factors
from soco.methods import METHODS, SVD, SVDLLM, DobiSVD, Method, SoCo, TrainedMethod
from soco.objectives import HiddenStates, objective_for
from soco.ranks import layer_params, parameter_budget
from soco.stages import SOFT_STAGES, TrainingSettings
from soco.surgery import find_linears, shape_of, weight_of
from soco.truncation import PositionSettings
from tiny_models import tiny_model

WEIGHT = torch.randn(9, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
INPUTS = torch.randn(6, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
INPUTS = torch.tensor([[9.0], [1], [0.1], [3], [1], [0.5]]) * INPUTS  # channels differ
GRAM = INPUTS @ INPUTS.T


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_svd_error_is_the_tail(rank):
    spectrum = SVD().spectrum(WEIGHT, {}, name="w")
    error = WEIGHT - spectrum.truncate(rank).product()
    torch.testing.assert_close(error.norm(), spectrum.sigma[rank:].norm(), atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(spectrum.sigma, torch.linalg.svdvals(WEIGHT))


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_svd_llm_output_error_is_the_tail(rank):
    spectrum = SVDLLM().spectrum(WEIGHT, {"gram": GRAM}, name="w")
    error = (WEIGHT - spectrum.truncate(rank).product()) @ INPUTS
    torch.testing.assert_close(error.norm(), spectrum.sigma[rank:].norm(), atol=1e-9, rtol=1e-8)


def test_svd_llm_is_the_published_form():
    """``trunc(W S) S^-1`` with the Cholesky factor S of the Gram matrix."""
    S = torch.linalg.cholesky(GRAM)
    U, sigma, Vh = torch.linalg.svd(WEIGHT @ S, full_matrices=False)
    published = (U[:, :3] * sigma[:3]) @ Vh[:3] @ torch.linalg.inv(S)
    found = SVDLLM().spectrum(WEIGHT, {"gram": GRAM}, name="w").truncate(3).product()
    torch.testing.assert_close(found, published, atol=1e-8, rtol=1e-8)


def test_whitening_pays_on_its_inputs_and_costs_on_the_weight():
    plain = SVD().spectrum(WEIGHT, {}, name="w").truncate(2).product()
    whitened = SVDLLM().spectrum(WEIGHT, {"gram": GRAM}, name="w").truncate(2).product()
    assert ((WEIGHT - whitened) @ INPUTS).norm() < ((WEIGHT - plain) @ INPUTS).norm()
    assert (WEIGHT - whitened).norm() > (WEIGHT - plain).norm()


@pytest.mark.parametrize("basis", ["kfac", "whitened", "scaled", "plain"])
@pytest.mark.parametrize("deviation", ["none", "mean"])
def test_soco_starts_at_the_weight_itself(basis, deviation):
    method = SoCo(basis=basis, deviation=deviation)
    mean = INPUTS.mean(1)
    centered = GRAM - INPUTS.shape[1] * mean[:, None] * mean
    known = {"gram": GRAM, "abs_mean": INPUTS.abs().mean(1), "mean": mean,
             "centered_gram": centered, "grad_gram": 2 * torch.eye(9).double()}  # fmt: skip
    stats = {name: known[name] for name in {*method.needs, "centered_gram"}}
    up, sigma, down = method.spectrum(WEIGHT, stats, name="w")
    torch.testing.assert_close((up * sigma) @ down, WEIGHT)


def test_soco_needs_what_its_basis_reads():
    assert SoCo().needs == {"gram", "grad_gram"}
    assert SoCo(basis="whitened").needs == {"gram"}
    assert SoCo(basis="scaled").needs == {"abs_mean"}
    assert SoCo(basis="plain").needs == frozenset()
    assert SoCo(basis="plain", deviation="mean").needs == {"mean"}
    assert SoCo(deviation="mean").needs == {"gram", "grad_gram", "mean"}


def test_settings_are_soco_s_own_fields():
    settings = SoCo(steps=7, learning_rate=0.5, seed=3).settings()
    assert type(settings) is TrainingSettings
    assert (settings.steps, settings.learning_rate, settings.seed) == (7, 0.5, 3)


def test_paper_preset():
    paper = SoCo.preset("paper", steps=9)
    assert (paper.basis, paper.criterion, paper.deviation) == ("plain", "score", "vector")
    assert paper.stages == SOFT_STAGES
    assert not any(stage.hard for stage in paper.stages)
    assert paper.steps == 9
    assert not paper.written
    assert SoCo.preset("paper").settings().within_passes(256).steps == 600  # as long as it is


def test_fast_preset_spends_few_sequences():
    fast, default = SoCo.preset("fast"), SoCo()
    assert fast.sampled
    assert not default.sampled
    assert (fast.written, default.written) == (0, 0.5)  # generating takes longer than it all
    seen = [each.batch_size * (each.fisher_warmup + each.steps) for each in (fast, default)]
    assert seen == [72, 1952]  # sequences, of which effort fast has a prior to see fewer
    assert fast.fisher_prior == 2 * fast.fisher_warmup
    assert default.fisher_prior == 0


@pytest.mark.parametrize("name", METHODS)
def test_table(name):
    method = METHODS[name]()
    assert method.name == name
    assert isinstance(method, Method)
    assert isinstance(method, TrainedMethod) == (name == "soco")
    with pytest.raises(AttributeError):
        setattr(method, "name", "other")  # noqa: B010 - frozen


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"basis": "best"}, "basis must be one of kfac, whitened, scaled, plain, got 'best'"),
        ({"deviation": True}, "deviation must be one of none, mean, vector, got True"),
        ({"largest_score": 1.0}, "largest_score must be above 1, got 1.0"),
        ({"steps": -1}, "steps must be a positive whole number, got -1"),
    ],
)
def test_soco_refuses(options, text):
    with pytest.raises(ValueError, match=text):
        SoCo(**options)


def test_broken_gram_is_named():
    with pytest.raises(ValueError, match=r"Gram matrix of layer\.weight"):
        SVDLLM().spectrum(WEIGHT, {"gram": GRAM * torch.nan}, name="layer.weight")


QUICK = DobiSVD(steps=3, batch_size=4)


def tokens(sequences=8, length=12):
    return torch.randint(3, 96, (sequences, length), generator=torch.Generator().manual_seed(1))


def fit(model, method=QUICK, ratio=0.4, windows=None, **options):
    windows = tokens() if windows is None else windows
    targets = find_linears(model)
    shapes = {name: shape_of(module) for name, module in targets.items()}
    budget = parameter_budget(shapes, ratio)
    objective = objective_for(model, windows[:1])
    return *method.fit(model, targets, windows, budget, objective, **options), targets, budget


def tree(model):
    return {name: id(module) for name, module in model.named_modules()}


def test_dobi_fields_are_its_settings():
    settings = DobiSVD(steps=7, loss="perplexity", seed=3).settings()
    assert type(settings) is PositionSettings
    assert (settings.steps, settings.loss, settings.seed) == (7, "perplexity", 3)
    assert DobiSVD.name == "dobi-svd"
    assert DobiSVD().needs == frozenset()


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "gpt_neox", "bloom", "opt", "phi3", "t5", "bert", "albert"]
)
def test_dobi_fits_every_architecture(name):
    """GQA, fused projections, Conv1D, biases, encoders, shared layers."""
    model = tiny_model(name)
    before, weights = tree(model), {n: p.clone() for n, p in model.named_parameters()}
    found, history, targets, budget = fit(model)
    assert list(found) == list(targets)
    used = 0
    for layer, module in targets.items():
        pair = found[layer]
        shape = shape_of(module)
        if pair is None:
            used += layer_params(shape, min(shape))
            continue
        assert isinstance(pair, Factors)
        assert pair.product().shape == shape
        used += pair.up.numel() + pair.down.numel()
    assert used <= budget
    assert any(pair is not None for pair in found.values())
    assert len(history) == 3
    assert tree(model) == before
    for n, p in model.named_parameters():
        assert torch.equal(p, weights[n])
        assert p.grad is None


def test_dobi_in_one_batch_is_svd_llm_at_its_ranks():
    """The theorem: what is left to the training is the choice of ranks."""
    model = tiny_model("qwen2", dtype=torch.float64)  # biases, and fewer key and value heads
    windows = tokens(16)
    found, _, targets, _ = fit(model, DobiSVD(steps=2, batch_size=16), windows=windows)
    stats = collect(model, targets, windows)
    compared = 0
    for name, pair in found.items():
        if pair is None:
            continue
        weight, rank = weight_of(targets[name]).detach(), pair.up.shape[1]
        best = SVDLLM().spectrum(weight, {"gram": stats[name].gram}, name=name).truncate(rank)
        inputs = stats[name].gram  # the Gram matrix is summed in float32: only its loss is exact
        mine, least = (
            torch.trace((weight - w) @ inputs @ (weight - w).T)
            for w in (pair.product(), best.product())
        )
        assert float(mine) == pytest.approx(float(least), rel=1e-4)
        compared += 1
    assert compared > 7


def test_dobi_puts_the_model_back_after_an_error():
    model = tiny_model("llama")
    before = tree(model)

    def stop(step):
        assert tree(model) != before
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(model, on_step=stop)
    assert tree(model) == before


def test_dobi_on_bfloat16():
    model = tiny_model("llama", dtype=torch.bfloat16)
    found, history, _, _ = fit(model)
    pairs = [pair for pair in found.values() if pair is not None]
    assert pairs
    assert {pair.up.dtype for pair in pairs} == {torch.bfloat16}
    assert all(step.loss < 1e3 for step in history)


def test_dobi_checkpointed_and_in_micro_batches():
    plain, _, _, _ = fit(tiny_model("llama"), DobiSVD(steps=3, batch_size=4, micro_batch=2))
    method = DobiSVD(steps=3, batch_size=4, micro_batch=2, checkpointing=True)
    again, _, _, _ = fit(tiny_model("llama"), method)
    for first, second in zip(plain.values(), again.values(), strict=True):
        assert (first is None) == (second is None)
        if first is not None and second is not None:
            torch.testing.assert_close(first.product(), second.product(), atol=1e-5, rtol=1e-4)


def test_dobi_compares_an_encoder_by_its_hidden_states():
    model = tiny_model("bert").base_model
    assert isinstance(objective_for(model, tokens(1)), HiddenStates)
    found, _, _, _ = fit(model)
    assert any(pair is not None for pair in found.values())


class Routed(nn.Module):
    """Two experts in blocks; the router sends every token to the first."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(96, 12)
        self.blocks: Any = nn.ModuleList(
            nn.ModuleDict({"used": nn.Linear(12, 12), "idle": nn.Linear(12, 12)}) for _ in range(1)
        )
        self.head = nn.Linear(12, 96)

    def forward(self, input_ids):
        x = self.embed(input_ids).reshape(-1, 12)
        first, second = x, x[:0]
        x = torch.cat([self.blocks[0]["used"](first), self.blocks[0]["idle"](second)])
        return type("Output", (), {"logits": self.head(x).reshape(*input_ids.shape, 96)})


def test_dobi_names_layers_without_tokens_and_cuts_them_plainly():
    model = Routed().eval()
    with pytest.warns(UserWarning, match=r"1 layers saw no calibration token.*blocks\.0\.idle"):
        found, _, targets, _ = fit(model)
    pair = found["blocks.0.idle"]
    assert pair is not None
    weight = weight_of(targets["blocks.0.idle"]).detach()
    plain = SVD().spectrum(weight, {}, name="w").truncate(pair.up.shape[1]).product()
    torch.testing.assert_close(pair.product(), plain, atol=1e-5, rtol=1e-5)


def test_dobi_shrinks_a_batch_that_is_too_large():
    with pytest.warns(UserWarning, match="has 3 sequences, fewer than one batch of 4"):
        found, _, _, _ = fit(tiny_model("llama"), DobiSVD(steps=1), windows=tokens(3))
    assert any(pair is not None for pair in found.values())


def test_dobi_says_nothing_when_all_is_well():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(tiny_model("llama"))
