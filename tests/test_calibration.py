"""soco.calibration against Gram matrices by hand and the probabilities of whole sequences."""

import math
import weakref
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from soco.calibration import KINDS, Statistics, collect, uncalled
from soco.keeping import Keeper
from soco.objectives import TokenDistribution, draw_seeds
from soco.surgery import find_linears
from soco.workfolder import opened
from tiny_models import CONFIGS, drawn, tiny_model

WINDOWS = torch.randint(3, 96, (5, 12), generator=torch.Generator().manual_seed(1))


def grams_by_hand(model, layers, windows, batch_size=2):
    """For each name the sum of x^T x in float64, and the tokens, from copies of all inputs."""
    inputs = {name: [] for name in layers}
    hooks = [
        module.register_forward_pre_hook(
            lambda module, args, name=name: inputs[name].append(args[0].detach().clone())
        )
        for name, module in layers.items()
    ]
    with torch.no_grad():
        for batch in windows.split(batch_size):
            more = {"decoder_input_ids": batch} if model.__class__.__name__[:2] == "T5" else {}
            model(input_ids=batch, **more)
    for hook in hooks:
        hook.remove()
    result = {}
    for name, seen in inputs.items():
        rows = [x.double().flatten(0, -2) for x in seen]
        result[name] = torch.cat(rows).T @ torch.cat(rows) if rows else None, sum(map(len, rows))
    return result


def assert_by_hand(stats, model, layers, windows, batch_size=2):
    assert list(stats) == list(layers)
    for name, (gram, tokens) in grams_by_hand(model, layers, windows, batch_size).items():
        assert stats[name].tokens == tokens, name
        assert stats[name].gram.dtype == torch.float64
        if gram is None:
            assert not stats[name].gram.any(), name
        else:
            scale = gram.diagonal().mean().item()
            torch.testing.assert_close(
                stats[name].gram, gram, rtol=1e-5, atol=1e-6 * scale, msg=lambda m, n=name: n + m
            )


# ---- statistics of real models -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama", torch.float32),
        ("llama", torch.bfloat16),
        ("gpt2", torch.float32),
        ("bert", torch.float32),
        ("albert", torch.float32),  # one block, called twice
        ("t5", torch.float32),
        ("qwen2_moe", torch.float32),
    ],
    ids=str,
)
def test_gram_is_the_sum_over_all_inputs(name, dtype):
    model = tiny_model(name, dtype)
    layers = find_linears(model)
    stats = collect(model, layers, WINDOWS, batch_size=2)
    assert_by_hand(stats, model, layers, WINDOWS)


def test_layers_with_the_same_input_share_a_matrix():
    model = tiny_model("llama")
    stats = collect(model, find_linears(model), WINDOWS)
    block = "model.layers.1."
    q, k, v, o = (stats[f"{block}self_attn.{kind}_proj"].gram for kind in "qkvo")
    gate, up, down = (stats[f"{block}mlp.{kind}_proj"].gram for kind in ("gate", "up", "down"))
    assert q is k is v
    assert gate is up
    assert len({id(gram) for gram in (q, o, gate, down)}) == 4
    assert q is not stats["model.layers.0.self_attn.q_proj"].gram
    assert down.shape == (48, 48)


def test_batch_size_does_not_matter():
    model = tiny_model("llama")
    layers = find_linears(model)
    one = collect(model, layers, WINDOWS, batch_size=1)
    for size in (2, 5, 100):
        other = collect(model, layers, WINDOWS, batch_size=size)
        for name in layers:
            assert other[name].tokens == one[name].tokens == 60
            torch.testing.assert_close(other[name].gram, one[name].gram, rtol=1e-5, atol=1e-5)


def test_on_any_device(device):
    model = tiny_model("llama")
    wanted = collect(model, find_linears(model), WINDOWS)
    stats = collect(model.to(device), find_linears(model), WINDOWS)
    for name in wanted:
        assert stats[name].gram.device.type == device
        torch.testing.assert_close(stats[name].gram.cpu(), wanted[name].gram, rtol=1e-4, atol=1e-4)


