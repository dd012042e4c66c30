"""soco.modules: each layer, the ways to compute it, and what others may do to its children."""

import copy
import gc
import io
import weakref
from typing import cast

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from soco import modules, ops
from soco.modules import LowRankLinear, PivotedLinear, share_basis


def layer(in_features=6, out_features=5, rank=3, bias=True, dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(0)
    up = torch.randn(out_features, rank, generator=g, dtype=torch.float64)
    down = torch.randn(rank, in_features, generator=g, dtype=torch.float64)
    shift = torch.randn(out_features, generator=g, dtype=torch.float64) if bias else None
    factors = up.to(device, dtype), down.to(device, dtype)
    return LowRankLinear.from_factors(factors, None if shift is None else shift.to(device))


def inputs(*shape, dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(1)
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(device, dtype)


@pytest.fixture
def fused(monkeypatch):
    """Counts the calls of the fused op."""
    calls = []
    original = ops.low_rank_linear

    def counted(*args):
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(ops, "low_rank_linear", counted)
    return calls


def test_by_hand():
    factors = torch.tensor([[3.0], [4.0]]), torch.tensor([[1.0, 2.0]])
    made = LowRankLinear.from_factors(factors, torch.tensor([0.5, -0.5]))
    assert made(torch.tensor([[1.0, 1.0]])).tolist() == [[9.5, 11.5]]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6,), (0, 6), (4, 6), (2, 3, 6)])
def test_is_the_dense_layer(shape, bias, device, fused):
    made = layer(bias=bias, device=device)
    x = inputs(*shape, device=device)
    torch.testing.assert_close(made(x), made.to_linear()(x))
    assert len(fused) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype, device):
    made = layer(dtype=dtype, device=device)
    y = made(inputs(4, 6, dtype=dtype, device=device))
    assert y.dtype == made.to_linear().weight.dtype == made.weight.dtype == dtype
    wide = layer(dtype=torch.float64, device=device)(
        inputs(4, 6, dtype=torch.float64, device=device)
    )
    torch.testing.assert_close(y.double(), wide, rtol=0.05, atol=0.1)


def test_trains(device):
    made, x = layer(device=device), inputs(4, 6, device=device).requires_grad_()
    twin, z = copy.deepcopy(made), inputs(4, 6, device=device).requires_grad_()
    made(x).square().sum().backward()
    assert twin.bias is not None
    y = z @ twin.down.weight.T @ twin.up.weight.T + twin.bias
    y.square().sum().backward()
    torch.testing.assert_close(x.grad, z.grad)
    for (name, mine), (_, theirs) in zip(
        made.named_parameters(), twin.named_parameters(), strict=True
    ):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name)


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class Identity(nn.Module):
    def forward(self, weight):
        return weight


def replace_child(made):
    made.down = Doubled(6, 3, bias=False)


def give_child_a_bias(made):
    made.up = nn.Linear(3, 5)


def wrap_forward(made):
    made.up.forward = lambda x: nn.Linear.forward(made.up, x)


CHANGES = {
    "replaced": replace_child,
    "biased": give_child_a_bias,
    "wrapped": wrap_forward,
    "forward hook": lambda made: made.up.register_forward_hook(lambda m, args, out: out),
    "pre-hook": lambda made: made.down.register_forward_pre_hook(lambda m, args: None),
    "backward hook": lambda made: made.up.register_full_backward_hook(lambda m, gi, go: None),
    "backward pre-hook": lambda made: made.up.register_full_backward_pre_hook(lambda m, go: None),
    "parametrized": lambda made: parametrize.register_parametrization(
        made.down, "weight", Identity()
    ),
    "pruned": lambda made: prune.l1_unstructured(made.down, "weight", amount=0.5),
    "offloaded": lambda made: add_hook_to_module(
        made.down, AlignDevicesHook("cpu", offload=True, weights_map=None)
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_changed_child_is_called(change, fused):
    made, x = layer(), inputs(4, 6)
    change(made)
    assert made.bias is not None
    torch.testing.assert_close(made(x), made.up(made.down(x)) + made.bias)
    assert not fused


def test_fused_again_after_accelerate_left(fused):
    made, x = layer(), inputs(4, 6)
    add_hook_to_module(made.down, AlignDevicesHook("cpu", offload=True))
    remove_hook_from_module(made.down)
    made(x)
    assert len(fused) == 1


def test_hooks_see_the_calls():
    made, seen = layer(), []
    made.up.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape))
    made(inputs(4, 6))
    assert seen == [(4, 3)]


