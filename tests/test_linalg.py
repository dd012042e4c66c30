"""soco.linalg against torch.linalg and against the theorems in its docstrings."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.linalg import LinAlgError  # pyright: ignore[reportAttributeAccessIssue]

from soco import linalg, ops
from soco.linalg import (
    Factors,
    Spectrum,
    exact,
    parallel,
    randomized,
    randomized_svd,
    subspace,
    truncated,
    truncated_svd,
    whitened_svd,
)

SHAPES = [(8, 5), (5, 8), (6, 6), (1, 7), (7, 1), (1, 1), (64, 33)]
BATCHES = [(), (3,), (2, 3)]
METHODS = ["exact", "randomized"]


def normal(*shape, device="cpu", dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def with_spectrum(shape, sigma):
    """A float64 matrix of this shape with these singular values."""
    left = torch.linalg.qr(normal(shape[0], len(sigma), seed=1)).Q
    right = torch.linalg.qr(normal(shape[1], len(sigma), seed=2)).Q
    return left * sigma @ right.mT


def product(svd):
    return svd.U * svd.S[..., None, :] @ svd.Vh


def away_from_orthonormal(columns):
    identity = torch.eye(columns.shape[-1], dtype=columns.dtype, device=columns.device)
    return (columns.mT @ columns - identity).abs().max().item() if identity.numel() else 0.0


def output_error(difference, gram):
    return (difference @ gram * difference).sum().clamp(min=0).sqrt()


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small matrices: on a busy machine, threads cost more waiting than they give."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["as it is", "as if it were large"])
def size(request, monkeypatch):
    """Small matrices as they are, and by the ways of large ones."""
    if request.param == "as if it were large":
        monkeypatch.setattr(exact, "SMALL", 0)
    return request.param


@pytest.fixture
def large(monkeypatch):
    """Small matrices go the ways of large ones."""
    monkeypatch.setattr(exact, "SMALL", 0)


# ---- truncated_svd ------------------------------------------------------------------------------


@pytest.mark.usefixtures("size")
def test_by_hand(device):
    weight = torch.tensor([[0.0, 0.0, -2.0], [3.0, 0.0, 0.0]], device=device)
    U, S, Vh = (part.cpu() for part in truncated_svd(weight, 2))
    torch.testing.assert_close(S, torch.tensor([3.0, 2.0]))
    torch.testing.assert_close(U, torch.eye(2).flip(1), rtol=0, atol=1e-6)
    expected = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])
    torch.testing.assert_close(Vh, expected, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("size")
@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_agrees_with_torch_at_every_rank(method, shape, batch, device):
    weight = normal(*batch, *shape, device=device)
    values = torch.linalg.svdvals(weight)
    for rank in {0, 1, min(shape) // 2, min(shape)}:
        svd = truncated_svd(weight, rank, method, oversampling=40.0)  # all columns: no excess
        assert svd.U.shape == (*batch, shape[0], rank)
        assert svd.Vh.shape == (*batch, rank, shape[1])
        torch.testing.assert_close(svd.S, values[..., :rank], rtol=1e-9, atol=1e-9)
        assert away_from_orthonormal(svd.U) < 1e-12
        assert away_from_orthonormal(svd.Vh.mT) < 1e-12
        loss = torch.linalg.matrix_norm(weight - product(svd))
        torch.testing.assert_close(loss, values[..., rank:].norm(dim=-1), rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("size")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_dtypes(method, dtype, device):
    weight = normal(12, 9, device=device, dtype=dtype)
    svd = truncated_svd(weight, 9, method)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert {part.dtype for part in svd} == {wanted}
    torch.testing.assert_close(product(svd), weight.to(wanted), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_strides_do_not_matter(method, device):
    weight = normal(6, 5, 4, device=device)
    for view in (weight.permute(2, 0, 1), weight[::2, 1:], weight[0].mT):
        for got, wanted in zip(
            truncated_svd(view, 3, method),
            truncated_svd(view.contiguous(), 3, method),
            strict=True,
        ):
            torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(0, 0), (0, 4), (4, 0), (0, 3, 4), (2, 0, 4)], ids=str)
def test_empty(method, shape, device):
    svd = truncated_svd(torch.zeros(shape, device=device), 0, method)
    assert product(svd).shape == shape


@pytest.mark.usefixtures("size")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("true_rank", [0, 1, 3])
def test_rank_deficient_columns_are_completed(method, true_rank, device):
    weight = normal(10, true_rank, device=device) @ normal(true_rank, 7, device=device, seed=1)
    svd = truncated_svd(weight, 7, method)
    assert away_from_orthonormal(svd.U) < 1e-12
    assert away_from_orthonormal(svd.Vh.mT) < 1e-12
    torch.testing.assert_close(product(svd), weight)
    assert svd.S[true_rank:].abs().max() < 1e-12


@pytest.mark.usefixtures("size")
@pytest.mark.parametrize("method", METHODS)
def test_one_bad_matrix_leaves_its_batch_alone(method, device):
    weight = normal(3, 8, 6, device=device)
    weight[1] = 0
    together = truncated_svd(weight, 4, method)
    for i in range(3):
        for got, wanted in zip(together, truncated_svd(weight[i], 4, method), strict=True):
            torch.testing.assert_close(got[i], wanted)


@pytest.mark.usefixtures("size")
@pytest.mark.parametrize("decades", [3, 5, 7, 9, 13])
@pytest.mark.parametrize("shape", [(60, 40), (40, 60)], ids=str)
def test_ill_conditioned(shape, decades, device):
    sigma = torch.logspace(0, -decades, 40, dtype=torch.float64)
    weight = with_spectrum(shape, sigma).to(device)
    svd = truncated_svd(weight, 40)
    assert away_from_orthonormal(svd.U) < 1e-13
    assert away_from_orthonormal(svd.Vh.mT) < 1e-13
    torch.testing.assert_close(svd.S.cpu(), sigma, rtol=1e-7, atol=2e-15)
    torch.testing.assert_close(product(svd), weight, rtol=0, atol=1e-9)


@pytest.fixture
def stable_calls(monkeypatch):
    """How many matrices each call gave to the stable route."""
    calls = []
    route = exact.directly

    def counted(matrices, rank, name):
        calls.append(len(matrices))
        return route(matrices, rank, name)

    monkeypatch.setattr(exact, "directly", counted)
    return calls


@pytest.mark.usefixtures("large")
def test_only_what_squaring_would_lose_takes_the_stable_route(stable_calls, device):
    sigma = torch.logspace(0, -8, 9, dtype=torch.float64)  # a decade each, SQUARING_LIMIT is 1e-6
    weight = with_spectrum((12, 20), sigma).to(device)
    truncated_svd(weight, 6)
    assert stable_calls == []
    truncated_svd(weight, 8)
    assert stable_calls == [1]
    truncated_svd(torch.stack([weight, normal(12, 20, device=device), weight]), 8)
    assert stable_calls == [1, 2]


@pytest.mark.usefixtures("large")
def test_failed_eigensolver_takes_the_stable_route(stable_calls, monkeypatch):
    def fails(_):
        raise LinAlgError("did not converge")

    weight = normal(5, 4)
    wanted = truncated_svd(weight, 3)
    monkeypatch.setattr(torch.linalg, "eigh", fails)
    for got, part in zip(truncated_svd(weight, 3), wanted, strict=True):
        torch.testing.assert_close(got, part)
    assert stable_calls == [1]
    monkeypatch.setattr(torch.linalg, "svd", lambda *_, **__: fails(None))
    with pytest.raises(LinAlgError, match="no SVD of q converged"):
        truncated_svd(weight, 3, name="q")


@pytest.mark.usefixtures("size")
@pytest.mark.parametrize("exponent", [-150, -60, 60, 150])
def test_extreme_scales(exponent, device):
    weight = normal(6, 8, device=device)
    svd = truncated_svd(weight * 10.0**exponent, 6)
    torch.testing.assert_close(svd.S * 10.0**-exponent, truncated_svd(weight, 6).S)


def test_signs_are_the_same_on_every_route(device, monkeypatch):
    weight = with_spectrum((30, 20), torch.linspace(2, 1, 20, dtype=torch.float64)).to(device)
    small = truncated_svd(weight, 20)
    random = truncated_svd(weight, 20, "randomized")
    monkeypatch.setattr(exact, "SMALL", 0)
    squared = truncated_svd(weight, 20)
    stable = exact.directly(weight[None], 20, "weight")
    U, Vh = ops.fix_signs(stable.U[0], stable.Vh[0])
    for other in (random, squared, linalg.SVD(U, stable.S[0], Vh)):
        torch.testing.assert_close(other.U, small.U)
        torch.testing.assert_close(other.Vh, small.Vh)
    assert (small.U.gather(0, small.U.abs().argmax(0, keepdim=True)) > 0).all()


def test_randomized_excess_error(device):
    """A flat spectrum is the hard case: still below one percent."""
    sigma = torch.linspace(1, 0.1, 256, dtype=torch.float64)
    sigma[:4] *= 8
    weight = with_spectrum((256, 320), sigma).to(device, torch.float32)
    svd = truncated_svd(weight, 64, "randomized")
    best = sigma[64:].norm()
    assert 1 < (weight - product(svd)).norm().item() / best < 1.01
    assert away_from_orthonormal(svd.U) < 1e-6
    again = truncated_svd(weight, 64, "randomized")
    assert all(torch.equal(a, b) for a, b in zip(svd, again, strict=True))
    other = truncated_svd(weight, 64, "randomized", seed=1)
    assert not torch.equal(svd.S, other.S)


def test_more_power_iterations_come_closer():
    sigma = torch.linspace(1, 0.1, 96, dtype=torch.float64)
    weight = with_spectrum((96, 128), sigma)
    errors = [
        (weight - product(truncated_svd(weight, 24, "randomized", power_iterations=q))).norm()
        for q in (0, 1, 4, 16)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < (1 + 1e-3) * sigma[24:].norm()


def test_range_falls_back_to_householder(monkeypatch):
    """An exactly rank-deficient sketch breaks Cholesky, which must not show."""
    weight = torch.zeros(2, 12, 10, dtype=torch.float64)
    weight[0, 0, 0] = 3
    weight[1] = normal(12, 10)
    used = []
    householder = randomized.householder_qr
    monkeypatch.setattr(
        randomized, "householder_qr", lambda y, last=False: (used.append(len(y)), householder(y))[1]
    )
    svd = truncated_svd(weight, 4, "randomized")
    assert set(used) == {1}
    torch.testing.assert_close(svd.S[0], torch.tensor([3.0, 0, 0, 0], dtype=torch.float64))
    assert away_from_orthonormal(svd.U) < 1e-12


def test_columns_that_depend_up_to_rounding_fall_back(monkeypatch):
    """Cholesky gets through, and leaves a column of zeros: found by the test of any matrix."""
    row = [-0.18629, -0.523126, 0.113495, -0.415922, 0.415212]
    weight = torch.tensor([row, row])
    for seed in range(20):
        svd = truncated_svd(weight, 2, "randomized", oversampling=40.0, seed=seed)
        assert away_from_orthonormal(svd.U) < 1e-6


def test_autocast_does_not_reach_the_range_finder():
    weight = normal(64, 48, dtype=torch.float32)
    wanted = truncated_svd(weight, 8, "randomized")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = truncated_svd(weight, 8, "randomized")
    assert torch.equal(got.S, wanted.S)


def test_parameters_give_no_gradient():
    weight = torch.nn.Parameter(normal(4, 3))
    assert not truncated_svd(weight, 2).U.requires_grad
    assert not whitened_svd(weight, torch.eye(3)).up.requires_grad


def test_sketch_is_the_op(monkeypatch):
    """The range finder draws nothing itself: all its randomness is the op's."""
    seeds = []
    sketch = ops.gaussian_sketch

    def recorded(weight, columns, seed):
        seeds.append((columns, seed))
        return sketch(weight, columns, seed)

    monkeypatch.setattr(ops, "gaussian_sketch", recorded)
    truncated_svd(normal(100, 90), 60, "randomized", seed=7)
    truncated_svd(normal(100, 90), 4, "randomized")
    truncated_svd(normal(100, 90), 4, "randomized", oversampling=0)
    assert seeds == [(75, 7), (12, 0), (4, 0)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", METHODS)
def test_nan_is_refused_before_any_solver(value, method, monkeypatch):
    monkeypatch.setattr(torch.linalg, "eigh", None)
    monkeypatch.setattr(torch.linalg, "svd", None)
    weight = normal(4, 3)
    weight[1, 2] = value
    message = r"h\.0\.q \(4, 3\) holds NaN or Inf in 1 of its entries, the first at \(1, 2\)"
    with pytest.raises(ValueError, match=message):
        truncated_svd(weight, 2, method, name="h.0.q")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=message):
        whitened_svd(weight, None, name="h.0.q")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 4}, "rank must be from 0 to 3 for weight, got 4"),
        ({"rank": -1}, "rank must be from 0 to 3 for weight, got -1"),
        ({"rank": 1.5}, "rank must be a whole number, got 1.5"),
        ({"method": "fast"}, "method must be exact, randomized or auto, got 'fast'"),
        ({"oversampling": -0.1}, "oversampling must be a finite number, at least 0, got -0.1"),
        ({"power_iterations": -1}, "power_iterations must be at least 0, got -1"),
        ({"weight": torch.zeros(3)}, r"weight must be \(..., out, in\), got \(3,\)"),
        ({"weight": torch.zeros(3, 3).int()}, "weight must be floating point, got torch.int32"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        truncated_svd(**{"weight": torch.zeros(3, 4), "rank": 1, **arguments})


# ---- the ways of the exact one ------------------------------------------------------------------

SIDE = 160
SINGLE_EXCESS = exact.SINGLE_EXCESS
PLACES = torch.arange(1, SIDE + 1, dtype=torch.float64)
SPECTRA = {
    "flat": torch.linspace(1, 0.9, SIDE, dtype=torch.float64),
    "like weights": PLACES**-0.5,
    "falling": 1 / PLACES,
    "steep": PLACES**-2,
    "condition 1e3": 1e3 ** -((PLACES - 1) / SIDE),
    "condition 1e6": 1e6 ** -((PLACES - 1) / SIDE),
    "outliers": torch.where(PLACES < 4, 30.0, 1.0) * PLACES**-0.3,
    "large outliers": torch.where(PLACES < 4, 1000.0, 1.0) * PLACES**-0.3,
    "a step": torch.where(PLACES < 40, 1.0, 0.01 * PLACES**-0.1),
    "equal ones": torch.where(PLACES < 80, 1.0, 0.5),
}
SINGLE = {
    "flat",
    "like weights",
    "falling",
    "condition 1e3",
    "condition 1e6",
    "equal ones",
}  # at rank 40


def excess(weight, svd, rank):
    """By how much the error of a truncation is above the least one, in float64."""
    weight = weight.double()
    least = torch.linalg.svdvals(weight)[rank:].norm()
    wide = linalg.SVD(*(part.double() for part in svd))
    return float((weight - product(wide)).norm() / least - 1)


@pytest.mark.parametrize("shape", [(SIDE, SIDE), (SIDE, 300), (300, SIDE)], ids=str)
@pytest.mark.parametrize("name", SPECTRA)
def test_whatever_the_spectrum_nothing_is_lost(name, shape, device):
    for rank in (10, 40, 120):
        weight = with_spectrum(shape, SPECTRA[name]).to(device, torch.float32)
        svd = truncated_svd(weight, rank)
        assert excess(weight, svd, rank) < 1e-6
        assert away_from_orthonormal(svd.U) < 1e-5
        assert away_from_orthonormal(svd.Vh.mT) < 1e-5
        values = torch.linalg.svdvals(weight.double())[:rank]
        torch.testing.assert_close(svd.S.double(), values, rtol=1e-5, atol=1e-7 * float(values[0]))


@pytest.mark.parametrize("name", SPECTRA)
def test_the_bound_of_single_precision_holds(name, device, monkeypatch):
    """What a Gram matrix in float32 costs is below what it says, where that is little."""
    monkeypatch.setattr(exact, "SINGLE_EXCESS", 1.0)  # nothing is refused
    for shape in ((SIDE, SIDE), (SIDE, 300)):
        weight = with_spectrum(shape, SPECTRA[name]).to(device, torch.float32)
        for rank in (10, 40, 120):
            values = torch.linalg.eigvalsh(weight @ weight.mT).flip(-1)
            if values[rank - 1] < exact.SINGLE_LIMIT**2 * values[0]:
                continue
            bound = float(exact.single_excess(values, rank))
            if bound > 2 * SINGLE_EXCESS:
                continue
            svd, _ = exact._by_gram(weight[None], rank)
            assert svd is not None
            found = excess(weight, linalg.SVD(*(part[0] for part in svd)), rank)
            assert found < max(bound, 1e-9)


def test_the_way_taken(monkeypatch, device):
    """Float32 where the eigenvalues allow it, else float64; so if its products may be less."""
    dtypes = []
    by_gram = exact._by_gram
    monkeypatch.setattr(
        exact, "_by_gram", lambda a, rank: (dtypes.append(a.dtype), by_gram(a, rank))[1]
    )
    for name, sigma in SPECTRA.items():
        dtypes.clear()
        truncated_svd(with_spectrum((SIDE, SIDE), sigma).to(device, torch.float32), 40)
        wanted = [torch.float32] + [torch.float64] * (name not in SINGLE)
        assert dtypes == wanted, name
    low = 36 ** -((PLACES - 1) / 79)  # 0.028 of the largest at rank 80
    for sigma, rank, ways in ((low, 80, 1), (low, 81, 2), (PLACES**-0.3, 160, 1)):
        dtypes.clear()  # most of the directions: not if they would have to be turned
        truncated_svd(with_spectrum((SIDE, SIDE), sigma).to(device, torch.float32), rank)
        assert len(dtypes) == ways
    dtypes.clear()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        truncated_svd(with_spectrum((SIDE, SIDE), SPECTRA["flat"]).to(device, torch.float32), 40)
    finally:
        torch.set_float32_matmul_precision(before)
    assert dtypes == [torch.float64]


def test_a_batch_with_a_matrix_for_every_way(stable_calls, device):
    rows = with_spectrum((SIDE, SIDE), SPECTRA["like weights"])
    singular = with_spectrum((SIDE, SIDE), PLACES**-0.5 * (PLACES < 30))
    steep = with_spectrum((SIDE, SIDE), SPECTRA["condition 1e6"])
    batch = torch.stack([singular, rows, steep, torch.zeros_like(rows)]).to(device, torch.float32)
    together = truncated_svd(batch, 40)
    assert stable_calls == [2]  # those without full rank
    for i, weight in enumerate(batch):
        for got, wanted in zip(together, truncated_svd(weight, 40), strict=True):
            torch.testing.assert_close(got[i], wanted)


def test_several_at_once(threads, monkeypatch):
    weight = normal(3, SIDE, SIDE, dtype=torch.float32)
    monkeypatch.setattr(parallel, "WORTH_A_THREAD", 10)
    threads(1)
    wanted = truncated_svd(weight, 20)
    threads(2)
    for got, part in zip(truncated_svd(weight, 20), wanted, strict=True):
        torch.testing.assert_close(got, part, rtol=1e-4, atol=1e-5)
    assert torch.get_num_threads() == 2
    monkeypatch.setattr(torch.linalg, "eigh", _fails)
    monkeypatch.setattr(torch.linalg, "svd", _fails)
    with pytest.raises(LinAlgError, match="no SVD of q converged"):
        truncated_svd(weight, 20, name="q")
    assert torch.get_num_threads() == 2


def mkl_threads():
    """What MKL would use in this process; the number that torch shows is this thread's alone."""
    found = re.search(r"mkl_get_max_threads\(\) : (\d+)", torch.__config__.parallel_info())
    return int(found[1]) if found else torch.get_num_threads()


def test_side_by_side(threads):
    threads(4)
    seen, running, most = [], set(), []

    def work(item):
        running.add(item)
        most.append(len(running))
        seen.append(torch.get_num_threads())
        time.sleep(0.01)
        running.discard(item)
        if item == 7:
            raise RuntimeError("no seven")
        return item * item

    assert list(parallel.side_by_side(work, range(6), 2)) == [0, 1, 4, 9, 16, 25]
    assert set(seen) == {2}  # half of the threads each
    assert max(most) == 2
    assert torch.get_num_threads() == mkl_threads() == 4
    taken = []
    results = parallel.side_by_side(work, (taken.append(i) or i for i in range(100)), 3)
    assert next(results) == 0
    assert len(taken) <= 4  # not all at once
    with pytest.raises(RuntimeError, match="no seven"):
        list(results)
    assert torch.get_num_threads() == 4


def test_memory_bounds_how_many_are_side_by_side(threads, monkeypatch):
    threads(8)
    assert [parallel.workers_for(side, 100) for side in (64, 512, 4096, 16384)] == [1, 8, 5, 1]
    assert parallel.workers_for(512, 3) == 3


def _fails(*_, **__):
    raise LinAlgError("did not converge")


@pytest.mark.usefixtures("size")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [2.0**123, 2.0**-126, 2.0**-140])
def test_scales_at_the_ends_of_float32(scale, method, device):
    weight = normal(9, 7, dtype=torch.float32).clamp(-1.9, 1.9).to(device)
    weight = torch.round(weight * 32) / 32  # exact also where it is subnormal
    svd = truncated_svd(weight * scale, 4, method)
    wanted = truncated_svd(weight, 4, method)
    torch.testing.assert_close(svd.U, wanted.U)
    atol = 2.0**-149 / scale  # what is subnormal has no more digits
    torch.testing.assert_close(svd.S.double() / scale, wanted.S.double(), rtol=1e-5, atol=atol)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_matrix(data):
    """Whatever shape, spectrum, scale and dtype: orthonormal, in order, and the best there is."""
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    shape = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    side = min(shape)
    sizes = st.one_of(st.just(0.0), st.just(1.0), st.floats(1e-12, 1))
    sigma = data.draw(st.lists(sizes, min_size=side, max_size=side))
    scale = 2.0 ** data.draw(st.integers(-100, 100))
    seed = data.draw(st.integers(0, 1000))
    left = torch.linalg.qr(normal(shape[0], side, seed=seed)).Q
    right = torch.linalg.qr(normal(shape[1], side, seed=seed + 1)).Q
    weight = (left * torch.tensor(sigma, dtype=torch.float64) @ right.mT * scale).to(dtype)
    for name in ("zero row", "zero column", "equal rows"):
        if data.draw(st.booleans()):
            if name == "zero row":
                weight[0] = 0
            elif name == "zero column":
                weight[:, -1] = 0
            else:
                weight[-1] = weight[0]
    rank = data.draw(st.integers(0, side))
    small, before = data.draw(st.sampled_from([0, 64])), exact.SMALL
    exact.SMALL = small
    try:
        for method in ("exact", "randomized", "auto"):
            svd = truncated_svd(weight, rank, method, oversampling=40.0)
            tolerance = 30 * torch.finfo(dtype).eps
            assert away_from_orthonormal(svd.U) < tolerance
            assert away_from_orthonormal(svd.Vh.mT) < tolerance
            values = torch.linalg.svdvals(weight.double())
            top = float(values[0])
            assert (svd.S[1:] <= svd.S[:-1]).all()
            grain = side * torch.finfo(dtype).tiny * torch.finfo(dtype).eps  # of subnormal numbers
            assert (svd.S.double() - values[:rank]).abs().sum() <= tolerance * top + grain
            wide = linalg.SVD(*(part.double() for part in svd))
            error = (weight.double() - product(wide)).norm()
            # A Gram matrix in float64 is taken down to 1e-6 of the largest, see SQUARING_LIMIT.
            slack = max(3 * side**0.5 * tolerance, 1e-9)
            assert error <= values[rank:].norm() + slack * top + 2 * side * grain
    finally:
        exact.SMALL = before