@pytest.fixture
def keeper(tmp_path):
    """Makes one that writes a state after every batch."""
    with opened(tmp_path / "work", {}, keep=True) as work:
        yield lambda: Keeper(work, "statistics", every=0)


class Stop(Exception):
    pass


def stopped_after(batches, tell=lambda done: None):
    """What ``on_batch`` is: it stops after so many."""
    left = [batches]

    def on_batch(done):
        if left[0] == 0:
            raise Stop
        left[0] -= 1
        tell(done)

    return on_batch


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("kinds", [{"gram"}, KINDS, {"sampled_grad_gram", "root"}])
@pytest.mark.parametrize("stop", [1, 2, 4])
def test_it_goes_on_where_it_was(name, kinds, stop, keeper, device):
    """The same bits; what is done is not done again, and what is kept changes nothing."""
    model = tiny_model(name).to(device)
    layers = find_linears(model)
    plain = collect(model, layers, WINDOWS, 1, kinds=kinds)
    with pytest.raises(Stop):
        collect(model, layers, WINDOWS, 1, stopped_after(stop), kinds=kinds, keeper=keeper())
    done = []
    found = collect(model, layers, WINDOWS, 1, done.append, kinds=kinds, keeper=keeper())
    # Stopped after a batch, before its state: that batch comes again.
    assert done == list(range(stop + 1, 6))
    for layer, each in plain.items():
        other = found[layer]
        assert (each.tokens, each.sequences) == (other.tokens, other.sequences)
        assert each.parts().keys() == other.parts().keys()
        for kind, value in each.parts().items():
            assert torch.equal(value, other.parts()[kind]), (layer, kind)
            assert value.device == other.parts()[kind].device


@pytest.mark.parametrize("stop", range(8))
def test_layers_that_part_and_a_run_that_goes_on(stop, keeper):
    def rule(toy, x, first):
        toy.a(x)
        toy.b(x + 1 if first >= 2 else x)
        toy.c(x - 1 if first == 3 else x)

    toy, windows, done = Toy(rule), first_tokens(1, 2, 2, 3, 1), []
    with pytest.raises(Stop):
        collect(
            toy, toy.layers, windows, 1, stopped_after(stop, done.append), keeper=keeper()
        )  # fmt: skip
    assert done == [1, 1, 2, 3, 1, 2, 3, 4][:stop]
    stats = collect(toy, toy.layers, windows, 1, keeper=keeper())
    assert_by_hand(stats, toy, toy.layers, windows, batch_size=1)


def test_progress_is_told():
    done = []
    model = tiny_model("llama")
    collect(model, find_linears(model), WINDOWS, batch_size=2, on_batch=done.append)
    assert done == [2, 4, 5]


def test_only_the_body_runs_where_the_head_is_not_asked_for():
    model = tiny_model("llama")
    calls = []
    model.lm_head.register_forward_hook(lambda *args: calls.append(1))
    collect(model, find_linears(model), WINDOWS)
    assert not calls
    layers = find_linears(model, include=["lm_head", "*.q_proj"])
    assert_by_hand(collect(model, layers, WINDOWS, batch_size=2), model, layers, WINDOWS)
    assert calls


def test_a_classifier_without_a_padding_token():
    """Its head refuses more than one sequence at a time."""
    config = transformers.LlamaConfig(**(CONFIGS["llama"] | {"pad_token_id": None}))
    model = transformers.LlamaForSequenceClassification(config).eval()
    with pytest.raises(ValueError, match="no padding token"):
        model(WINDOWS)
    layers = find_linears(model)
    stats = collect(model, layers, WINDOWS, batch_size=2)
    assert_by_hand(stats, model.model, layers, WINDOWS)


# ---- toys ----------------------------------------------------------------------------------------


class Toy(nn.Module):
    """Three layers and a rule: ``rule(toy, x, first)``, ``first`` the first token of the batch."""

    def __init__(self, rule):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(96, 4)
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 6)
        self.rule = rule

    @property
    def layers(self):
        return {"a": self.a, "b": self.b, "c": self.c}

    def forward(self, input_ids):
        self.rule(self, self.embed(input_ids), int(input_ids[0, 0]))