def test_autocast_decides(fused):
    made, x = layer(), inputs(4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y, dense = made(x), made.to_linear()(x)
    assert y.dtype == dense.dtype == torch.bfloat16
    torch.testing.assert_close(y, dense, rtol=0.05, atol=0.1)
    assert not fused


def test_wrong_dtype_is_what_linear_says():
    with pytest.raises(RuntimeError, match="same dtype"):
        layer()(inputs(4, 6, dtype=torch.float64))


def test_compiles_whole():
    made, x = layer(), inputs(4, 6)
    targets = []

    def backend(graph, example_inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(made, fullgraph=True, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), made(x))
    assert any("soco" in target for target in targets)  # the fused op is seen by the compiler
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    assert made.up.weight.grad is not None


def test_an_exported_program_needs_no_soco():
    made, x = layer(), inputs(4, 6)
    program = torch.export.export(made, (x,))
    assert not [node for node in program.graph.nodes if "soco" in str(node.target)]
    torch.testing.assert_close(program.module()(x), made(x))


def test_state_dict_and_sentinel():
    made = layer()
    state = made.state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == {
        "bias": (5,),
        "weight": (1,),
        "down.weight": (3, 6),
        "up.weight": (5, 3),
    }
    assert [name for name, _ in made.named_parameters()] == ["bias", "down.weight", "up.weight"]
    empty = LowRankLinear(6, 5, 3)
    empty.load_state_dict(state)
    assert torch.equal(empty(inputs(4, 6)), made(inputs(4, 6)))
    assert "bias" not in layer(bias=False).state_dict()
    assert made.to(torch.bfloat16).weight.dtype == torch.bfloat16


def test_factors_are_copied():
    up, down = torch.ones(5, 100)[:, :3], torch.ones(100, 6)[:3]
    made = LowRankLinear.from_factors((up, down))
    assert made.down.weight.untyped_storage().nbytes() == 3 * 6 * 4
    assert made.up.weight.is_contiguous()
    down.zero_()
    assert made.down.weight.min() == 1


def test_shapes_that_do_not_fit():
    up, down = torch.ones(5, 3), torch.ones(3, 6)
    with pytest.raises(ValueError, match=r"up must be \(out, rank\).*got \(5, 3\) and \(6, 3\)"):
        LowRankLinear.from_factors((up, down.T))
    with pytest.raises(ValueError, match=r"bias must be \(out,\) = \(5,\), got \(6,\)"):
        LowRankLinear.from_factors((up, down), torch.ones(6))
    with pytest.raises(ValueError, match=r"float32 on cpu and torch\.float64 on cpu"):
        LowRankLinear.from_factors((up, down.double()))
    with pytest.raises(ValueError, match="at least 1, got 6, 5 and 0"):
        LowRankLinear(6, 5, 0)


def test_to_linear_refuses_what_it_would_lose():
    made = layer()
    made.down = Doubled(6, 3, bias=False)
    with pytest.raises(ValueError, match=r"down is a .*Doubled: merge or remove it first"):
        made.to_linear()
    with pytest.raises(ValueError, match="the weight of down is offloaded"):
        LowRankLinear(6, 5, 3, device="meta").to_linear()


def test_to_linear_keeps_the_training_flag():
    assert layer().train().to_linear().training
    assert not layer().eval().to_linear().training


def test_repr():
    assert "in_features=6, out_features=5, rank=3, bias=True" in repr(layer())


# ---- pivots -------------------------------------------------------------------------------------

PIVOTS = [5, 0, 3]  # of 7 outputs, in no order


def pivoted(bias=True, dtype=torch.float32, device="cpu", pivots=PIVOTS):
    rest, rows = inputs(4, 3), inputs(3, 6)
    shift = inputs(7).to(device) if bias else None
    factors = rest.to(device, dtype), rows.to(device, dtype), torch.tensor(pivots, device=device)
    return PivotedLinear.from_factors(factors, shift)


def dense(made):
    """The weight by the definition, row by row."""
    rest, rows = iter(made.up.weight @ made.down.weight), made.down.weight
    pivots = made.pivots.tolist()
    return torch.stack([rows[pivots.index(i)] if i in pivots else next(rest) for i in range(7)])


def test_pivots_by_hand():
    factors = torch.tensor([[0.5], [2.0]]), torch.tensor([[4.0, 2.0]]), torch.tensor([1])
    made = PivotedLinear.from_factors(factors, torch.tensor([0.0, 100.0, 0.0]))
    assert made(torch.tensor([[1.0, 1.0]])).tolist() == [[3.0, 106.0, 12.0]]
    assert (made.in_features, made.out_features, made.rank) == (2, 3, 1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6,), (0, 6), (4, 6), (2, 3, 6)])
