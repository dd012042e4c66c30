"""soco.objectives: distances by hand, and the theorem that joins a distance and its surprise."""

import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from soco import objectives
from soco.objectives import (
    HiddenStates,
    TokenDistribution,
    by_sequence,
    draw_seeds,
    last_hidden_state,
    objective_for,
    run_model,
)
from tiny_models import CONFIGS, tiny_model

IDS = torch.randint(3, 96, (2, 8), generator=torch.Generator().manual_seed(1))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeds(sequences, seed=0):
    return torch.arange(sequences) + 10**6 * seed


def from_config(cls, name, **changes):
    """A tiny model of another class: a head on the blocks, or none."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **(CONFIGS[name] | changes))
    return getattr(transformers, cls)(config).eval()


# ---- running any model ---------------------------------------------------------------------------


class Taking(nn.Module):
    """Remembers what it was called with."""

    def forward(self, input_ids, use_cache=None, decoder_input_ids=None):
        self.got = input_ids, use_cache, decoder_input_ids


class TakingLess(nn.Module):
    def forward(self, input_ids):
        self.got = input_ids


def test_a_model_is_given_what_it_takes():
    model = Taking()
    run_model(model, IDS)
    assert model.got[0] is IDS
    assert model.got[1] is False
    assert model.got[2] is IDS
    less = TakingLess()
    run_model(less, IDS)
    assert less.got is IDS


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba", "t5", "bert"])
def test_real_models_run_without_a_cache(name):
    outputs = run_model(tiny_model(name), IDS)
    assert outputs.logits.shape == (2, 8, 96)
    assert outputs.get("past_key_values") is None
    assert outputs.get("cache_params") is None


# ---- token distributions -------------------------------------------------------------------------


def test_divergence_by_hand():
    dense = torch.tensor([[[0.25, 0.75], [0.5, 0.5]]]).log()
    student = torch.tensor([[[0.5, 0.5], [0.5, 0.5]]]).log()
    objective = TokenDistribution()
    wanted = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert objective.divergence(dense, student).item() == pytest.approx(wanted / 2)
    back = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert objective.divergence(student, dense).item() == pytest.approx(back / 2)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(
    "shape", [torch.Size((3, 5, 7)), torch.Size((2, 1, 7)), torch.Size((4, 7))], ids=str
)
def test_divergence_and_its_gradient_are_those_of_plain_torch(shape, temperature, monkeypatch):
    monkeypatch.setitem(objectives._CHUNK, False, 21)  # three rows at a time
    dense = normal(*shape, seed=1).double().log_softmax(-1)
    logits = normal(*shape, seed=2).double().requires_grad_()

    def found(logits):
        objective = TokenDistribution(temperature)
        return objective.divergence(dense, logits.log_softmax(-1))

    soft = (dense / temperature).log_softmax(-1)
    wanted = F.kl_div(
        (logits / temperature).log_softmax(-1), soft, log_target=True, reduction="sum"
    )
    torch.testing.assert_close(found(logits), wanted / shape[:-1].numel())
    assert torch.autograd.gradcheck(found, logits)
    assert not found(logits.detach()).requires_grad


def test_divergence_of_what_is_not_contiguous():
    dense = normal(4, 3, 7, seed=1).log_softmax(-1)
    logits = normal(4, 3, 7, seed=2).requires_grad_()
    turned = logits.log_softmax(-1).transpose(0, 1)
    assert not turned.is_contiguous()
    found = TokenDistribution().divergence(dense.transpose(0, 1), turned)
    wanted = TokenDistribution().divergence(dense, logits.log_softmax(-1))
    torch.testing.assert_close(found, wanted)
    one, other = (torch.autograd.grad(each, logits)[0] for each in (found, wanted))
    torch.testing.assert_close(one, other)


def test_divergence_can_be_differentiated_twice_over():
    """One graph, two backward passes: what the first one leaves is not spoiled."""
    dense = normal(3, 7, seed=1).log_softmax(-1)
    logits = normal(3, 7, seed=2).requires_grad_()
    loss = 3 * TokenDistribution().divergence(dense, logits.log_softmax(-1))
    first, second = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_divergence_is_zero_where_equal_and_nowhere_else():
    objective = TokenDistribution()
    dense = normal(2, 5, 30).log_softmax(-1)
    assert objective.divergence(dense, dense).item() == 0
    for seed in range(1, 5):
        other = normal(2, 5, 30, seed=seed).log_softmax(-1)
        value = objective.divergence(dense, other).item()
        reference = nn.functional.kl_div(other, dense, log_target=True, reduction="sum") / 10
        assert value == pytest.approx(reference.item(), rel=1e-5)
        assert value > 0.1
    shift = torch.zeros(2, 5, 30, requires_grad=True)
    objective.divergence(dense, (dense + shift).log_softmax(-1)).backward()
    assert shift.grad is not None
    assert shift.grad.abs().max() < 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_are_log_probabilities(dtype):
    model = tiny_model("llama", dtype)
    outputs = TokenDistribution().outputs(model, IDS)
    assert outputs.dtype == torch.float32
    torch.testing.assert_close(outputs.exp().sum(-1), torch.ones(2, 8))
    logits = model(IDS).logits.float()
    torch.testing.assert_close(outputs, logits - logits.logsumexp(-1, keepdim=True))


def test_cross_entropy_is_the_models_own():
    model = tiny_model("llama")
    objective = TokenDistribution()
    got = objective.cross_entropy(objective.outputs(model, IDS), IDS)
    torch.testing.assert_close(got, model(IDS, labels=IDS).loss)


def test_labels_are_drawn_from_the_dense_model():
    objective = TokenDistribution()
    chances = torch.tensor([0.5, 0.3, 0.2, 0.0])
    dense = chances.log().expand(100, 200, 4)
    counts = [
        -objective.surprise(dense, mark.expand(100, 200, 4), seeds(100)).item()
        for mark in torch.eye(4)
    ]
    assert sum(counts) == 20_000
    assert counts == pytest.approx([10_000, 6_000, 4_000, 0], abs=300)  # 4 standard deviations
    other = objective.surprise(dense, torch.eye(4)[0].expand(100, 200, 4), seeds(100, 1)).item()
    assert -other != counts[0]


def test_surprise_is_a_sum_over_tokens():
    certain = torch.full((2, 3, 4), -100.0).index_fill(-1, torch.tensor([2]), 0.0)
    student = normal(2, 3, 4).log_softmax(-1)
    got = TokenDistribution().surprise(certain, student, seeds(2))
    torch.testing.assert_close(got, -student[..., 2].sum())


def test_random_state_is_left_alone():
    before = torch.random.get_rng_state()
    dense = normal(2, 3, 4).log_softmax(-1)
    for objective in (TokenDistribution(), HiddenStates()):
        objective.surprise(dense, dense, seeds(2))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("objective", [TokenDistribution(), HiddenStates()])
def test_what_is_drawn_for_a_sequence_does_not_depend_on_its_batch(objective):
    """Labels show in the gradient, up to the scale that the variance of a batch gives."""
    dense = normal(4, 6, 9).log_softmax(-1)
    of_all = draw_seeds(4, torch.Generator().manual_seed(3))
    assert len(set(of_all.tolist())) == 4

    def pulled(rows):
        student = dense[rows].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(
            objective.surprise(dense[rows], student, of_all[rows]), student
        )
        return gradient / gradient.norm(dim=(1, 2), keepdim=True)

    whole = pulled(torch.arange(4))
    for rows in ([0], [2, 1], [3, 0, 2]):
        torch.testing.assert_close(pulled(torch.tensor(rows)), whole[rows])


def test_the_same_labels_on_every_device(device):
    dense = normal(2, 50, 7).log_softmax(-1)
    for objective in (TokenDistribution(), HiddenStates()):
        wanted = objective.surprise(dense, dense.flip(0), seeds(2))
        got = objective.surprise(dense.to(device), dense.flip(0).to(device), seeds(2))
        torch.testing.assert_close(got.cpu(), wanted)


def tiny_softmax(theta, table):
    """Log probabilities (tokens, 1, classes); each token has weights of its own."""
    return (theta @ table)[:, None].log_softmax(-1)


def tiny_states(theta, table):
    return torch.tanh(theta @ table)[:, None] + torch.arange(4.0)


@pytest.mark.parametrize(
    ("objective", "outputs"), [(TokenDistribution(), tiny_softmax), (HiddenStates(), tiny_states)]
)
def test_squared_gradient_of_the_surprise_is_the_curvature_of_the_divergence(objective, outputs):
    """E[g g^T] over drawn labels = the Hessian, where student and dense model agree.

    40,000 labels; an entry of the estimate is off by less than 4 standard errors, and those are
    below 2 % of the largest entry.
    """
    tokens, parameters = 40_000, 3
    table, theta = normal(parameters, 4), normal(parameters, seed=1) / 2
    rows = theta.repeat(tokens, 1).requires_grad_()
    dense = outputs(theta.repeat(tokens, 1), table)
    surprise = objective.surprise(dense, outputs(rows, table), seeds(tokens))
    (gradients,) = torch.autograd.grad(surprise, rows)
    products = gradients[:, :, None] * gradients[:, None]  # (tokens, parameters, parameters)
    error = products.std(0) / math.sqrt(tokens)

    def divergence(theta):
        few = theta.repeat(100, 1)
        return objective.divergence(dense[:100], outputs(few, table))

    hessian = torch.autograd.functional.hessian(divergence, theta)
    assert isinstance(hessian, torch.Tensor)
    if isinstance(objective, HiddenStates):  # the variance of 100 equal tokens, and of 40,000
        hessian = hessian * dense[:100].var() / dense.var()
    assert error.max() < 0.02 * hessian.abs().max()
    assert ((products.mean(0) - hessian).abs() < 4 * error).all()
    mean_error = gradients.std(0) / math.sqrt(tokens)
    assert (gradients.mean(0).abs() < 4 * mean_error).all()


# ---- hidden states -------------------------------------------------------------------------------


def test_distance_of_hidden_states_by_hand():
    objective = HiddenStates()
    dense = torch.tensor([[[1.0, 3.0], [5.0, 7.0]]])  # variance 20/3
    student = dense + torch.tensor([0.0, 2.0])
    assert objective.divergence(dense, student).item() == pytest.approx(2 / (20 / 3))
    assert objective.divergence(dense, dense).item() == 0
    torch.testing.assert_close(
        objective.divergence(1000 * dense, 1000 * student), objective.divergence(dense, student)
    )
    assert objective.divergence(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2)).item() == 0


def test_hidden_states_have_no_cross_entropy():
    with pytest.raises(ValueError, match="no cross-entropy: set its weight 0"):
        HiddenStates().cross_entropy(normal(2, 8, 4), IDS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hidden_states_are_those_before_the_head(dtype):
    model = tiny_model("llama", dtype)
    states = HiddenStates().outputs(model, IDS)
    assert states.dtype == torch.float32
    assert states.shape == (2, 8, 32)
    assert torch.equal(model.lm_head(states.to(dtype)), model(IDS).logits)
    bare = model.model
    assert torch.equal(last_hidden_state(bare, IDS), last_hidden_state(model, IDS))


# ---- which one -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mamba", "t5", "bert", "roberta"])
def test_models_that_predict_tokens(name):
    assert objective_for(tiny_model(name), IDS) == TokenDistribution()


@pytest.mark.parametrize(
    ("cls", "name", "changes"),
    [
        ("LlamaModel", "llama", {}),
        ("BertModel", "bert", {}),
        ("T5Model", "t5", {}),
        ("T5EncoderModel", "t5", {}),
        ("BertForSequenceClassification", "bert", {"num_labels": 3}),
        ("BertForTokenClassification", "bert", {"num_labels": 5}),
        ("BertForQuestionAnswering", "bert", {}),
        ("LlamaForSequenceClassification", "llama", {"num_labels": 3}),
        ("LlamaForTokenClassification", "llama", {"num_labels": 5}),
        ("GPT2ForSequenceClassification", "gpt2", {"num_labels": 8, "pad_token_id": 0}),
    ],
)
def test_models_that_do_not(cls, name, changes):
    model = from_config(cls, name, **changes)
    objective = objective_for(model, IDS)
    assert objective == HiddenStates()
    states = objective.outputs(model, IDS)
    assert states.shape == (2, 8, 32)
    assert objective.divergence(states, states).item() == 0
    if model.__class__.__name__.startswith("Bert"):
        pooler = getattr(model.base_model, "pooler", None)  # what the head adds changes nothing
        nn.init.zeros_(pooler.dense.weight) if pooler is not None else None
        assert torch.equal(objective.outputs(model, IDS), states)


@pytest.mark.parametrize(
    ("shape", "objective"),
    [
        ((2, 8, 5), TokenDistribution()),  # there is no config to say that 5 is too few
        ((2, 7, 5), HiddenStates()),
        ((2, 5), HiddenStates()),
        ((2, 8), HiddenStates()),
    ],
)
def test_one_row_for_each_token(shape, objective):
    class Toy(nn.Module):
        def forward(self, input_ids):
            return SimpleNamespace(logits=torch.zeros(shape))

    assert objective_for(Toy(), IDS) == objective


def test_choosing_builds_no_graph():
    class Counting(nn.Module):
        def forward(self, input_ids):
            self.grad = torch.is_grad_enabled()

    model = Counting()
    assert objective_for(model, IDS) == HiddenStates()
    assert not model.grad


def test_both_are_described():
    assert "KL" in TokenDistribution.name
    assert "hidden states" in HiddenStates.name


def test_rows_of_flattened_sequences_are_told_apart():
    rows = torch.arange(24.0).view(12, 2)
    assert torch.equal(by_sequence(rows, (3, 4)), rows.view(3, 4, 2))
    assert by_sequence(rows[:5], (3, 4)).shape == (1, 5, 2)
    assert by_sequence(rows.view(3, 2, 2, 2), (3, 4)).shape == (3, 4, 2)
    assert by_sequence(rows.view(1, 12, 2), (3, 4)).shape == (3, 4, 2)
    assert by_sequence(rows.view(3, 4, 2), (3, 9)).shape == (3, 4, 2)
