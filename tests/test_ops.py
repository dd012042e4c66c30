"""soco.ops against plain torch, on every device there is."""

import multiprocessing
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.library import opcheck

import reference  # tests/reference.py
from soco import core, ops
from soco.ops import layers, lowrank
from soco.ops import spectral as spectral_ops

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LEVELS = core.simd_levels()


def randn(*shape, seed=0, device="cpu", dtype=torch.float32, grad=False):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return values.to(device, dtype).requires_grad_(grad)


# spectral_scale ----------------------------------------------------------------------------------

SPECTRAL_SHAPES = [(0, 4), (4, 0), (1, 1), (5, 3), (33, 64), (300, 37), (2, 3, 5), (7,)]


def spectral(shape, device, dtype=torch.float32, scale_dtype=None, grad=False):
    """An x, a scale and a mask that drops every third component."""
    x = randn(*shape, device=device, dtype=dtype, grad=grad)
    scale = randn(shape[-1], seed=1, device=device, dtype=scale_dtype or dtype, grad=grad)
    return x, scale, torch.arange(shape[-1], device=device) % 3 != 1


def test_spectral_by_hand():
    y = ops.spectral_scale(
        torch.tensor([[1.0, 2.0]]), torch.tensor([3.0, 4.0]), torch.tensor([True, False])
    )
    assert y.tolist() == [[3.0, 0.0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SPECTRAL_SHAPES)
def test_spectral_matches_reference(shape, dtype, device):
    for scale_dtype in {dtype, torch.float32}:
        x, scale, mask = spectral(shape, device, dtype, scale_dtype)
        y = ops.spectral_scale(x, scale, mask)
        torch.testing.assert_close(y, reference.spectral_scale(x, scale, mask), rtol=0, atol=0)
        grad = randn(*shape, seed=2, device=device, dtype=dtype)
        grad_x, grad_scale = ops.spectral_scale_backward(grad, x, scale, mask)
        expected_x, expected_scale = reference.spectral_scale_backward(grad, x, scale, mask)
        torch.testing.assert_close(grad_x, expected_x, rtol=0, atol=0)
        torch.testing.assert_close(grad_scale, expected_scale)


def test_dropped_components_are_zero_whatever_x_is(device):
    x = torch.tensor([[torch.nan, torch.inf, 2.0]], device=device)
    mask = torch.tensor([False, False, True], device=device)
    assert ops.spectral_scale(x, torch.ones(3, device=device), mask).tolist() == [[0.0, 0.0, 2.0]]
    _, grad_scale = ops.spectral_scale_backward(torch.ones_like(x), x, torch.ones_like(x[0]), mask)
    assert grad_scale.tolist() == [0.0, 0.0, 2.0]


def test_spectral_of_strided_inputs(device):
    x, scale, mask = spectral((6, 8), device)
    grad = torch.ones(1, 1, device=device).expand(3, 4)  # what sum().backward() gives
    strided = x[::2, ::2], scale[::2], mask[::2]
    packed = tuple(t.clone() for t in strided)
    assert torch.equal(ops.spectral_scale(*strided), ops.spectral_scale(*packed))
    for ours, theirs in zip(
        ops.spectral_scale_backward(grad, *strided),
        ops.spectral_scale_backward(grad.contiguous(), *packed),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_spectral_gradients(device):
    x, scale, mask = spectral((5, 3), device, torch.float64, grad=True)
    assert torch.autograd.gradcheck(lambda x, s: ops.spectral_scale(x, s, mask), (x, scale))
    assert torch.autograd.gradgradcheck(lambda x, s: ops.spectral_scale(x, s, mask), (x, scale))


@pytest.mark.parametrize("shape", [(0, 4), (5, 3), (2, 3, 5)])
def test_spectral_registration(shape, device):
    opcheck(torch.ops.soco.spectral_scale.default, spectral(shape, device, grad=True))
    args = randn(*shape, device=device, grad=True), *spectral(shape, device, grad=True)
    opcheck(torch.ops.soco.spectral_scale_backward.default, args)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_spectral_at_every_simd_level(level, dtype, simd_level):
    x, scale, mask = spectral((131, 67), "cpu", dtype)
    simd_level(level)
    expected = reference.spectral_scale(x, scale, mask)
    torch.testing.assert_close(ops.spectral_scale(x, scale, mask), expected, rtol=0, atol=0)
    _, grad_scale = ops.spectral_scale_backward(x, x, scale, mask)
    _, expected = reference.spectral_scale_backward(x, x, scale, mask)
    torch.testing.assert_close(grad_scale, expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(5, 3).long()}, TypeError, "x must be float32, .* got torch.int64"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x must be \(..., rank\), got a tensor without"),
        ({"scale": torch.ones(4)}, ValueError, r"scale must be \(rank,\) = \(3,\), got \(4,\)"),
        (
            {"scale": torch.ones(3).half()},
            TypeError,
            r"scale must be torch.float32 or torch.float32, got torch.float16",
        ),
        ({"mask": torch.ones(3)}, TypeError, "mask must be torch.bool, got torch.float32"),
        ({"mask": torch.ones(3, 1).bool()}, ValueError, r"mask must be .* got \(3, 1\)"),
        ({"scale": torch.ones(3, device="meta")}, ValueError, "scale must be on cpu .* got meta"),
    ],
)
def test_wrong_spectral_arguments_are_named(change, error, message):
    args = dict(zip(("x", "scale", "mask"), spectral((5, 3), "cpu"), strict=True)) | change
    with pytest.raises(error, match=message):
        ops.spectral_scale(**args)


