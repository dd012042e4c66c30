"""The training loop: what a stage may do, what it leaves behind, and that learning pays."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from soco import masters, training
from soco.choosing import choose_components, kept_params, soft_ratio
from soco.linalg import whitened_svd
from soco.masters import probed_rate
from soco.objectives import TokenDistribution, draw_seeds
from soco.ranks import is_dense
from soco.spectral import Snapshot, SpectralLinear
from soco.stages import SOFT_STAGES, STAGES, Stage, TrainingSettings
from soco.steps import Teacher, all_dense, checkpointed
from soco.training import train_scores
from tiny_models import drawn

VOCABULARY, HIDDEN = 17, 12


class Output:
    """What a transformers model returns, as far as the objective reads it."""

    def __init__(self, logits):
        self.logits = logits


class Toy(nn.Module):
    """Embedding, two blocks of a wide and a narrow linear, head; differs from token to token."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.blocks: Any = nn.ModuleList(
            nn.Sequential(nn.Linear(HIDDEN, 24), nn.Tanh(), nn.Linear(24, HIDDEN, bias=False))
            for _ in range(2)
        )
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        with torch.no_grad():  # a spectrum that falls, as trained weights have
            for block in self.blocks:
                for linear in (block[0], block[2]):
                    U, S, Vh = torch.linalg.svd(linear.weight, full_matrices=False)
                    linear.weight.copy_(U * (3 * 0.7 ** torch.arange(len(S))) @ Vh)
            self.head.weight.mul_(4)
        self.requires_grad_(False)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = x + block(x)
        return Output(self.head(x))


def toy(made=None, **options):
    """A toy with its four linears trainable, as ``(model, layers, windows)``."""
    model = made or Toy()
    layers = {}
    for index, block in enumerate(model.blocks):
        for place in (0, 2):
            linear = block[place]
            spectrum = whitened_svd(linear.weight, None)
            layer = SpectralLinear(linear.weight, linear.bias, spectrum, **options)
            layers[f"blocks.{index}.{place}"] = block[place] = layer
    windows = torch.randint(VOCABULARY, (32, 9), generator=torch.Generator().manual_seed(1))
    return model, layers, windows


def total(layers):
    return sum(layer.weight.numel() for layer in layers.values())


def divergence(model, layers, windows):
    objective = TokenDistribution()
    with torch.no_grad():
        student = objective.outputs(model, windows)
        for layer in layers.values():
            layer.dense = True
        dense = objective.outputs(model, windows)
        for layer in layers.values():
            layer.dense = False
    return float(objective.divergence(dense, student))


def train(model, layers, windows, kept=0.5, on_step=lambda step: None, **settings):
    settings = TrainingSettings(**{"steps": 40, "batch_size": 4, **settings})
    budget = int(kept * total(layers))
    history, _ = train_scores(
        model, layers, windows, [budget], TokenDistribution(), settings, on_step
    )
    return budget, history


@pytest.mark.parametrize("kept", [0.3, 0.5, 0.8])
def test_budget_is_met_to_within_one_rank(kept):
    model, layers, windows = toy()
    budget, history = train(model, layers, windows, kept)
    used = kept_params(layers)
    growing = [
        layer.in_features + layer.out_features
        for layer in layers.values()
        if not bool(layer.mask.all())
    ]
    assert used <= budget < used + max(growing)
    assert len(history) == 40
    for layer in layers.values():  # dense whenever factors would not be smaller
        shape = (layer.out_features, layer.in_features)
        assert bool(layer.mask.all()) == is_dense(shape, int(layer.mask.sum()))


def test_learning_beats_the_same_choice_without_it():
    model, layers, windows = toy()
    energy = {name: (layer.gain**2) for name, layer in layers.items()}
    choose_components(layers, energy, int(0.4 * total(layers)))
    plain = divergence(model, layers, windows)
    train(model, layers, windows, 0.4, steps=120)
    learned = divergence(model, layers, windows)
    assert learned < 0.6 * plain


