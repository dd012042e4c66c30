"""soco.ops.low_rank_group against plain torch, on every device there is."""

import pickle
from typing import Any

import pytest
import torch
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import reference  # tests/reference.py
from soco import core, ops
from soco.ops import group, layers

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
EIGHT = [torch.int8, torch.float8_e4m3fn]
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 4e-3, torch.float16: 5e-4}
# tokens, in, and (rank, out, pivoted) of each layer
GROUPS = {
    "one": (3, 10, [(4, 7, False)]),
    "qkv": (5, 33, [(9, 31, False), (3, 12, False), (5, 12, False)]),
    "pivoted": (2, 65, [(30, 50, True), (7, 8, True)]),
    "mixed": (4, 17, [(5, 9, True), (6, 11, False), (1, 2, True)]),
    "one token": (1, 129, [(70, 130, True), (64, 64, False)]),
    "wide": (9, 200, [(100, 150, True), (53, 170, False)]),
    "rank 1": (2, 1, [(1, 1, False), (1, 3, True)]),
    "no tokens": (0, 6, [(2, 3, False)]),
    "no outputs": (2, 6, [(2, 0, False)]),
    "no inputs": (2, 0, [(2, 3, False)]),
}

# As GROUPS, with rows that begin at multiples of 16 bytes, in 8 bits, too.
ALIGNED = {
    "one": (3, 64, [(16, 24, False)]),
    "one token": (1, 1040, [(128, 257, False)]),
    "qkv": (5, 144, [(32, 70, False), (16, 31, False), (16, 31, False)]),
    "pivoted": (2, 192, [(64, 150, True), (32, 40, True)]),
    "mixed": (8, 80, [(32, 60, True), (48, 41, False), (16, 17, True)]),
    "wide": (16, 320, [(48, 90, True), (80, 33, False)]),
    "many rows": (9, 32, [(240, 260, False)]),
    "rank 16": (2, 16, [(16, 1, False), (16, 300, False)]),
    "no outputs": (2, 32, [(16, 0, False), (16, 5, False)]),
    "all identity": (2, 32, [(16, 16, True), (16, 30, True)]),
}


