"""Each basis' theorem: what is dropped is what the error is, in the measure that it names."""

import pytest
import torch

from soco.linalg import whitened_svd
from soco.methods import FisherWeighted, Plain, Scaled, TwoSided, Whitened
from soco.methods.protocol import Basis


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHT = random(7, 6)
INPUTS = torch.logspace(-1, 1, 6, dtype=torch.float64)[:, None] * random(6, 50, seed=1)
GRADIENTS = torch.logspace(1, -1, 7, dtype=torch.float64)[:, None] * random(7, 50, seed=2)
STATS = {
    "gram": INPUTS @ INPUTS.T / 50,
    "root": torch.linalg.qr(INPUTS.T, mode="r").R / 50**0.5,
    "abs_mean": INPUTS.abs().mean(1),
    "grad_gram": GRADIENTS @ GRADIENTS.T / 50,
    "fisher": random(7, 6, seed=3).square(),
}
BASES = [
    Plain(), Whitened(), Whitened("eigen"), Whitened("qr"), Scaled(), FisherWeighted(),
    FisherWeighted("output"), TwoSided(), TwoSided(0.1, 0.3),
]  # fmt: skip


def loss(basis, change):
    """The error of a change of the weight in the basis' own measure, written out."""
    if isinstance(basis, Plain):
        return change.square().sum()
    if isinstance(basis, Whitened):
        return (change @ INPUTS).square().sum() / 50
    if isinstance(basis, Scaled):
        return (change * (STATS["abs_mean"] ** 0.5 + 1e-6)).square().sum()
    if isinstance(basis, FisherWeighted):
        if basis.side == "input":
            return (STATS["fisher"].mean(0) * change.square()).sum()
        return (STATS["fisher"].mean(1)[:, None] * change.square()).sum()
    A, B = STATS["gram"], STATS["grad_gram"]
    A = (1 - basis.input_shrinkage) * A + basis.input_shrinkage * A.diagonal().mean() * torch.eye(6)
    B = (1 - basis.output_shrinkage) * B + basis.output_shrinkage * B.diagonal().mean() * torch.eye(
        7
    )
    return torch.trace(change.T @ B @ change @ A)


@pytest.mark.parametrize("basis", BASES, ids=str)
def test_the_loss_is_the_dropped_tail_and_no_other_factors_do_better(basis):
    assert isinstance(basis, Basis)
    assert basis.needs <= STATS.keys()
    known = {name: STATS[name] for name in basis.needs}
    spectrum = basis.spectrum(WEIGHT, known, name="w")
    torch.testing.assert_close((spectrum.up * spectrum.sigma) @ spectrum.down, WEIGHT)
    for rank in (1, 3, 5):
        cut = spectrum.truncate(rank)
        found = loss(basis, WEIGHT - cut.product())
        torch.testing.assert_close(found, spectrum.sigma[rank:].square().sum(), rtol=1e-5, atol=0)
        for seed in range(3):
            up = cut.up + 1e-3 * random(7, rank, seed=seed)
            assert loss(basis, WEIGHT - up @ cut.down) > found


def test_bases_are_keys():
    assert (
        len({Whitened(), Whitened("output"), Whitened("qr"), Scaled(0.5), Scaled(), Plain()}) == 4
    )


def test_only_the_two_sided_one_measures_the_loss():
    assert [basis for basis in BASES if basis.in_loss] == [TwoSided(), TwoSided(0.1, 0.3)]


def test_no_scaling_is_the_plain_svd():
    sigma = Scaled(alpha=0.0).spectrum(WEIGHT, STATS, name="w").sigma
    torch.testing.assert_close(sigma, torch.linalg.svdvals(WEIGHT) * (1 + 1e-6))


def test_a_layer_that_saw_nothing_has_its_plain_components():
    for basis in (*BASES[1:4], TwoSided(), TwoSided(0.1, 0.3), Scaled(), FisherWeighted()):
        nothing = {name: torch.zeros_like(STATS[name]) for name in basis.needs}
        found = basis.spectrum(WEIGHT, nothing, name="w").truncate(2).product()
        wanted = whitened_svd(WEIGHT, None).truncate(2).product()
        torch.testing.assert_close(found, wanted, msg=str(basis))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: Whitened("cholesky"),  # type: ignore[arg-type]
            'route must be "output", "eigen" or "qr"',
        ),
        (lambda: Scaled(-1.0), "alpha must be at least 0, got -1"),
        (
            lambda: FisherWeighted("both"),  # type: ignore[arg-type]
            'side must be "input" or "output"',
        ),
        (lambda: TwoSided(1.0), "input_shrinkage must be from 0 to below 1, got 1"),
        (lambda: TwoSided(0, -0.1), "output_shrinkage must be from 0 to below 1"),
    ],
)
def test_refusals(make, text):
    with pytest.raises(ValueError, match=text):
        make()