def test_pivoted_is_the_dense_layer(shape, bias, device):
    made = pivoted(bias, device=device)
    x = inputs(*shape, device=device)
    linear = made.to_linear()
    torch.testing.assert_close(linear.weight, dense(made))
    torch.testing.assert_close(made(x), linear(x))
    assert (linear.bias is not None) == bias


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_pivoted_dtypes(dtype, device):
    made = pivoted(dtype=dtype, device=device)
    y = made(inputs(4, 6, dtype=dtype, device=device))
    assert y.dtype == made.to_linear().weight.dtype == made.weight.dtype == dtype
    wide = pivoted(device=device)(inputs(4, 6, device=device))
    torch.testing.assert_close(y.float(), wide, rtol=0.05, atol=0.1)


@torch.no_grad()
def test_pivoted_is_one_op_without_gradients(device, monkeypatch):
    seen, group = [], ops.low_rank_group
    monkeypatch.setattr(ops, "low_rank_group", lambda *a, **k: seen.append(1) or group(*a, **k))
    made, x = pivoted(device=device), inputs(4, 6, device=device, dtype=torch.float32)
    torch.testing.assert_close(made(x), made.to_linear()(x))
    assert not seen  # the core is called at once
    made(inputs(0, 6, device=device))
    assert len(seen) == 1


# The core called at once --------------------------------------------------------------------------


@pytest.fixture
def at_once(monkeypatch):
    """Counts the outputs that came from a direct call of the core."""
    found, call = [], ops.DirectCall.__call__

    def counted(self, x):
        y = call(self, x)
        if y is not None:
            found.append(1)
        return y

    monkeypatch.setattr(ops.DirectCall, "__call__", counted)
    return found


def lone(kind, device="cpu"):
    return layer(device=device) if kind == "low rank" else pivoted(device=device)


KINDS = pytest.mark.parametrize("kind", ["low rank", "pivoted"])


@KINDS
def test_at_once_is_what_it_is_with_gradients(kind, device, at_once):
    made, x = lone(kind, device), inputs(2, 3, 6, device=device)
    expected = made(x)
    assert not at_once
    with torch.no_grad():
        torch.testing.assert_close(made(x), expected)
        kept = made._call
        torch.testing.assert_close(made(x[:1]), expected[:1])
    assert len(at_once) == 2
    assert made._call is kept  # made ready once


def replace_data(made):
    made.down.weight.data = made.down.weight.data * 3


def replace_parameter(made):
    made.up.weight = nn.Parameter(made.up.weight.detach() * 3)


def replace_module(made):
    other = nn.Linear(made.rank, made.up.out_features, bias=False)
    made.up = other


def assign_state(made):
    state = {name: value * 2 for name, value in made.state_dict().items() if name != "pivots"}
    made.load_state_dict(state, strict=False, assign=True)


def take_bias(made):
    made.bias = None


def other_bias(made):
    made.bias = nn.Parameter(torch.full_like(made.bias, 7.0))


def transpose(made):
    made.down.weight.data = made.down.weight.data.T.contiguous().T


def write(made):
    made.down.weight.mul_(2)
    made.bias.add_(1)


def move(made):
    made.double().float()