def randn(*shape, seed, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def pivots(rank, out, seed, device):
    """Where in (z, up z) the outputs are, for random pivots in ascending order."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(out, generator=generator)[:rank].sort().values
    order, rest = torch.zeros(out, dtype=torch.int64), rank
    for i in range(out):
        at = (chosen == i).nonzero()
        order[i] = int(at) if at.numel() else rest
        rest += not at.numel()
    return order.to(device)


def made(tokens, inner, layers, device="cpu", dtype=torch.float32, **extra) -> dict[str, Any]:
    """Arguments of low_rank_group with everything that a layer may have."""
    options = {"device": device, "dtype": dtype}
    width = sum(out for _, out, _ in layers)
    args = {
        "x": randn(tokens, inner, seed=0, **options),
        "down": randn(sum(rank for rank, _, _ in layers), inner, seed=1, **options),
        "ups": [
            randn(out - rank if pivoted else out, rank, seed=2 + i, **options)
            for i, (rank, out, pivoted) in enumerate(layers)
        ],
        "sources": [
            pivots(rank, out, i, device)
            if pivoted
            else torch.empty(0, dtype=torch.int64, device=device)
            for i, (rank, out, pivoted) in enumerate(layers)
        ],
        "bias": randn(width, seed=20, **options),
        "residual": randn(tokens, width, seed=21, **options),
    }
    return {**args, **extra}


def close(args, rtol):
    y, expected = ops.low_rank_group(**args), reference.low_rank_group(**args)
    assert y.shape == expected.shape
    assert y.dtype == args["x"].dtype
    atol = rtol * float(expected.abs().max()) if expected.numel() else 0
    torch.testing.assert_close(y, expected, rtol=rtol, atol=atol)


def in_eight_bits(args, dtype) -> dict[str, Any]:
    """The same weights with a factor per row."""
    top = 127 if dtype == torch.int8 else 448

    def scaled(weight):
        scale = weight.float().abs().amax(1) / top if weight.numel() else torch.ones(len(weight))
        rounded = weight.float() / scale[:, None]
        return (rounded.round() if dtype == torch.int8 else rounded).to(dtype), scale

    down, down_scale = scaled(args["down"])
    ups, up_scales = zip(*(scaled(up) for up in args["ups"]), strict=True)
    return {
        **args,
        **{"down": down, "down_scale": down_scale, "ups": list(ups), "up_scales": list(up_scales)},
    }


def test_by_hand(side):
    x, down = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0], [2.0, 0.0]])  # z = 3 and 2
    ups = [torch.tensor([[1.0], [2.0]]), torch.tensor([[5.0]])]
    assert ops.low_rank_group(x, down, ups).tolist() == [[3.0, 6.0, 10.0]]
    # the second layer pivoted: outputs 5 z, z
    sources = [torch.tensor([], dtype=torch.int64), torch.tensor([1, 0])]
    y = ops.low_rank_group(x, down, ups, sources=sources)
    assert y.tolist() == [[3.0, 6.0, 10.0, 2.0]]
    bias, residual = torch.tensor([0.0, 1.0, 0.0, -1.0]), torch.tensor([[10.0, 0.0, 0.0, 0.0]])
    y = ops.low_rank_group(x, down, ups, sources=sources, bias=bias, residual=residual)
    assert y.tolist() == [[13.0, 7.0, 10.0, 1.0]]


def test_gated_by_hand(side):
    x, down = torch.tensor([[1.0]]), torch.tensor([[0.0], [2.0]])
    ups = [torch.tensor([[1.0]]), torch.tensor([[3.0]])]
    bias = torch.tensor([1.0, 0.0])
    y = ops.low_rank_group(x, down, ups, bias=bias, gated=True)  # silu(1) * 6
    assert y.item() == pytest.approx(6 / (1 + 2.718281828459045**-1))


def test_eight_bits_by_hand(side):
    x, down = torch.tensor([[1.0, -1.0]]), torch.tensor([[127, -127]], dtype=torch.int8)
    ups, scales = [torch.tensor([[1], [-128]], dtype=torch.int8)], [torch.tensor([1.0, 0.5])]
    y = ops.low_rank_group(x, down, ups, down_scale=torch.tensor([2.0]), up_scales=scales)
    assert y.tolist() == [[508.0, -32512.0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GROUPS)
def test_matches_reference(name, dtype, device, side):
    args = made(*GROUPS[name], device, dtype)
    rtol = TOLERANCE[dtype] if side == "kernel" or dtype.itemsize > 2 else 4 * TOLERANCE[dtype]
    close(args, rtol)
    close({**args, "sources": args["sources"], "bias": None, "residual": None}, rtol)


@pytest.mark.parametrize("weights", [None, *EIGHT])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ALIGNED)
@pytest.mark.usefixtures("on_cpu_by_kernel")
def test_rows_of_16_bytes(name, dtype, weights, device):
    """On CUDA these take one launch."""
    args = made(*ALIGNED[name], "cpu", dtype)
    args = args if weights is None else in_eight_bits(args, weights)
    args = {k: _to(v, device) for k, v in args.items()}
    close(args, TOLERANCE[dtype])
    y = ops.low_rank_group(**args)
    for _ in range(100):
        assert torch.equal(ops.low_rank_group(**args), y)


@torch.no_grad()
def test_in_cuda_graphs(device):
    """Recorded on one stream, replayed side by side on two."""
    if device == "cpu":
        pytest.skip("graphs are of CUDA")
    groups, graphs, outputs, expected = [], [], [], []
    for seed in range(2):
        args = made(4, 1024, [(256, 900, True), (512, 800, False)], device, torch.bfloat16)
        args["x"] = randn(4, 1024, seed=50 + seed, device=device, dtype=torch.bfloat16)
        group = prepared(args)
        expected.append(group(args["x"]))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = args["x"]
            for _ in range(20):
                y = group(args["x"])
        groups.append((group, args["x"]))
        graphs.append(graph)
        outputs.append(y)
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(50):
        for graph, stream, y in zip(graphs, streams, outputs, strict=True):
            with torch.cuda.stream(stream):
                y.zero_()
                graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(y, e) for y, e in zip(outputs, expected, strict=True))


@torch.no_grad()
def test_dependent_launches(device):
    """Behind kernels that write the input, one after the other and in a graph."""
    if device == "cpu":
        pytest.skip("dependent launches are of CUDA")
    args = made(4, 1024, [(256, 1024, True)], device, torch.bfloat16)
    plain, early = prepared(args), prepared(args, dependent=True)
    inputs = [randn(4, 1024, seed=70 + i, device=device, dtype=torch.bfloat16) for i in range(20)]
    expected = [plain(plain(x * 2) / 64) for x in inputs]
    for _ in range(50):
        assert all(
            torch.equal(early(early(x * 2) / 64), y) for x, y in zip(inputs, expected, strict=True)
        )
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [early(early(x * 2) / 64) for x in inputs]
    for _ in range(50):
        for y in found:
            y.zero_()
        graph.replay()
        assert all(torch.equal(y, e) for y, e in zip(found, expected, strict=True))


def test_a_prepared_group_knows_how_outputs_are_shared_out(monkeypatch):
    plans = []
    monkeypatch.setattr(layers, "LowRankPlan", lambda *args: plans.append(args[-1]))
    monkeypatch.setattr(group, "shares_for", lambda weights: [0, len(weights.ups[0])])
    args = made(3, 10, [(4, 7, False)])
    ops.PreparedGroup(args["down"], args["ups"], torch.float32)
    assert plans == [[0, 7]]


@pytest.mark.parametrize(("value", "expected"), [(None, False), ("0", False), ("1", True)])
def test_dependent_launches_are_asked_for(monkeypatch, value, expected):
    plans = []
    monkeypatch.setattr(layers, "LowRankPlan", lambda *args: plans.append(args[-2]))
    monkeypatch.delenv("SOCO_DEPENDENT_LAUNCH", raising=False)
    if value is not None:
        monkeypatch.setenv("SOCO_DEPENDENT_LAUNCH", value)
    args = made(3, 10, [(4, 7, False)])
    weights = layers.Weights(args["down"], args["ups"])
    layers.plan_of(weights, torch.float32)
    assert plans == [expected]
    for given in (False, True):
        group = ops.PreparedGroup(args["down"], args["ups"], torch.float32, dependent=given)
        assert plans.pop() == given
        again = pickle.loads(pickle.dumps(group))
        assert again.dependent == plans.pop() == given


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "layers",
    [
        [(9, 30, False), (4, 30, False)],
        [(9, 30, True), (4, 30, True)],
        [(9, 100, True), (60, 100, False)],
    ],
)
def test_gated_matches_reference(layers, dtype, device, side):
    args = made(3, 40, layers, device, dtype, gated=True)
    args["residual"] = args["residual"][:, : layers[0][1]].contiguous()
    args["down"] = args["down"] / 8  # so that silu is where it is neither 0 nor the identity
    rtol = TOLERANCE[dtype] if side == "kernel" or dtype.itemsize > 2 else 4 * TOLERANCE[dtype]
    close(args, rtol)


@pytest.mark.parametrize("weights", EIGHT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["one", "qkv", "mixed", "wide", "one token"])
def test_eight_bit_weights(name, dtype, weights, device, side):
    args = in_eight_bits(made(*GROUPS[name], "cpu", dtype), weights)
    args = {k: _to(v, device) for k, v in args.items()}
    close(args, TOLERANCE[dtype] if side == "kernel" else 4 * TOLERANCE[dtype])


def test_eight_bit_weights_do_not_overflow_in_float16(side, monkeypatch):
    """Without their factors, the sums of these would be 20 times what float16 holds."""
    monkeypatch.setattr(layers, "is_slow", lambda *_: False)  # the library computes in float16
    for weights, top in ((torch.int8, 127.0), (torch.float8_e4m3fn, 448.0)):
        down = torch.full((3, 3000), top).to(weights)
        ups = [torch.full((2, 3), top).to(weights)]
        y = ops.low_rank_group(
            torch.ones(1, 3000, dtype=torch.float16), down, ups,
            down_scale=torch.full((3,), 1 / (3000 * top)), up_scales=[torch.full((2,), 1 / top)],
        )  # fmt: skip
        expected = torch.full((1, 2), 3.0, dtype=torch.float16)
        torch.testing.assert_close(y, expected, rtol=4 * TOLERANCE[torch.float16], atol=0)


def _to(value, device) -> Any:
    if isinstance(value, list):
        return [item.to(device) for item in value]
    return value.to(device) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("level", core.simd_levels())
@pytest.mark.parametrize("weights", EIGHT)
def test_every_eight_bit_number(weights, level, device, simd_level):
    """All 256, by the vector code and by that for the rest of a row."""
    simd_level(level)
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(weights)
    known = codes.float().nan_to_num(nan=7.0)
    down = torch.cat((codes.view(torch.uint8), torch.zeros(3, dtype=torch.uint8))).view(weights)
    for place in range(256):
        x = torch.zeros(1, 259)
        x[0, place] = 1.0
        if codes[place].float().isnan():
            continue
        row = down.view(torch.uint8).clone()
        row[:256][codes.float().isnan()] = 0  # NaN times 0 is NaN
        y = ops.low_rank_group(
            x.to(device), row.view(weights)[None].to(device),
            [torch.ones(1, 1).to(weights).to(device)],
            down_scale=torch.ones(1, device=device), up_scales=[torch.ones(1, device=device)],
        )  # fmt: skip
        assert y.item() == known[place].item()
    if weights == torch.float8_e4m3fn:
        nan = torch.tensor([[0x7F, 0xFF]], dtype=torch.uint8).view(weights).to(device)
        one = torch.ones(1, device=device)
        y = ops.low_rank_group(
            torch.ones(1, 2, device=device), nan, [torch.ones(1, 1).to(weights).to(device)],
            down_scale=one, up_scales=[one],
        )  # fmt: skip
        assert y.isnan().all()


@pytest.mark.parametrize("level", core.simd_levels())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gates_of_any_size(level, dtype, simd_level):
    """From where silu is 0 to where it is the identity, next to torch's own."""
    simd_level(level)
    generator = torch.Generator().manual_seed(0)
    values = torch.cat(
        [
            torch.linspace(-110, 110, 4001, dtype=torch.float64),
            torch.randn(1000, generator=generator, dtype=torch.float64) * 3,
            torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e4, -1e4, 1e30, -1e30, 3e38, -3e38]),
        ]
    ).to(dtype)
    factors = torch.randn(len(values), generator=generator, dtype=torch.float64).to(dtype)
    x, down = torch.ones(1, 1, dtype=dtype), torch.ones(2, 1, dtype=dtype)
    y = ops.low_rank_group(x, down, [values[:, None], factors[:, None]], gated=True)[0]
    exact = torch.nn.functional.silu(values.double()) * factors.double()
    theirs = torch.nn.functional.silu(values) * factors
    assert y.isfinite().all()
    normal = exact.abs() > torch.finfo(dtype).tiny
    gap = ((y.double() - exact) / exact)[normal].abs().max()
    limit = 1.5 * ((theirs.double() - exact) / exact)[normal].abs().max()
    assert gap <= (limit if dtype == torch.float32 else 1e-15)  # theirs is what is called exact
    assert (y.double() - exact)[~normal].abs().max() <= torch.finfo(dtype).tiny
    for place in range(0, len(values), 97):  # a value does not depend on where it is
        some = [values[place : place + 3, None], factors[place : place + 3, None]]
        again = ops.low_rank_group(x, down, some, gated=True)[0]
        assert torch.equal(again, y[place : place + 3])


