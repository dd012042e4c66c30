"""Who stays, how much that is, and how decided the scores are: numbers worked by hand."""

import math

import pytest
import torch
from torch import nn

from soco.choosing import (
    choose_components,
    component_values,
    kept_params,
    polarization,
    soft_ratio,
)
from soco.linalg import whitened_svd
from soco.spectral import SpectralLinear

SHAPES = {"wide": (24, 12), "narrow": (12, 24), "square": (12, 12)}
TOTAL = 24 * 12 + 12 * 24 + 12 * 12


def made():
    """Three layers of 12 components each, all alive, all scores 1."""
    torch.manual_seed(0)
    layers = {}
    for name, (rows, columns) in SHAPES.items():
        linear = nn.Linear(columns, rows, bias=False)
        layers[name] = SpectralLinear(linear.weight, None, whitened_svd(linear.weight, None))
    return layers


def alive(layers, **ranks):
    for name, rank in ranks.items():
        layers[name].mask.copy_(torch.arange(12) < rank)


def test_kept_params_by_hand():
    layers = made()
    alive(layers, wide=5, narrow=8, square=5)
    # 5 of (24 + 12); 8 x 36 = 288 is as large as dense, 12 x 24; 5 of (12 + 12)
    assert kept_params(layers) == 5 * 36 + 288 + 5 * 24
    # r (out + in - r): pivoted factors do not hold the identity
    assert kept_params(layers, pivoted=True) == 5 * 31 + 8 * 28 + 5 * 19


def test_a_component_is_worth_half_its_squared_score_times_the_fisher_information():
    layers = made()
    with torch.no_grad():
        layers["wide"].logit.fill_(math.log(0.25 / 0.75))  # 2 sigmoid = 0.5
    fisher = {name: torch.full((12,), 3.0) for name in layers}
    values = component_values(layers, fisher)
    torch.testing.assert_close(values["wide"], torch.full((12,), 0.375))
    torch.testing.assert_close(values["narrow"], torch.full((12,), 1.5))
    scores = component_values(layers, {})
    torch.testing.assert_close(scores["wide"], torch.full((12,), 0.5))
    assert not any(value.requires_grad for value in (*values.values(), *scores.values()))


def test_components_go_by_worth_not_by_order():
    layers = made()
    fisher = {name: torch.arange(12.0, 0, -1) for name in layers}
    fisher["wide"][0] = 0.0  # the largest singular value does not matter to the loss
    orders = choose_components(layers, fisher, TOTAL // 2)
    assert orders["wide"].tolist() == [*range(1, 12), 0]
    for name, layer in layers.items():  # those alive are the first ones of the order
        rank = int(layer.mask.sum())
        assert sorted(orders[name][:rank].tolist()) == layer.mask.nonzero()[:, 0].tolist()
        assert rank
    assert not bool(layers["wide"].mask.all())
    assert TOTAL // 2 - 36 < kept_params(layers) <= TOTAL // 2


def test_what_is_masked_can_come_back():
    layers = made()
    fisher = {name: torch.arange(12.0, 0, -1) for name in layers}
    choose_components(layers, fisher, TOTAL // 4)
    few = {name: layer.mask.clone() for name, layer in layers.items()}
    choose_components(layers, fisher, TOTAL // 2)
    for name, layer in layers.items():
        assert bool((layer.mask | ~few[name]).all())
    assert sum(int(layer.mask.sum() - few[name].sum()) for name, layer in layers.items()) > 0


def test_without_fisher_information_the_scores_decide():
    layers = made()
    with torch.no_grad():
        for layer in layers.values():
            layer.logit.copy_(torch.linspace(-2, 2, 12))
    choose_components(layers, {}, int(0.6 * TOTAL))
    for layer in layers.values():
        rank = int(layer.mask.sum())
        assert layer.mask.tolist() == [False] * (12 - rank) + [True] * rank
    assert 0 < int(layers["wide"].mask.sum()) < 12


def test_soft_ratio_by_hand():
    layers = made()  # scores 1, five temperatures above the threshold; it passes 1 by intent
    expected = (12 * 36 + 12 * 36 + 12 * 24) / TOTAL / (1 + math.exp(-5))
    assert float(soft_ratio(layers, 0.5, 0.1).detach()) == pytest.approx(expected)
    assert expected > 1


def test_polarization_by_hand():
    layers = made()
    with torch.no_grad():
        for layer in layers.values():
            layer.logit.fill_(math.log(0.25 / 0.75))  # 2 sigmoid = 0.5, the threshold
    assert float(polarization(layers, 0.5, 0.1).detach()) == pytest.approx(1.0)
    with torch.no_grad():
        layers["square"].logit.fill_(-20.0)  # a third of all is decided, but for sigmoid(-5)
    low = 4 / (1 + math.exp(5)) / (1 + math.exp(-5))
    expected = (2 + low) / 3
    assert float(polarization(layers, 0.5, 0.1).detach()) == pytest.approx(expected, rel=1e-5)