def test_wrong_gradient_is_named():
    with pytest.raises(ValueError, match=r"grad must be shaped as x = \(5, 3\), got \(5, 4\)"):
        ops.spectral_scale_backward(torch.ones(5, 4), *spectral((5, 3), "cpu"))


# spectral_linear ---------------------------------------------------------------------------------

# (..., rank), out: with fewer tokens than outputs, and with more
SPECTRAL_LAYERS = [
    ((0, 4), 3), ((4, 0), 3), ((5, 3), 0), ((1, 1), 1), ((5, 3), 7), ((40, 70), 9),
    ((2, 150, 33), 20), ((2, 3, 5), 40), ((7,), 4),
]  # fmt: skip


def spectral_layer(shape, out, device, dtype=torch.float32, scale_dtype=None, grad=False):
    z, scale, mask = spectral(shape, device, dtype, scale_dtype, grad)
    up, bias = (
        randn(*size, seed=seed, device=device, dtype=dtype, grad=grad)
        for seed, size in ((3, (out, shape[-1])), (4, (out,)))
    )
    return z, scale, mask, up, bias


def near(found, expected, dtype):
    rtol = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 2e-2}.get(dtype, 3e-3)
    atol = rtol * max(1.0, float(expected.abs().max())) if expected.numel() else 0
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


def test_spectral_linear_by_hand(device):
    z, scale = torch.tensor([[1.0, 2.0]], device=device), torch.tensor([3.0, 4.0], device=device)
    up, bias = torch.tensor([[1.0, 5.0]], device=device), torch.tensor([0.5], device=device)
    mask = torch.tensor([True, False], device=device)
    assert ops.spectral_linear(z, scale, mask, up, bias).tolist() == [[3.5]]
    assert ops.spectral_linear(z, scale, ~mask, up).tolist() == [[40.0]]
    grad = torch.tensor([[2.0]], device=device)  # grad up = (2, 10)
    grad_z, sums = ops.spectral_linear_backward(grad, z, scale, mask, up)
    assert grad_z.tolist() == [[6.0, 0.0]]
    assert sums.tolist() == [[2.0, 20.0]]  # masked or not


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "out"), SPECTRAL_LAYERS)
def test_spectral_linear_matches_reference(shape, out, dtype, device):
    for scale_dtype in {dtype, torch.float32}:
        z, scale, mask, up, bias = spectral_layer(shape, out, device, dtype, scale_dtype)
        for added in (bias, None):
            y = ops.spectral_linear(z, scale, mask, up, added)
            near(y, reference.spectral_linear(z, scale, mask, up, added), dtype)
        grad = randn(*shape[:-1], out, seed=5, device=device, dtype=dtype)
        for segments in {1, shape[0]} if len(shape) > 1 and shape[0] else {1}:
            args = grad, z, scale, mask, up, segments
            found, expected = (
                backward(*args)
                for backward in (ops.spectral_linear_backward, reference.spectral_linear_backward)
            )
            for part, wanted in zip(found, expected, strict=True):
                near(part, wanted, dtype)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_segments_at_every_simd_level(level, dtype, simd_level):
    """More tokens than a partial sum has, in whole and in parts; columns in blocks and beside."""
    simd_level(level)
    z, scale, mask, up, _ = spectral_layer((3, 277, 131), 5, "cpu", dtype)
    grad = randn(3, 277, 5, seed=5, dtype=dtype)
    found = ops.spectral_linear_backward(grad, z, scale, mask, up, 3)
    expected = reference.spectral_linear_backward(grad, z, scale, mask, up, 3)
    near(found[0], expected[0], dtype)
    inner = (grad @ up).double()  # the sums are exact to float32, of what the product rounded to
    sums = (inner * z.double()).sum(1)
    tolerance = 1e-5 if dtype.itemsize < 8 else 1e-13
    torch.testing.assert_close(
        found[1].double(), sums, rtol=tolerance, atol=tolerance * float(sums.abs().max())
    )