@pytest.mark.parametrize("level", core.simd_levels())
def test_gates_that_are_not_finite(level, simd_level):
    simd_level(level)
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0, 1.0])
    factors = torch.tensor([1.0, 2.0, 1.0, torch.nan, -torch.inf])
    x, down = torch.ones(1, 1), torch.ones(2, 1)
    y = ops.low_rank_group(x, down, [values[:, None], factors[:, None]], gated=True)[0]
    expected = torch.nn.functional.silu(values) * factors
    torch.testing.assert_close(y, expected, equal_nan=True)


@pytest.mark.parametrize("level", core.simd_levels())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner", [*range(1, 20), 31, 33, 63, 65, 93])
def test_rows_of_any_length(inner, dtype, level, simd_level):
    """What lies behind and before the last numbers of a row adds nothing, not even if it is Inf."""
    simd_level(level)
    generator = torch.Generator().manual_seed(inner)
    x = torch.randint(-4, 5, (3, inner + 40), generator=generator).to(dtype)
    down = torch.randint(-2, 3, (5, inner + 40), generator=generator).to(dtype)
    nothing, order = torch.empty(0, 5, dtype=dtype), torch.arange(5)
    x[:, inner:], down[:, inner:] = torch.nan, torch.nan
    places = [place for place in range(inner) if place % 5 == 2]
    down[1, places] = torch.inf
    x[:, places] = 1
    x, down = x[:, :inner], down[:, :inner]
    y = ops.low_rank_group(x, down.contiguous(), [nothing], sources=[order])
    finite = [0, 2, 3, 4]
    assert torch.equal(y[:, finite], (x.double() @ down[finite].double().T).to(dtype))
    assert (y[:, 1] == (x.double() @ down[1].double()).to(dtype)).all()