# ---- randomized_svd and subspace ----------------------------------------------------------------


@pytest.mark.parametrize("name", SPECTRA)
def test_the_estimate_is_near_the_excess_and_above_it(name, device):
    weight = with_spectrum((SIDE, 200), SPECTRA[name]).to(device)
    for rank in (10, 30):
        for power_iterations in (4, 8):
            svd, estimate = randomized_svd(weight, rank, power_iterations=power_iterations)
            found = excess(weight, svd, rank)
            if found > 1e-6:  # below that nothing is left to be seen
                assert 1 < float(estimate) / found < 6
            else:
                assert float(estimate) < 2e-5


@pytest.mark.parametrize("name", SPECTRA)
def test_in_float32_the_estimate_is_never_below_the_excess(name, device):
    """Also where a few large singular values hide what is gained in their squares' rounding."""
    weight = with_spectrum((SIDE, 200), SPECTRA[name]).to(device, torch.float32)
    for rank in (10, 30):
        for power_iterations in (3, 4, 8):
            svd, estimate = randomized_svd(weight, rank, power_iterations=power_iterations)
            assert excess(weight, svd, rank) < float(estimate)


def test_without_enough_iterations_nothing_is_estimated(device):
    weight = normal(20, 16, device=device)
    assert torch.isinf(randomized_svd(weight, 3, power_iterations=2).excess)
    assert not torch.isinf(randomized_svd(weight, 3, power_iterations=3).excess)
    assert float(randomized_svd(weight, 16, power_iterations=0).excess) == 0  # all columns


