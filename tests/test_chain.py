"""Blocks that run one at a time give what they give in the model; the rest is in test_streaming."""

from contextlib import contextmanager

import pytest
import torch

from soco.calibration import collect
from soco.chain import Chain, inside
from soco.stored import StoredModel
from soco.surgery import find_linears
from soco.workfolder import opened
from tiny_models import tiny_model

IDS = torch.randint(3, 96, (5, 12), generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")


def deep(name, folder):
    """A model of three blocks, also in a folder."""
    depth: dict = {"n_layer": 3} if name == "gpt2" else {"num_hidden_layers": 3}
    model = tiny_model(name, **depth)
    model.save_pretrained(folder)
    return model


@contextmanager
def chained(folder, batch_size=2):
    """A chain, and the layers of each of its blocks."""
    stored = StoredModel(folder / "model")
    with (
        opened(folder / "work", {}) as work,
        Chain(stored, work, IDS, batch_size, torch.float32, CPU) as chain,
    ):
        layers = find_linears(stored.model)
        yield chain, [{n: m for n, m in layers.items() if inside(n, p)} for p in chain.paths]
        chain.forget(len(chain.paths))
        chain.forget(0)
        assert not list(work.path.glob("*.pt"))
    assert all(parameter.is_meta for parameter in stored.model.parameters())


def check_same(found, wanted):
    assert found.keys() == wanted.keys()
    for layer, each in wanted.items():
        assert (found[layer].tokens, found[layer].sequences) == (each.tokens, each.sequences)
        for kind, part in each.parts().items():
            assert torch.equal(found[layer].parts()[kind], part), (layer, kind)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_statistics_are_those_of_the_whole_model(name, tmp_path):
    model = deep(name, tmp_path / "model")
    kinds = {"gram", "mean", "abs_mean"}
    found = {}
    with chained(tmp_path) as (chain, layers):
        for number, own in enumerate(layers):
            found |= chain.statistics(number, own, kinds, last=number == 2)
            chain.forget(number)
    check_same(found, collect(model, find_linears(model), IDS, 2, kinds=kinds))


@pytest.mark.parametrize("kinds", [{"grad_gram", "fisher"}, {"sampled_grad_gram"}])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_gradients_are_those_of_the_whole_model(name, kinds, tmp_path):
    model = deep(name, tmp_path / "model")
    found = {}
    with chained(tmp_path, 1) as (chain, layers):
        for number in range(3):
            chain.pass_on(number)
        chain.turn(7, kinds)
        for number in (2, 1, 0):
            found |= chain.back(number, layers[number], kinds)
            chain.forget(number + 1)
    wanted = collect(model, find_linears(model), IDS, 1, kinds=kinds, seed=7)
    check_same({name: found[name] for name in wanted}, wanted)


def test_inside():
    assert inside("model.layers.1.mlp", "model.layers.1")
    assert not inside("model.layers.10.mlp", "model.layers.1")
    assert not inside("model.layers.1", "model.layers.1")
