"""What training loops share."""

from typing import Any, cast

import pytest
import torch
from torch import nn

from soco.objectives import Objective
from soco.stepping import batches, dense_outputs, half_cosine


def test_batches_take_every_window_once_a_round():
    windows = torch.arange(14).reshape(7, 2)
    stream = batches(windows, 3, torch.Generator().manual_seed(0))
    for _ in range(3):
        round_ = torch.cat([next(stream), next(stream)])
        assert len({int(row[0]) for row in round_}) == 6


def test_same_generator_same_order():
    windows = torch.arange(20).reshape(10, 2)
    first, second = (batches(windows, 4, torch.Generator().manual_seed(3)) for _ in range(2))
    for _ in range(5):
        assert torch.equal(next(first), next(second))


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