def test_a_tolerance_is_kept(monkeypatch, device):
    weight = torch.stack([normal(SIDE, 200, seed=1), normal(SIDE, 200, seed=2) * PLACES[:, None]])
    weight = weight.to(device)
    columns = []
    once = truncated.randomized
    monkeypatch.setattr(
        truncated, "randomized",
        lambda a, rank, count, *args, **options: (
            columns.append((len(a), count)), once(a, rank, count, *args, **options),
        )[1],
    )  # fmt: skip
    loose, tight = (randomized_svd(weight, 24, tolerance=t) for t in (0.05, 1e-3))
    assert columns[0] == (2, 32)
    assert len(columns) > 2  # with more columns, where it did not hold
    assert max(count for _, count in columns) <= SIDE // 2
    for i in range(2):
        assert excess(weight[i], linalg.SVD(*(p[i] for p in loose.svd)), 24) < 0.05
        assert excess(weight[i], linalg.SVD(*(p[i] for p in tight.svd)), 24) < 1e-3
    assert (tight.excess <= 1e-3).all()


@pytest.mark.parametrize(("tolerance", "iterations"), [(0.0, 4), (-1.0, 4), (0.1, 2)])
def test_wrong_tolerances_are_named(tolerance, iterations):
    with pytest.raises(ValueError, match=f"got {tolerance} with {iterations}"):
        randomized_svd(torch.eye(3), 1, tolerance=tolerance, power_iterations=iterations)


