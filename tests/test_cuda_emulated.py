"""The CUDA kernels without a GPU, see tests/emulation.py.

The order in which their threads run is drawn anew in every run; what they must not touch ends the
process.
"""

import itertools
import re
import shutil

import pytest
import torch

import emulation
import reference
import test_ops_svd
from soco import ops
from soco.ops import low_rank_group, sketch, spectral
from soco.ops.layers import Weights
from soco.ops.shares import shares as shared_out
from test_ops_group import ALIGNED, DTYPES, EIGHT, GROUPS, TOLERANCE, in_eight_bits, made

HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    if not emulation.compiler():
        pytest.skip("no C++ compiler")
    return emulation.build(tmp_path_factory.mktemp("emulated"))


@pytest.fixture
def cuda(library):
    library.machine()
    library.at_the_beginning = False
    return library


def close(y, args, rtol):
    expected = reference.low_rank_group(**args)
    assert y.shape == expected.shape
    atol = rtol * float(expected.abs().max()) if expected.numel() else 0
    torch.testing.assert_close(y, expected, rtol=rtol, atol=atol)


def weighted(args, weights):
    return args if weights is None else in_eight_bits(args, weights)


# two launches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in GROUPS if not name.startswith("no ")])
def test_plain_kernels(cuda, name, dtype):
    args = made(*GROUPS[name], dtype=dtype)
    close(cuda.low_rank_group(**args), args, TOLERANCE[dtype])
    assert cuda.launches() == 2
    if dtype != torch.float64:
        for weights in EIGHT:
            args = in_eight_bits(made(*GROUPS[name], dtype=dtype), weights)
            close(cuda.low_rank_group(**args), args, TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("group", "machine", "barrier"),
    [
        (ALIGNED["one"], {}, False),  # no counter
        (ALIGNED["one"], {"major": 7}, True),
        (ALIGNED["one"], {"refuses": 1}, True),  # fewer multiprocessors than the device says
        (ALIGNED["one"], {"shared": 16 * 1024}, True),
        ((3, 60, [(16, 24, False)]), {}, True),  # rows of down are not aligned
        ((3, 64, [(12, 24, False)]), {}, True),  # rows of up are not
        ((17, 64, [(16, 24, False)]), {}, True),  # too many tokens
    ],
)
def test_two_launches_where_one_is_not_possible(cuda, group, machine, barrier):
    args = made(*group, dtype=torch.bfloat16)
    cuda.machine(**machine)
    close(cuda.low_rank_group(**args, barrier=barrier), args, TOLERANCE[torch.bfloat16])
    assert cuda.launches() == 2


def test_an_input_that_begins_anywhere_takes_two_launches(cuda):
    args = made(*ALIGNED["one"], dtype=torch.bfloat16)
    close(cuda.low_rank_group(**args, shift=2), args, TOLERANCE[torch.bfloat16])
    assert cuda.launches() == 2


def test_ranks_that_end_between_16_bytes_take_two_launches(cuda):
    """Their rows begin at multiples of 16 bytes, and what is behind them is NaN."""
    args = made(3, 64, [(12, 24, False)], dtype=torch.bfloat16)
    close(cuda.low_rank_group(**args, steps=[16]), args, TOLERANCE[torch.bfloat16])
    assert cuda.launches() == 2


def test_float32_takes_two_launches(cuda):
    args = made(*ALIGNED["one"])
    close(cuda.low_rank_group(**args), args, TOLERANCE[torch.float32])
    assert cuda.launches() == 2


# one launch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, *EIGHT])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ALIGNED)
def test_one_launch(cuda, name, dtype, weights):
    args = weighted(made(*ALIGNED[name], dtype=dtype), weights)
    for blocks in (1, 3, 8):
        cuda.machine(multiprocessors=blocks)
        close(cuda.low_rank_group(**args), args, TOLERANCE[dtype])
        assert cuda.launches() == 1
    plain = {**args, "bias": None, "residual": None}
    close(cuda.low_rank_group(**plain), plain, TOLERANCE[dtype])


