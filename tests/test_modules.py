"""soco.modules: one layer, two ways to compute it, and what others may do to its children."""

import copy

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from torch import nn
from torch.nn.utils import parametrize, prune

from soco import ops
from soco.modules import LowRankLinear


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