@KINDS
@pytest.mark.parametrize(
    "change",
    [replace_data, replace_parameter, replace_module, assign_state, take_bias, other_bias,
     transpose, write, move],
)  # fmt: skip
@torch.no_grad()
def test_at_once_sees_every_change(kind, change):
    made, x = lone(kind), inputs(2, 6)
    for _ in range(3):  # memory is used again
        made(x)
        change(made)
        if made.bias is None:
            made.bias = nn.Parameter(torch.zeros(made.out_features))
            made(x)
            made.bias = None
        torch.testing.assert_close(made(x), made.to_linear()(x))


@torch.no_grad()
def test_at_once_sees_other_views_of_the_same_memory():
    made, x = layer(in_features=3, out_features=3, rank=3, bias=False), inputs(2, 3)
    up, down = made.up.weight.detach().clone(), made.down.weight.detach().clone()
    made(x)
    made.down.weight.data = made.down.weight.data.T
    torch.testing.assert_close(made(x), x @ down @ up.T)
    made.down.weight.data = made.down.weight.data.T
    made(x)
    made.down.weight.data = made.down.weight.data[:2]
    made.up.weight.data = made.up.weight.data[:, :2]
    torch.testing.assert_close(made(x), x @ down[:2].T @ up[:, :2].T)


@torch.no_grad()
def test_at_once_sees_other_pivots():
    made, x = pivoted(), inputs(2, 6)
    made(x)
    made.pivots.copy_(made.pivots.flip(0))
    torch.testing.assert_close(made(x), made.to_linear()(x))
    made.pivots = (made.pivots + 1) % made.out_features
    torch.testing.assert_close(made(x), made.to_linear()(x))


@KINDS
@torch.no_grad()
def test_not_at_once_where_a_child_is_more_than_its_weight(kind, at_once):
    made, x = lone(kind), inputs(2, 6)
    made(x)
    at_once.clear()
    seen = []
    made.up.register_forward_hook(lambda *_: seen.append(1))
    made(x)
    assert seen == [1]
    assert not at_once
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert lone(kind)(x).dtype == torch.bfloat16
    assert not at_once


@KINDS
@torch.no_grad()
def test_at_once_holds_nothing_that_is_replaced(kind):
    made, x = lone(kind), inputs(2, 6)
    made(x)
    old = weakref.ref(made.down.weight)
    made.down.weight = nn.Parameter(made.down.weight.to("meta"))  # as offloading does
    gc.collect()
    assert old() is None


@KINDS
@torch.no_grad()
def test_copies_and_files_of_a_layer_that_was_called(kind, at_once):
    made, x = lone(kind), inputs(2, 6)
    expected = made(x)
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    for again in (copy.deepcopy(made), torch.load(file, weights_only=False)):
        made.down.weight.zero_()
        at_once.clear()
        assert torch.equal(again(x), expected)
        assert torch.equal(again(x), expected)
        assert len(at_once) == 2


@torch.no_grad()
def test_a_shared_basis_at_once(at_once):
    first, second = layer(), layer()
    share_basis([first, second])
    x = inputs(2, 6)
    torch.testing.assert_close(second(x), second.to_linear()(x))
    assert len(at_once) == 1


@torch.no_grad()
def test_at_once_with_factors_that_do_not_fit(at_once):
    made = layer()
    made.up = nn.Linear(4, 5, bias=False)
    with pytest.raises(ValueError, match=r"down must be .* = \(4, 6\), got \(3, 6\)"):
        made(inputs(2, 6))


def test_pivoted_trains(device):
    made, x = pivoted(device=device), inputs(4, 6, device=device).requires_grad_()
    twin, z = copy.deepcopy(made), inputs(4, 6, device=device).requires_grad_()
    made(x).square().sum().backward()
    nn.functional.linear(z, dense(twin), twin.bias).square().sum().backward()
    torch.testing.assert_close(x.grad, z.grad)
    for (name, mine), (_, theirs) in zip(
        made.named_parameters(), twin.named_parameters(), strict=True
    ):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name)


@pytest.mark.parametrize("change", ["biased", "forward hook", "wrapped"])
def test_a_changed_child_of_a_pivoted_layer_is_called(change):
    made, x = pivoted(), inputs(4, 6)
    made.up, made.down = nn.Linear(3, 4, bias=False), nn.Linear(6, 3, bias=False)
    if change == "biased":
        made.up = nn.Linear(3, 4)
    elif change == "forward hook":
        made.down.register_forward_hook(lambda m, args, out: out.mul(2))
    else:
        made.up.forward = lambda input: 3 * nn.Linear.forward(made.up, input)
    y = made(x) - made.bias
    torch.testing.assert_close(y[:, PIVOTS], made.down(x))
    torch.testing.assert_close(y[:, [1, 2, 4, 6]], made.up(made.down(x)))