def test_sums_do_not_depend_on_the_threads_nor_on_other_segments(threads):
    z, scale, mask, up, _ = spectral_layer((4, 300, 90), 6, "cpu")
    grad = randn(4, 300, 6, seed=5)
    threads(1)
    wanted = ops.spectral_linear_backward(grad, z, scale, mask, up, 4)
    alone = [ops.spectral_linear_backward(grad[s], z[s], scale, mask, up)[1][0] for s in range(4)]
    for count in (1, 2, 3):
        threads(count)
        for _ in range(20):
            found = ops.spectral_linear_backward(grad, z, scale, mask, up, 4)
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert torch.equal(torch.stack(alone), wanted[1])


def test_the_scales_go_into_what_is_smaller(monkeypatch):
    seen = []
    scaled = spectral_ops._spectral_scale

    def noted(run, x, *rest):
        seen.append(x)
        return scaled(run, x, *rest)

    monkeypatch.setattr(spectral_ops, "_spectral_scale", noted)
    for tokens in (6, 7):
        z, scale, mask, up, bias = spectral_layer((tokens, 3), 7, "cpu")
        ops.spectral_linear(z, scale, mask, up, bias)
        assert seen.pop() is (z if tokens < 7 else up)


def test_spectral_linear_gradients(device):
    for shape, out in (((5, 3), 4), ((2, 4, 3), 2)):
        z, scale, mask, up, bias = spectral_layer(shape, out, device, torch.float64, grad=True)
        args = z, scale, up, bias

        def layer(z, scale, up, bias, mask=mask):
            return ops.spectral_linear(z, scale, mask, up, bias)

        assert torch.autograd.gradcheck(layer, args)
        assert torch.autograd.gradgradcheck(layer, args)
        grad = randn(*shape[:-1], out, seed=5, device=device, dtype=torch.float64, grad=True)

        def back(grad, z, scale, up, mask=mask, segments=shape[0]):
            return ops.spectral_linear_backward(grad, z, scale, mask, up, segments)

        assert torch.autograd.gradcheck(back, (grad, z, scale, up))


@pytest.mark.parametrize(("shape", "out"), [((0, 4), 3), ((5, 3), 4), ((2, 3, 5), 9)])
def test_spectral_linear_registration(shape, out, device):
    args = spectral_layer(shape, out, device, grad=True)
    opcheck(torch.ops.soco.spectral_linear.default, args)
    grad = randn(*shape[:-1], out, device=device, grad=True)
    opcheck(torch.ops.soco.spectral_linear_backward.default, (grad, *args[:4], 1))
    compiled = torch.compile(ops.spectral_linear, fullgraph=True)
    torch.testing.assert_close(compiled(*args), ops.spectral_linear(*args))


def test_spectral_linear_under_autocast(device):
    """Products in autocast's dtype, as of ``linear``; the scales in their own."""
    z, scale, mask, up, bias = spectral_layer((6, 5), 4, device, grad=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = ops.spectral_linear(z, scale, mask, up, bias)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert scale.grad is not None
    assert scale.grad.dtype == torch.float32
    wanted = reference.spectral_linear(z, scale, mask, up, bias)
    torch.testing.assert_close(y.float(), wanted, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"up": torch.ones(3)}, ValueError, r"up must be \(out, rank\), got \(3,\)"),
        (
            {"up": torch.ones(2, 4)},
            ValueError,
            r"up must be \(out, rank\) = \(2, 3\), got \(2, 4\)",
        ),
        ({"up": torch.ones(2, 3).half()}, TypeError, "up must be torch.float32, got torch.float16"),
        ({"bias": torch.ones(3)}, ValueError, r"bias must be \(out,\) = \(2,\), got \(3,\)"),
        ({"mask": torch.ones(3)}, TypeError, "mask must be torch.bool"),
    ],
)
def test_wrong_spectral_layers_are_named(change, error, message):
    names = "z", "scale", "mask", "up", "bias"
    args = dict(zip(names, spectral_layer((5, 3), 2, "cpu"), strict=True)) | change
    with pytest.raises(error, match=message):
        ops.spectral_linear(**args)