def test_survivors_are_amplified():
    model, layers, windows = toy()
    train(model, layers, windows, 0.4, steps=120)
    alive = torch.cat([layer.scores().detach()[layer.mask] for layer in layers.values()])
    assert float(alive.max()) > 1.05
    assert float(alive.max()) < 2.0


def test_only_scores_are_trained():
    model, layers, windows = toy()
    before = {name: p.clone() for name, p in model.named_parameters()}
    train(model, layers, windows)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {f"{name}.logit" for name in layers}


def test_same_seed_same_result_other_seed_other_result():
    results = []
    for seed in (3, 3, 4):
        model, layers, windows = toy()
        train(model, layers, windows, seed=seed)
        results.append(torch.cat([layer.logit.detach() for layer in layers.values()]))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("micro", [1, 3])
def test_micro_batches_add_up(micro):
    """Same steps, up to rounding; the drawn labels differ in nothing but their order."""
    results = []
    for size in (None, micro):
        model, layers, windows = toy()
        _, history = train(model, layers, windows, micro_batch=size, criterion="score", steps=20)
        results.append([step.loss for step in history])
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def test_checkpointing_changes_nothing():
    results = []
    for blocks in (False, True):
        model, layers, windows = toy()
        with checkpointed(list(model.blocks) if blocks else []):
            train(model, layers, windows, steps=20)
        results.append(torch.cat([layer.logit.detach() for layer in layers.values()]))
    torch.testing.assert_close(results[0], results[1])


def test_checkpointed_leaves_the_blocks_as_they_were():
    model, _, _ = toy()
    own = model.blocks[1].forward = model.blocks[1].forward  # somebody's hook on the instance
    with checkpointed(list(model.blocks)):
        assert "forward" in model.blocks[0].__dict__
    assert "forward" not in model.blocks[0].__dict__
    assert model.blocks[1].__dict__["forward"] is own


def test_fisher_is_the_mean_squared_score_gradient():
    """Against autograd, one sequence at a time, with the labels that were drawn."""
    from soco.training import _pass, _Run

    model, layers, windows = toy()
    layers["blocks.0.0"].mask[3:] = False
    batch = windows[:5]
    settings = TrainingSettings(batch_size=5)
    generator = torch.Generator().manual_seed(7)
    teacher = Teacher(model, lambda: all_dense(layers.values()), TokenDistribution(), windows)
    run = _Run(model, layers, TokenDistribution(), settings, generator, teacher)
    for name, layer in layers.items():
        run.alive[name] = run.watched[name] = len(layer.mask)
    _pass(run, torch.arange(5), None, record=True)
    objective = TokenDistribution()
    generator.manual_seed(7)
    for layer in layers.values():
        layer.dense = True
    dense = objective.outputs(model, batch)
    for layer in layers.values():
        layer.dense = False
    chances = dense.exp().flatten(0, -2).cumsum(-1)
    seeds = draw_seeds(5, generator)
    point = drawn(torch.rand, seeds, batch.shape[1], 1).flatten(0, 1)
    labels = torch.searchsorted(chances, point * chances[:, -1:], right=True).view(5, -1)
    expected = {name: torch.zeros_like(layer.gain) for name, layer in layers.items()}
    for ids, label in zip(batch, labels, strict=True):
        scores = {
            name: (layer.scores() * layer.mask).detach().requires_grad_()
            for name, layer in layers.items()
        }
        x = model.embed(ids)
        for index, block in enumerate(model.blocks):
            h = x
            for place, part in enumerate(block):
                name = f"blocks.{index}.{place}"
                if name in layers:
                    layer = layers[name]
                    z = h @ layer.down.T * layer.gain * scores[name]
                    h = F.linear(z, layer.up, layer.bias)
                else:
                    h = part(h)
            x = x + h
        surprise = F.cross_entropy(model.head(x), label, reduction="sum")
        grads = torch.autograd.grad(surprise, list(scores.values()))
        for name, grad in zip(scores, grads, strict=True):
            expected[name] += grad.square() / batch.numel()
    found = run.fisher()
    for name in layers:
        torch.testing.assert_close(found[name], expected[name], rtol=2e-4, atol=1e-9)
    assert float(found["blocks.0.0"][3:].max()) > 0  # masked components are seen, too
    # What is expected counts like so many batches beside the one that was seen.
    run.settings = TrainingSettings(batch_size=5, fisher_prior=3.0)
    run.expected = {"blocks.0.0": torch.arange(1.0, 13)}
    mixed = run.fisher()
    torch.testing.assert_close(
        mixed["blocks.0.0"], (found["blocks.0.0"] + 3 * torch.arange(1.0, 13)) / 4
    )
    torch.testing.assert_close(mixed["blocks.1.2"], found["blocks.1.2"])