def test_pivoted_under_autocast():
    made, x = pivoted(), inputs(4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = made(x), made.to_linear()(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_pivoted_compiles_whole(backend):
    made, x = pivoted(), inputs(4, 6)
    compiled = torch.compile(made, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), made(x))
    compiled(x).sum().backward()
    assert made.up.weight.grad is not None
    made.load_state_dict(pivoted(pivots=[1, 2, 6]).state_dict())  # the graph sees other pivots
    torch.testing.assert_close(compiled(x), made(x))


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_pivoted_program_needs_no_soco(strict):
    made, x = pivoted(), inputs(4, 6)
    program = torch.export.export(made, (x,), strict=strict)
    assert not [node for node in program.graph.nodes if "soco" in str(node.target)]
    torch.testing.assert_close(program.module()(x), made(x))


def load_in_place(made, other):
    made.load_state_dict(other.state_dict())


def load_by_assigning(made, other):
    made.load_state_dict(other.state_dict(), assign=True)


def set_the_buffer(made, other):
    made.pivots = other.pivots


def set_the_buffer_like_accelerate(made, other):
    made._buffers["pivots"] = other.pivots


def write_into_the_buffer(made, other):
    made.pivots[:] = other.pivots


def materialize(made, other):
    made.to("meta").to_empty(device="cpu")
    made.load_state_dict(other.state_dict())


WAYS = [
    load_in_place, load_by_assigning, set_the_buffer, set_the_buffer_like_accelerate,
    write_into_the_buffer, materialize,
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_new_pivots_are_noticed(way):
    made, other, x = pivoted(), pivoted(pivots=[1, 2, 6]), inputs(4, 6)
    before = made(x)
    way(made, other)
    assert torch.equal(made(x), other(x))
    assert not torch.equal(made(x), before)


def test_the_order_is_computed_once(monkeypatch):
    made, x, calls = pivoted(), inputs(4, 6), []
    original = modules._order
    monkeypatch.setattr(modules, "_order", lambda *args: calls.append(1) or original(*args))
    for _ in range(3):
        made(x)
    assert len(calls) == 1
    twin = copy.deepcopy(made)
    assert torch.equal(twin(x), made(x))


def test_a_first_call_in_inference_mode_spoils_nothing():
    made, x = pivoted(), inputs(4, 6)
    with torch.inference_mode():
        made(x)
    made(x).sum().backward()
    with torch.inference_mode():
        other = copy.deepcopy(made)
        other.pivots = made.pivots.clone()
    assert torch.equal(other(x), made(x))


def test_pivoted_state_dict():
    made = pivoted()
    state = made.state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == {
        "bias": (7,),
        "weight": (1,),
        "pivots": (3,),
        "down.weight": (3, 6),
        "up.weight": (4, 3),
    }
    assert sum(p.numel() for p in pivoted(bias=False).parameters()) == 3 * (6 + 7) - 3 * 3
    empty = PivotedLinear(6, 7, 3, device="meta").to_empty(device="cpu")
    empty.load_state_dict(state)
    assert torch.equal(empty(inputs(4, 6)), made(inputs(4, 6)))
    half = copy.deepcopy(made).to(torch.bfloat16)
    assert half.pivots.dtype == torch.int64
    assert torch.equal(PivotedLinear(6, 7, 3).pivots, torch.arange(3))
    stream = io.BytesIO()
    torch.save(made, stream)
    stream.seek(0)
    assert torch.equal(torch.load(stream, weights_only=False)(inputs(4, 6)), made(inputs(4, 6)))


@pytest.mark.parametrize(
    ("pivots", "message"),
    [
        ([0, 3], r"pivots must be int64 of shape \[3\], got torch\.int64 of shape \[2\]"),
        ([0.0, 3.0, 5.0], r"pivots must be int64 of shape \[3\], got torch\.float32 of shape"),
        ([0, 3, 7], "pivots hold 7, which is no output of 7"),
        ([0, -1, 3], "pivots hold -1, which is no output of 7"),
        ([3, 0, 3], "pivots hold 3 twice"),
    ],
)
def test_pivots_that_are_none(pivots, message):
    with pytest.raises(ValueError, match=message):
        pivoted(pivots=pivots)
    made = pivoted()
    made.pivots = torch.tensor(pivots)
    with pytest.raises(ValueError, match=message):
        made.to_linear()


def test_pivoted_shapes_that_do_not_fit():
    rest, rows, pivots = torch.ones(4, 3), torch.ones(3, 6), torch.arange(3)
    with pytest.raises(ValueError, match=r"rest must be \(out - rank.*got \(4, 3\) and \(6, 3\)"):
        PivotedLinear.from_factors((rest, rows.T, pivots))
    with pytest.raises(ValueError, match=r"bias must be \(out,\) = \(7,\), got \(4,\)"):
        PivotedLinear.from_factors((rest, rows, pivots), torch.ones(4))
    with pytest.raises(ValueError, match=r"float32 on cpu and torch\.float64 on cpu"):
        PivotedLinear.from_factors((rest, rows.double(), pivots))
    with pytest.raises(ValueError, match="at least 1, got 6, 5 and 0"):
        PivotedLinear(6, 5, 0)
    with pytest.raises(ValueError, match="rank below out_features, got 5 and 5: keep it dense"):
        PivotedLinear(6, 5, 5)
    with pytest.raises(ValueError, match="the weight of down is offloaded"):
        PivotedLinear(6, 5, 3, device="meta").to_linear()
    with pytest.raises(ValueError, match="the pivots are not in memory"):
        PivotedLinear(6, 5, 3, device="meta").check_pivots()


# ---- a shared basis -----------------------------------------------------------------------------


class Trio(nn.Module):
    """Three layers with one input; the first holds the basis of all."""

    def __init__(self, device="cpu", share=True):
        super().__init__()
        down = inputs(3, 6).to(device)
        self.a, self.b, self.c = (
            LowRankLinear.from_factors((inputs(n, 3).to(device), down), inputs(n).to(device))
            for n in (5, 7, 5)
        )
        if share:
            share_basis(self.layers())

    def layers(self):
        return [self.a, self.b, self.c]

    def forward(self, x):
        return torch.cat((self.a(x), self.b(x), self.c(x)), -1)


def test_a_shared_basis_is_one_tensor():
    trio, apart = Trio(), Trio(share=False)
    assert trio.a.down is trio.b.down is trio.c.down
    assert (trio.a.basis, trio.b.basis, trio.c.basis) == (None, trio.a, trio.a)
    assert [key for key in trio.state_dict() if "down" in key] == ["a.down.weight"]
    assert trio.get_submodule("b.down") is trio.a.down
    saved = sum(p.numel() for p in apart.parameters()) - sum(p.numel() for p in trio.parameters())
    assert saved == 2 * 3 * 6
    assert "down=another layer's" in repr(trio.b)
    assert "another" not in repr(trio.a)


def test_a_shared_basis_changes_no_output(device, fused):
    trio, apart = Trio(device), Trio(device, share=False)
    x = inputs(4, 6, device=device)
    assert torch.equal(trio(x), apart(x))
    assert len(fused) == 6
    for one, other in zip(trio.layers(), apart.layers(), strict=True):
        assert torch.equal(one.to_linear().weight, other.to_linear().weight)


def test_gradients_of_a_shared_basis_add_up(device):
    trio, apart = Trio(device), Trio(device, share=False)
    x = inputs(4, 6, device=device)
    for each in (trio, apart):
        each(x).square().sum().backward()
    grads = [cast(Tensor, layer.down.weight.grad) for layer in apart.layers()]
    torch.testing.assert_close(trio.a.down.weight.grad, sum(grads))


def test_what_replaces_the_basis_replaces_it_for_all(fused):
    trio, x = Trio(), inputs(4, 6)
    before = trio(x)
    trio.a.down = Doubled(6, 3, bias=False)
    trio.a.down.weight = nn.Parameter(inputs(3, 6))
    assert trio.b.down is trio.a.down
    biases = torch.cat([cast(Tensor, layer.bias) for layer in trio.layers()])
    fused.clear()
    torch.testing.assert_close(trio(x) - biases, 2 * (before - biases))
    assert not fused
    with pytest.raises(ValueError, match=r"down is a .*Doubled: merge or remove it first"):
        trio.c.to_linear()


def test_hooks_of_the_basis_see_every_call():
    trio, seen = Trio(), []
    trio.a.down.register_forward_hook(lambda m, args, out: seen.append(1))
    trio(inputs(4, 6))
    assert len(seen) == 3


def test_a_shared_basis_survives():
    trio, x = Trio(), inputs(4, 6)
    twin = copy.deepcopy(trio)
    assert twin.b.down is twin.a.down is not trio.a.down
    assert torch.equal(twin(x), trio(x))
    wide = copy.deepcopy(trio).to(torch.float64)
    assert wide.b.down.weight.dtype == torch.float64
    wide(x.double())
    empty = Trio(device="meta").to_empty(device="cpu")
    empty.load_state_dict(trio.state_dict())
    assert torch.equal(empty(x), trio(x))
    stream = io.BytesIO()
    torch.save(trio, stream)
    stream.seek(0)
    again = torch.load(stream, weights_only=False)
    assert again.c.down is again.a.down
    assert torch.equal(again(x), trio(x))


def test_a_shared_basis_compiles_and_exports():
    trio, x = Trio(), inputs(4, 6)
    compiled = torch.compile(trio, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), trio(x))
    for strict in (True, False):
        program = torch.export.export(trio, (x,), strict=strict)
        assert not [node for node in program.graph.nodes if "soco" in str(node.target)]
        assert [key for key in program.state_dict if "down" in key] == ["a.down.weight"]
        torch.testing.assert_close(program.module()(x), trio(x))


def test_a_shared_basis_under_autocast():
    trio, x = Trio(), inputs(4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = trio(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), trio(x), rtol=0.05, atol=0.2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_basis_on_another_device():
    trio, x = Trio(), inputs(4, 6)
    expected = trio.b(x)
    trio.a.to("cuda")
    torch.testing.assert_close(trio.b(x), expected)
    torch.testing.assert_close(trio.b.to_linear()(x), expected)


def test_an_offloaded_basis():
    trio, x = Trio(), inputs(4, 6)
    expected = trio(x)
    weights = {"weight": trio.a.down.weight.detach().clone()}
    hook = AlignDevicesHook("cpu", offload=True, weights_map=weights)
    add_hook_to_module(trio.a.down, hook)
    assert trio.b.down.weight.is_meta
    torch.testing.assert_close(trio(x), expected)


def test_groups_that_meet():
    """A basis that is given away takes those along that used it."""
    trio, other = Trio(share=False), LowRankLinear.from_factors((inputs(4, 3), inputs(3, 6)))
    share_basis([trio.a, trio.b])
    share_basis([other, trio.a])
    share_basis([trio.b, trio.c])
    share_basis([trio.a, other])  # nothing left to do
    assert {layer.basis for layer in trio.layers()} == {other}
    assert other.basis is None
    trio.b.down = nn.Linear(6, 3, bias=False)  # a child of its own again
    assert trio.b.basis is None
    assert trio.a.basis is other


def test_layers_that_share_no_basis():
    trio = Trio(share=False)
    with pytest.raises(ValueError, match="two layers or more, got 1"):
        share_basis([trio.a])
    with pytest.raises(ValueError, match="only a LowRankLinear shares a basis, got PivotedLinear"):
        share_basis([trio.a, pivoted()])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"layers 0 and 2 cannot .* \[3, 6\] in .* and \[4, 6\]"):
        share_basis([trio.a, trio.b, LowRankLinear(6, 5, 4)])
    with pytest.raises(ValueError, match=r"torch\.float32 and \[3, 6\] in torch\.float64"):
        share_basis([trio.a, LowRankLinear(6, 5, 3, dtype=torch.float64)])
    with pytest.raises(ValueError, match="layers 0 and 1 differ in down"):
        share_basis([trio.a, LowRankLinear(6, 5, 3)])
    assert trio.b.basis is None  # nothing was shared
    with pytest.raises(TypeError, match="down must be a module, got Tensor"):
        Trio().b.down = torch.ones(2)  # type: ignore[assignment]