def test_wrong_segments_are_named():
    z, scale, mask, up, _ = spectral_layer((5, 3), 2, "cpu")
    for segments in (0, 2, -1):
        with pytest.raises(ValueError, match=f"must divide the 5 tokens, got {segments}"):
            ops.spectral_linear_backward(torch.ones(5, 2), z, scale, mask, up, segments)
    with pytest.raises(ValueError, match=r"grad must be \(..., out\) = \(5, 2\), got \(5, 3\)"):
        ops.spectral_linear_backward(torch.ones(5, 3), z, scale, mask, up)


# low_rank_linear ---------------------------------------------------------------------------------

# tokens, in, rank, out: empty, smallest, odd, past every register block
LOW_RANK_SIZES = [
    (0, 4, 2, 3),
    (1, 0, 2, 3),
    (1, 4, 0, 3),
    (2, 4, 2, 0),
    (1, 1, 1, 1),
    (3, 5, 2, 7),
    (9, 67, 13, 35),
    (16, 130, 33, 64),
]


def low_rank(sizes, device, dtype=torch.float32, grad=False):
    tokens, in_features, rank, out_features = sizes
    options = {"device": device, "dtype": dtype, "grad": grad}
    return (
        randn(tokens, in_features, **options),
        randn(rank, in_features, seed=1, **options),
        randn(out_features, rank, seed=2, **options),
        randn(out_features, seed=3, **options),
    )


def test_low_rank_by_hand(side):
    x, down, up = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4]])
    assert ops.low_rank_linear(x, down, up).tolist() == [[9.0, 12.0]]
    assert ops.low_rank_linear(x, down, up, torch.tensor([0.5, -1.0])).tolist() == [[9.5, 11.0]]


def test_few_tokens_take_the_kernel_and_many_the_library(monkeypatch):
    taken = []
    original = layers.linear
    monkeypatch.setattr(layers, "linear", lambda *args: taken.append(1) or original(*args))
    most = layers.most_tokens("cpu", torch.float32)
    for tokens, calls in ((most, 0), (most + 1, 2)):
        taken.clear()
        ops.low_rank_linear(*low_rank((tokens, 5, 2, 3), "cpu"))
        assert len(taken) == calls