@pytest.mark.parametrize("weights", [None, torch.int8])
@pytest.mark.parametrize("name", ALIGNED)
def test_every_weight_is_copied_once(cuda, name, weights):
    args = weighted(made(*ALIGNED[name], dtype=torch.bfloat16), weights)
    for blocks in (1, 8):
        cuda.machine(multiprocessors=blocks)
        cuda.low_rank_group(**args)
        factors = [args["down"], *args["ups"]]
        assert cuda.library.copied() == sum(f.numel() * f.element_size() for f in factors)


@pytest.mark.parametrize("weights", [None, *EIGHT])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    "layers",
    [
        [(48, 90, False), (32, 90, False)],
        [(48, 90, True), (32, 90, True)],
        [(48, 90, True), (32, 90, False)],
    ],
)
def test_gated(cuda, layers, dtype, weights):
    for tokens in (1, 5, 12):
        args = made(tokens, 96, layers, dtype=dtype, gated=True)
        args["residual"] = args["residual"][:, :90].contiguous()
        args["down"] = args["down"] / 8  # so that silu is where it is neither 0 nor the identity
        args = weighted(args, weights)
        close(cuda.low_rank_group(**args), args, TOLERANCE[dtype])
    assert cuda.launches() == 3


@pytest.mark.parametrize("weights", [None, *EIGHT])
@pytest.mark.parametrize("dtype", HALF)
def test_same_bits_whatever_is_not_of_the_sum(cuda, dtype, weights):
    """For any grid, order of threads, length of the ring, number of tokens, and company."""
    layers = [(48, 90, True), (80, 133, False)]
    args = weighted(made(11, 336, layers, dtype=dtype), weights)
    expected = cuda.low_rank_group(**args)
    for seed in range(12):
        shared = (99, 115, 227)[seed % 3] * 1024
        cuda.machine(seed, multiprocessors=seed % 5 + 1, shared=shared)
        assert torch.equal(cuda.low_rank_group(**args), expected)
        assert cuda.launches() == 1
    for token in (0, 8, 10):
        one = {name: args[name][token : token + 1] for name in ("x", "residual")}
        assert torch.equal(cuda.low_rank_group(**{**args, **one})[0], expected[token])
    alone = {
        "x": args["x"], "down": args["down"][48:], "ups": args["ups"][1:],
        "bias": args["bias"][90:], "residual": args["residual"][:, 90:],
    }  # fmt: skip
    if weights is not None:
        alone.update(down_scale=args["down_scale"][48:], up_scales=args["up_scales"][1:])
    assert torch.equal(cuda.low_rank_group(**alone), expected[:, 90:])


@pytest.mark.parametrize("dtype", HALF)
def test_fewer_tokens_at_a_time_where_memory_is_small(cuda, dtype):
    args = made(15, 64, [(512, 40, False)], dtype=dtype)
    expected = cuda.low_rank_group(**args)
    assert cuda.launches() == 1
    for shared, launches in [(84, 2), (74, 4), (68, 8)]:
        cuda.machine(shared=shared * 1024)
        assert torch.equal(cuda.low_rank_group(**args), expected)
        assert cuda.launches() == launches


def test_counter_is_ready_for_the_next_grid(cuda):
    args = made(*ALIGNED["one"], dtype=torch.bfloat16)
    expected = cuda.low_rank_group(**args)
    for blocks in (3, 1, 7, 2, 2):
        before = cuda.counter.value
        cuda.machine(multiprocessors=blocks)
        assert torch.equal(cuda.low_rank_group(**args), expected)
        assert (cuda.counter.value - before) % 2**32 == 2**31