def test_soft_stages_press_the_ratio_down_and_polarize():
    model, layers, windows = toy()
    before = float(soft_ratio(layers, 0.5, 0.1).detach())
    budget, history = train(
        model,
        layers,
        windows,
        stages=SOFT_STAGES,
        criterion="score",
        steps=200,
        learning_rate=0.05,
    )
    assert float(soft_ratio(layers, 0.5, 0.1).detach()) < 0.7 * before
    assert kept_params(layers) <= budget
    assert {step.stage for step in history} == {"coarse", "refine", "sparsify"}


def test_deviation_is_trained_where_the_layer_is_not_dense():
    model, layers, windows = toy(deviation=True)
    train(model, layers, windows, 0.5)
    for layer in layers.values():
        if not bool(layer.mask.all()):
            assert float(layer.deviation.detach().abs().max()) > 0


def test_patience_ends_a_stage():
    model, layers, windows = toy()
    stage = Stage("only", 1.0, period=1000, patience=3)
    _, history = train(model, layers, windows, stages=(stage,), learning_rate=1e-9, steps=200)
    assert 3 < len(history) < 200


def test_callback_sees_every_step():
    model, layers, windows = toy()
    seen = []
    _, history = train(model, layers, windows, on_step=seen.append)
    assert seen == history
    assert [step.step for step in seen] == list(range(1, 41))
    assert [stage for stage in dict.fromkeys(step.stage for step in seen)] == [
        stage.name for stage in STAGES
    ]


def test_broken_outputs_are_an_error():
    model, layers, windows = toy()
    model.head.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="the loss became nan in stage coarse"):
        train(model, layers, windows, criterion="score")


def test_too_few_windows():
    model, layers, windows = toy()
    with pytest.raises(ValueError, match="a batch takes 4 sequences, the calibration has 3"):
        train(model, layers, windows[:3])


def test_each_budget_is_met_and_kept_as_a_snapshot():
    model, layers, windows = toy()
    budgets = [int(kept * total(layers)) for kept in (0.8, 0.5, 0.3)]
    settings = TrainingSettings(steps=20, later_steps=10, batch_size=4)
    history, snapshots = train_scores(
        model, layers, windows, budgets, TokenDistribution(), settings
    )
    assert len(history) == 40
    assert {step.steps for step in history} == {40}
    kept = [step.kept * total(layers) for step in history]
    losses = []
    for last, budget, found in zip((20, 30, 40), budgets, snapshots, strict=True):
        assert kept[last - 1] <= budget < kept[last - 1] + 36
        for name, layer in layers.items():
            layer.mask.copy_(found[name].mask)
            assert found[name].scores.shape == found[name].values.shape == layer.mask.shape
            assert bool((found[name].scores > 0).all())
        assert kept_params(layers) <= budget
        losses.append(divergence(model, layers, windows))
    assert losses == sorted(losses)
    assert kept == sorted(kept, reverse=True) or any(s.stage == "refine" for s in history)
    last = snapshots[-1]
    for name, layer in layers.items():
        assert isinstance(last[name], Snapshot)
        assert torch.equal(last[name].scores, layer.scores().detach())


@pytest.mark.parametrize("budgets", [[], [100, 100], [100, 200]])
def test_budgets_descend(budgets):
    model, layers, windows = toy()
    settings = TrainingSettings(batch_size=4)
    with pytest.raises(ValueError, match="budgets must be one or more and descend, got"):
        train_scores(model, layers, windows, budgets, TokenDistribution(), settings)


