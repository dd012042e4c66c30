"""soco.packing: layers computed together give what each gives alone, or let it do so."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import silu

from soco import ops
from soco.modules import LowRankLinear, PivotedLinear
from soco.packing import LayerGroup, check_whole, fuse_gated, take_apart

TOKENS = [1, 5, 200]  # by the kernel, and by the library


def layers(shapes, device="cpu", dtype=torch.float32, inner=24) -> list[Any]:
    """One layer per (rank, out, pivoted, bias), with random weights."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for rank, out, pivoted, bias in shapes:

        def draw(*shape):
            values = torch.randn(*shape, generator=generator) / shape[-1] ** 0.5
            return values.to(device, dtype)

        shift = draw(out) if bias else None
        if pivoted:
            pivots = torch.randperm(out, generator=generator)[:rank].sort().values.to(device)
            factors = draw(out - rank, rank), draw(rank, inner), pivots
            made.append(PivotedLinear.from_factors(factors, shift))
        else:
            factors = draw(out, rank), draw(rank, inner)
            made.append(LowRankLinear.from_factors(factors, shift))
    for layer in made:
        layer.requires_grad_(False)
    return made


def inputs(tokens, device="cpu", dtype=torch.float32, inner=24):
    values = torch.randn(2, tokens, inner, generator=torch.Generator().manual_seed(9))
    return values.to(device, dtype)


QKV = [(9, 40, False, False), (5, 16, False, False), (7, 16, False, False)]
SETS = {
    "one": QKV[:1],
    "qkv": QKV,
    "biased": [(9, 40, False, True), (5, 16, False, False)],
    "pivoted": [(9, 40, True, True), (5, 16, True, False), (7, 16, False, True)],
}


@pytest.fixture
def calls(monkeypatch):
    """Counts the kernel calls of prepared groups."""
    made = []
    original = ops.PreparedGroup.__call__
    monkeypatch.setattr(
        ops.PreparedGroup, "__call__", lambda self, x: made.append(1) or original(self, x)
    )
    return made


@pytest.mark.parametrize("align", [1, 16])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", SETS)
def test_gives_what_the_layers_give(name, dtype, tokens, align, device):
    made, x = layers(SETS[name], device, dtype), inputs(tokens, device, dtype)
    before = [layer(x) for layer in made]
    LayerGroup(made, align=align)
    rtol = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-12}[dtype]
    with torch.no_grad():
        for layer, expected in zip(made, before, strict=True):
            found = layer(x)
            assert found.dtype == dtype
            torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("align", [1, 16])
def test_the_layers_keep_their_parameters(align, device):
    """Values, names and identity; as views of one memory."""
    made = layers(SETS["pivoted"], device)
    before = [(dict(layer.named_parameters()), copy.deepcopy(layer.state_dict())) for layer in made]
    LayerGroup(made, align=align)
    for layer, (parameters, state) in zip(made, before, strict=True):
        for name, parameter in layer.named_parameters():
            assert parameter is parameters[name]
        for name, value in layer.state_dict().items():
            assert torch.equal(value, state[name])
    storages = {layer.down.weight.untyped_storage().data_ptr() for layer in made}
    assert len(storages) == 1


def test_one_call_for_all(calls):
    made, x = layers(QKV), inputs(2)
    group = LayerGroup(made)
    with torch.no_grad():
        for layer in made:
            layer(x)
        assert len(calls) == 1
        assert group._held is None  # nothing is kept alive
        made[1](x)  # not the first one of them: computed anew
        made[1](x)  # it has been given out: again
        assert len(calls) == 3
        made[0](x)
        assert len(calls) == 3


def test_outputs_are_of_the_input_that_is_given(calls):
    made, x = layers(QKV), inputs(2)
    with torch.no_grad():
        expected = [layer(x + 1) for layer in made]
        LayerGroup(made)
        made[0](x)
        torch.testing.assert_close(made[1](x + 1), expected[1])  # another input
        made[0](x)
        x += 1  # another one in the same place
        torch.testing.assert_close(made[1](x), expected[1])
        assert len(calls) == 4


def test_gated(device):
    made = layers([(9, 40, True, True), (5, 40, False, True)], device)
    for tokens in TOKENS:
        x = inputs(tokens, device)
        group = LayerGroup(made)
        with torch.no_grad():
            take_apart(nn.ModuleList(made))
            expected = silu(made[0](x)) * made[1](x)
            found = group.gated(x)
            assert found is not None
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", ["int8", "float8"])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", SETS)
def test_eight_bit_weights(name, tokens, weights, device):
    """Off by what rounding to 8 bits makes: half a step of int8, 1 in 16 of a float8 number."""
    made, x = layers(SETS[name], device), inputs(tokens, device)
    before = [layer(x) for layer in made]
    LayerGroup(made, weights)
    with torch.no_grad():
        for layer, expected in zip(made, before, strict=True):
            error = (layer(x) - expected).norm() / expected.norm()
            assert 0 < error < (0.015 if weights == "int8" else 0.06)
    assert all(layer.down.weight.is_meta for layer in made)


