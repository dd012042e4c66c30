"""soco.observing: whose sums layers share, alone and in several processes (test_processes.py)."""

import pytest
import torch
from torch import nn

from soco import observing
from soco.observing import GradientSums, InputSums, _agreed


def seen(*batches, kinds=("gram", "mean", "root")):
    """Sums over forwards: each is a layer to the tensors that it is called with."""
    sums = InputSums(set(), kinds)
    hooks = {}
    for batch in batches:
        for name, inputs in batch.items():
            hook = hooks.setdefault(name, sums.hook(name))
            for x in inputs:
                hook(nn.Identity(), (x,))
        sums.end_forward()
    return sums


def rows(seed, count=3):
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))


def test_layers_on_one_tensor_share_its_sums():
    x, y = rows(0), rows(1)
    sums = seen({"q": [x], "k": [x], "o": [x.clone()]}, {"q": [y], "k": [y], "o": [y.clone()]})
    assert sums.leader == {"q": "q", "k": "q", "o": "o"}
    assert sums.parted == set()
    both = torch.cat([x, y]).double()
    torch.testing.assert_close(sums.sums["q"]["gram"], both.T @ both)
    torch.testing.assert_close(sums.sums["q"]["mean"], both.sum(0))
    assert sums.tokens == {"q": 6, "o": 6}


def test_layers_that_part_are_told():
    x = rows(0)
    assert seen({"q": [x], "k": [x]}, {"q": [x], "k": [x.clone()]}).parted == {"k"}
    assert seen({"q": [x], "k": [x]}, {"q": [x]}).parted == {"k"}


def test_whose_sums_are_shared_by_all():
    """A process that saw neither of two layers has nothing to say; one that saw one of them has."""
    together, neither, other = {"q": "q", "k": "q"}, {}, {"q": "q", "k": "k"}
    assert _agreed("k", [together, neither]) == "q"
    assert _agreed("k", [together, other]) == "k"
    assert _agreed("k", [together, {"q": "q"}]) == "k"
    assert _agreed("q", [together, {"k": "k"}]) == "q"


def test_sums_of_two_processes(monkeypatch):
    """This one saw q and k together, the other one k alone."""
    layers = {"q": nn.Linear(4, 2), "k": nn.Linear(4, 2), "never": nn.Linear(4, 2)}
    x, y = rows(0), rows(1, 5)
    here, there = seen({"q": [x], "k": [x]}), seen({"k": [y]})
    alone = {name: [here.leader, there.leader] for name in ("leaders",)}

    def gathered(value):
        return alone["leaders"] if value == here.leader else [value, {"q": 0, "k": 5}]

    def add_up(*tensors):  # the other process has zeros for q, and comes to k second
        calls.append(tensors)
        if len(calls) == 2:
            for tensor, other in zip(tensors, [held["gram"], held["mean"]], strict=True):
                tensor.add_(other)

    calls, held = [], there.sums["k"]
    monkeypatch.setattr(observing, "gathered", gathered)
    monkeypatch.setattr(observing, "add_up", add_up)
    monkeypatch.setattr(observing, "gathered_tensors", lambda tensor: [tensor])
    here.add_up(layers)
    assert here.leader == {"q": "q", "k": "k"}
    of_q, tokens_of_q = here.result("q", layers["q"])
    of_k, tokens_of_k = here.result("k", layers["k"])
    assert (tokens_of_q, tokens_of_k) == (3, 8)
    torch.testing.assert_close(of_q["gram"], x.double().T @ x.double())
    both = torch.cat([x, y]).double()
    torch.testing.assert_close(of_k["gram"], both.T @ both)
    nothing, tokens = here.result("never", layers["never"])
    assert tokens == 0
    assert not nothing["gram"].any()


def test_what_is_not_finite_is_named():
    layer = nn.Linear(4, 2)
    sums = seen({"q": [torch.full((2, 4), float("inf"))]})
    with pytest.raises(ValueError, match="the inputs of q hold NaN or Inf"):
        sums.result("q", layer)
    gradients = GradientSums({"fisher"})
    gradients.sums["q"] = {"fisher": torch.full((2, 4), float("nan"))}
    with pytest.raises(ValueError, match="the gradients at q hold NaN or Inf"):
        gradients.result("q", layer, 2)
    assert not gradients.result("k", layer, 2)["fisher"].any()