@pytest.mark.parametrize("level", core.simd_levels())
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_simd_level(level, dtype, simd_level):
    simd_level(level)
    for tokens in range(1, 11):
        close(made(tokens, 83, [(21, 61, True), (50, 57, False)], dtype=dtype), TOLERANCE[dtype])
    if dtype != torch.float64:
        for weights in EIGHT:
            args = made(3, 83, [(21, 61, True), (50, 57, False)], dtype=dtype)
            close(in_eight_bits(args, weights), TOLERANCE[dtype])


@pytest.mark.usefixtures("on_cpu_by_kernel")
def test_does_not_depend_on_threads_tokens_or_company(threads):
    layers = [(300, 500, True), (200, 600, False)]
    args = made(7, 400, layers, dtype=torch.bfloat16)
    threads(1)
    expected = ops.low_rank_group(**args)
    for run in range(100):
        threads((2, 3, 8, 1)[run % 4])
        assert torch.equal(ops.low_rank_group(**args), expected)
    for token in range(7):
        one = {**args, "x": args["x"][token], "residual": args["residual"][token]}
        assert torch.equal(ops.low_rank_group(**one), expected[token])
    alone = {
        "x": args["x"], "down": args["down"][:300], "ups": args["ups"][:1],
        "sources": args["sources"][:1], "bias": args["bias"][:500],
        "residual": args["residual"][:, :500],
    }  # fmt: skip
    assert torch.equal(ops.low_rank_group(**alone), expected[:, :500])