def test_the_scale_of_components_is_no_matter_in_eight_bits():
    """A component may be large in one factor and small in the other."""
    made, x = layers([(8, 40, False, False)]), inputs(3)
    sizes = torch.logspace(-3, 3, 8)
    expected = made[0](x)
    with torch.no_grad():
        made[0].down.weight *= sizes[:, None]
        made[0].up.weight /= sizes
        LayerGroup(made, "int8")
        assert (made[0](x) - expected).norm() < 0.015 * expected.norm()


def test_zeros_in_eight_bits():
    made = layers([(4, 6, False, False)])
    with torch.no_grad():
        made[0].down.weight[1] = 0
        made[0].up.weight[:, 2] = 0
        made[0].up.weight[3] = 0
        expected = made[0](inputs(2))
        LayerGroup(made, "int8")
        found = made[0](inputs(2))
    assert found.isfinite().all()
    assert (found[..., 3] == 0).all()
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.05)


def change_a_weight_in_place(layer):
    layer.up.weight.data.mul_(2)


def load_a_state(layer):
    layer.load_state_dict(
        {k: v if v.dtype == torch.int64 else v * 2 for k, v in layer.state_dict().items()}
    )


def new_weight(layer):
    layer.down.weight = nn.Parameter(layer.down.weight * 2, requires_grad=False)


def moved_weight(layer):
    layer.up.weight.data = layer.up.weight.data.clone() * 2


def replaced_factor(layer):
    layer.up = nn.Sequential(layer.up, nn.Identity())
    layer.up.get_parameter("0.weight").data.mul_(2)


def another_factor(layer):
    was, layer.up = layer.up, nn.Linear(*layer.up.weight.T.shape, bias=False).requires_grad_(False)
    layer.up.weight.copy_(was.weight * 2)


def another_class(layer):
    class Double(nn.Linear):
        def forward(self, input):
            return super().forward(input) * 2

    layer.down.__class__ = Double


def hook(layer):
    layer.down.register_forward_hook(lambda module, args, output: output * 2)


def pre_hook(layer):
    layer.up.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def wrapped_forward(layer):
    original = layer.down.forward
    layer.down.forward = lambda x: original(x) * 2


def parametrized(layer):
    class Double(nn.Module):
        def forward(self, weight):
            return weight * 2

    nn.utils.parametrize.register_parametrization(layer.up, "weight", Double())


def bias_of_a_factor(layer):
    layer.down.bias = nn.Parameter(torch.ones(layer.rank), requires_grad=False)


def new_bias(layer):
    layer.bias = nn.Parameter(layer.bias + 1, requires_grad=False)


def bias_in_place(layer):
    layer.bias += 1


def pivots_in_place(layer):
    layer.pivots[:2] = layer.pivots[:2].flip(0)