def first_tokens(*tokens):
    windows = WINDOWS[: len(tokens)].clone()
    windows[:, 0] = torch.tensor(tokens)
    return windows


def both(toy, x):
    toy.a(x)
    toy.b(x)


# What happens at the batch that begins with token 2; before and after, b sees what a sees.
ODD = {
    "b sees another tensor": lambda toy, x: (toy.a(x), toy.b(x + 1)),
    "b sees an equal tensor": lambda toy, x: (toy.a(x), toy.b(x.clone())),
    "a sees another tensor": lambda toy, x: (toy.a(x - 1), toy.b(x)),
    "b is not called": lambda toy, x: toy.a(x),
    "a is not called": lambda toy, x: toy.b(x),
    "neither is called": lambda toy, x: toy.c(x),
    "b is called again": lambda toy, x: (both(toy, x), toy.b(x)),
    "a is called again": lambda toy, x: (both(toy, x), toy.a(x)),
    "a is called first for both": lambda toy, x: (toy.a(x), toy.a(x + 1), toy.b(x), toy.b(x + 1)),
    "the second call differs": lambda toy, x: (both(toy, x), toy.a(x + 1), toy.b(x + 2)),
    "b sees the first one twice": lambda toy, x: (toy.a(x), toy.a(x + 1), toy.b(x), toy.b(x)),
    "the calls are crossed": lambda toy, x: (toy.a(x), toy.a(y := x + 1), toy.b(y), toy.b(x)),
    "b is called before a": lambda toy, x: (toy.b(x), toy.a(x)),
    "c takes the place of b": lambda toy, x: (toy.a(x), toy.c(x), toy.b(x * 2)),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("tokens", [(1, 1, 2, 1), (2, 1, 1), (1, 2), (2,), (1, 2, 1, 2, 1)])
def test_layers_that_share_their_input_only_sometimes(odd, tokens):
    def rule(toy, x, first):
        ODD[odd](toy, x) if first == 2 else both(toy, x)

    toy, windows = Toy(rule), first_tokens(*tokens)
    stats = collect(toy, toy.layers, windows, batch_size=1)
    assert_by_hand(stats, toy, toy.layers, windows, batch_size=1)


def test_three_that_part_one_after_the_other():
    def rule(toy, x, first):
        toy.a(x)
        toy.b(x + 1 if first >= 2 else x)
        toy.c(x - 1 if first == 3 else x)

    toy, windows = Toy(rule), first_tokens(1, 2, 2, 3, 1)
    done = []
    stats = collect(toy, toy.layers, windows, batch_size=1, on_batch=done.append)
    assert_by_hand(stats, toy, toy.layers, windows, batch_size=1)
    assert done == [1, 1, 2, 3, 1, 2, 3, 4, 5]  # started again twice


def test_a_layer_called_twice_sees_both():
    toy = Toy(lambda toy, x, first: both(toy, toy.a(x)))
    stats = collect(toy, toy.layers, WINDOWS, batch_size=2)
    assert_by_hand(stats, toy, toy.layers, WINDOWS)
    assert (stats["a"].tokens, stats["b"].tokens, stats["c"].tokens) == (120, 60, 0)


def test_two_layers_called_twice_together_share():
    toy = Toy(lambda toy, x, first: (both(toy, x), both(toy, x + 1)))
    stats = collect(toy, toy.layers, WINDOWS, batch_size=2)
    assert_by_hand(stats, toy, toy.layers, WINDOWS)
    assert stats["a"].gram is stats["b"].gram


def test_a_layer_that_saw_nothing():
    toy = Toy(lambda toy, x, first: both(toy, x))
    stats = collect(toy, toy.layers, WINDOWS)
    assert stats["c"].tokens == 0
    assert torch.equal(stats["c"].gram, torch.zeros(4, 4, dtype=torch.float64))
    conv = tiny_model("gpt2").transformer.h[0].attn.c_attn
    gram = collect(toy, {"conv": conv}, WINDOWS)["conv"].gram
    assert torch.equal(gram, torch.zeros(32, 32, dtype=torch.float64))


def test_a_layer_that_was_given_no_token():
    toy = Toy(lambda toy, x, first: (toy.a(x), toy.b(x[:0]), toy.c(x[0, :0])))
    stats = collect(toy, toy.layers, WINDOWS, batch_size=2)
    assert_by_hand(stats, toy, toy.layers, WINDOWS)
    assert (stats["b"].tokens, stats["c"].tokens) == (0, 0)


def test_more_tokens_than_are_multiplied_at_once():
    toy = Toy(lambda toy, x, first: both(toy, x * 1e6))
    windows = torch.randint(96, (3, 3000), generator=torch.Generator().manual_seed(2))
    stats = collect(toy, toy.layers, windows, batch_size=2)
    assert_by_hand(stats, toy, toy.layers, windows)
    assert stats["a"].tokens == 9000


def test_inputs_are_not_kept():
    """Of many blocks that would be most of the memory."""
    alive = []

    def rule(toy, x, first):
        inputs = weakref.ref(x)
        x = toy.a(x)
        alive.append(inputs() is not None)
        toy.b(x)

    toy = Toy(rule)
    collect(toy, toy.layers, WINDOWS, batch_size=2)
    assert alive == [False] * 3


def test_the_model_can_be_trained_afterwards():
    """What a model computes once and keeps must not be an inference tensor."""

    class Caching(Toy):
        cached: torch.Tensor | None = None

        def forward(self, input_ids):
            if self.cached is None:
                self.cached = torch.arange(4.0) * 2
            return self.a(self.embed(input_ids) * self.cached).sum()

    toy = Caching(None)
    stats = collect(toy, toy.layers, WINDOWS)
    toy(WINDOWS).backward()
    assert toy.a.weight.grad is not None
    assert not stats["a"].gram.requires_grad
    stats["a"].gram.add_(1)  # an ordinary tensor, too


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_inputs_that_are_not_finite_are_named(bad):
    toy = Toy(lambda toy, x, first: (toy.a(x), toy.b(x + (bad if first == 2 else 0)), toy.c(x)))
    windows = first_tokens(1, 2, 1)
    with pytest.raises(ValueError, match="the inputs of b hold NaN or Inf on the calibration text"):
        collect(toy, toy.layers, windows, batch_size=1)
    assert not any(module._forward_pre_hooks for module in toy.modules())
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = bad
    with pytest.raises(ValueError, match=r"inputs of model\.layers\.1\.mlp\.down_proj hold NaN"):
        collect(model, find_linears(model), WINDOWS)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_hooks_are_gone_after_an_error(error):
    def rule(toy, x, first):
        both(toy, x)
        if first == 2:
            raise error

    toy = Toy(rule)
    for windows in (first_tokens(1, 1), first_tokens(1, 2)):
        if 2 in windows[:, 0]:
            with pytest.raises(error):
                collect(toy, toy.layers, windows, batch_size=1)
        else:
            collect(toy, toy.layers, windows, batch_size=1)
        assert not any(module._forward_pre_hooks for module in toy.modules())


# ---- layers that are never called ----------------------------------------------------------------


def test_a_weight_that_its_model_reads_itself():
    model = tiny_model("mamba")
    ids = torch.zeros(1, 8, dtype=torch.long)
    found = uncalled(model, find_linears(model), ids)
    assert found == [f"backbone.layers.{block}.mixer.dt_proj" for block in range(2)]
    for name in ("llama", "gpt2", "bert", "t5", "albert", "qwen2_moe"):
        model = tiny_model(name)
        assert uncalled(model, find_linears(model), ids) == []
        assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_layer_whose_module_does_not_run_is_not_meant():
    class Expert(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return x @ self.up.weight + self.down(x)

    toy = Toy(lambda toy, x, first: toy.experts[0](x))
    toy.experts = nn.ModuleList([Expert(), Expert()])
    toy.lists = nn.ModuleDict({"of": nn.ModuleList([nn.Linear(4, 4)])})
    layers = {name: module for name, module in toy.named_modules() if isinstance(module, nn.Linear)}
    found = uncalled(toy, layers, WINDOWS)
    assert found == ["a", "b", "c", "experts.0.up", "lists.of.0"]


# ---- statistics beyond the Gram matrix -----------------------------------------------------------


def plain_statistics(model, name, windows):
    """Everything of one layer by plain autograd, sequence by sequence, for given labels."""
    layer = model.get_submodule(name)
    seeds = draw_seeds(len(windows), torch.Generator().manual_seed(0))
    objective = TokenDistribution()
    with torch.no_grad():
        dense = objective.outputs(model, windows)
    inputs, gradients = [], []

    def watch(module, given, output):
        inputs.append(given[0].detach())
        output = output + torch.zeros(1, requires_grad=True)
        output.retain_grad()
        gradients.append(output)
        return output

    hook = layer.register_forward_hook(watch)
    student = objective.outputs(model, windows)
    objective.surprise(dense, student, seeds).backward()
    hook.remove()
    return inputs[0].double(), gradients[0].grad.double()


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "bert"])
def test_every_statistic_against_plain_autograd(name):
    model = tiny_model(name)
    model.requires_grad_(False)
    layers = find_linears(model)
    windows = torch.randint(3, 96, (4, 7), generator=torch.Generator().manual_seed(3))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found: dict[str, Any] = dict(collect(model, layers, windows, 4, kinds=KINDS))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    for layer in list(layers)[:: max(1, len(layers) // 4)]:
        x, g = plain_statistics(model, layer, windows)
        flat, flat_g = x.flatten(0, 1), g.flatten(0, 1)
        each = found[layer]
        close: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-4}
        torch.testing.assert_close(each.gram, flat.T @ flat, **close)
        torch.testing.assert_close(each.mean, flat.sum(0), **close)
        torch.testing.assert_close(each.abs_mean, flat.abs().sum(0), **close)
        torch.testing.assert_close(each.root.T @ each.root, flat.T @ flat, **close)
        assert torch.equal(each.root, each.root.triu())
        mean = x.mean(0)
        torch.testing.assert_close(each.stacked_gram, mean.T @ mean, **close)
        torch.testing.assert_close(each.grad_gram, flat_g.T @ flat_g, **close)
        torch.testing.assert_close(each.sampled_grad_gram, each.grad_gram)  # of one batch, it is
        per_sequence = torch.einsum("sto,sti->soi", g, x)
        torch.testing.assert_close(each.fisher, per_sequence.square().sum(0), **close)
        assert (each.tokens, each.sequences) == (28, 4)


@pytest.mark.parametrize("others", [set(), {"grad_gram"}, {"fisher", "mean"}])
def test_sampled_gradients_are_those_of_the_first_batches(others):
    """As they are for these windows alone, as if the others had been like them."""
    model = tiny_model("llama")
    layers = find_linears(model)
    windows = torch.randint(3, 96, (18, 7), generator=torch.Generator().manual_seed(3))
    backward = []
    model.lm_head.register_full_backward_hook(lambda *_: backward.append(1))
    model.lm_head.weight.requires_grad_(False)
    kinds = {"sampled_grad_gram", *others}
    found: dict[str, Any] = dict(collect(model, layers, windows, 2, kinds=kinds))
    assert len(backward) == (9 if others & {"grad_gram", "fisher"} else 2)
    part: dict[str, Any] = dict(collect(model, layers, windows[:4], 2, kinds={"grad_gram"}))
    whole = collect(model, layers, windows, 2)
    for name in layers:
        torch.testing.assert_close(
            found[name].sampled_grad_gram, part[name].grad_gram * 18 / 4, atol=1e-6, rtol=1e-5
        )
        torch.testing.assert_close(found[name].gram, whole[name].gram, atol=1e-5, rtol=1e-5)
        assert found[name].tokens == 126
        means = found[name].means(126)["sampled_grad_gram"]
        torch.testing.assert_close(means, part[name].means(28)["grad_gram"], atol=1e-7, rtol=1e-5)


def test_batches_do_not_matter_but_to_stacks():
    model = tiny_model("llama")
    layers = find_linears(model)
    windows = torch.randint(3, 96, (6, 7), generator=torch.Generator().manual_seed(3))
    one = collect(model, layers, windows, 6, kinds={"gram", "abs_mean", "root"})
    two: dict[str, Any] = dict(
        collect(model, layers, windows, 2, kinds={"gram", "abs_mean", "root"})
    )
    for name in layers:
        torch.testing.assert_close(one[name].gram, two[name].gram, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one[name].abs_mean, two[name].abs_mean, atol=1e-5, rtol=1e-5)
        square = two[name].root.T @ two[name].root
        torch.testing.assert_close(square, one[name].gram, atol=1e-4, rtol=1e-4)


def test_layers_that_stand_in_several_places_add_their_gradients_up():
    """ALBERT runs one block twice: the gradient of a sequence is the sum over both."""
    model = tiny_model("albert")
    layers = find_linears(model)
    windows = torch.randint(3, 96, (3, 6), generator=torch.Generator().manual_seed(3))
    found = collect(model, layers, windows, 3, kinds={"fisher"})
    name, layer = next(iter(layers.items()))
    objective = TokenDistribution()
    seeds = draw_seeds(len(windows), torch.Generator().manual_seed(0))
    with torch.no_grad():
        dense = objective.outputs(model, windows)
    student = objective.outputs(model, windows)
    weight = layer.get_parameter("weight")
    losses = []  # of each sequence by itself, for the labels that all were drawn with

    chances = dense.exp().flatten(0, -2).cumsum(-1)
    point = drawn(torch.rand, seeds, windows.shape[1], 1).flatten(0, 1)
    labels = torch.searchsorted(chances, point * chances[:, -1:], right=True).clamp_max(
        chances.shape[-1] - 1
    )
    scores = -student.flatten(0, -2).gather(-1, labels).view(3, 6).sum(1)
    for loss in scores:
        (gradient,) = torch.autograd.grad(loss, [weight], retain_graph=True)
        losses.append(gradient.double().square())
    wanted = torch.stack(losses).sum(0)
    torch.testing.assert_close(found[name].fisher, wanted, atol=1e-6, rtol=1e-3)


def test_gradients_that_are_not_finite_are_named():
    model = tiny_model("llama")
    layers = find_linears(model)
    name = list(layers)[-1]

    class Broken(TokenDistribution):
        def surprise(self, dense, student, seeds):
            return super().surprise(dense, student, seeds) * float("inf")

    with pytest.raises(ValueError, match=r"the gradients at .* hold NaN or Inf"):
        collect(
            model, {name: layers[name]}, torch.full((2, 5), 7), kinds={"fisher"}, objective=Broken()
        )


def test_unknown_statistics_are_named():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="there is no statistic 'hessian': choose from"):
        collect(model, find_linears(model), torch.full((1, 5), 7), kinds={"hessian"})