@pytest.mark.parametrize(
    ("dtype", "has", "most", "eight_bit", "slow"),
    [
        (torch.float64, {"avx2"}, 16, 16, False),
        (torch.float32, {"avx2"}, 32, 32, False),
        (torch.float32, {"avx2", "avx512_bw"}, 16, 64, False),
        (torch.bfloat16, {"avx2"}, 64, 64, True),
        (torch.bfloat16, {"avx2", "avx512_bw"}, 32, 64, False),
        (torch.bfloat16, {"avx2", "avx512_bw", "amx_bf16"}, 4, 32, False),
        (torch.float16, {"avx2", "avx512_bw"}, 64, 64, True),
        (torch.float16, {"avx2", "avx512_bw", "avx512_fp16"}, 12, 64, False),
        (torch.bfloat16, {"neon"}, 32, 32, False),
    ],
)
def test_where_the_library_takes_over(dtype, has, most, eight_bit, slow, monkeypatch):
    monkeypatch.setattr(layers, "instructions", lambda: frozenset(has))
    monkeypatch.setattr(layers, "is_slow", layers.is_slow.__wrapped__)
    assert layers.most_tokens.__wrapped__("cpu", dtype) == most
    assert layers.most_tokens.__wrapped__("cpu", dtype, dtype) == most
    for weights in (torch.int8, torch.float8_e4m3fn):
        assert layers.most_tokens.__wrapped__("cpu", dtype, weights) == eight_bit
    assert layers.is_slow("cpu", dtype) == slow
    assert layers.most_tokens("cuda", dtype) == 16
    assert not layers.is_slow("cuda", dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_slow_products_are_computed_wide(dtype, monkeypatch):
    monkeypatch.setattr(layers, "most_tokens", lambda *_: 0)
    monkeypatch.setattr(layers, "is_slow", lambda *_: True)
    monkeypatch.setattr(layers, "PIECE", 7)  # several pieces, the last one smaller
    x, down, up, bias = low_rank((5, 30, 20, 24), "cpu", dtype)
    wide = ops.low_rank_linear(x, down, up, bias)
    exact = reference.low_rank_linear(x.float(), down.float(), up.float(), bias.float())
    # One rounding, and the sums of float32, whose order is the library's.
    rtol = torch.finfo(dtype).eps / 2 * (1 + 1e-6)
    atol = 1e-6 * float(exact.abs().max())
    torch.testing.assert_close(wide.float(), exact, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", LOW_RANK_SIZES)
def test_low_rank_matches_reference(sizes, dtype, device, side):
    x, down, up, bias = low_rank(sizes, device, dtype)
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 2e-2}.get(dtype, 3e-3)
    for shift in (bias, None):
        y = ops.low_rank_linear(x, down, up, shift)
        expected = reference.low_rank_linear(x, down, up, shift)
        atol = tolerance * max(1.0, float(expected.abs().max())) if expected.numel() else 0
        torch.testing.assert_close(y, expected, rtol=tolerance, atol=atol)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("on_cpu_by_kernel")
def test_the_kernel_is_no_worse_than_two_linears(dtype, device):
    x, down, up, bias = low_rank((16, 256, 96, 128), device, dtype)
    exact = reference.low_rank_linear(x.double(), down, up, bias)
    eager = torch.nn.functional.linear(torch.nn.functional.linear(x, down), up, bias)
    ours = ops.low_rank_linear(x, down, up, bias)
    assert (ours - exact).norm() < (eager - exact).norm()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("on_cpu_by_kernel")
def test_low_rank_at_every_simd_level(level, dtype, simd_level):
    simd_level(level)
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 4e-3}.get(dtype, 5e-4)
    for tokens in range(1, 11):
        args = low_rank((tokens, 83, 21, 17), "cpu", dtype)
        expected = reference.low_rank_linear(*args)
        atol = tolerance * float(expected.abs().max())
        torch.testing.assert_close(ops.low_rank_linear(*args), expected, rtol=0, atol=atol)


def test_a_token_alone_gives_what_it_gives_among_others(device):
    x, down, up, bias = low_rank((16, 67, 13, 35), device)
    together = ops.low_rank_linear(x, down, up, bias)
    for token in range(16):
        alone = ops.low_rank_linear(x[token], down, up, bias)
        assert torch.equal(alone, together[token])


def test_the_kernel_does_not_depend_on_the_threads(threads):
    args = low_rank((7, 500, 300, 400), "cpu")
    spectral_args = spectral((1000, 100), "cpu")
    threads(1)
    expected = ops.low_rank_linear(*args)
    _, expected_scale = ops.spectral_scale_backward(spectral_args[0], *spectral_args)
    for count in (2, 3, 8):
        threads(count)
        for _ in range(5):
            assert torch.equal(ops.low_rank_linear(*args), expected)
            _, grad_scale = ops.spectral_scale_backward(spectral_args[0], *spectral_args)
            assert torch.equal(grad_scale, expected_scale)


def test_low_rank_of_leading_dimensions_and_strides(device, side):
    x, down, up, bias = low_rank((12, 10, 6, 8), device)
    flat = ops.low_rank_linear(x, down, up, bias)
    torch.testing.assert_close(
        ops.low_rank_linear(x.view(2, 3, 2, 10), down, up, bias), flat.view(2, 3, 2, 8)
    )
    torch.testing.assert_close(ops.low_rank_linear(x[4], down, up, bias), flat[4])
    strided = (
        x.mT.contiguous().mT,
        down.mT.contiguous().mT,
        up.mT.contiguous().mT,
        bias.repeat(2)[::1][:8],
    )
    y = ops.low_rank_linear(*strided)
    assert y.is_contiguous()
    torch.testing.assert_close(y, flat)


@pytest.mark.parametrize("way", ["op", "function"])
def test_low_rank_gradients(way, device, side):
    op = torch.ops.soco.low_rank_linear.default if way == "op" else ops.low_rank_linear
    args = low_rank((4, 5, 2, 3), device, torch.float64, grad=True)
    assert torch.autograd.gradcheck(op, args)
    assert torch.autograd.gradgradcheck(op, args)
    x, down, up, _ = args
    assert torch.autograd.gradcheck(
        lambda *some: op(some[0], some[1], some[2], None), (x, down, up)
    )


