"""soco.linalg against torch.linalg and against the theorems in its docstrings."""

import pytest
import torch

from soco import linalg, ops
from soco.linalg import Factors, Spectrum, truncated_svd, whitened_svd

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


# ---- truncated_svd ------------------------------------------------------------------------------


def test_by_hand(device):
    weight = torch.tensor([[0.0, 0.0, -2.0], [3.0, 0.0, 0.0]], device=device)
    svd = truncated_svd(weight, 2)
    assert svd.S.tolist() == [3.0, 2.0]
    assert svd.U.tolist() == [[0.0, 1.0], [1.0, 0.0]]
    assert svd.Vh.tolist() == [[1.0, 0.0, 0.0], [0.0, 0.0, -1.0]]


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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("true_rank", [0, 1, 3])
def test_rank_deficient_columns_are_completed(method, true_rank, device):
    weight = normal(10, true_rank, device=device) @ normal(true_rank, 7, device=device, seed=1)
    svd = truncated_svd(weight, 7, method)
    assert away_from_orthonormal(svd.U) < 1e-12
    assert away_from_orthonormal(svd.Vh.mT) < 1e-12
    torch.testing.assert_close(product(svd), weight)
    assert svd.S[true_rank:].abs().max() < 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_one_bad_matrix_leaves_its_batch_alone(method, device):
    weight = normal(3, 8, 6, device=device)
    weight[1] = 0
    together = truncated_svd(weight, 4, method)
    for i in range(3):
        for got, wanted in zip(together, truncated_svd(weight[i], 4, method), strict=True):
            torch.testing.assert_close(got[i], wanted)


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
    route = linalg._by_svd

    def counted(matrices, rank, name):
        calls.append(len(matrices))
        return route(matrices, rank, name)

    monkeypatch.setattr(linalg, "_by_svd", counted)
    return calls


def test_only_what_squaring_would_lose_takes_the_stable_route(stable_calls, device):
    sigma = torch.logspace(0, -8, 9, dtype=torch.float64)  # a decade each, SQUARING_LIMIT is 1e-6
    weight = with_spectrum((12, 20), sigma).to(device)
    truncated_svd(weight, 6)
    assert stable_calls == []
    truncated_svd(weight, 8)
    assert stable_calls == [1]
    truncated_svd(torch.stack([weight, normal(12, 20, device=device), weight]), 8)
    assert stable_calls == [1, 2]


def test_failed_eigensolver_takes_the_stable_route(stable_calls, monkeypatch):
    def fails(_):
        raise linalg.LinAlgError("did not converge")

    weight = normal(5, 4)
    wanted = truncated_svd(weight, 3)
    monkeypatch.setattr(torch.linalg, "eigh", fails)
    for got, part in zip(truncated_svd(weight, 3), wanted, strict=True):
        torch.testing.assert_close(got, part)
    assert stable_calls == [1]
    monkeypatch.setattr(torch.linalg, "svd", lambda *_, **__: fails(None))
    with pytest.raises(linalg.LinAlgError, match="no SVD of q converged"):
        truncated_svd(weight, 3, name="q")


@pytest.mark.parametrize("exponent", [-150, -60, 60, 150])
def test_extreme_scales(exponent, device):
    weight = normal(6, 8, device=device)
    svd = truncated_svd(weight * 10.0**exponent, 6)
    torch.testing.assert_close(svd.S * 10.0**-exponent, truncated_svd(weight, 6).S)


def test_signs_are_the_same_on_every_route(device):
    weight = with_spectrum((30, 20), torch.linspace(2, 1, 20, dtype=torch.float64)).to(device)
    exact = truncated_svd(weight, 20)
    random = truncated_svd(weight, 20, "randomized")
    stable = linalg._by_svd(weight[None], 20, "weight")
    U, Vh = linalg._fix_signs(stable.U[0], stable.Vh[0])
    for other in (random, linalg.SVD(U, stable.S[0], Vh)):
        torch.testing.assert_close(other.U, exact.U)
        torch.testing.assert_close(other.Vh, exact.Vh)
    assert (exact.U.gather(0, exact.U.abs().argmax(0, keepdim=True)) > 0).all()


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
    householder = linalg._householder_qr
    monkeypatch.setattr(
        linalg, "_householder_qr", lambda y: (used.append(len(y)), householder(y))[1]
    )
    svd = truncated_svd(weight, 4, "randomized")
    assert set(used) == {1}
    torch.testing.assert_close(svd.S[0], torch.tensor([3.0, 0, 0, 0], dtype=torch.float64))
    assert away_from_orthonormal(svd.U) < 1e-12


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
        ({"method": "fast"}, 'method must be "exact" or "randomized", got \'fast\''),
        ({"oversampling": -0.1}, "oversampling must be a finite number, at least 0, got -0.1"),
        ({"power_iterations": -1}, "power_iterations must be at least 0, got -1"),
        ({"weight": torch.zeros(3)}, r"weight must be \(..., out, in\), got \(3,\)"),
        ({"weight": torch.zeros(3, 3).int()}, "weight must be floating point, got torch.int32"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        truncated_svd(**{"weight": torch.zeros(3, 4), "rank": 1, **arguments})


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
