"""soco.ops.direct: what a call past the dispatcher gives, and when there is none."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from soco import ops
from soco.ops import direct
from soco.ops.direct import DirectCall, is_plain
from soco.ops.layers import Weights

pytestmark = pytest.mark.usefixtures("on_cpu_by_kernel")


def weights(device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = (3, 6), (5, 3), (5,)
    down, up, bias = (torch.randn(*s, generator=generator).to(device, dtype) for s in shapes)
    return Weights(down, [up], bias=bias)


def inputs(*shape, device="cpu", dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)


def negative(x):
    return torch._neg_view(x)  # pyright: ignore


def zero(*shape):
    return torch._efficientzerotensor(shape)  # pyright: ignore


class Nothing(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(6,), (1, 6), (2, 3, 6)])
def test_is_the_op(shape, dtype, device):
    given = weights(device, dtype)
    x = inputs(*shape, device=device, dtype=dtype)
    y = DirectCall(given, dtype)(x)
    assert y is not None
    assert torch.equal(y, ops.low_rank_linear(x, given.down, given.ups[0], given.bias))
    wide = inputs(*shape[:-1], 12, device=device, dtype=dtype)[..., ::2]
    apart = DirectCall(given, dtype)(wide)
    assert apart is not None
    assert torch.equal(apart, ops.low_rank_linear(wide, given.down, given.ups[0], given.bias))


@torch.no_grad()
def test_sees_what_is_written_into_the_weights():
    given, x = weights(), inputs(2, 6)
    call = DirectCall(given, torch.float32)
    call(x)
    given.down.mul_(2)
    y = call(x)
    assert y is not None
    assert torch.equal(y, ops.low_rank_linear(x, given.down, given.ups[0], given.bias))


@torch.no_grad()
@pytest.mark.parametrize(
    "x",
    [
        inputs(2, 6, dtype=torch.float64),
        inputs(2, 7),
        inputs(0, 6),
        torch.tensor(1.0),
        inputs(2, 6).to("meta"),
        inputs(2, 6).to_sparse(),
        nn.Parameter(inputs(2, 6)),
        negative(inputs(2, 6)),
        zero(2, 6),
    ],
    ids=["dtype", "size", "empty", "scalar", "meta", "sparse", "subclass", "negative", "zero"],
)
def test_no_call_for_other_inputs(x):
    assert DirectCall(weights(), torch.float32)(x) is None


def test_inputs_that_are_not_what_lies_in_memory_are_given_to_the_op():
    given = weights()
    group = ops.PreparedGroup(given.down, given.ups, torch.float32, bias=given.bias)
    with torch.no_grad():
        for x in (negative(inputs(2, 6)), zero(2, 6)):
            assert not is_plain(x)
            assert torch.equal(group(x), group(x.clone() + 0))


@torch.no_grad()
def test_no_call_for_more_tokens_than_the_kernel_is_used_for(monkeypatch):
    monkeypatch.setattr(direct, "most_tokens", lambda *_: 2)
    call = DirectCall(weights(), torch.float32)
    assert call(inputs(2, 6)) is not None
    assert call(inputs(3, 6)) is None


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated:DeprecationWarning")
def test_no_call_where_somebody_follows(device):
    call, x = DirectCall(weights(device), torch.float32), inputs(2, 6, device=device)
    assert call(x) is None  # gradients are enabled
    with torch.no_grad():
        assert call(x) is not None
        with Nothing():
            assert call(x) is None
        with torch.autocast(device, dtype=torch.bfloat16):
            assert call(x) is None
        with forward_ad.dual_level():
            assert call(x) is None
        seen = []
        torch.vmap(lambda row: seen.append(call(row)) or row)(x)
        torch.jit.trace(lambda x: seen.append(call(x)) or x, (x,), check_trace=False)
        assert seen == [None] * len(seen)
        assert len(seen) == 2
        assert call(x) is not None
    with torch.inference_mode():
        assert call(x) is not None


@torch.no_grad()
def test_no_call_for_weights_that_would_have_to_be_copied():
    given, x = weights(), inputs(2, 6)
    assert given.bias is not None
    for changed in (
        given._replace(down=given.down.T.contiguous().T),
        given._replace(ups=[given.ups[0].T.contiguous().T]),
        given._replace(bias=given.bias.repeat_interleave(2)[::2]),
        given._replace(down=negative(given.down)),
    ):
        assert DirectCall(changed, torch.float32)(x) is None
        group = ops.PreparedGroup(changed.down, changed.ups, torch.float32, bias=changed.bias)
        expected = ops.low_rank_group(x, changed.down, changed.ups, bias=changed.bias)
        assert torch.equal(group(x), expected)
    padded = torch.cat((given.ups[0], torch.zeros(5, 2)), 1)[:, :3]  # rows may lie apart
    assert DirectCall(given._replace(ups=[padded]), torch.float32)(x) is not None


def test_holds_no_weights():
    given = weights()
    call, dead = DirectCall(given, torch.float32), weakref.ref(given.down)
    del given
    gc.collect()
    assert dead() is None
    del call


def test_copies_and_files_of_it_are_none():
    call = DirectCall(weights(), torch.float32, made_for="these")
    assert call.made_for == "these"
    assert copy.deepcopy(call) is None
    assert pickle.loads(pickle.dumps(call)) is None
