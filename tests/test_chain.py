"""Blocks that run one at a time give what they give in the model; the rest is in test_streaming."""

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


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_statistics_are_those_of_the_whole_model(name, tmp_path):
    depth: dict = {"n_layer": 3} if name == "gpt2" else {"num_hidden_layers": 3}
    model = tiny_model(name, **depth)
    model.save_pretrained(tmp_path / "model")
    kinds = {"gram", "mean", "abs_mean"}
    wanted = collect(model, find_linears(model), IDS, 2, kinds=kinds)
    stored = StoredModel(tmp_path / "model")
    found = {}
    with (
        opened(tmp_path / "work", {}) as work,
        Chain(stored, work, torch.float32, CPU) as chain,
    ):
        layers = find_linears(stored.model)
        for number, path in enumerate(chain.paths):
            own = {n: module for n, module in layers.items() if inside(n, path)}
            found |= chain.statistics(number, own, IDS, 2, kinds, last=number == 2)
            chain.forget(number)
        assert not list(work.path.glob("hidden-*"))
    assert found.keys() == wanted.keys()
    for layer, each in wanted.items():
        for kind, part in each.parts().items():
            assert torch.equal(found[layer].parts()[kind], part), (layer, kind)
    assert all(parameter.is_meta for parameter in stored.model.parameters())


def test_inside():
    assert inside("model.layers.1.mlp", "model.layers.1")
    assert not inside("model.layers.10.mlp", "model.layers.1")
    assert not inside("model.layers.1", "model.layers.1")