@pytest.mark.parametrize("weights", [None, *EIGHT])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ALIGNED)
def test_dependent_launch(cuda, name, dtype, weights):
    """What the stream ran before writes x and the residual when the kernel waits for it."""
    args = weighted(made(*ALIGNED[name], dtype=dtype), weights)
    expected = cuda.low_rank_group(**args)
    assert cuda.library.dependent_launches() == 0
    assert cuda.library.read_ahead() == cuda.library.released() == 0
    for blocks in (1, 3, 8):
        cuda.machine(blocks, multiprocessors=blocks)
        assert torch.equal(cuda.low_rank_group(**args, dependent=True), expected)
        assert cuda.launches() == cuda.library.dependent_launches() == 1
        assert cuda.library.released() == blocks
        rows = [len(args["down"]) * block // blocks for block in range(blocks + 1)]
        row = args["down"][0].numel() * args["down"].element_size()
        asked = [min((b - a) * row, 64 * 1024) for a, b in itertools.pairwise(rows)]
        assert cuda.library.read_ahead() == sum(asked)


def test_dependent_launch_asks_for_a_part_of_large_weights(cuda):
    args = made(1, 4096, [(32, 8, False)], dtype=torch.bfloat16)
    expected = cuda.low_rank_group(**args)
    for blocks, asked in [(2, 2 * 64 * 1024), (8, 32 * 4096 * 2)]:
        cuda.machine(multiprocessors=blocks)
        assert torch.equal(cuda.low_rank_group(**args, dependent=True), expected)
        assert cuda.library.read_ahead() == asked


def test_dependent_launch_of_fewer_tokens_at_a_time(cuda):
    """Launches of one call wait for each other: they share the memory of z."""
    args = made(15, 64, [(512, 40, False)], dtype=torch.bfloat16)
    expected = cuda.low_rank_group(**args)
    cuda.machine(shared=74 * 1024)
    assert torch.equal(cuda.low_rank_group(**args, dependent=True), expected)
    assert cuda.launches() == cuda.library.dependent_launches() == 4


def test_older_gpus_have_no_dependent_launch(cuda):
    args = made(*ALIGNED["qkv"], dtype=torch.bfloat16)
    expected = cuda.low_rank_group(**args)
    cuda.machine(major=8)
    assert torch.equal(cuda.low_rank_group(**args, dependent=True), expected)
    assert cuda.launches() == 1
    assert cuda.library.dependent_launches() == 0
    assert cuda.library.read_ahead() == 0


@pytest.mark.parametrize("gated", [False, True])
def test_same_bits_however_outputs_are_shared_out(cuda, gated):
    layers = [(48, 90, True), (80, 90, False)]
    args = made(11, 96, layers, dtype=torch.bfloat16, gated=gated)
    width = 90 if gated else 180
    args["residual"] = args["residual"][:, :width].contiguous()
    expected = cuda.low_rank_group(**args)
    weights = Weights(args["down"], args["ups"], args["sources"], gated=gated)
    for shares in (
        shared_out(weights, 3), [0, 0, 0, width], [0, width, width, width], [0, 89, 90, width],
        [0, 1, 2, 3, width],  # for a grid of another size: not taken
    ):  # fmt: skip
        assert torch.equal(cuda.low_rank_group(**args, shares=shares), expected)
    assert cuda.launches() == 6


def test_outputs_are_shared_out_as_they_are_told(cuda):
    """One block with all outputs has no room for more than a few tokens at a time."""
    args = made(15, 64, [(64, 600, False)], dtype=torch.bfloat16)
    cuda.machine(shared=100 * 1024)
    expected = cuda.low_rank_group(**args)
    assert cuda.launches() == 1
    assert torch.equal(cuda.low_rank_group(**args, shares=[0, 0, 600, 600]), expected)
    assert cuda.launches() > 2


def test_more_multiprocessors_than_a_grid_has_blocks(cuda):
    args = made(2, 32, [(16, 700, False)], dtype=torch.bfloat16)
    expected = cuda.low_rank_group(**args)
    cuda.machine(multiprocessors=300)
    assert torch.equal(cuda.low_rank_group(**args, dependent=True), expected)
    assert cuda.library.released() == 256


def test_rows_that_lie_apart(cuda):
    """What is between them is NaN."""
    args = made(3, 64, [(16, 24, False), (32, 50, True)], dtype=torch.bfloat16)
    expected = cuda.low_rank_group(**args)
    assert torch.equal(cuda.low_rank_group(**args, steps=[24, 48]), expected)
    assert cuda.launches() == 2


@pytest.mark.parametrize("weights", EIGHT)
@pytest.mark.parametrize("dtype", HALF)
def test_every_eight_bit_number(cuda, dtype, weights):
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(weights)
    known = codes.float()
    numbers = torch.where(known.isnan(), 0, known)
    one = torch.ones(256)
    args = {
        "x": torch.eye(16, dtype=dtype), "down": torch.eye(16).to(weights),
        "down_scale": torch.ones(16), "ups": [codes.view(16, 16).mT.contiguous()],
        "up_scales": [one[:16]],
    }  # fmt: skip
    y = cuda.low_rank_group(**args)  # token i, row j: number 16 i + j, and 0 times the others
    finite = ~known.view(16, 16).isnan().any(0)  # rows with NaN are NaN
    assert torch.equal(y[:, finite], numbers.view(16, 16)[:, finite].to(dtype))
    assert y[:, ~finite].isnan().all()
    codes = numbers.to(weights).view(16, 16)
    first = {**args, "down": codes, "ups": [torch.eye(16).to(weights)]}
    y = cuda.low_rank_group(**first)  # token i, row j: number 16 j + i
    assert torch.equal(y, codes.mT.to(dtype))
    assert cuda.launches() == 2


@pytest.mark.parametrize("size", [1e-7, 1e-3, 1.0, 1e3, 3e4])
def test_float16_between_the_products(cuda, size):
    """Numbers larger than any float16, and so small that float16 has few digits of them."""
    args = made(5, 64, [(32, 40, False)], dtype=torch.float16, bias=None, residual=None)
    args["x"] = (args["x"] / 4).clamp(-1, 1)
    args["down"] = args["down"].clamp(-2, 2) * size
    args["ups"] = [args["ups"][0] / max(size, 1e-4)]
    assert size < 1e4 or (args["x"].double() @ args["down"].double().mT).abs().max() > 65504
    close(cuda.low_rank_group(**args), args, TOLERANCE[torch.float16])
    assert cuda.launches() == 1


@pytest.mark.parametrize("dtype", HALF)
def test_numbers_that_are_not_finite(cuda, dtype):
    args = made(4, 32, [(16, 24, False)], dtype=dtype, bias=None, residual=None)
    args["x"][1, 3] = float("nan")
    args["x"][2, 5] = float("inf")
    y = cuda.low_rank_group(**args)
    plain = cuda.low_rank_group(**args, barrier=False)
    assert torch.equal(y.isnan(), plain.isnan())
    assert torch.equal(y[[0, 3]].isfinite(), torch.ones(2, 24, dtype=torch.bool))
    assert y[1].isnan().all()
    assert not y[2].isfinite().any()


def test_infinity_between_the_products(cuda):
    args = made(2, 32, [(16, 24, False)], dtype=torch.bfloat16, bias=None, residual=None)
    args["x"][0, 3], args["down"][:, 3] = 3e38, 0
    args["down"][5, 3] = 100
    y = cuda.low_rank_group(**args)
    assert torch.equal(y[0], args["ups"][0][:, 5] * float("inf"))
    assert y[1].isfinite().all()


def test_scales_near_the_ends_of_float32(cuda):
    args = made(3, 32, [(16, 24, False)], dtype=torch.float16, bias=None, residual=None)
    args = in_eight_bits(args, torch.int8)
    args["down_scale"] *= 2.0**-120
    args["up_scales"][0] *= 2.0**120
    close(cuda.low_rank_group(**args), args, TOLERANCE[torch.float16])
    assert cuda.launches() == 1


@pytest.mark.parametrize("at_the_beginning", [False, True])
@pytest.mark.parametrize("wrong", [-1, -(2**62), 40, 2**62, 16, 39])
def test_wrong_sources_touch_nothing_else(cuda, wrong, at_the_beginning):
    cuda.at_the_beginning = at_the_beginning
    args = made(2, 32, [(16, 40, True), (16, 5, False)], dtype=torch.bfloat16)
    args["sources"][0] = torch.full((40,), wrong)
    right = made(2, 32, [(16, 40, True), (16, 5, False)], dtype=torch.bfloat16)
    y, expected = cuda.low_rank_group(**args), cuda.low_rank_group(**right)
    assert torch.equal(y[:, 40:], expected[:, 40:])


@pytest.mark.parametrize("at_the_beginning", [False, True])
def test_sources_in_no_order_touch_nothing_else(cuda, at_the_beginning):
    cuda.at_the_beginning = at_the_beginning
    args = made(2, 32, [(16, 400, True)], dtype=torch.bfloat16)
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        args["sources"] = [torch.randint(-40, 440, (400,), generator=generator)]
        cuda.machine(seed, multiprocessors=seed % 3 + 1)
        assert cuda.low_rank_group(**args).shape == (2, 400)


@pytest.mark.parametrize("weights", [None, torch.int8])
@pytest.mark.parametrize("dtype", HALF)
def test_error_beside_the_cpu_kernel(cuda, dtype, weights):
    args = weighted(made(8, 512, [(96, 300, True), (80, 200, False)], dtype=dtype), weights)
    exact = reference.low_rank_group(**{**args, "x": args["x"].double()})
    error = (cuda.low_rank_group(**args) - exact).norm()
    assert error < 1.01 * (low_rank_group(**args) - exact).norm()


# what the emulation notices -----------------------------------------------------------------------

MISTAKES = {  # what of decode.cuh or ring.cuh is left out, or becomes something else
    "the barrier of the grid": ("if (thread == 0) grid_barrier(task.barrier);", ""),
    "the wait for copies": ("return wait_for_copies<5>();", "return wait_for_copies<8>();"),
    "the wait for the stream": ("wait_for_stream();", ""),
    "a wait of one thread": (
        "      wait_for_stream();",
        "      if (thread == 0) wait_for_stream();",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_emulation_shows_mistakes(mistake, tmp_path, library):
    line, instead = MISTAKES[mistake]
    csrc = tmp_path / "csrc"
    shutil.copytree(emulation.ROOT / "csrc", csrc)
    sources = [csrc / "cuda" / name for name in ("decode.cuh", "ring.cuh")]
    (source,) = (path for path in sources if line in path.read_text())
    text = source.read_text()
    assert len(re.findall(re.escape(line), text)) == 1
    source.write_text(text.replace(line, instead))
    wrong = emulation.build(tmp_path, csrc)
    args = made(*ALIGNED["qkv"], dtype=torch.bfloat16)
    expected = library.low_rank_group(**args)
    found = []
    for seed in range(4):
        wrong.machine(seed)
        try:
            found.append(wrong.low_rank_group(**args, dependent=True))
        except AssertionError as error:  # copies on their way, or begun too soon
            found.append(error)
    assert any(not isinstance(y, torch.Tensor) or not torch.equal(y, expected) for y in found)


# the other kernels --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_spectral_scale(cuda, dtype):
    for tokens, rank in [(1, 1), (3, 5), (300, 70), (7, 0), (0, 7)]:
        x, grad = (torch.randn(tokens, rank).to(dtype) for _ in range(2))
        for scale in (torch.randn(rank).to(dtype), torch.randn(rank)):
            if dtype == torch.float64 and scale.dtype != dtype:
                continue
            mask = torch.rand(rank) < 0.7
            y = spectral._spectral_scale(cuda.runner("spectral_scale"), x, scale, mask)
            assert torch.equal(y, reference.spectral_scale(x, scale, mask))
            grads = spectral._spectral_scale_backward(
                cuda.runner("spectral_scale_backward"), grad, x, scale, mask
            )
            expected = reference.spectral_scale_backward(grad, x, scale, mask)
            assert torch.equal(grads[0], expected[0])
            rtol = max(1e-5, torch.finfo(scale.dtype).eps)
            torch.testing.assert_close(grads[1], expected[1], rtol=rtol, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("segments", "length", "rank", "out"),
    [(1, 5, 3, 2), (3, 130, 64, 5), (2, 300, 72, 3), (4, 1, 40, 7)],
)
def test_spectral_linear_backward(cuda, segments, length, rank, out, dtype):
    """16 bytes at a time, and one number; segments of several partial sums; in place."""
    z, grad = (torch.randn(segments, length, size).to(dtype) for size in (rank, out))
    up, mask = torch.randn(out, rank).to(dtype), torch.rand(rank) < 0.7
    scale = torch.randn(rank).to(torch.float64 if dtype == torch.float64 else torch.float32)
    run = cuda.runner("spectral_scale_backward")
    found = spectral._spectral_linear_backward(run, grad, z, scale, mask, up, segments)
    inner = (grad @ up).double()
    expected = torch.where(mask, inner * scale.double(), 0).to(dtype)
    torch.testing.assert_close(found[0], expected, rtol=torch.finfo(dtype).eps, atol=0)
    sums = (inner * z.double()).sum(1)
    torch.testing.assert_close(
        found[1].double(), sums, rtol=1e-4, atol=1e-4 * float(sums.abs().max())
    )


def test_gaussian(cuda):
    for rows, columns in [(1, 1), (5, 7), (40, 33)]:
        omega = torch.empty(rows, columns)
        cuda.runner("gaussian")(omega, omega.data_ptr(), rows, columns, 2**40 + 7)
        expected = torch.from_numpy(reference.gaussian(rows, columns, 2**40 + 7)).float()
        torch.testing.assert_close(omega, expected, rtol=1e-5, atol=1e-5)


def test_empty_sketch(cuda):
    cuda.runner("gaussian")(None, 0, 0, 5, 1)
    assert cuda.launches() == 0
    assert sketch.gaussian_sketch(torch.ones(0, 3), 2, 1).shape == (0, 2)


# batched_svd --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("shape", "shared"),
    [
        ((2, 1, 1), 10**6), ((3, 5, 3), 10**6), ((3, 3, 5), 10**6), ((1, 9, 9), 2000),
        ((1, 40, 6), 10**6), ((1, 6, 40), 2000), ((1, 34, 33), 10**6),
    ],
)  # fmt: skip
def test_batched_svd(cuda, shape, shared, dtype):
    """In shared memory and beside it; one warp and several; more lanes than entries, and fewer."""
    cuda.machine(shared=shared, seed=shape[1])
    for at_the_beginning in (False, True):
        cuda.at_the_beginning = at_the_beginning
        matrices = test_ops_svd.randn(*shape, dtype=dtype)
        U, S, Vh, sweeps = cuda.batched_svd(matrices)
        test_ops_svd.check(matrices, U, S, Vh)
        assert (sweeps < 10).all()
        for part, expected in zip((U, S, Vh), ops.batched_svd(matrices), strict=True):
            tolerance = 1e3 * torch.finfo(dtype).eps
            torch.testing.assert_close(part, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", ["zero", "rank 2", "orthogonal", "graded", "tiny"])
def test_batched_svd_of_difficult_matrices(cuda, kind):
    matrix = test_ops_svd.randn(9, 7, seed=1)
    if kind == "zero":
        matrix = torch.zeros(9, 7, dtype=torch.float64)
    elif kind == "rank 2":
        matrix = test_ops_svd.randn(9, 2, seed=1) @ test_ops_svd.randn(2, 7, seed=2)
    elif kind == "orthogonal":
        matrix = torch.linalg.qr(matrix).Q
    elif kind == "graded":
        matrix = 10 ** torch.linspace(-100, 0, 9, dtype=torch.float64)[:, None] * matrix
    else:
        matrix = matrix * 2.0**-1030  # subnormal
    U, S, Vh, _ = cuda.batched_svd(matrix[None])
    scale = 2.0**1020 if kind == "tiny" else 1.0
    test_ops_svd.check(matrix[None] * scale, U, S * scale, Vh)
    expected = ops.batched_svd(matrix)[1]
    torch.testing.assert_close(S[0], expected, rtol=1e-12, atol=1e-15 * float(expected[0]))
    if kind == "graded":  # every digit of the smallest
        torch.testing.assert_close(S[0], expected, rtol=1e-12, atol=0)


def test_batched_svd_of_what_is_too_small_for_a_square(cuda):
    row = [0.0] * 4 + [
        1125899839733760.0,
        1589781070872576.0,
        1589781339308032.0,
        1.2171584533304773e30,
    ]
    matrices = torch.tensor([[row] * 7])
    U, S, Vh, sweeps = cuda.batched_svd(matrices)
    test_ops_svd.check(matrices, U, S, Vh)
    assert (sweeps < 10).all()


def test_batched_svd_tells_what_is_not_finite(cuda):
    for bad in (torch.nan, torch.inf, -torch.inf):
        matrices = test_ops_svd.randn(3, 6, 5)
        matrices[1, 4, 3] = bad
        U, S, Vh, sweeps = cuda.batched_svd(matrices)
        assert sweeps[1] == -1
        for i in (0, 2):
            test_ops_svd.check(matrices[i], U[i], S[i], Vh[i])


def test_batched_svd_gives_the_same_again(cuda):
    matrices = test_ops_svd.randn(2, 11, 8, dtype=torch.float32)
    first = cuda.batched_svd(matrices)
    for seed in range(1, 6):  # another order of the threads
        cuda.machine(seed=seed)
        for part, before in zip(cuda.batched_svd(matrices), first, strict=True):
            assert torch.equal(part, before)
