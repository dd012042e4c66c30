"""soco.linalg.halves: what products of bfloat16 lose, and that subspace iteration does not mind."""

import pytest
import torch

from soco.linalg import halves, randomized, randomized_svd, subspace
from soco.linalg.halves import Halves

SIDE = 160
PLACES = torch.arange(1, SIDE + 1, dtype=torch.float64)
SPECTRA = {
    "like a weight": PLACES**-0.5,
    "three decades": 1e3 ** (-PLACES / SIDE),
    "six decades": 1e6 ** (-PLACES / SIDE),
    "outliers": torch.where(PLACES < 5, 300.0, 1.0) * PLACES**-0.3,
    "step": torch.where(PLACES < 40, 1.0, 0.1),
}


def normal(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def with_spectrum(sigma):
    left = torch.linalg.qr(normal(SIDE, SIDE, dtype=torch.float64, seed=1)).Q
    right = torch.linalg.qr(normal(SIDE, SIDE, dtype=torch.float64, seed=2)).Q
    return (left * sigma @ right.mT).float()


@pytest.fixture
def on_the_cpu(monkeypatch):
    """Products as on a GPU, counted."""
    made = []
    times = Halves.__matmul__

    def counted(self, other):
        made.append(other.high.shape)
        return times(self, other)

    monkeypatch.setattr(randomized, "pay", lambda matrices: matrices.dtype == torch.float32)
    monkeypatch.setattr(Halves, "__matmul__", counted)
    return made


def test_halves_hold_a_number_to_seventeen_bits():
    numbers = normal(1000) * torch.logspace(-20, 20, 1000)
    high, low = (part.double() for part in Halves.of(numbers))
    assert ((high + low - numbers) / numbers).abs().max() <= 2**-17
    assert ((high - numbers) / numbers).abs().max() > 2**-10  # and one alone does not


def test_by_hand():
    """1 + 2^-9 is no number of bfloat16; its square is 1 + 2^-8 + 2^-18, without the last one."""
    number = torch.tensor([[[1 + 2**-9]]])
    assert (Halves.of(number) @ Halves.of(number)).item() == 1 + 2**-8


@pytest.mark.parametrize("shapes", [((2, 30, 50), (2, 50, 7)), ((1, 1, 1), (1, 1, 1))], ids=str)
def test_products_are_nearly_those_of_float32(shapes):
    left, right = (normal(*shape, seed=i) for i, shape in enumerate(shapes))
    found = Halves.of(left) @ Halves.of(right)
    assert found.dtype == torch.float32
    most = left.double().abs() @ right.double().abs()
    assert ((found - left.double() @ right.double()).abs() <= 2**-15 * most).all()
    transposed = Halves.of(right).mT @ Halves.of(left).mT
    torch.testing.assert_close(transposed.mT, found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("rank", [20, 80])
def test_a_randomized_decomposition_is_as_good(name, rank, on_the_cpu, monkeypatch):
    weight = with_spectrum(SPECTRA[name])
    least = SPECTRA[name].sort(descending=True).values[rank:].norm()

    def excess():
        (U, S, Vh), estimate = randomized_svd(weight, rank)
        error = (weight.double() - U.double() * S.double() @ Vh.double()).norm()
        return float(error / least - 1), float(estimate)

    found, estimate = excess()
    assert len(on_the_cpu) == 4  # two of four iterations
    monkeypatch.setattr(randomized, "pay", lambda matrices: False)
    plain, _ = excess()
    assert len(on_the_cpu) == 4
    assert found <= 1.01 * plain + 1e-6
    assert found < estimate


def test_a_subspace_is_as_good(on_the_cpu, monkeypatch):
    weight = with_spectrum(SPECTRA["like a weight"])
    found = subspace(weight, 40).captured
    assert len(on_the_cpu) == 4
    monkeypatch.setattr(randomized, "pay", lambda matrices: False)
    assert found == pytest.approx(subspace(weight, 40).captured, rel=1e-5)


def test_few_iterations_and_float64_are_exact(on_the_cpu):
    weight = with_spectrum(SPECTRA["step"])
    randomized_svd(weight, 20, power_iterations=2)
    randomized_svd(weight.double(), 20)
    assert on_the_cpu == []


def test_where_they_pay(monkeypatch):
    capability = [(7, 5), (8, 0), (9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability.pop(0))
    with torch._subclasses.FakeTensorMode():
        matrices = torch.empty(1, 8, 8, device="cuda")
        assert [halves.pay(matrices) for _ in range(3)] == [False, True, True]
        assert not halves.pay(torch.empty(1, 8, 8, device="cuda", dtype=torch.float64))
    assert not halves.pay(normal(1, 8, 8))


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_products_on_a_gpu_are_those_of_the_cpu(device):
    left, right = normal(2, 64, 200), normal(2, 200, 24, seed=1)
    expected = Halves.of(left) @ Halves.of(right)
    found = Halves.of(left.to(device)) @ Halves.of(right.to(device))
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)
