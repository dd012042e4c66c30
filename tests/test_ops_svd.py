"""soco.ops.batched_svd against torch, against many digits, and on matrices made to break it."""

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from soco import core, ops
from soco.ops import svd as module

DTYPES = [torch.float32, torch.float64]
SHAPES = [
    (1, 1), (3, 1, 1), (1, 5), (5, 1), (2, 2), (4, 8, 8), (3, 17, 9), (3, 9, 17), (2, 2, 33, 31),
    (2, 64, 64), (1, 200, 24), (1, 24, 200), (2, 130, 129),
]  # fmt: skip


def randn(*shape, seed=0, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def check(matrices, U, S, Vh, slack=1.0):
    """A decomposition as good as its dtype allows, in the order and with the signs promised."""
    m, n = matrices.shape[-2:]
    eps = torch.finfo(matrices.dtype).eps
    tolerance = slack * eps * max(16.0, 2 * min(m, n) ** 0.5)
    assert U.shape == (*matrices.shape[:-1], min(m, n))
    assert S.shape == (*matrices.shape[:-2], min(m, n))
    assert Vh.shape == (*matrices.shape[:-2], min(m, n), n)
    assert U.dtype == S.dtype == Vh.dtype == matrices.dtype
    identity = torch.eye(min(m, n), dtype=torch.float64, device=matrices.device)
    wide_U, wide_Vh = U.double(), Vh.double()
    assert ((wide_U.mT @ wide_U - identity).abs() <= tolerance).all()
    assert ((wide_Vh @ wide_Vh.mT - identity).abs() <= tolerance).all()
    assert (S >= 0).all()
    assert (S[..., 1:] <= S[..., :-1]).all()
    top = S[..., :1, None].double()
    again = (wide_U * S[..., None, :].double()) @ wide_Vh
    grain = torch.finfo(matrices.dtype).tiny * eps  # what S is rounded to where it is subnormal
    assert ((again - matrices.double()).abs() <= tolerance * top + grain).all()
    largest = U.gather(-2, U.abs().argmax(-2, keepdim=True))
    assert (largest > 0).all()


def test_by_hand(device):
    U, S, Vh = ops.batched_svd(torch.tensor([[0.0, -4.0], [9.0, 0.0]], device=device))
    expected = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([9.0, 4.0])
    torch.testing.assert_close(U.cpu(), expected[0], rtol=0, atol=1e-7)
    torch.testing.assert_close(S.cpu(), expected[1])
    torch.testing.assert_close(Vh.cpu(), torch.diag(torch.tensor([1.0, -1.0])), rtol=0, atol=1e-7)
    U, S, Vh = ops.batched_svd(torch.tensor([[-3.0, -4.0]], device=device))
    torch.testing.assert_close((U.cpu(), S.cpu()), (torch.ones(1, 1), torch.tensor([5.0])))
    torch.testing.assert_close(Vh.cpu(), torch.tensor([[-0.6, -0.8]]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_is_a_decomposition(shape, dtype, device):
    matrices = randn(*shape, dtype=dtype, device=device)
    U, S, Vh = ops.batched_svd(matrices)
    check(matrices, U, S, Vh)
    expected = torch.linalg.svdvals(matrices.double())
    error = (S.double() - expected).abs() / expected[..., :1]
    theirs = torch.linalg.svdvals(matrices).double()
    limit = ((theirs - expected).abs() / expected[..., :1]).max()
    assert error.max() <= 2 * max(limit, torch.finfo(dtype).eps * min(shape[-2:]) ** 0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", core.simd_levels())
def test_every_simd_level(level, dtype, simd_level):
    simd_level(level)
    for shape in SHAPES:
        matrices = randn(*shape, dtype=dtype)
        check(matrices, *ops.batched_svd(matrices))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", core.simd_levels())
def test_all_of_many_small_matrices_converge(level, dtype, simd_level):
    """One of 3,000 did not, while the limit was below what rounding leaves of few numbers."""
    simd_level(level)
    for rows, columns in ((2, 2), (60, 2), (3, 3), (9, 4), (5, 5)):
        matrices = randn(20000, rows, columns, dtype=dtype)
        check(matrices, *ops.batched_svd(matrices), slack=1.5)  # the worst of 20,000


GRADED = ["rows", "rows upwards", "rows, the largest in the middle", "columns"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", GRADED)
def test_small_singular_values_keep_their_digits(kind, dtype, device):
    """Rows or columns from 1 to 1e-15 (float64: 1e-120): where torch's have no digit left."""
    n, span = 12, 15 if dtype == torch.float32 else 120
    sizes = 10 ** -torch.linspace(0, span, n, dtype=torch.float64)
    matrix = randn(n, n, seed=3)
    rows = {
        "rows": sizes,
        "rows upwards": sizes.flip(0),
        "rows, the largest in the middle": torch.cat((sizes[1::2].flip(0), sizes[::2])),
    }
    matrix = matrix * sizes.flip(0) if kind == "columns" else rows[kind][:, None] * matrix
    matrix = matrix.to(device, dtype)
    with mpmath.workdps(2 * span + 30):
        exact = mpmath.svd_r(mpmath.matrix(matrix.tolist()), compute_uv=False)
        U, S, Vh = ops.batched_svd(matrix)
        errors = [
            abs(ours / mpmath.mpf(true) - 1) for ours, true in zip(S.tolist(), exact, strict=True)
        ]
        theirs = torch.linalg.svdvals(matrix).tolist()
        torch_errors = [
            abs(value / mpmath.mpf(true) - 1) for value, true in zip(theirs, exact, strict=True)
        ]
    check(matrix, U, S, Vh)
    assert max(errors) < 100 * torch.finfo(dtype).eps
    if kind != "rows":  # LAPACK's way through a matrix is the right one for this
        assert max(torch_errors) > 0.01


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(6, 6), (9, 5), (5, 9), (40, 33)])
@pytest.mark.parametrize(
    "kind", ["zero", "rank 1", "rank 2", "a dead column", "a dead row", "orthogonal", "equal rows"]
)
def test_never_fails(kind, shape, dtype, device):
    m, n = shape
    matrix = randn(m, n, seed=1)
    if kind == "zero":
        matrix = torch.zeros(m, n)
    elif kind.startswith("rank"):
        r = int(kind[-1])
        matrix = randn(m, r, seed=1) @ randn(r, n, seed=2)
    elif kind == "a dead column":
        matrix[:, 2] = 0
    elif kind == "a dead row":
        matrix[1] = 0
    elif kind == "orthogonal":  # all singular values are equal
        matrix = torch.linalg.qr(matrix if m >= n else matrix.mT).Q
        matrix = matrix if m >= n else matrix.mT
    else:
        matrix = torch.ones(m, n)
    matrix = matrix.to(device, dtype)
    check(matrix, *ops.batched_svd(matrix))


def test_what_is_too_small_for_a_square_is_no_direction(device):
    """Found by the test of whatever matrix: equal rows, and rounding 1e-22 below the largest."""
    row = [0.0] * 4 + [
        1125899839733760.0,
        1589781070872576.0,
        1589781339308032.0,
        1.2171584533304773e30,
    ]
    for matrix in (torch.tensor([row] * 7, device=device), torch.tensor([row] * 7).to(device).mT):
        check(matrix, *ops.batched_svd(matrix))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", ["largest", "smallest", "subnormal"])
def test_huge_and_tiny(size, dtype, device):
    info = torch.finfo(dtype)
    scale = {"largest": info.max / 64, "smallest": info.tiny * 64, "subnormal": info.tiny}[size]
    matrix = (randn(7, 5).clamp(-2, 2) * scale).to(device, dtype)
    U, S, Vh = ops.batched_svd(matrix)
    expected = torch.linalg.svdvals(matrix.cpu().double() / scale) * scale
    rtol = 1e-5 if dtype == torch.float32 else 1e-13
    if size == "subnormal":  # the input itself has fewer digits
        torch.testing.assert_close(
            S.cpu().double(), expected, rtol=1e-2 * (rtol > 1e-9) + rtol, atol=0
        )
    else:
        torch.testing.assert_close(S.cpu().double(), expected, rtol=rtol, atol=0)
    check(matrix / scale, U, S / scale, Vh)


def test_is_the_same_for_every_number_of_threads_and_every_batch(threads):
    matrices = randn(37, 21, 18, dtype=torch.float32)
    threads(1)
    alone = [ops.batched_svd(matrix) for matrix in matrices]
    for count in (1, 2, 3):
        threads(count)
        for part, parts in zip(ops.batched_svd(matrices), zip(*alone, strict=True), strict=True):
            assert torch.equal(part, torch.stack(parts))


def test_strided_and_empty(device):
    matrices = randn(2, 14, 10, dtype=torch.float32, device=device)
    for strided in (matrices.mT, matrices[:, ::2, ::3], matrices.expand(3, 2, 14, 10)):
        for ours, packed in zip(
            ops.batched_svd(strided), ops.batched_svd(strided.contiguous()), strict=True
        ):
            assert torch.equal(ours, packed)
    for shape in ((0, 3, 4), (2, 0, 4), (2, 4, 0), (0, 0)):
        U, S, Vh = ops.batched_svd(torch.empty(shape, device=device))
        k = min(shape[-2:])
        assert U.shape == (*shape[:-1], k)
        assert S.shape == (*shape[:-2], k)
        assert Vh.shape == (*shape[:-2], k, shape[-1])


def test_above_its_size_torch_computes(device, monkeypatch):
    monkeypatch.setattr(module, "MOST_COLUMNS", 6)
    for shape in ((2, 9, 7), (2, 7, 9)):
        matrices = randn(*shape, device=device)
        check(matrices, *ops.batched_svd(matrices))


def test_gradients(device):
    for shape in ((5, 3), (3, 5), (2, 4, 4)):
        matrices = randn(*shape, seed=4, device=device).requires_grad_()
        assert torch.autograd.gradcheck(ops.batched_svd, matrices)
        assert torch.autograd.gradgradcheck(ops.batched_svd, matrices)


def test_gradient_is_that_of_torch(device):
    for shape in ((6, 4), (4, 6), (3, 5, 5)):
        ours = randn(*shape, seed=5, device=device).requires_grad_()
        theirs = ours.detach().clone().requires_grad_()
        for matrices, decompose in (
            (ours, ops.batched_svd),
            (theirs, lambda a: torch.linalg.svd(a, full_matrices=False)),
        ):
            U, S, Vh = decompose(matrices)
            ((U @ torch.diag_embed(S.sqrt()) @ Vh) ** 3).sum().backward()  # whatever the signs
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)


def test_opcheck_and_compile(device):
    for shape in ((4, 3), (2, 3, 4), (0, 3), (2, 0, 3)):
        matrices = randn(*shape, dtype=torch.float32, device=device).requires_grad_()
        opcheck(torch.ops.soco.batched_svd.default, (matrices,))
    compiled = torch.compile(lambda a: ops.batched_svd(a * 2)[1].sum(), fullgraph=True)
    matrices = randn(3, 6, 5, device=device)
    torch.testing.assert_close(compiled(matrices), 2 * ops.batched_svd(matrices)[1].sum())


@pytest.mark.parametrize("most", [0, 512])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_refused(bad, most, device, monkeypatch):
    monkeypatch.setattr(module, "MOST_COLUMNS", most)
    matrices = randn(2, 3, 4, device=device)
    matrices[1, 2, 0] = bad
    with pytest.raises(ValueError, match=r"\(2, 3, 4\) holds NaN or Inf in 1 .* at \(1, 2, 0\)"):
        ops.batched_svd(matrices)


def test_wrong_inputs_are_refused(device):
    with pytest.raises(TypeError, match=r"float32 or float64, got torch\.bfloat16"):
        ops.batched_svd(torch.ones(2, 2, dtype=torch.bfloat16, device=device))
    with pytest.raises(ValueError, match=r"\(\.\.\., m, n\), got \(3,\)"):
        ops.batched_svd(torch.ones(3, device=device))


def test_what_does_not_converge_is_told(monkeypatch):
    monkeypatch.setattr(module, "MOST_SWEEPS", 0)  # how many a diagonal matrix takes
    with pytest.raises(RuntimeError, match=r"1 of 1 matrices \(2, 2\) did not converge"):
        ops.batched_svd(torch.eye(2))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_whatever_the_matrix(data):
    """Entries of any size down to subnormal ones, many zeros and repeated rows."""
    dtype = data.draw(st.sampled_from(DTYPES))
    m, n = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    width = 32 if dtype == torch.float32 else 64
    number = st.one_of(
        st.floats(-1, 1, width=width),
        st.floats(-(2.0**100), 2.0**100, width=width),
        st.sampled_from([0.0, 1.0, -1.0]),
    )
    rows = data.draw(st.lists(st.lists(number, min_size=n, max_size=n), min_size=1, max_size=m))
    matrix = torch.tensor([rows[i % len(rows)] for i in range(m)], dtype=dtype)
    check(matrix, *ops.batched_svd(matrix), slack=2.0)