def test_one_layer_is_low_rank_linear(device, side):
    args = made(3, 40, [(9, 30, False)], device)
    single = ops.low_rank_linear(args["x"], args["down"], args["ups"][0], args["bias"])
    found = ops.low_rank_group(args["x"], args["down"], args["ups"], bias=args["bias"])
    assert torch.equal(found, single)


def test_strides_and_leading_dimensions(device, side):
    args = made(6, 10, [(5, 9, True), (3, 8, False)], device)
    flat = ops.low_rank_group(**args)
    shaped = {**args, "x": args["x"].view(2, 3, 10), "residual": args["residual"].view(2, 3, 17)}
    torch.testing.assert_close(ops.low_rank_group(**shaped), flat.view(2, 3, 17))
    padded = []
    for up in args["ups"]:  # rows that lie apart: what is between them must not be looked at
        wide = torch.full((up.shape[0], 16), torch.nan, device=device)
        wide[:, : up.shape[1]] = up
        padded.append(wide[:, : up.shape[1]])
    strided = {
        **args,
        "x": args["x"].mT.contiguous().mT,
        "down": args["down"].mT.contiguous().mT,
        "ups": padded,
        "residual": args["residual"].mT.contiguous().mT,
    }
    torch.testing.assert_close(ops.low_rank_group(**strided), flat)
    turned = {**args, "ups": [up.mT.contiguous().mT for up in args["ups"]]}
    torch.testing.assert_close(ops.low_rank_group(**turned), flat)


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_worse_than_plain_layers(dtype, weights, device):
    """Against float64, next to what torch makes of the same weights in the same dtype."""
    args = made(8, 256, [(96, 300, True), (80, 200, False)], device, dtype, residual=None)
    if weights == torch.int8:
        args = {k: _to(v, device) for k, v in in_eight_bits(_cpu(args), weights).items()}
    exact = reference.low_rank_group(**{**args, "x": args["x"].double()})
    ours = ops.low_rank_group(**args)
    plain = group_by_library(args)
    assert (ours - exact).norm() < 1.01 * (plain - exact).norm()