def test_subspace(device):
    weight = with_spectrum((60, 40), torch.logspace(0, -2, 40, dtype=torch.float64)).to(device)
    factors, captured = subspace(weight, 12, power_iterations=6)
    assert away_from_orthonormal(factors.up) < 1e-12
    torch.testing.assert_close(factors.down, factors.up.mT @ weight)
    error = (weight - factors.product()).square().sum() / weight.square().sum()
    assert float(error) == pytest.approx(1 - captured, rel=1e-6)
    best = float(torch.linalg.svdvals(weight)[12:].square().sum() / weight.square().sum())
    assert best < 1 - captured < 1.05 * best
    assert subspace(torch.zeros(3, 4), 2).captured == 1.0
    assert subspace(weight, 0).factors.product().shape == (60, 40)
    with pytest.raises(ValueError, match=r"must be \(out, in\), got \(2, 3, 4\)"):
        subspace(torch.zeros(2, 3, 4), 1)


def test_auto(monkeypatch):
    asked = []
    monkeypatch.setattr(
        truncated,
        "randomized",
        lambda a, rank, *_, **__: asked.append(rank) or (exact.exact(a, rank, ""), 0),
    )
    weight = torch.zeros(512, 512)
    for rank in (64, 65):
        truncated_svd(weight, rank, "auto")
    truncated_svd(torch.zeros(512, 1100), 33, "auto")
    truncated_svd(torch.zeros(500, 500), 8, "auto")
    assert asked == [64]


