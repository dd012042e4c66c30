"""Trained methods on a model: the dense layers come back, ranks and scores are what was learned."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from soco import learning
from soco.learning import learn_positions, learn_ranks, learn_scores
from soco.linalg import Factors
from soco.methods import DobiSVD, SoCo, Whitened
from soco.preparation import prepare
from soco.ranks import layer_params, parameter_budget
from soco.stages import CHOICE_STAGES
from soco.surgery import find_linears
from soco.training import train_scores
from soco.workbench import Workbench
from tiny_models import logits, tiny_model

WINDOWS = torch.randint(3, 96, (8, 10), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def bench():
    model = tiny_model("llama")
    model.requires_grad_(False)
    return Workbench(model, find_linears(model), WINDOWS, batch_size=4)


def spectra(bench):
    return dict(bench.spectra(Whitened(), [(name,) for name in bench.targets]))


def kept(bench, ranks, pivoted=False):
    return sum(layer_params(bench.shapes[name], rank, pivoted) for name, rank in ranks.items())


def windows_trained_on(monkeypatch):
    """A list to which every training of scores adds its windows."""
    seen = []

    def spy(model, layers, windows, *arguments, **options):
        seen.append(windows)
        return train_scores(model, layers, windows, *arguments, **options)

    monkeypatch.setattr("soco.learning.train_scores", spy)
    return seen


@pytest.mark.parametrize("pivoted", [False, True])
def test_scores_meet_the_budget_and_the_model_is_back(bench, pivoted):
    before, places = logits(bench.model), dict(bench.model.named_modules())
    budget = parameter_budget(bench.shapes, 0.5)
    learned = learn_scores(
        bench.model, SoCo(steps=6, fisher_warmup=1), bench.targets, spectra(bench), bench, [budget],
        pivoted=pivoted, progress=False,
    )  # fmt: skip
    result, scores, history = learned.folded(), learned.ranges(), learned.history
    assert dict(bench.model.named_modules()) == places
    assert torch.equal(logits(bench.model), before)
    ranks = {
        name: found.up.shape[1] if isinstance(found, Factors) else min(found.shape)
        for name, (found, _) in result.items()
    }
    assert 0 <= budget - kept(bench, ranks, pivoted) < max(map(sum, bench.shapes.values()))
    assert len(history) == 6
    assert all(0 <= low <= high <= 2 for low, high in scores.values())


def test_pivoted_budgets_hold_more_rank(bench):
    budget = parameter_budget(bench.shapes, 0.5)
    total = {}
    for pivoted in (False, True):
        result = learn_scores(
            bench.model, SoCo(steps=3, fisher_warmup=1), bench.targets, spectra(bench), bench,
            [budget], pivoted=pivoted, progress=False,
        ).folded()  # fmt: skip
        total[pivoted] = sum(
            found.up.shape[1] for found, _ in result.values() if isinstance(found, Factors)
        )
    assert total[True] > total[False]


def test_learned_ranks(bench, monkeypatch):
    monkeypatch.setattr(
        "soco.learning.SoCo",
        lambda seed, **fields: SoCo(steps=6, fisher_warmup=1, seed=seed, **fields),
    )
    seen = windows_trained_on(monkeypatch)
    budget = parameter_budget(bench.shapes, 0.5)
    ranks = learn_ranks(bench, spectra(bench), budget, pivoted=False, progress=False)
    assert list(ranks) == list(bench.targets)
    assert kept(bench, ranks) <= budget
    assert torch.equal(seen[0], torch.cat([WINDOWS, bench.written(SoCo().written, bench.seed)]))


def test_positions(bench):
    budget = parameter_budget(bench.shapes, 0.5)
    before = logits(bench.model)
    method = DobiSVD(steps=2)
    found, history = learn_positions(
        bench.model, method, bench.targets, bench, budget, progress=False
    )
    assert found.keys() == bench.targets.keys()
    assert len(history) == 2
    assert torch.equal(logits(bench.model), before)


def test_a_short_calibration_is_told(bench):
    bench.windows = WINDOWS[:3]
    budget = parameter_budget(bench.shapes, 0.5)
    with pytest.warns(UserWarning, match="3 sequences to train on, fewer than one batch of 8"):
        learn_scores(
            bench.model, SoCo(steps=3, fisher_warmup=1), bench.targets, spectra(bench), bench,
            [budget], pivoted=False, progress=False,
        )  # fmt: skip


def test_few_sequences_are_not_gone_over_for_ever(bench):
    budget = parameter_budget(bench.shapes, 0.5)
    method = SoCo(steps=20, batch_size=4, fisher_warmup=1, passes=3)
    with pytest.warns(UserWarning, match="8 sequences to train on: 6 steps are made instead of"):
        learned = learn_scores(
            bench.model, method, bench.targets, spectra(bench), bench, [budget], pivoted=False,
            progress=False,
        )  # fmt: skip
    assert len(learned.history) == 6
    budgets = [budget, budget // 2]
    method = SoCo(steps=4, later_steps=9, batch_size=4, fisher_warmup=1, passes=3)
    with pytest.warns(UserWarning, match="8 sequences to train on: 10 steps are made in"):
        learned = learn_scores(
            bench.model, method, bench.targets, spectra(bench), bench, budgets, pivoted=False,
            progress=False,
        )  # fmt: skip
    assert len(learned.history) == 10


def test_what_is_held_out_is_not_trained_on(bench):
    """Other windows at the end, the same scores."""
    budget = parameter_budget(bench.shapes, 0.5)
    found = []
    components = spectra(bench)
    for tail in (WINDOWS[-2:], WINDOWS[-2:].flip(0, 1)):
        bench.windows = torch.cat([WINDOWS[:-2], tail])
        method = SoCo(steps=4, batch_size=3, fisher_warmup=1)
        learned = learn_scores(
            bench.model, method, bench.targets, dict(components), bench, [budget],
            pivoted=False, progress=False, held_out=2,
        )  # fmt: skip
        found.append(torch.cat([layer.logit.detach() for layer in learned.layers.values()]))
    assert torch.equal(*found)
    assert float(found[0].abs().max()) > 0


@pytest.mark.parametrize("basis", ["kfac", "whitened"])
def test_the_decomposition_says_what_fisher_information_to_expect(bench, basis, monkeypatch):
    """Where squared singular values are in units of the loss, and the layer saw a token."""
    method = SoCo(steps=1, fisher_warmup=1, basis=basis)
    components = dict(bench.spectra(method.components, [(name,) for name in bench.targets]))
    sigmas = {name: each.sigma for name, each in components.items()}
    idle = next(iter(bench.targets))
    told = {}

    def spy(*arguments, expected, **options):
        told.update(expected)
        return train_scores(*arguments, expected=expected, **options)

    monkeypatch.setattr(learning, "train_scores", spy)
    monkeypatch.setattr(bench, "saw_nothing", lambda group: group == (idle,))
    budget = parameter_budget(bench.shapes, 0.5)
    learn_scores(
        bench.model, method, bench.targets, components, bench, [budget], pivoted=False,
        progress=False,
    )  # fmt: skip
    assert told.keys() == (bench.targets.keys() - {idle} if basis == "kfac" else set())
    for name, expected in told.items():
        torch.testing.assert_close(expected, sigmas[name].float() ** 2)


def test_expected_and_measured_fisher_information_are_of_one_size(shared_data):
    """On a trained model: sums over the leading components of a layer agree within a factor."""
    folder = shared_data / "models" / "stories260K"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    text = shared_data / "text" / "tinystories_train_sample.clean.txt"
    bench = prepare(model, tokenizer=tokenizer, calibration=text, samples=32, length=128)
    method = SoCo(steps=1, fisher_warmup=4, stages=CHOICE_STAGES)
    components = dict(bench.spectra(method.components, [(name,) for name in bench.targets]))
    expected = {name: each.sigma.float().square() for name, each in components.items()}
    measured = {}
    for prior in (0.0, 1e9):  # nothing but what was seen, nothing but what is expected
        learned = learn_scores(
            bench.model, replace(method, fisher_prior=prior), bench.targets, dict(components),
            bench, [parameter_budget(bench.shapes, 0.01)], pivoted=False, progress=False,
        )  # fmt: skip
        measured[prior] = {n: 2 * each.values for n, each in learned.snapshots[0].items()}
    for name, each in expected.items():
        torch.testing.assert_close(measured[1e9][name], each, rtol=1e-4, atol=1e-12)
    ratios = torch.stack([measured[0.0][n].sum() / each.sum() for n, each in expected.items()])
    # The least are some keys, whose gradients add up to little over a sequence: 0.07 on another.
    assert 0.03 < float(ratios.min()) < float(ratios.max()) < 3
    assert 0.6 < float(ratios.log().mean().exp()) < 1.6


def test_the_bar_counts_the_steps_of_all_budgets(bench, monkeypatch):
    totals = []

    @contextmanager
    def bar(total, progress):
        totals.append(total)
        yield lambda step: None

    monkeypatch.setattr(learning, "steps_bar", bar)
    budgets = [parameter_budget(bench.shapes, ratio) for ratio in (0.3, 0.5, 0.6)]
    learned = learn_scores(
        bench.model, SoCo(steps=10, fisher_warmup=1), bench.targets, spectra(bench), bench, budgets,
        pivoted=False, progress=False,
    )  # fmt: skip
    assert totals == [10 + 5 + 5] == [len(learned.history)]


def test_written_text_is_trained_on_beside_the_calibration(bench, monkeypatch):
    """All of it, but for what is held out of the calibration; passes count both."""
    seen = windows_trained_on(monkeypatch)
    written = torch.randint(3, 96, (5, WINDOWS.shape[1]))
    with pytest.warns(UserWarning, match="11 sequences to train on: 3 steps are made instead of 9"):
        learn_scores(
            bench.model, SoCo(steps=9, batch_size=4, fisher_warmup=1, passes=1), bench.targets,
            spectra(bench), bench, [parameter_budget(bench.shapes, 0.5)], pivoted=False,
            progress=False, written=written, held_out=2,
        )  # fmt: skip
    assert torch.equal(seen[0], torch.cat([WINDOWS[:-2], written]))