def _cpu(args) -> dict[str, Any]:
    return {k: _to(v, "cpu") for k, v in args.items()}


def group_by_library(args):
    names = layers.Weights._fields
    weights = layers.Weights(**{name: args[name] for name in names if name in args})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "widened", lambda x: x)
        return layers._by_products(args["x"], weights, args["residual"])


@pytest.mark.parametrize("name", ["qkv", "mixed", "no tokens"])
def test_registration(name, device):
    args = made(*GROUPS[name], device)
    order = (args["x"], args["residual"], args["down"], args["ups"], args["sources"], args["bias"])
    opcheck(torch.ops.soco.low_rank_group.default, (*order, None, [], False))


@pytest.mark.parametrize("tokens", [3, 40])
def test_compiles(tokens, device):
    args = made(tokens, 20, [(6, 12, True), (5, 12, False)], device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x):
        return ops.low_rank_group(**{**args, "x": x}) * 2

    with torch.no_grad():
        torch.testing.assert_close(run(args["x"]), ops.low_rank_group(**args) * 2)


@pytest.mark.parametrize("wrong", [-1, -(2**62), 9, 2**62])
def test_wrong_sources_read_nothing_else(wrong, device):
    """What they give is not said; it comes from the factors, which are ones and twos here."""
    sources = torch.full((9,), wrong, device=device)
    y = ops.low_rank_group(
        torch.ones(2, 1, device=device), torch.ones(4, 1, device=device),
        [torch.full((5, 4), 2.0, device=device)], sources=[sources],
    )  # fmt: skip
    assert set(y.flatten().tolist()) <= {0.0, 1.0, 8.0}


def prepared(args, **changed):
    options = {name: args[name] for name in ("sources", "bias")}
    return ops.PreparedGroup(args["down"], args["ups"], args["x"].dtype, **{**options, **changed})


def test_a_prepared_group_has_no_derivative(device):
    args = made(3, 10, [(4, 7, False)], device)
    group = prepared(args)
    y = group(args["x"].requires_grad_())
    with pytest.raises(RuntimeError, match="low_rank_group is for inference"):
        y.sum().backward()