def test_trained_layers_keep_what_their_gradient_needs(monkeypatch):
    """Two linears where ``up`` is trained, the op otherwise and where torch's products are slow."""
    x, down, up, bias = low_rank((4, 5, 2, 3), "cpu", torch.bfloat16)

    def grad_fn():
        return type(ops.low_rank_linear(x, down, up, bias).grad_fn).__name__

    x.requires_grad_()
    assert "soco" in grad_fn()
    up.requires_grad_()
    for slow in (True, False):
        monkeypatch.setattr(lowrank, "is_slow", lambda *_, slow=slow: slow)
        assert ("soco" in grad_fn()) == slow
    with torch.no_grad():
        assert ops.low_rank_linear(x, down, up).grad_fn is None


def test_only_the_gradients_that_are_needed(device):
    x, down, up, bias = low_rank((4, 5, 2, 3), device)
    up.requires_grad_()
    y = ops.low_rank_linear(x, down, up, bias)
    (grad_up,) = torch.autograd.grad(y.sum(), up)
    torch.testing.assert_close(grad_up, torch.ones_like(y).mT @ (x @ down.mT))
    grads = ops.low_rank_linear_backward(
        torch.ones_like(y), x, down, up, (False, True, False, False)
    )
    assert [tuple(g.shape) for g in grads] == [(0,), (2, 5), (0,), (0,)]


@pytest.mark.parametrize("sizes", [(0, 4, 2, 3), (3, 5, 2, 7), (20, 5, 2, 7)])
def test_low_rank_registration(sizes, device):
    args = low_rank(sizes, device, grad=True)
    opcheck(torch.ops.soco.low_rank_linear.default, args)
    grad = randn(sizes[0], sizes[3], device=device, grad=True)
    for needs in ([True] * 4, [False, True, False, True]):
        opcheck(torch.ops.soco.low_rank_linear_backward.default, (grad, *args[:3], needs))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(3, 5).int()}, TypeError, "x must be float32, .* got torch.int32"),
        (
            {"x": torch.ones(3, 6)},
            ValueError,
            r"down must be \(rank, in\) = \(2, 6\), got \(2, 5\)",
        ),
        ({"down": torch.ones(5)}, ValueError, r"x must be .* got \(3, 5\), \(5,\) and \(7, 2\)"),
        (
            {"up": torch.ones(7, 3)},
            ValueError,
            r"up must be \(out, rank\) = \(7, 2\), got \(7, 3\)",
        ),
        ({"bias": torch.ones(1)}, ValueError, r"bias must be \(out,\) = \(7,\), got \(1,\)"),
        (
            {"up": torch.ones(7, 2).double()},
            TypeError,
            "up must be torch.float32, got torch.float64",
        ),
        ({"bias": torch.ones(7, device="meta")}, ValueError, "bias must be on cpu .* got meta"),
    ],
)
def test_wrong_low_rank_arguments_are_named(change, error, message):
    args = dict(zip(("x", "down", "up", "bias"), low_rank((3, 5, 2, 7), "cpu"), strict=True))
    with pytest.raises(error, match=message):
        ops.low_rank_linear(**args | change)


def test_low_rank_under_autocast(device, side):
    args = low_rank((4, 8, 3, 5), device, grad=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = ops.low_rank_linear(*args)
        exact = ops.low_rank_linear(*(t.double() for t in args))
    assert y.dtype == torch.bfloat16
    assert exact.dtype == torch.float64
    y.float().sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in args)


# gaussian_sketch ---------------------------------------------------------------------------------


def omega(rows, columns, seed, device="cpu"):
    return ops.gaussian_sketch(torch.eye(rows, device=device), columns, seed)


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_omega_is_philox_and_box_muller(seed, device):
    ours = omega(13, 131, seed, device).cpu().double()
    expected = torch.from_numpy(reference.gaussian(13, 131, seed))
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


GOLDEN = """
3f6188af bf3331e0 be35501d 3fa3dbac be15f66b 3feb911f
3ea2a07e be78f32d be6ab6f4 3f1b5957 3f3d4dc3 3e02188f
be8c2b3f bff7ce1d 3ed1b69a 3e6537a3 bf88b96e 3f9f696f
"""  # the bits of each number


@pytest.mark.parametrize("level", LEVELS)
def test_omega_is_the_recorded_one_bit_for_bit(level, device, simd_level):
    simd_level(level)
    bits = omega(3, 6, 20240229, device).flatten().view(torch.int32).tolist()
    assert [value & 0xFFFFFFFF for value in bits] == [int(value, 16) for value in GOLDEN.split()]


