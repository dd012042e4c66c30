"""What loops share: batches in order, models frozen and given back as they were."""

from typing import Any, cast

import pytest
import torch
from torch import nn

from soco.objectives import Objective
from soco.steps import (
    Step,
    checkpointed,
    dense_outputs,
    endless_batches,
    frozen,
    half_cosine,
)


def test_every_window_comes_once_before_any_comes_again():
    windows = torch.arange(7)[:, None]
    batches = endless_batches(windows, 3, torch.Generator().manual_seed(0))
    rounds = [torch.cat([next(batches), next(batches)])[:, 0].tolist() for _ in range(4)]
    assert all(len(set(each)) == 6 for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1
    again = endless_batches(windows, 3, torch.Generator().manual_seed(0))
    assert next(again)[:, 0].tolist() == rounds[0][:3]


def test_frozen_gives_modes_and_flags_back():
    first, second = nn.Sequential(nn.Linear(2, 2), nn.Dropout()), nn.Linear(2, 2).eval()
    first[0].bias.requires_grad_(False)

    def fail():
        with frozen(first, second):
            assert not any(part.training for part in first.modules())
            assert not any(p.requires_grad for p in (*first.parameters(), *second.parameters()))
            first[0].bias.requires_grad_(True)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert all(part.training for part in first.modules())
    assert not second.training
    assert [p.requires_grad for p in first.parameters()] == [True, False]
    assert all(p.requires_grad for p in second.parameters())


def test_checkpointed_computes_again_in_backward_and_ends():
    calls = []

    class Block(nn.Linear):
        def forward(self, input):
            calls.append(1)
            return super().forward(input).tanh()

    block = Block(3, 3)
    x = torch.randn(2, 3, requires_grad=True)
    with checkpointed([block]):
        y = block(x).sum()
        assert len(calls) == 1
        y.backward()
        assert len(calls) == 2
    assert "forward" not in block.__dict__
    seen = x.grad
    x.grad = None
    block(x).sum().backward()
    assert seen is not None
    assert x.grad is not None
    torch.testing.assert_close(x.grad, seen)


def test_a_step_has_no_held_out_loss_unless_measured():
    assert Step("coarse", 1, 2, 0.5, 0.5, 1.0).held_out is None


class Layer:
    dense = False


class Watching:
    """An objective that notes whether its layers were dense and gradients were off."""

    def __init__(self, layers, fails=False):
        self.layers, self.fails = layers, fails

    def outputs(self, model, ids):
        if self.fails:
            raise RuntimeError("in the middle")
        dense = all(layer.dense for layer in self.layers)
        return torch.tensor([dense, torch.is_grad_enabled()])


def test_dense_outputs_switch_and_switch_back():
    layers = [Layer(), Layer()]
    seen = dense_outputs(nn.Identity(), iter(layers), cast(Any, Watching(layers)), torch.zeros(1))
    assert seen.tolist() == [True, False]
    assert not any(layer.dense for layer in layers)


def test_dense_outputs_switch_back_after_an_error():
    layers = [Layer()]
    objective = cast(Objective, Watching(layers, fails=True))
    with pytest.raises(RuntimeError, match="in the middle"):
        dense_outputs(nn.Identity(), layers, objective, torch.zeros(1))
    assert not layers[0].dense


def test_half_cosine():
    assert [half_cosine(step, 4, 1.0, 0.2) for step in (0, 2, 4)] == pytest.approx([1.0, 0.6, 0.2])