def test_the_seed_draws_the_labels():
    model = tiny_model("llama")
    layers = find_linears(model)
    windows = torch.randint(3, 96, (4, 7), generator=torch.Generator().manual_seed(3))
    name = next(iter(layers))
    found = [
        collect(model, layers, windows, kinds={"grad_gram"}, seed=seed)[name].parts()["grad_gram"]
        for seed in (1, 1, 2)
    ]
    first, again, other = found
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_gradients_and_stacks_are_by_sequence_where_tokens_come_flattened():
    """OPT gives its feed-forward layers tokens without sequences."""
    model = tiny_model("opt")
    layers = find_linears(model)
    windows = torch.randint(3, 96, (6, 7), generator=torch.Generator().manual_seed(3))
    kinds = {"fisher", "grad_gram", "stacked_gram"}
    one, two = (collect(model, layers, windows, size, kinds=kinds) for size in (1, 6))
    flat = next(name for name in layers if name.endswith("fc1"))
    for name in layers:
        assert (one[name].sequences, two[name].sequences) == (6, 6)
        near = 1e-6 * float(one[name].parts()["grad_gram"].abs().max())  # rounding in float32
        torch.testing.assert_close(one[name].grad_gram, two[name].grad_gram, rtol=1e-3, atol=near)
        torch.testing.assert_close(one[name].fisher, two[name].fisher, rtol=1e-3, atol=1e-12)
    means = []

    def stacked(module, inputs):
        means.append(inputs[0].reshape(6, 7, -1).mean(0))

    with layers[flat].register_forward_pre_hook(stacked), torch.no_grad():
        model(windows)
    wanted = (means[0].T @ means[0]).double()
    torch.testing.assert_close(two[flat].stacked_gram, wanted, rtol=1e-4, atol=1e-5)