@pytest.mark.parametrize("level", LEVELS)
def test_many_of_its_numbers_are_the_recorded_ones(level, device, simd_level):
    """A fused multiply-add changes few of them: this is the test that sees it on any device."""
    simd_level(level)
    bits = omega(200, 203, 5, device).flatten().view(torch.int32)
    assert int(bits.long().sum()) == -893730929960


def test_omega_is_the_same_at_every_simd_level_and_thread_count(simd_level, threads):
    threads(1)
    expected = omega(200, 203, 5)
    for level in LEVELS:
        simd_level(level)
        for count in (1, 2, 5):
            threads(count)
            assert torch.equal(omega(200, 203, 5), expected)


def test_an_element_depends_on_its_position_only():
    large = omega(20, 70, 9)
    assert torch.equal(omega(11, 33, 9), large[:11, :33])
    assert not torch.equal(omega(20, 70, 10), large)


def test_omega_is_standard_normal():
    values = omega(400, 500, 3).flatten().double()  # 200000: a standard error of 0.0022
    assert abs(values.mean()) < 0.01
    assert abs(values.var() - 1) < 0.015
    assert abs((values**3).mean()) < 0.03
    assert abs((values**4).mean() - 3) < 0.08
    assert abs((values.abs() < 0.6744898).double().mean() - 0.5) < 0.005
    neighbours = torch.corrcoef(omega(400, 500, 3).double().view(-1, 4).T)
    assert (neighbours - torch.eye(4)).abs().max() < 0.02


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5), (0, 5), (3, 0)])
def test_sketch_is_the_product_with_omega(shape, dtype, device):
    weight = randn(*shape, device=device, dtype=dtype)
    y = ops.gaussian_sketch(weight, 4, 7)
    wide = torch.promote_types(dtype, torch.float32)
    expected = (weight.to(wide) @ omega(shape[-1], 4, 7, device).to(wide)).to(dtype)
    torch.testing.assert_close(y, expected)
    assert ops.gaussian_sketch(weight, 0, 7).shape == (*shape[:-1], 0)