CHANGES = [
    change_a_weight_in_place, load_a_state, new_weight, moved_weight, replaced_factor,
    another_factor, another_class, hook, pre_hook, wrapped_forward, parametrized,
    bias_of_a_factor, new_bias, bias_in_place, pivots_in_place,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@torch.no_grad()
def test_every_change_of_a_layer_is_seen(change):
    """The outputs are those of the same layers without a group, changed in the same way."""
    made, plain = layers(SETS["pivoted"]), layers(SETS["pivoted"])
    LayerGroup(made)
    x = inputs(3)
    before = made[0](x)
    for layer in (made[0], plain[0]):
        change(layer)
    x = x.clone()
    found, expected = [layer(x) for layer in made], [layer(x) for layer in plain]
    assert not torch.allclose(found[0], before)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_gradients_flow_as_before():
    made, plain = layers(QKV), layers(QKV)
    LayerGroup(made, align=16)
    for group in (made, plain):
        for layer in group:
            layer.requires_grad_()
        x = inputs(3).requires_grad_()
        torch.stack([layer(x).square().sum() for layer in group]).sum().backward()
        group.append(x)
    torch.testing.assert_close(made[3].grad, plain[3].grad, rtol=1e-4, atol=1e-4)
    for one, other in zip(made[:3], plain[:3], strict=True):
        assert torch.isfinite(one.up.weight.grad).all()
        torch.testing.assert_close(one.up.weight.grad, other.up.weight.grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            one.down.weight.grad, other.down.weight.grad, rtol=1e-4, atol=1e-4
        )


def test_an_optimizer_step_is_seen():
    made = layers(QKV)
    LayerGroup(made, align=16)
    for layer in made:
        layer.requires_grad_()
    optimizer = torch.optim.SGD([p for layer in made for p in layer.parameters()], lr=0.1)
    x = inputs(3)
    torch.stack([layer(x).square().sum() for layer in made]).sum().backward()
    optimizer.step()
    plain = copy.deepcopy(made)
    with torch.no_grad():
        for one, other in zip(made, plain, strict=True):
            torch.testing.assert_close(one(x), other(x), rtol=1e-5, atol=1e-5)


def test_needs_no_gradients_without_any_to_compute(calls):
    """Gradients are on, and nothing asks for them."""
    made = layers(QKV)
    LayerGroup(made)
    made[0](inputs(2))
    assert len(calls) == 1


def test_a_copy_and_a_file_hold_plain_layers(calls):
    made = layers(SETS["pivoted"])
    LayerGroup(made)
    x = inputs(2)
    for other in (copy.deepcopy(nn.ModuleList(made)), pickle.loads(pickle.dumps(made))):
        assert all(layer.fast is None for layer in other)
        for layer, twin in zip(made, other, strict=True):
            torch.testing.assert_close(twin(x), layer(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_copy_with_eight_bits_runs_and_a_file_too():
    made = layers(SETS["pivoted"])
    LayerGroup(made, "int8")
    x = inputs(2)
    expected = [layer(x) for layer in made]
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert other[0].fast is not made[0].fast
        assert other[0].fast.layers[0] is other[0]
        assert all(torch.equal(a(x), b) for a, b in zip(other, expected, strict=True))


def test_moved_layers_compute_on_their_own(calls):
    made = layers(QKV)
    LayerGroup(made)
    nn.ModuleList(made).to(torch.float64)
    assert made[0](inputs(2).double()).dtype == torch.float64
    assert not calls


@torch.no_grad()
def test_under_autocast_layers_compute_on_their_own(calls):
    made = layers(QKV)
    LayerGroup(made)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert made[0](inputs(2)).dtype == torch.bfloat16
    assert not calls


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("tokens", [2, 200])
def test_compiles_in_one_graph(tokens, backend, device):
    made = layers(SETS["pivoted"], device)
    LayerGroup(made)
    module = nn.ModuleList(made)

    @torch.compile(fullgraph=True, backend=backend)
    def run(x):
        return torch.cat([layer(x) for layer in module], -1)

    x = inputs(tokens, device)
    with torch.no_grad():
        expected = torch.cat([layer(x) for layer in made], -1)
        torch.testing.assert_close(run(x), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(run(x + 1), torch.cat([f(x + 1) for f in made], -1))


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_holds_plain_layers(strict):
    made = layers(SETS["qkv"])
    LayerGroup(made)
    with torch.no_grad():
        program = torch.export.export(nn.Sequential(made[0]), (inputs(3),), strict=strict)
    ops_of = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "soco.low_rank_group.default" not in ops_of
    torch.testing.assert_close(program.module()(inputs(3)), made[0](inputs(3)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up = layers([(9, 40, True, True), (5, 40, False, True)])
        self.last = layers([(6, 24, False, False)], inner=40)[0]
        self.calls = 0

    def forward(self, x, scale=1):
        self.calls += 1
        return self.last(silu(self.gate(x)) * self.up(x)) * scale


@torch.no_grad()
def test_a_gated_block():
    plain, block = Block().eval(), Block().eval()
    x = inputs(1)
    fuse_gated(block, LayerGroup([block.gate, block.up]), "last")
    for tokens in TOKENS:
        x = inputs(tokens)
        torch.testing.assert_close(block(x), plain(x), rtol=1e-5, atol=1e-5)
    assert block.calls == 0
    # what goes the old way
    torch.testing.assert_close(block(x, scale=2), plain(x) * 2, rtol=1e-5, atol=1e-5)
    block.train()(x)
    block.eval().up.down.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(block(x), plain(x), rtol=1e-5, atol=1e-5)
    assert block.calls == 3
    twin = copy.deepcopy(block)
    torch.testing.assert_close(twin(x), plain(x), rtol=1e-5, atol=1e-5)
    take_apart(block)
    block(x)
    assert block.calls == 4
    assert "forward" not in block.__dict__


def test_eight_bit_layers_refuse_what_they_cannot_do():
    made = layers(QKV)
    LayerGroup(made, "int8")
    with pytest.raises(RuntimeError, match=r"the factors are int8 .* inference in torch.float32"):
        made[0](inputs(2).requires_grad_())
    with pytest.raises(RuntimeError, match=r"inference in torch.float32"):
        made[0](inputs(2).double())
    model = nn.ModuleDict({"q": made[0]})
    with pytest.raises(ValueError, match=r"the factors of q are int8 .* load the model again"):
        check_whole(model)
    with pytest.raises(ValueError, match="load the model again"):
        take_apart(model)
