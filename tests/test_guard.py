"""soco.guard: what a compression that fails, at whatever moment, leaves behind."""

import time

import pytest
import torch
from torch import nn

import soco
from soco import learning, pipeline, workbench
from soco.checkpoint import mark_compressed
from soco.experts import experts_split, join_experts
from soco.guard import Clock, unchanged_on_error
from soco.linalg import whitened_svd
from soco.methods import SoCo
from soco.modules import LowRankLinear
from soco.spectral import SpectralLinear
from soco.surgery import (
    bias_of,
    find_linears,
    output_head,
    replace_module,
    untie_head,
    weight_of,
    with_weight,
)
from tiny_models import NEEDS_5, logits, tiny_mixture, tiny_model

ERRORS = [ValueError, KeyboardInterrupt]


class Block(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return x + self.layer(self.norm(x))


class Tower(nn.Module):
    """Blocks 0 and 2 share a module; 1 and 3 share weight and bias, in modules of their own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        shared, one, other = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        other.weight, other.bias = one.weight, one.bias
        self.blocks = nn.ModuleList([Block(layer) for layer in (shared, one, shared, other)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def everything(model):
    """What has to be as before, and does not change with what is done to the model later."""
    config = getattr(model, "config", None)
    return {
        "modules": [(name, id(m)) for name, m in model.named_modules(remove_duplicate=False)],
        "training": [(name, m.training) for name, m in model.named_modules()],
        "parameters": [
            (name, id(p), p.requires_grad)
            for name, p in model.named_parameters(remove_duplicate=False)
        ],
        "values": {name: value.tolist() for name, value in model.state_dict().items()},
        "config": None if config is None else config.to_dict(),
        "written": None if config is None else sorted(vars(config)),
        "attributes": sorted(vars(model)),
        "ties": getattr(model, "all_tied_weights_keys", None),
        "quantized": getattr(model, "is_quantized", None),
        "hooks": [name for name, m in model.named_modules() if m._forward_pre_hooks],
    }


def unlike(model):
    """Flags that are not the same everywhere: training here, frozen there."""
    model.train()
    for number, (module, parameter) in enumerate(
        zip(model.modules(), list(model.parameters()), strict=False)
    ):
        module.training = number % 3 > 0
        parameter.requires_grad_(number % 2 == 0)
    return model


def low_rank(layer):
    """Always with a bias: a trained deviation makes one where there was none."""
    up, sigma, down = whitened_svd(weight_of(layer).detach(), None, 2)
    bias = bias_of(layer)
    bias = torch.zeros(len(up)) if bias is None else bias
    return LowRankLinear.from_factors((up * sigma, down), bias)


def compress_by_hand(model, targets, until):
    """What the pipeline does to a model, up to a step; the last target stays dense."""
    if until == "nothing":
        return
    for name, layer in targets.items():
        weight = weight_of(layer)
        spectrum = whitened_svd(weight.detach(), None)
        replace_module(model, name, SpectralLinear(weight, bias_of(layer), spectrum))
    if until == "training":
        return
    head = output_head(model)
    if head in targets:
        untie_head(model)
    *factored, dense = targets
    replace_module(model, dense, with_weight(targets[dense], weight_of(targets[dense]) + 1))
    for name in factored:
        replace_module(model, name, low_rank(targets[name]))
    if until == "marking" and hasattr(model, "config"):
        mark_compressed(model, dict.fromkeys(factored, 2), {"a": "report"})


def fail(model, targets, until, error, watch=lambda model: None):
    with unchanged_on_error(model, targets):
        compress_by_hand(model, targets, until)
        watch(model)
        raise error


CASES = [
    ("llama", None),
    ("llama", "*"),
    ("llama-tied", ["lm_head", "*.q_proj"]),
    ("gpt2", None),
    ("bert", None),
    ("albert", None),
    ("tower", None),
]


def case(name, include):
    model = Tower() if name == "tower" else tiny_model(name)
    return unlike(model), find_linears(model, include)


@torch.no_grad()
def outputs(model):
    return model(torch.arange(16.0).view(2, 8)) if isinstance(model, Tower) else logits(model)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("until", ["nothing", "training", "factors", "marking"])
@pytest.mark.parametrize(("name", "include"), CASES, ids=str)
def test_an_error_leaves_everything_as_it_was(name, include, until, error):
    model, targets = case(name, include)
    before = everything(model)
    inside = []
    with pytest.raises(error):
        fail(model, targets, until, error, lambda model: inside.append(everything(model)))
    assert (inside[0]["modules"] == before["modules"]) == (until == "nothing")
    after = everything(model)
    for what, value in before.items():
        assert after[what] == value, what


@pytest.mark.parametrize(("name", "include"), CASES, ids=str)
def test_a_tied_head_is_tied_again_and_all_of_it_works(name, include):
    model, targets = case(name, include)
    model.eval()
    before = outputs(model)
    inside = []
    with pytest.raises(KeyboardInterrupt):
        fail(model, targets, "marking", KeyboardInterrupt, lambda m: inside.append(outputs(m)))
    assert not torch.equal(inside[0], before)
    assert torch.equal(outputs(model), before)
    if not isinstance(model, Tower) and name == "llama-tied":
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.config.tie_word_embeddings
        model.tie_weights()
        assert torch.equal(outputs(model), before)
    assert find_linears(model, include) == targets
    with unchanged_on_error(model, targets):  # and once more, to the end
        compress_by_hand(model, targets, "marking")
    assert not torch.equal(outputs(model), before)


def test_inside_it_is_frozen_and_in_evaluation_mode():
    model, targets = case("bert", None)
    with unchanged_on_error(model, targets):
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(("name", "include"), CASES, ids=str)
def test_flags_after_success(name, include):
    """New layers have those of the old ones, also where the dense weight is a new one."""
    model, targets = case(name, include)
    old = {
        key: (layer.training, weight_of(layer).requires_grad, bias_of(layer))
        for key, layer in targets.items()
    }
    trained = {
        key: of_weight if bias is None else bias.requires_grad
        for key, (_, of_weight, bias) in old.items()
    }
    others = {
        key: (module, module.training)
        for key, module in model.named_modules()
        if key not in targets and not any(key.startswith(f"{target}.") for target in targets)
    }
    flags = {
        id(parameter): (parameter, parameter.requires_grad) for parameter in model.parameters()
    }
    with unchanged_on_error(model, targets):
        compress_by_hand(model, targets, "marking")
    for key, (training, of_weight, _) in old.items():
        layer = model.get_submodule(key)
        assert isinstance(layer, LowRankLinear) == (key != list(targets)[-1])
        assert all(module.training == training for module in layer.modules())
        for part, parameter in layer.named_parameters():
            assert parameter.requires_grad == (trained[key] if part == "bias" else of_weight)
    for module, training in others.values():
        if type(module) not in (nn.Linear, LowRankLinear):
            assert module.training == training
    for parameter, flag in flags.values():
        assert parameter.requires_grad == flag
    assert len({training for training, *_ in old.values()}) == 2 or len(old) == 1 or name == "tower"


def test_a_model_without_a_config():
    model = nn.Sequential(nn.ModuleList([Block(nn.Linear(8, 8))]))
    targets = find_linears(model)
    before = everything(model)
    with pytest.raises(ValueError, match="stop"):
        fail(model, targets, "training", ValueError("stop"))
    assert everything(model) == before


def test_a_config_that_no_module_holds():
    class Text:
        tie_word_embeddings = True

        def __init__(self):
            self.layers = 4

    class Config:
        def __init__(self):
            self.text = Text()

        def get_text_config(self, decoder):
            return self.text

    config = Config()
    model = Tower()
    vars(model)["config"] = config
    written = dict(layers=3, tie_word_embeddings=False)
    with pytest.raises(ValueError, match="stop"):
        fail(
            model,
            find_linears(model),
            "training",
            ValueError("stop"),
            lambda model: vars(config.text).update(written),
        )
    assert vars(config.text) == {"layers": 4}


@pytest.mark.parametrize(
    ("home", "moment"),
    [
        (workbench, "collect"),
        (workbench, "objective_for"),
        (learning, "train_scores"),
        (pipeline, "install"),
        (pipeline, "mark_compressed"),
    ],
)
@pytest.mark.parametrize("where", ["before", "after"])
def test_ctrl_c_at_any_time_of_a_real_compression(home, moment, where, monkeypatch):
    """In the middle of ``soco.compress``, with a tied head among its targets."""
    real = getattr(home, moment)

    def interrupted(*args, **more):
        if where == "after":
            real(*args, **more)
        raise KeyboardInterrupt

    def run():
        ids = torch.randint(3, 96, (8, 16), generator=torch.Generator().manual_seed(0))
        method = SoCo(steps=3, batch_size=2)
        include = ["lm_head", "*_proj"]
        soco.compress(model, 0.4, method=method, calibration=ids, samples=8, include=include)

    model = unlike(tiny_model("llama-tied"))
    before = everything(model)
    with monkeypatch.context() as patch:
        patch.setattr(home, moment, interrupted)
        with pytest.raises(KeyboardInterrupt):
            run()
    after = everything(model)
    for what, value in before.items():
        assert after[what] == value, what
    run()
    assert soco.report(model).removed >= 0.4


# ---- the clock -----------------------------------------------------------------------------------


def test_seconds_of_each_phase():
    clock = Clock(torch.device("cpu"))
    with clock("short"):
        pass
    with clock("long"):
        time.sleep(0.05)
    with clock("short"):
        pass
    assert list(clock.seconds) == ["short", "long"]
    assert 0 <= clock.seconds["short"] < 0.05 <= clock.seconds["long"] < 5
    with clock("long"):
        time.sleep(0.05)
    assert clock.seconds["long"] >= 0.1


def test_peak_memory(device):
    clock = Clock(torch.device(device))
    size = 32 * 2**20
    with clock("work"):
        block = torch.ones(size, dtype=torch.uint8, device=device)
        del block
    peak, of = clock.peak()
    assert peak >= size
    assert of == ("process" if device == "cpu" else device)
    if device == "cuda":
        assert Clock(torch.device(device)).peak()[0] < peak


@NEEDS_5
def test_layers_of_experts_that_are_fused_again():
    """They were targets, and are in the model no more."""
    model = unlike(tiny_mixture("mixtral"))
    before = everything(model)
    with experts_split(model) as fused:
        targets = find_linears(model)
        with unchanged_on_error(model, targets):
            name = "model.layers.0.self_attn.q_proj"
            replace_module(model, name, LowRankLinear(32, 32, 2, bias=False))
            replace_module(model, name, targets[name])
            join_experts(model, fused)
    assert everything(model) == before