def test_dropout_autocast_and_gradients_of_the_caller_make_no_difference():
    model = tiny_model("opt", dropout=0.3, attention_dropout=0.3)
    layers = find_linears(model)
    kinds = {"gram", "grad_gram"}
    wanted: dict[str, Any] = dict(collect(model, layers, WINDOWS, kinds=kinds))
    model.train().requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        found: dict[str, Any] = dict(collect(model, layers, WINDOWS, kinds=kinds))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.modules())
    for name in layers:
        assert torch.equal(found[name].gram, wanted[name].gram)
        assert torch.equal(found[name].grad_gram, wanted[name].grad_gram)


def test_twins_count_together():
    """Two layers with one weight are one target, and it sees what both see."""
    model = tiny_model("llama")
    apart = find_linears(model)
    first, second = (f"model.layers.{block}.mlp.up_proj" for block in (0, 1))
    apart[second].weight = apart[first].weight
    both = {name: collect(model, {name: apart[name]}, WINDOWS)[name] for name in (first,)}
    layers = find_linears(model)
    assert second not in layers
    found = collect(model, layers, WINDOWS)
    assert found[first].tokens == 2 * WINDOWS.numel() == both[first].tokens
    seen = []
    hooks = [
        apart[name].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        for name in (first, second)
    ]
    with torch.no_grad():
        model(WINDOWS)
    for hook in hooks:
        hook.remove()
    x = torch.cat(seen).flatten(0, 1).double()
    torch.testing.assert_close(found[first].gram, x.T @ x, rtol=1e-4, atol=1e-4)