@torch.no_grad()
def test_a_prepared_group_is_seen_by_who_follows_ops(device):
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    args = made(3, 10, [(4, 7, True)], device)
    group = prepared(args)
    with Seen():
        y = group(args["x"])
    assert "soco.low_rank_group.default" in names
    assert torch.equal(group(args["x"]), y)


def test_has_no_derivative(device):
    args = made(3, 10, [(4, 7, False)], device)
    args["x"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"low_rank_group is for inference .* low_rank_linear"):
        ops.low_rank_group(**args).sum().backward()


def test_under_autocast(device):
    args = made(3, 10, [(4, 7, True)], device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert ops.low_rank_group(**args).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(3, 5).int()}, TypeError, "x must be float32, .* got torch.int32"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x must be \(..., in\)"),
        ({"x": torch.ones(3, 6)}, ValueError, r"down must be .* = \(5, 6\), got \(5, 5\)"),
        ({"ups": []}, ValueError, "a group has 1 to 8 layers, got 0"),
        ({"ups": [torch.ones(2, 1)] * 9}, ValueError, "a group has 1 to 8 layers, got 9"),
        ({"ups": [torch.ones(7), torch.ones(7, 3)]}, ValueError, r"each of ups \(out, rank\)"),
        ({"down": torch.ones(4, 5)}, ValueError, r"down must be .* = \(5, 5\), got \(4, 5\)"),
        ({"down": torch.ones(5, 5).half()}, TypeError, "down must be torch.float32"),
        ({"sources": [torch.arange(9)]}, ValueError, "sources must have .* or none, that is 2"),
        (
            {"sources": [torch.arange(10), torch.empty(0).long()]},
            ValueError,
            r"sources\[0\] must be \(out,\) = \(9,\), got \(10,\)",
        ),
        (
            {"sources": [torch.arange(6), torch.empty(0).long()]},
            ValueError,
            r"sources\[0\] must be \(out,\) = \(7,\), got \(6,\)",
        ),
        (
            {"sources": [torch.arange(9).int(), torch.empty(0).long()]},
            TypeError,
            r"sources\[0\] must be torch.int64, got torch.int32",
        ),
        ({"bias": torch.ones(1)}, ValueError, r"bias must be \(sum of outs,\) = \(13,\)"),
        ({"residual": torch.ones(3, 1)}, ValueError, r"residual must be .* = \(3, 13\)"),
        ({"gated": True}, ValueError, r"gated means two layers .* got outs \[9, 4\]"),
        ({"down_scale": torch.ones(5)}, ValueError, "down_scale goes with 8-bit weights"),
        ({"up_scales": [torch.ones(7)] * 2}, ValueError, "up_scales must have .* that is 0"),
        ({"down": torch.ones(5, 5).to(torch.int8)}, ValueError, "up_scales .* that is 2 .* got 0"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    args = made(3, 5, [(2, 9, True), (3, 4, False)])
    with pytest.raises(error, match=message):
        ops.low_rank_group(**{**args, **change})


def test_wrong_eight_bit_arguments_are_named():
    args = in_eight_bits(made(3, 5, [(2, 9, True), (3, 4, False)]), torch.int8)
    with pytest.raises(TypeError, match=r"x must not be float64"):
        ops.low_rank_group(**{**args, "x": args["x"].double()})
    with pytest.raises(TypeError, match=r"ups\[1\] must be torch.int8, got torch.float32"):
        ops.low_rank_group(**{**args, "ups": [args["ups"][0], torch.ones(4, 3)]})
    with pytest.raises(ValueError, match=r"up_scales\[0\] must be \(rows,\) = \(7,\), got \(9,\)"):
        ops.low_rank_group(**{**args, "up_scales": [torch.ones(9), torch.ones(4)]})
    with pytest.raises(ValueError, match="down_scale goes with 8-bit weights, got none"):
        ops.low_rank_group(**{**args, "down_scale": None})
    with pytest.raises(TypeError, match=r"down_scale must be torch.float32, got torch.float64"):
        ops.low_rank_group(**{**args, "down_scale": torch.ones(5).double()})