def test_sketch_under_autocast_keeps_its_precision(device):
    weight = randn(6, 50, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = ops.gaussian_sketch(weight, 4, 7)
    assert torch.equal(y, ops.gaussian_sketch(weight, 4, 7))


def test_sketch_gradients(device):
    weight = randn(3, 5, device=device, dtype=torch.float64, grad=True)
    assert torch.autograd.gradcheck(lambda w: ops.gaussian_sketch(w, 4, 7), (weight,))
    assert torch.autograd.gradgradcheck(lambda w: ops.gaussian_sketch(w, 4, 7), (weight,))


def test_sketch_registration(device):
    weight = randn(3, 5, device=device, grad=True)
    opcheck(torch.ops.soco.gaussian_sketch.default, (weight, 4, 7))
    opcheck(torch.ops.soco.gaussian_sketch_backward.default, (weight, 9, 7))


@pytest.mark.parametrize(
    ("weight", "columns", "seed", "error", "message"),
    [
        (torch.ones(5), 2, 0, ValueError, r"weight must have at least two dimensions, got \(5,\)"),
        (torch.ones(2, 5).int(), 2, 0, TypeError, "weight must be float32, .* got torch.int32"),
        (torch.ones(2, 5), -1, 0, ValueError, "columns must not be negative, got -1"),
        (torch.ones(2, 5), 2, -1, ValueError, r"seed must be from 0 to 2\*\*63 - 1, got -1"),
        (torch.ones(2, 5), 2, 2**63, ValueError, r"seed must be from 0 to 2\*\*63 - 1, got 9223"),
        (torch.ones(2, 5), 2**61, 0, ValueError, "is too large for 64-bit sizes"),
    ],
)
def test_wrong_sketch_arguments_are_named(weight, columns, seed, error, message):
    with pytest.raises(error, match=message):
        ops.gaussian_sketch(weight, columns, seed)


# All ops -----------------------------------------------------------------------------------------


def test_nothing_is_written_into_an_input(device):
    def check(op, *tensors):
        before = [t.clone() for t in tensors]
        op(*tensors)
        assert all(torch.equal(old, new) for old, new in zip(before, tensors, strict=True))

    check(ops.spectral_scale, *spectral((5, 3), device))
    check(ops.low_rank_linear, *low_rank((3, 5, 2, 7), device))
    check(lambda weight: ops.gaussian_sketch(weight, 4, 7), randn(3, 5, device=device))


def test_rows_without_an_end_cost_nothing():
    """Empty tensors may have any number of rows."""
    x = torch.empty(2**40, 0)
    none = torch.empty(0)
    assert ops.spectral_scale(x, none, none.bool()).shape == (2**40, 0)
    assert ops.spectral_scale_backward(x, x, none, none.bool())[0].shape == (2**40, 0)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 on
def test_a_forked_child_can_use_the_threads(threads):
    threads(4)
    args = low_rank((7, 500, 300, 400), "cpu")
    expected = ops.low_rank_linear(*args)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def work():
        queue.put((bool((ops.low_rank_linear(*args) == expected).all()), core.build_record()))

    child = context.Process(target=work)
    child.start()
    child.join(60)
    assert child.exitcode == 0
    is_right, record = queue.get()
    assert is_right
    assert record["threads"] == "own pool"  # torch's would hang there


def test_several_python_threads_at_once(threads):
    """Each gets what it would get alone, bit for bit, whatever the others do."""
    threads(2)
    jobs = []
    for seed in range(6):
        x, down, up, bias = low_rank((8, 300, 40, 200), "cpu")
        z, scale, mask = spectral((2000, 64), "cpu")
        matrices = randn(7, 24, 20, seed=seed)
        jobs += [
            lambda args=(x + seed, down, up, bias): ops.low_rank_linear(*args),
            lambda args=(z + seed, z, scale, mask): ops.spectral_scale_backward(*args)[1],
            lambda args=matrices: ops.batched_svd(args)[1],
            lambda args=up, seed=seed: ops.gaussian_sketch(args, 9, seed),
        ]
    expected = [job() for job in jobs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            found = list(pool.map(lambda job: job(), jobs))
            assert all(map(torch.equal, found, expected))


@pytest.mark.skipif(sys.platform != "linux", reason="looked up on Linux only")
def test_loops_run_on_the_threads_of_torch():
    """Where torch has them: those of its wheels for Linux have."""
    has = "USE_OPENMP=ON" in torch.__config__.show()
    assert core.build_record()["threads"] == ("torch's OpenMP" if has else "own pool")


def whole(x, down, up, bias, scale, mask):
    """All ops in one function, with gradients through all of them."""
    z = ops.spectral_scale(x @ down.mT, scale, mask)
    y = ops.low_rank_linear(x, down, up, bias) + z @ up.mT
    return y.square().mean() + ops.gaussian_sketch(up, 3, 1).sum()


@pytest.mark.parametrize("tokens", [4, 40])
def test_compile_of_the_full_graph(tokens, device):
    args = *low_rank((tokens, 6, 3, 5), device, grad=True), *spectral((3,), device)[1:]
    expected = whole(*args)
    grads = torch.autograd.grad(expected, args[:4])
    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), expected)
    for ours, theirs in zip(torch.autograd.grad(compiled(*args), args[:4]), grads, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_compile_with_inductor_and_any_number_of_tokens(device):
    _, down, up, bias = low_rank((1, 6, 3, 5), device)
    compiled = torch.compile(ops.low_rank_linear, fullgraph=True, dynamic=True)
    for tokens in (2, 5, 30):
        x = randn(tokens, 6, device=device)
        torch.testing.assert_close(
            compiled(x, down, up, bias), ops.low_rank_linear(x, down, up, bias)
        )


def test_compile_under_autocast(device):
    args = low_rank((4, 6, 3, 5), device, grad=True)

    def run(*args):
        with torch.autocast(device, dtype=torch.bfloat16):
            return ops.low_rank_linear(*args).float().sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), run(*args))


# ---- what is not finite --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_seen(dtype, bad):
    x = torch.randn(9, 33, dtype=dtype)
    for each in (x, x.mT, x[:, ::2], x[:0], x[0, 0]):
        assert ops.all_finite(each)
    for place in ((0, 0), (4, 17), (8, 32)):
        broken = x.clone()
        broken[place] = bad
        for each in (broken, broken.mT, broken[place]):
            assert not ops.all_finite(each)
    other = torch.tensor([bad, 1.0, -bad], dtype=dtype)  # one of each
    assert not ops.all_finite(other)
    with pytest.raises(ValueError, match=r"q_proj \(9, 33\) holds NaN or Inf"):
        ops.check_finite("q_proj", broken)


def test_a_gradient_is_not_asked_for():
    assert ops.all_finite(torch.ones(3, requires_grad=True))