def test_columns_that_float32_cannot_make_orthonormal():
    """Cholesky in float32 would leave nothing right of these; in float64 it is exact."""
    Y = with_spectrum((50, 10), torch.logspace(0, -6, 10, dtype=torch.float64)).float()[None]
    Q, failed = randomized.cholesky_qr(Y)
    assert not failed.any()
    assert away_from_orthonormal(Q[0]) < 1e-3
    Q, failed = randomized.cholesky_qr(torch.ones(1, 6, 3))
    assert failed.all()


# ---- whitened_svd -------------------------------------------------------------------------------

GRAMS = ["full rank", "rank 3", "dead channels", "outlier channel", "graded"]


def gram_of(kind, inputs):
    X = normal(inputs, 4 * inputs, seed=5)
    X += 0.5 * X.roll(1, 0)  # neighbours correlate
    if kind == "rank 3":
        X = X[:, :3]
    if kind == "dead channels":
        X[::2] = 0
    if kind == "outlier channel":
        X[0] *= 1e3
    if kind == "graded":
        X *= torch.logspace(0, -4, inputs, dtype=torch.float64)[:, None]
    return X @ X.mT


@pytest.mark.parametrize("kind", GRAMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dropped_tail_is_the_loss(shape, kind, device):
    weight = normal(*shape, device=device)
    gram = gram_of(kind, shape[1]).to(device)
    spectrum = whitened_svd(weight, gram)
    everything = output_error(weight, gram)
    if everything == 0:  # (7, 1) with its only channel dead
        return
    for rank in range(min(shape) + 1):
        loss = output_error(weight - spectrum.truncate(rank).product(), gram)
        tail = spectrum.sigma[rank:].norm()
        assert abs(loss**2 - tail**2) < 1e-8 * everything**2


@pytest.mark.parametrize("kind", [*GRAMS, "zero", None])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_full_spectrum_is_the_weight(shape, kind, device):
    weight = normal(*shape, device=device)
    gram = None
    if kind == "zero":
        gram = torch.zeros(shape[1], shape[1], device=device)
    elif kind is not None:
        gram = gram_of(kind, shape[1]).to(device)
    up, sigma, down = spectrum = whitened_svd(weight, gram)
    assert away_from_orthonormal(up) < 1e-13
    assert (sigma > 0).all()
    assert (sigma.diff() <= 0).all()
    torch.testing.assert_close(up * sigma @ down, weight, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(spectrum.truncate(min(shape)).product(), weight)
    part = whitened_svd(weight, gram, 1)
    torch.testing.assert_close(part, Spectrum(up[:, :1], sigma[:1], down[:1]))


def test_no_other_product_of_that_rank_is_better():
    weight, gram = normal(9, 12), gram_of("full rank", 12)
    for rank in (1, 4, 8):
        best = whitened_svd(weight, gram).truncate(rank)
        loss = output_error(weight - best.product(), gram)
        for seed in range(50):
            size = 10.0 ** -(seed % 5)
            up = best.up + size * normal(*best.up.shape, seed=seed)
            # the best `down` for this `up`, by least squares: the hardest competitor
            down = torch.linalg.lstsq(up, weight).solution
            assert output_error(weight - up @ down, gram) > loss
            near = best.down + size * normal(*best.down.shape, seed=seed)
            assert output_error(weight - best.up @ near, gram) > loss


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_form_that_inverts(shape):
    weight, gram = normal(*shape), gram_of("full rank", shape[1])
    root = torch.linalg.cholesky(gram)
    U, S, Vh = torch.linalg.svd(weight @ root, full_matrices=False)
    spectrum = whitened_svd(weight, gram)
    torch.testing.assert_close(spectrum.sigma, S, rtol=1e-8, atol=1e-8)
    rank = (min(shape) + 1) // 2
    inverted = U[:, :rank] * S[:rank] @ Vh[:rank] @ torch.linalg.inv(root)
    torch.testing.assert_close(spectrum.truncate(rank).product(), inverted, rtol=1e-7, atol=1e-7)


def test_identity_gram_is_the_plain_svd(device):
    weight = normal(7, 9, device=device)
    plain = whitened_svd(weight, None)
    torch.testing.assert_close(plain, Spectrum(*truncated_svd(weight, 7)))
    torch.testing.assert_close(whitened_svd(weight, 4 * torch.eye(9, device=device)).up, plain.up)


def test_unseen_directions_follow_the_plain_svd():
    """Only input 0 is ever nonzero: the rest of the weight is ordered as if nothing were known."""
    weight = torch.diag(torch.tensor([1.0, 5.0, 9.0, 7.0]))
    gram = torch.diag(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    up = whitened_svd(weight, gram).up
    assert up.argmax(0).tolist() == [0, 2, 3, 1]


def test_inputs_the_weight_ignores_are_no_division_by_zero():
    weight, gram = normal(3, 4), torch.zeros(4, 4)
    weight[:, 2:] = 0
    gram[3, 3] = 1
    for case in (weight, torch.zeros(3, 4)):
        up, sigma, down = whitened_svd(case, gram)
        torch.testing.assert_close(up * sigma @ down, case.to(up.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_spectrum_of_low_precision_is_float32(dtype, device):
    weight = normal(16, 24, device=device, dtype=dtype)
    gram = gram_of("graded", 24).to(device, torch.float32)
    up, sigma, down = whitened_svd(weight, gram)
    assert {up.dtype, sigma.dtype, down.dtype} == {torch.float32}
    torch.testing.assert_close(up * sigma @ down, weight.float(), rtol=1e-5, atol=1e-5)


def test_empty_weight():
    spectrum = whitened_svd(torch.zeros(0, 3), torch.eye(3))
    assert spectrum.truncate(0).product().shape == (0, 3)
    assert whitened_svd(torch.zeros(3, 0), torch.zeros(0, 0)).up.shape == (3, 0)


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (torch.eye(3), r"the Gram matrix of q must be \(in, in\) = \(2, 2\), got \(3, 3\)"),
        (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), "of q is not symmetric: .* differ by up to 0.5"),
        (torch.diag(torch.tensor([1.0, -1.0])), "of q is not positive semidefinite: its diagonal"),
        (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), "not positive semidefinite: one direction"),
        (torch.eye(2) * float("nan"), r"the Gram matrix of q \(2, 2\) holds NaN or Inf in"),
        (torch.eye(2).int(), "the Gram matrix of q must be floating point, got torch.int32"),
    ],
)
def test_wrong_grams_are_named(gram, message):
    with pytest.raises(ValueError, match=message):
        whitened_svd(torch.eye(2), gram, name="q")


def test_whitening_takes_one_weight_at_a_time():
    with pytest.raises(ValueError, match=r"weight must be \(out, in\), got \(2, 3, 3\)"):
        whitened_svd(torch.zeros(2, 3, 3), None)


# ---- factors ------------------------------------------------------------------------------------


def test_truncate_splits_sigma_evenly():
    spectrum = whitened_svd(torch.diag(torch.tensor([16.0, 9.0, 4.0])), None)
    up, down = spectrum.truncate(2)
    assert up.tolist() == [[4, 0], [0, 3], [0, 0]]
    assert down.tolist() == [[4, 0, 0], [0, 3, 0]]
    with pytest.raises(ValueError, match="rank must be from 0 to 3 for the spectrum, got 4"):
        spectrum.truncate(4)


def test_factors():
    factors = Factors(normal(4, 2), normal(2, 3))
    torch.testing.assert_close(factors.product(), factors.up @ factors.down)
    assert {part.dtype for part in factors.to(torch.bfloat16)} == {torch.bfloat16}


# ---- sums of Gram matrices ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(0, 5), (3, 1), (4100, 30), (7, 600), (2048, 513)])
def test_sums_of_gram_matrices(shape, dtype, device):
    """Several pieces of rows and of columns, and what was there before."""
    rows = normal(*shape, device=device).to(dtype)
    total = torch.ones(shape[1], shape[1], dtype=torch.float64, device=device)
    linalg.add_gram(total, rows)
    linalg.add_gram(total, rows[:, None].expand(-1, 2, -1)[:, 1])
    wide = rows.double()
    expected = 1 + 2 * wide.mT @ wide
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=2e-6 * max(1, shape[0]))
    assert torch.equal(total, total.mT)


def test_memory_of_a_whitened_svd():
    """Beside the Gram matrix there is no second one."""
    code = """if True:
        import torch
        from soco.linalg import whitened_svd
        from soco.memory import peak_memory
        gram = torch.ones(4096, 4096, dtype=torch.float64).fill_diagonal_(2)  # all of it is there
        whitened_svd(torch.randn(64, 64), torch.eye(64, dtype=torch.float64), 4)
        before = peak_memory()
        whitened_svd(torch.randn(64, 4096), gram, 4)
        print((peak_memory() - before) / gram.nbytes)
    """
    if not Path("/proc/self/status").exists():
        pytest.skip("only Linux tells the peak")
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(told.stdout) < 0.5