def test_what_a_rare_expert_saw_counts_by_how_often_it_was_asked():
    """Sums of inputs per token of the calibration; means and gradients per token it saw."""
    one = torch.ones(2, 2, dtype=torch.float64)
    rare = Statistics(
        tokens=5, sequences=2, gram=10 * one, abs_mean=10 * one[0], mean=5 * one[0],
        stacked_gram=20 * one, root=2 * one, fisher=6 * one, grad_gram=15 * one,
    )  # fmt: skip
    means = rare.means(20)
    assert torch.equal(means["gram"], one / 2)
    assert torch.equal(means["abs_mean"], 2 * one[0])
    assert torch.equal(means["mean"], one[0])
    # 10 - 5 tokens of mean (1, 1): 10 - 5 in each entry, per token of all
    assert torch.equal(means["centered_gram"], (10 - 5) * one / 20)
    assert torch.equal(means["stacked_gram"], one)
    torch.testing.assert_close(means["root"].T @ means["root"], (2 * one).T @ (2 * one) / 20)
    assert torch.equal(means["fisher"], 3 * one)
    assert torch.equal(means["grad_gram"], 3 * one)


def test_the_outputs_of_a_batch_go_before_the_next_one():
    """They are as large as all logits."""
    before: list[weakref.ref[torch.Tensor]] = []

    class Watched(TokenDistribution):
        def outputs(self, model, ids):
            assert not any(each() is not None for each in before)
            found = super().outputs(model, ids)
            before.append(weakref.ref(found))
            return found

    model = tiny_model("llama")
    layers = find_linears(model)
    collect(model, layers, WINDOWS, 2, kinds={"grad_gram"}, objective=Watched())
    assert len(before) == 3
