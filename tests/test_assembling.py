"""soco.assembling: what became of the layers, with what stays, is a model that loads."""

from typing import Any

import pytest
import torch

import soco
from soco.assembling import Assembly, Outcome, Piece
from soco.checkpoint import mark_compressed
from soco.linalg import Factors
from soco.stored import StoredModel
from soco.surgery import bias_of, find_linears, shape_of, weight_of
from test_streaming import dense


def made(name, rank, shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rank + len(name))
    up, down = (torch.randn(size, rank, generator=generator).to(dtype) for size in shape)
    return Factors(up, down.mT.contiguous())


@torch.no_grad()
def product_of(layer):
    """The weight that a layer multiplies with."""
    found = layer(torch.eye(layer.in_features))
    return (found if layer.bias is None else found - layer.bias).T


def written(tmp_path, pieces, pivoted=False, dtype=torch.float32):
    """The folder that comes of pieces by layer, loaded."""
    stored = StoredModel(tmp_path / "dense")
    targets = find_linears(stored.model)
    ranks = {n: p.weight.down.shape[0] for n, p in pieces.items() if isinstance(p.weight, Factors)}
    biased = {n for n in ranks if pieces[n].bias is not None and bias_of(targets[n]) is None}
    outcome = Outcome(ranks, lambda name: pieces.get(name, Piece()), frozenset(biased))
    groups = [(name,) for name in targets]
    assembly = Assembly(stored, targets, {}, groups, outcome, pivoted, dtype)
    layers = assembly.install()
    assert {n: layer.rank for n, layer in layers.items()} == ranks
    mark_compressed(stored.model, ranks, {}, biased)
    (tmp_path / "out").mkdir()
    assembly.write(tmp_path / "out", False)
    return soco.load(tmp_path / "out")


@pytest.mark.parametrize("pivoted", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_factors_weights_and_biases(name, pivoted, tmp_path):
    """A layer with factors, one with other numbers, one with a bias that is another or new."""
    model = dense(tmp_path / "dense", name)
    targets = find_linears(model)
    first, second, third, *rest = targets
    rows, columns = shape_of(targets[second])
    bias = torch.arange(float(shape_of(targets[third])[0]))
    pieces: dict[str, Any] = {
        first: Piece(made(first, 3, shape_of(targets[first])), bias_of(targets[first])),
        second: Piece(torch.arange(float(rows * columns)).view(rows, columns) / 7),
        third: Piece(made(third, 4, shape_of(targets[third])), bias),
    }
    places: dict[str, Any] = dict(written(tmp_path, pieces, pivoted).named_modules())
    for n, layer in places.items():
        if n in (first, third):
            torch.testing.assert_close(
                product_of(layer), pieces[n].weight.product(), rtol=1e-4, atol=1e-4
            )
        elif n == second:
            assert torch.equal(weight_of(layer), pieces[n].weight)
        elif n in rest:
            assert torch.equal(weight_of(layer), weight_of(targets[n]))
        if n in (first, second, *rest):
            expected = bias_of(targets[n])
            assert (layer.bias is None) if expected is None else torch.equal(layer.bias, expected)
    assert torch.equal(places[third].bias, bias)


def test_rounded_to_what_was_computed_in(tmp_path):
    """As layers in memory are, which hold their factors in that."""
    model = dense(tmp_path / "dense")
    name, layer = next(iter(find_linears(model).items()))
    factors = made(name, 2, shape_of(layer))
    found = written(tmp_path, {name: Piece(factors)}, dtype=torch.bfloat16).state_dict()
    for part, value in factors._asdict().items():
        assert torch.equal(found[f"{name}.{part}.weight"], value.bfloat16().float())


def test_what_is_too_large_to_be_stored_is_named(tmp_path):
    """Computed in float32, stored in float16."""
    model = dense(tmp_path / "dense", dtype=torch.float16)
    name, layer = next(iter(find_linears(model).items()))
    factors = made(name, 2, shape_of(layer))
    with pytest.raises(ValueError, match=rf"{name}.up.weight holds numbers that are too large"):
        written(tmp_path, {name: Piece(Factors(factors.up * 1e6, factors.down))})