@pytest.mark.parametrize("spare", [0.0, 0.5, 50.0])
def test_only_what_lives_or_may_come_back_is_computed(spare):
    """Rows of ``down`` that run, at every step: the living ones, and those watched now and then."""
    model, layers, windows = toy()
    sizes = []
    layer = layers["blocks.1.2"]
    layer.register_forward_pre_hook(
        lambda *_: None if layer.dense else sizes.append((layer.computed, int(layer.mask.sum())))
    )
    train(model, layers, windows, 0.3, spare=spare, fisher_warmup=1, learning_rate=0.02)
    assert sizes[0] == (12, 12)
    for computed, alive in sizes[1:]:
        assert computed in {alive, min(12, alive + math.ceil(spare * alive))}
    if spare:
        assert any(computed > alive for computed, alive in sizes)
    assert sizes[-1][0] == sizes[-1][1] < 12


def test_a_stage_ends_when_its_choice_is_settled():
    model, layers, windows = toy()
    stage = Stage("only", 1.0, period=5, settled=0.0)
    _, history = train(model, layers, windows, stages=(stage,), learning_rate=1e-9, steps=200)
    assert 5 <= len(history) < 200
    assert len(history) % 5 == 0


def test_a_stage_that_begins_settled_runs_to_its_next_choice():
    model, layers, windows = toy()
    stage = Stage("only", 1.0, period=5, settled=1.0)
    _, history = train(model, layers, windows, stages=(stage,), steps=200)
    assert len(history) == 5


def test_a_later_budget_begins_from_the_one_before_it():
    """Not from everything: what was pruned for a size is not brought back for a smaller one."""
    model, layers, windows = toy()
    stage = Stage("coarse", 1.0, excess_begin=1.0, period=1)
    settings = TrainingSettings(steps=8, later_steps=8, batch_size=4, stages=(stage,))
    budgets = [int(kept * total(layers)) for kept in (0.8, 0.4)]
    history, _ = train_scores(model, layers, windows, budgets, TokenDistribution(), settings)
    kept = [step.kept for step in history]
    assert max(kept[8:]) <= 0.8 < max(kept[:8])
    assert 0.5 < kept[10] < 0.75  # and not at once


@torch.no_grad()
def untrained(layers):
    """Let every component live, with a score of 1.3."""
    for layer in layers.values():
        layer.logit.fill_(math.log(1.3 / 0.7))
        layer.mask.fill_(True)
        layer.arrange(layer.order.clone(), len(layer.mask))


def first_loss(model, layers, windows, **settings):
    """The loss of the first step of layers that are as ``untrained`` leaves them."""
    untrained(layers)
    found = train(model, layers, windows, steps=1, fisher_warmup=1, batch_size=32, **settings)
    return found[1][0].loss


def test_distributions_are_softened_by_the_temperature():
    loose = Stage("only", 1.0, hard=False)
    model, layers, windows = toy()
    found = first_loss(model, layers, windows, stages=(loose,), softening=3.0)
    with torch.no_grad():
        untrained(layers)
        student = (model(windows).logits / 3).log_softmax(-1)
        dense = (Toy()(windows).logits / 3).log_softmax(-1)
    wanted = float((dense.exp() * (dense - student)).sum(-1).mean())
    assert found == pytest.approx(wanted, rel=1e-4)
    assert found != pytest.approx(first_loss(*toy(), stages=(loose,)), rel=0.1)


class Headed(Toy):
    """A toy that shows its head, and remembers what it got."""

    def get_output_embeddings(self):
        return self.head


def test_hidden_states_are_a_loss_of_their_own():
    model, layers, windows = toy(made=Headed())
    stage = Stage("only", 1.0, hard=False, divergence=0.0, states=2.0)
    found = first_loss(model, layers, windows, stages=(stage,))
    seen = []
    model.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        untrained(layers)
        model(windows)
        other = Toy()
        other.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        other(windows)
    student, dense = seen
    wanted = 2 * float((dense - student).square().mean() / dense.var())
    assert found == pytest.approx(wanted, rel=1e-4)


