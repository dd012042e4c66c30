"""Joint fine-tuning: what it trains, what it leaves alone, and that it never makes things worse."""

import itertools
import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from soco import refinement
from soco.linalg import whitened_svd
from soco.masters import Masters
from soco.modules import LowRankLinear
from soco.objectives import HiddenStates, TokenDistribution
from soco.refinement import Refinement, _dense_in_place, _swaps, refine
from soco.surgery import bias_of, find_linears, replace_module, weight_of
from tiny_models import tiny_model

FAST = {"steps": 12, "batch_size": 4, "evaluate_every": 4, "warmup": 2, "learning_rate": 0.03}
WINDOWS = torch.randint(3, 96, (20, 8), generator=torch.Generator().manual_seed(2))


def compressed(name="llama", rank=4, dtype=torch.float32, include=None, **changes):
    """A model whose linears are truncated, and name to (dense, compressed)."""
    model: Any = tiny_model(name, dtype=dtype, **changes)
    with torch.no_grad():
        module: Any
        for module in find_linears(model).values():
            module.weight.mul_(8)
            if module.bias is not None:
                module.bias.normal_(generator=torch.Generator().manual_seed(4))
        head = model.get_output_embeddings()
        head.weight.mul_(20)
    pairs = {}
    for name, dense in find_linears(model, include).items():
        weight = weight_of(dense).float()
        factors = whitened_svd(weight, None).truncate(min(rank, *weight.shape)).to(dtype)
        layer = LowRankLinear.from_factors(factors, bias_of(dense))
        replace_module(model, name, layer)
        pairs[name] = (dense, layer)
    return model, pairs


def tune(model, pairs, objective=None, windows=WINDOWS, held_out=None, **settings):
    objective = objective or TokenDistribution()
    return refine(
        model, pairs, windows, objective, Refinement(**FAST | settings), held_out=held_out
    )


@torch.no_grad()
def distance(model, pairs, windows, objective=None):
    """The divergence on windows, by a way of its own: the teacher's layers are put in for good."""
    objective = objective or TokenDistribution()
    student = objective.outputs(model, windows)
    for name, (dense, _) in pairs.items():
        replace_module(model, name, dense)
    dense = objective.outputs(model, windows)
    for name, (_, layer) in pairs.items():
        replace_module(model, name, layer)
    return float(objective.divergence(dense, student))


def state(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "qwen2", "mixtral"])
def test_divergence_falls_on_held_out_text(name):
    objective = HiddenStates() if name == "bert" else TokenDistribution()
    model, pairs = compressed(name)
    before = distance(model, pairs, WINDOWS[-2:], objective)
    history = tune(model, pairs, objective, steps=30)
    after = distance(model, pairs, WINDOWS[-2:], objective)
    assert history[0].step == 0
    assert history[0].held_out == pytest.approx(before, rel=1e-4)
    assert min(s.held_out for s in history if s.held_out is not None) == pytest.approx(
        after, rel=1e-4
    )
    assert after < 0.9 * before