def test_hidden_states_that_are_not_at_hand_are_an_error():
    model, layers, windows = toy(made=Headed())
    model.forward = lambda input_ids: Output(2 * Toy.forward(model, input_ids).logits)
    stage = Stage("only", 1.0, states=1.0)
    with pytest.raises(
        ValueError, match="the last hidden states of the dense model are not at hand"
    ):
        train(model, layers, windows, stages=(stage,))


@pytest.mark.parametrize(("offered", "first"), [(None, 12), (1.0, 8), (0.5, 4), (9.0, 12)])
def test_a_layer_may_begin_with_fewer_components(offered, first):
    model, layers, windows = toy()  # 24 x 12: break-even at rank 8
    sizes = []
    layer = layers["blocks.0.0"]
    layer.register_forward_pre_hook(
        lambda *_: None if layer.dense else sizes.append((layer.computed, int(layer.mask.sum())))
    )
    train(model, layers, windows, 0.4, offered=offered, steps=8)
    assert sizes[0] == (first, first)


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_channel_scales_have_a_rate_of_their_own(rate):
    model, layers, windows = toy(channels=True)
    train(model, layers, windows, channel_rate=rate)
    for layer in layers.values():
        for part in (layer.left, layer.right):
            assert bool(part.detach().abs().max() > 1e-4) == bool(rate)


# ---- the rate that is measured -------------------------------------------------------------------


def rates(monkeypatch, kept, **settings):
    """Every rate that is measured in a training, and its history."""
    seen = []

    def probe(*arguments):
        seen.append(probed_rate(*arguments))
        return seen[-1]

    monkeypatch.setattr(training, "probed_rate", probe)
    model, layers, windows = toy(channels=True)
    budgets = [int(each * total(layers)) for each in kept]
    settings = TrainingSettings(**{"steps": 12, "batch_size": 4, **settings})
    history, _ = train_scores(model, layers, windows, budgets, TokenDistribution(), settings)
    return seen, [step.loss for step in history]


def test_the_rate_is_measured_at_every_budget(monkeypatch):
    """Less is cut at first: the model is nearer to the dense one, and its steps are smaller."""
    monkeypatch.setattr(masters, "LARGEST_RATE", 1.0)
    (near, far), _ = rates(monkeypatch, [0.97, 0.5])
    assert 0 < near < 0.5 * far < 0.5


@pytest.mark.parametrize("micro", [None, 3])
def test_measuring_the_rate_leaves_nothing_behind(micro, monkeypatch):
    """The same training as with that rate given: masks, scores and random numbers are untouched."""
    (rate,), measured = rates(monkeypatch, [0.9], micro_batch=micro)
    none, given = rates(monkeypatch, [0.9], learning_rate=rate, micro_batch=micro)
    assert not none
    assert measured == given


def test_the_rate_is_that_of_a_step_with_random_signs(monkeypatch):
    """At the budget's own choice of components, a step costs 4 % of what the choice has cost."""
    model, layers, windows = toy()
    budget = int(0.9 * total(layers))
    found = []

    def probe(parameters, sizes, loss, start, seed, cost):
        rate = probed_rate(parameters, sizes, loss, start, seed, cost)
        risen = 0.0
        for sign in (1, -1):
            generator = torch.Generator().manual_seed(seed)
            for parameter, size in zip(parameters, sizes, strict=True):
                way = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
                parameter.data.add_(sign * rate * size * way)
            risen += (loss() - start) / 2
            generator.manual_seed(seed)
            for parameter, size in zip(parameters, sizes, strict=True):
                way = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
                parameter.data.sub_(sign * rate * size * way)
        found.append((kept_params(layers), rate, risen / start))
        return rate

    monkeypatch.setattr(training, "probed_rate", probe)
    monkeypatch.setattr(masters, "LARGEST_RATE", 1.0)
    settings = TrainingSettings(steps=1, batch_size=4)
    train_scores(model, layers, windows, [budget], TokenDistribution(), settings)
    ((kept, rate, cost),) = found
    assert 0.8 * budget < kept <= budget
    assert rate < 1
    assert cost == pytest.approx(0.04, rel=0.2)