def test_only_the_factors_change():
    model, pairs = compressed("qwen2")
    before = state(model)
    dense = {name: state(layer) for name, (layer, _) in pairs.items()}
    tune(model, pairs)
    after = state(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    expected = {f"{name}.{part}.weight" for name in pairs for part in ("up", "down")}
    expected |= {f"{name}.bias" for name, (_, layer) in pairs.items() if layer.bias is not None}
    assert changed == expected
    assert any(name.endswith("bias") for name in changed)
    for name, (layer, _) in pairs.items():
        assert all(torch.equal(value, dense[name][key]) for key, value in state(layer).items())


def test_biases_can_stay():
    model, pairs = compressed("qwen2")
    before = {n: layer.bias.clone() for n, (_, layer) in pairs.items() if layer.bias is not None}
    tune(model, pairs, biases=False)
    assert before
    assert all(torch.equal(pairs[name][1].bias, value) for name, value in before.items())


def test_a_bias_that_the_dense_layer_has_too_is_left_alone():
    model, pairs = compressed("qwen2")
    with_bias = {n: p for n, p in pairs.items() if p[1].bias is not None}
    for dense, layer in with_bias.values():
        layer.bias = dense.bias
    before = {name: dense.bias.clone() for name, (dense, _) in with_bias.items()}
    tune(model, pairs)
    assert all(torch.equal(dense.bias, before[name]) for name, (dense, _) in with_bias.items())


def test_modes_flags_and_modules_are_given_back():
    model, pairs = compressed()
    model.train()
    model.requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    modules = dict(model.named_modules())
    tune(model, pairs)
    assert dict(model.named_modules()) == modules
    assert all(module.training for module in model.modules())
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["model.norm.weight"]
    assert all(p.grad is None for p in model.parameters())
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("name", ["llama", "gpt2", "albert"])
def test_the_teacher_is_the_dense_model_bit_for_bit(name):
    model, pairs = compressed(name)
    plain = tiny_model(name)
    plain.load_state_dict(
        {
            key: value
            for key, value in model.state_dict().items()
            if not any(key.startswith(f"{layer}.") for layer in pairs)
        }
        | {f"{n}.{key}": v for n, (d, _) in pairs.items() for key, v in d.state_dict().items()},
        strict=False,
    )
    objective = TokenDistribution()
    before = objective.outputs(model, WINDOWS[:3])
    swaps = _swaps(model, pairs)
    with _dense_in_place(swaps):
        teacher = objective.outputs(model, WINDOWS[:3])
    assert torch.equal(teacher, objective.outputs(plain, WINDOWS[:3]))
    assert not torch.equal(teacher, before)
    assert torch.equal(objective.outputs(model, WINDOWS[:3]), before)
    assert all(model.get_submodule(name) is layer for name, (_, layer) in pairs.items())


def test_a_teacher_that_fails_leaves_the_compressed_layers():
    model, pairs = compressed()
    swaps = _swaps(model, pairs)

    def fail():
        with _dense_in_place(swaps):
            model(input_ids="no tokens")

    with pytest.raises((AttributeError, TypeError)):
        fail()
    assert all(model.get_submodule(name) is layer for name, (_, layer) in pairs.items())


def test_a_layer_in_two_places_is_swapped_in_both():
    model, pairs = compressed()
    name, (dense, layer) = next(iter(pairs.items()))
    model.second = nn.ModuleList([layer])
    with _dense_in_place(_swaps(model, pairs)):
        assert model.second[0] is dense
        assert model.get_submodule(name) is dense
    assert model.second[0] is layer


@pytest.mark.parametrize("rate", [1e4, 1e25])
def test_never_worse_than_before_on_held_out_text(rate):
    model, pairs = compressed(rank=31)  # so near to the dense model that no accident beats it
    before, values = distance(model, pairs, WINDOWS[-2:]), state(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        history = tune(
            model, pairs, learning_rate=rate, warmup=0, clip=None, patience=None, backoff=1
        )
    worst = max((s.held_out for s in history if s.held_out is not None), default=0)
    assert worst > before or not math.isfinite(history[-1].loss)
    assert distance(model, pairs, WINDOWS[-2:]) == before
    assert all(torch.equal(value, values[key]) for key, value in state(model).items())


def test_the_best_is_kept_and_not_the_last():
    model, pairs = compressed()
    held_out = WINDOWS[-2:]
    seen = []
    history = refine(
        model, pairs, WINDOWS[:18], TokenDistribution(),
        Refinement(**FAST | {"steps": 60, "learning_rate": 0.3, "patience": None, "backoff": 1}),
        seen.append, held_out,
    )  # fmt: skip
    assert seen == history
    values = [s.held_out for s in history if s.held_out is not None]
    assert min(values) < values[-1]  # or this shows nothing
    assert distance(model, pairs, held_out) == pytest.approx(min(values), rel=1e-4)


def test_held_out_text_is_not_trained_on():
    """Other held-out windows, same training: only the choice of the best may differ."""
    results = []
    for tail in (WINDOWS[-2:], WINDOWS[-2:].flip(-1)):
        model, pairs = compressed()
        windows = torch.cat([WINDOWS[:18], tail])
        history = tune(model, pairs, windows=windows, patience=None, backoff=1)
        results.append([step.loss for step in history[1:]])
    assert results[0] == results[1]
    model, pairs = compressed()
    given = tune(
        model, pairs, windows=WINDOWS[:18], held_out=WINDOWS[-2:], patience=None, backoff=1
    )
    assert [step.loss for step in given[1:]] == results[0]


def test_patience_ends_it():
    model, pairs = compressed(rank=31)
    history = tune(model, pairs, learning_rate=1.0, steps=100, evaluate_every=2, patience=3)
    assert history[-1].step == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_that_are_too_long_are_taken_back_and_shortened(dtype):
    settings = {"learning_rate": 0.5, "steps": 60, "patience": None, "evaluate_every": 4}
    lowest = {}
    for backoff in (1, 0.25):
        model, pairs = compressed(rank=28, dtype=dtype)
        history = tune(model, pairs, backoff=backoff, **settings)
        lowest[backoff] = min(s.held_out for s in history if s.held_out is not None)
    assert max(s.loss for s in history[1:]) > 10 * history[0].loss  # it does go wrong first,
    begins = [history[i + 1].loss for i, s in enumerate(history[:-1]) if s.held_out is not None]
    assert max(begins) < 2 * history[0].loss  # and goes on from the best there was
    assert lowest[1] == history[0].held_out
    assert lowest[0.25] < 0.8 * lowest[1]


class Poisoned(TokenDistribution):
    """Gives NaN from some call of ``divergence`` on."""

    def __new__(cls, after):
        self = super().__new__(cls)
        counter = itertools.count()

        def divergence(dense, student):
            value = TokenDistribution.divergence(self, dense, student)
            return value * math.nan if next(counter) >= after else value

        object.__setattr__(self, "divergence", divergence)
        return self

    def __init__(self, after):
        pass


def test_a_loss_that_is_not_finite_ends_it_with_a_warning():
    model, pairs = compressed()
    before = state(model)
    # One evaluation, then a step, then NaN: the step must be undone, for nothing measured it.
    with pytest.warns(UserWarning, match="the loss became nan in step 2 of refine"):
        history = tune(model, pairs, Poisoned(after=2))
    assert [step.step for step in history] == [0, 1, 2]
    assert all(torch.equal(value, before[key]) for key, value in state(model).items())


def test_a_broken_start_is_left_as_it_is():
    model, pairs = compressed()
    with pytest.warns(UserWarning, match="held-out text is nan before the first step"):
        history = tune(model, pairs, Poisoned(after=0))
    assert len(history) == 1


def test_an_exception_leaves_the_best_and_no_dense_layer():
    model, pairs = compressed()
    before = state(model)

    def stop(step):
        if step.step == 2:
            raise KeyboardInterrupt

    settings = Refinement(**{**FAST, "evaluate_every": 40})
    with pytest.raises(KeyboardInterrupt):
        refine(model, pairs, WINDOWS, TokenDistribution(), settings, stop)
    assert all(torch.equal(value, before[key]) for key, value in state(model).items())
    assert all(model.get_submodule(name) is layer for name, (_, layer) in pairs.items())


def test_shared_factors_are_trained_once_and_stay_shared():
    model, pairs = compressed(include=["*.q_proj", "*.o_proj"])
    (_, first), (_, second) = list(pairs.values())[:2]
    second.down.weight = first.down.weight
    before = distance(model, pairs, WINDOWS[-2:])
    tune(model, pairs, steps=20)
    assert second.down.weight is first.down.weight
    assert distance(model, pairs, WINDOWS[-2:]) < before


class Pivoted(nn.Module):
    """A layer with two factors, and integers among its buffers and parameters."""

    def __init__(self, layer):
        super().__init__()
        self.down, self.up, self.bias = layer.down, layer.up, layer.bias
        self.register_buffer("pivots", torch.arange(3))
        self.order = nn.Parameter(torch.arange(3), requires_grad=False)

    def forward(self, x):
        return F.linear(self.down(x), self.up.weight, self.bias)


def test_layers_of_other_kinds_are_trained_by_their_parameters():
    model, pairs = compressed()
    pairs = {name: (dense, Pivoted(layer)) for name, (dense, layer) in pairs.items()}
    for name, (_, layer) in pairs.items():
        path, _, last = name.rpartition(".")
        setattr(model.get_submodule(path), last, layer)
    before = distance(model, pairs, WINDOWS[-2:])
    tune(model, pairs)
    assert distance(model, pairs, WINDOWS[-2:]) < before
    layer: Any
    for _, layer in pairs.values():
        assert torch.equal(layer.pivots, torch.arange(3))
        assert torch.equal(layer.order, torch.arange(3))


def test_the_split_into_factors_makes_no_difference():
    losses = []
    for split in (1.0, 1000.0):
        model, pairs = compressed()
        with torch.no_grad():
            for number, (_, layer) in enumerate(pairs.values()):
                layer.up.weight.mul_(split ** (-1) ** number)
                layer.down.weight.div_(split ** (-1) ** number)
        losses.append([step.loss for step in tune(model, pairs)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_half_precision_is_trained_in_float32():
    """Steps of a thousandth are lost in bfloat16, unless they add up elsewhere."""
    model, pairs = compressed(dtype=torch.bfloat16)
    before = distance(model, pairs, WINDOWS[-4:])
    history = tune(
        model, pairs, learning_rate=1e-3, steps=60, warmup=0, rate_end=1.0, evaluate_every=10,
        held_out=WINDOWS[-4:], windows=WINDOWS[:16], patience=None,
    )  # fmt: skip
    assert all(p.dtype == torch.bfloat16 for _, layer in pairs.values() for p in layer.parameters())
    full, same = compressed(dtype=torch.float32)
    reference = tune(
        full, same, learning_rate=1e-3, steps=60, warmup=0, rate_end=1.0, evaluate_every=10,
        held_out=WINDOWS[-4:], windows=WINDOWS[:16], patience=None,
    )  # fmt: skip
    gain = before - distance(model, pairs, WINDOWS[-4:])
    first, last = reference[0].held_out, reference[-1].held_out
    assert first is not None
    assert last is not None
    assert gain > 0.5 * (first - last) > 0
    assert len(history) == 61


def test_float16_takes_its_gradients_scaled():
    """The loss of a large vocabulary has gradients below float16's least number."""
    results = []
    for dtype in (torch.float16, torch.float32):
        model, pairs = compressed(dtype=dtype)
        results.append(tune(model, pairs, divergence=1e-6, windows=WINDOWS, steps=20)[-1])
    assert results[0].divergence == pytest.approx(results[1].divergence, rel=0.2)
    model, pairs = compressed()
    start = tune(model, pairs, steps=1)[0].divergence
    assert results[0].divergence < 0.9 * start


@pytest.mark.parametrize("micro", [1, 3])
def test_micro_batches_add_up(micro):
    results = []
    for size in (None, micro):
        model, pairs = compressed()
        results.append([step.loss for step in tune(model, pairs, micro_batch=size)])
    assert results[0] == pytest.approx(results[1], rel=1e-3)


def test_checkpointing_changes_nothing():
    results = []
    for checkpointing in (False, True):
        model, pairs = compressed()
        tune(model, pairs, checkpointing=checkpointing)
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(results[0], results[1])


def test_seeds():
    results = []
    for seed in (3, 3, 4):
        model, pairs = compressed()
        tune(model, pairs, seed=seed)
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_the_loss_is_the_weighted_sum():
    model, pairs = compressed()
    objective, held_out = TokenDistribution(), WINDOWS[-2:]
    with torch.no_grad():
        student = objective.outputs(model, held_out)
        text = float(objective.cross_entropy(student, held_out))
    kl = distance(model, pairs, held_out)
    start = tune(model, pairs, divergence=0.5, cross_entropy=2.0, steps=1)[0]
    assert start.held_out == pytest.approx(0.5 * kl + 2 * text, rel=1e-4)
    assert start.divergence == pytest.approx(kl, rel=1e-4)
    model, pairs = compressed()
    history = tune(model, pairs, divergence=0.0, cross_entropy=1.0, steps=20, backoff=1)
    assert history[0].held_out == pytest.approx(text, rel=1e-4)
    losses = [step.loss for step in history[1:]]
    assert sum(losses[-5:]) < 0.98 * sum(losses[:5])


def test_weight_decay_pulls_to_zero():
    sizes = []
    for decay in (0.0, 3.0):
        model, pairs = compressed()
        tune(model, pairs, weight_decay=decay, steps=4)
        sizes.append(float(sum(layer.up.weight.detach().norm() for _, layer in pairs.values())))
    assert sizes[1] < 0.9 * sizes[0]


def test_kept_is_the_size_of_the_factors():
    model, pairs = compressed(rank=4)
    factors = sum(
        layer.up.weight.numel() + layer.down.weight.numel() for _, layer in pairs.values()
    )
    total = sum(dense.weight.numel() for dense, _ in pairs.values())
    assert tune(model, pairs, steps=1)[-1].kept == pytest.approx(factors / total)


def test_written_text_is_trained_on_and_not_held_out():
    """With a rate of nothing the losses are those of the start, of whichever windows."""
    model, pairs = compressed()
    changes: Any = FAST | {"learning_rate": 1e-12}
    objective, settings = TokenDistribution(), Refinement(**changes)
    written = torch.full((24, WINDOWS.shape[1]), 7)
    plain = refine(model, pairs, WINDOWS, objective, settings)
    more = refine(model, pairs, WINDOWS, objective, settings, written=written)
    assert more[0].held_out == plain[0].held_out
    assert more[-1].held_out == pytest.approx(plain[-1].held_out, rel=1e-6)
    assert [step.loss for step in more[1:]] != pytest.approx(
        [step.loss for step in plain[1:]], rel=0.01
    )


def test_the_rate_that_was_measured_is_the_one_that_it_goes_with(monkeypatch):
    """Near the dense model it is a small one; one that is given is taken."""
    seen = []

    def spy(*arguments, learning_rate, **options):
        seen.append(learning_rate)
        return Masters(*arguments, learning_rate=learning_rate, **options)

    monkeypatch.setattr(refinement, "Masters", spy)
    for rank, rate in ((31, None), (4, None), (4, 0.07)):
        tune(*compressed(rank=rank), learning_rate=rate, steps=1)
    near, far, given = seen
    assert 1e-5 < near < 0.5 * far <= 0.01
    assert given == 0.07


def test_rate_rises_and_falls():
    settings = Refinement(steps=20, warmup=4, rate_end=0.1)
    rates = [settings.rate(step) for step in range(21)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4] == 1.0
    assert rates[12] == pytest.approx(0.55)
    assert rates[20] == pytest.approx(0.1)


def test_arguments_are_checked():
    model, pairs = compressed()
    with pytest.raises(ValueError, match="no layer is compressed"):
        tune(model, {})
    dense, layer = next(iter(pairs.values()))
    with pytest.raises(ValueError, match="the compressed layer lost is not in the model"):
        tune(model, {"lost": (dense, LowRankLinear(4, 4, 1))})
    with pytest.raises(ValueError, match="the compressed layer other stands for two dense layers"):
        tune(model, pairs | {"other": (nn.Linear(32, 32), layer)})
    with pytest.raises(ValueError, match="refine takes two sequences at least"):
        tune(model, pairs, windows=WINDOWS[:1])
    with pytest.raises(ValueError, match="one sequence to train on and one held out at least"):
        tune(model, pairs, held_out=WINDOWS[:0])
    with pytest.warns(UserWarning, match="3 sequences are left to refine on, fewer than one batch"):
        tune(model, pairs, windows=WINDOWS[:4], steps=2)


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("steps", 0, "steps must be a positive whole number, got 0"),
        ("evaluate_every", 1.5, "evaluate_every must be a positive whole number, got 1.5"),
        ("micro_batch", 9, r"micro_batch must be from 1 to batch_size \(8\), got 9"),
        ("learning_rate", 0.0, "learning_rate must be positive, got 0.0"),
        ("warmup", -1, "warmup must be a whole number of steps, got -1"),
        ("held_out", 1.0, "held_out must be above 0 and below 1, got 1.0"),
        ("patience", 0, "patience must be at least 1, or None, got 0"),
        ("backoff", 0.0, "backoff must be above 0 and at most 1, got 0.0"),
        ("clip", 0.0, "clip must be positive, or None, got 0.0"),
        ("betas", (0.9, 1.0), "betas must be two numbers"),
        ("weight_decay", -1.0, "weight_decay must be at least 0, got -1.0"),
        ("divergence", 0.0, "divergence and cross_entropy are both 0"),
        ("written", -0.5, "written must be at least 0, got -0.5"),
    ],
)
def test_settings_are_checked(field, value, text):
    with pytest.raises(ValueError, match=text):
        Refinement(**{field: value})
