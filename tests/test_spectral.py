"""soco.spectral against its formula in plain torch, and against autograd of that formula."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from soco.linalg import Factors, Spectrum, whitened_svd
from soco.spectral import SpectralLinear
from soco.surgery import weight_of

SHAPES = [(6, 9), (9, 6), (7, 7), (1, 5)]  # (out, in)
TOLERANCE = {  # relative; absolute is twice as much
    torch.float64: 1e-6,  # the scales are float32
    torch.float32: 1e-5,
    torch.bfloat16: 3e-2,
    torch.float16: 4e-3,
}


def normal(*shape, seed=0, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device, dtype)


def make(
    shape=(6, 9),
    *,
    bias=True,
    deviation=False,
    gram=None,
    mean=None,
    device="cpu",
    dtype=torch.float32,
    **more,
):
    weight = normal(*shape, device=device, dtype=dtype)
    offset = normal(shape[0], seed=1, device=device, dtype=dtype) if bias else None
    spectrum = whitened_svd(weight, gram)
    if mean is not None:
        more["mean"] = (mean, weight @ mean)
    return SpectralLinear(weight, offset, spectrum, deviation=deviation, **more)


def trained(layer, alive=None, seed=2):
    """Scores and deviation as after a training, ``alive`` components left."""
    with torch.no_grad():
        layer.logit.copy_(normal(len(layer.logit), seed=seed))
        for part in (layer.left, layer.right):
            if part is not None:
                part.copy_(0.3 * normal(len(part), seed=seed + len(part)))
        if layer.deviation is not None:
            layer.deviation.copy_(normal(len(layer.deviation), seed=seed + 1))
        if alive is not None:
            layer.mask.copy_(normal(len(layer.mask), seed=seed + 2).argsort().argsort() < alive)
    return layer


def formula(layer, x, kept):
    """``up ((gain * kept) * (down x)) + bias (+ deviation)``; ``kept`` is score * mask, (rank,)."""
    if layer.right is not None:
        x = x * (1 + layer.right)
    y = x @ layer.down.to(x.dtype).T * (layer.gain * kept) @ layer.up.to(x.dtype).T
    if layer.left is not None:
        y = y * (1 + layer.left)
    if layer.bias is not None:
        y = y + layer.bias.to(x.dtype)
    if layer.deviation is not None and not layer.mask.all():
        y = y + layer.deviation
    return y


# ---- forward -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_at_the_start_it_is_the_dense_layer(shape, bias, dtype, device):
    x = normal(3, 5, shape[1], seed=7, device=device, dtype=dtype)
    for gram in (None, "seen"):
        if gram is not None:
            inputs = normal(20, shape[1], seed=8, device=device, dtype=torch.float64)
            gram = inputs.T @ inputs
        layer = make(shape, bias=bias, gram=gram, deviation=True, device=device, dtype=dtype)
        assert layer.scores().tolist() == pytest.approx([1.0] * min(shape))
        wanted = F.linear(x, layer.weight, layer.bias)
        y = layer(x)
        assert y.dtype == dtype
        torch.testing.assert_close(y, wanted, rtol=TOLERANCE[dtype], atol=2 * TOLERANCE[dtype])
        layer.dense = True
        trained(layer, alive=1)
        assert torch.equal(layer(x), wanted)


@pytest.mark.parametrize("alive", [None, 6, 3, 1])
@pytest.mark.parametrize("deviation", [False, True])
@pytest.mark.parametrize("lead", [(), (4,), (2, 4), (2, 1, 3), (0, 4)], ids=str)
def test_forward_is_the_formula(lead, deviation, alive, device):
    layer = trained(make(deviation=deviation, device=device), alive)
    x = normal(*lead, 9, seed=7, device=device)
    y = layer(x)
    assert y.shape == (*lead, 6)
    torch.testing.assert_close(y, formula(layer, x, layer.scores() * layer.mask))


def test_by_hand():
    spectrum = Spectrum(
        torch.eye(2), torch.tensor([3.0, 2.0]), torch.tensor([[0.0, 4.0], [5.0, 0]])
    )
    weight = torch.tensor([[0.0, 12.0], [10.0, 0.0]])
    layer = SpectralLinear(weight, None, spectrum, largest_score=3.0, deviation=True)
    x = torch.tensor([[1.0, 10.0]])
    torch.testing.assert_close(layer(x), torch.tensor([[120.0, 10.0]]))
    with torch.no_grad():
        layer.logit[0] = math.log(2)  # 3 / (1 + 2 / 2)
        layer.mask[1] = False
        layer.get_parameter("deviation").copy_(torch.tensor([0.5, 0.25]))
    assert layer.scores()[0].item() == pytest.approx(1.5)
    torch.testing.assert_close(layer(x), torch.tensor([[180.5, 0.25]]))


def test_scores_are_bounded_and_positive():
    for largest in (1.01, 1.5, 2.0, 10.0):
        layer = make(largest_score=largest)
        assert layer.scores().tolist() == pytest.approx([1.0] * 6)
        with torch.no_grad():
            layer.logit.copy_(torch.tensor([-30.0, -2, 0, 2, 30, 1e4]))
        scores = layer.scores()
        assert scores[0] > 0
        assert scores[:4].diff().min() > 0
        assert scores.max().item() == pytest.approx(largest)


def test_scores_without_a_bound_are_an_exponential():
    layer = make(largest_score=math.inf)
    assert layer.scores().tolist() == [1.0] * 6
    with torch.no_grad():
        layer.logit.copy_(torch.tensor([-2.0, 0, 1, 2, 3, 4]))
    assert layer.scores().tolist() == pytest.approx([math.exp(x) for x in (-2, 0, 1, 2, 3, 4)])


@pytest.mark.parametrize("deviation", [False, True])
@pytest.mark.parametrize("computed", [1, 4, 6])
def test_in_any_order_it_computes_the_same(computed, deviation, device):
    """Whatever the order, with those alive in front; and what is behind ``computed`` is masked."""
    layer = trained(make(deviation=deviation, device=device), alive=computed)
    x = normal(3, 5, 9, seed=7, device=device)
    wanted, folded, rows = layer(x), layer.fold(), recorded(layer, x, x[..., :6])
    for seed in range(3):
        alive = layer.mask.nonzero()[:, 0].cpu()
        dead = (~layer.mask).nonzero()[:, 0].cpu()
        generator = torch.Generator().manual_seed(seed)
        order = torch.cat([each[torch.randperm(len(each), generator=generator)]
                           for each in (alive, dead)]).to(device)  # fmt: skip
        layer.arrange(order, computed)
        torch.testing.assert_close(layer(x), wanted)
        torch.testing.assert_close(layer.up * layer.gain[layer.order] @ layer.down, layer.weight)
        again = layer.fold()
        products = [
            each.product() if isinstance(each, Factors) else each for each in (again[0], folded[0])
        ]
        torch.testing.assert_close(*products)
        got = recorded(layer, x, x[..., :6])
        torch.testing.assert_close(got[:, layer.mask], rows[:, layer.mask], rtol=1e-4, atol=1e-5)
        assert got[:, ~layer.mask].eq(0).all()
        layer.arrange(order.flip(0), 6)
        torch.testing.assert_close(layer(x), wanted)
        torch.testing.assert_close(recorded(layer, x, x[..., :6]), rows, rtol=1e-4, atol=1e-5)
    layer.arrange(torch.arange(6, device=device), 6)
    layer.mask.fill_(True)
    layer.arrange(torch.arange(6, device=device).flip(0), computed)
    kept = layer.scores() * (torch.arange(6, device=device) >= 6 - computed)
    layer.arrange(torch.arange(6, device=device), 6)
    plain = formula(layer, x, kept)
    layer.arrange(torch.arange(6, device=device).flip(0), computed)
    torch.testing.assert_close(layer(x), plain)


@pytest.mark.parametrize("channels", [False, True])
def test_a_mean_is_kept_whatever_the_scores_are(channels, device):
    """Outputs of the mean input are the dense layer's; every other input by its distance."""
    mean = 3 * normal(9, seed=5, device=device)
    layer = trained(make(device=device, mean=mean, channels=channels), alive=2)
    x = normal(2, 5, 9, seed=7, device=device)
    at_mean = F.linear(mean, layer.weight, layer.bias)
    torch.testing.assert_close(layer(mean), at_mean, rtol=1e-4, atol=1e-4)
    wanted = at_mean + (formula(layer, x, layer.scores() * layer.mask)
                        - formula(layer, mean, layer.scores() * layer.mask))  # fmt: skip
    torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-4)
    factors, bias = layer.fold()
    assert isinstance(factors, Factors)
    torch.testing.assert_close(
        F.linear(F.linear(x, factors.down), factors.up, bias), layer(x), rtol=1e-4, atol=1e-4
    )
    by = normal(2, 5, 6, seed=8, device=device)
    got = recorded(layer, x, by)
    rows = []
    for sequence, weights in zip(x, by, strict=True):
        kept = (layer.scores() * layer.mask).detach().requires_grad_()
        y = formula(layer, sequence, kept) - formula(layer, mean, kept)
        rows.append(torch.autograd.grad((y * weights).sum(), kept)[0])
    torch.testing.assert_close(got, torch.stack(rows), rtol=1e-4, atol=1e-4)
    layer.mask.fill_(True)  # a layer that is dense needs no new bias
    torch.testing.assert_close(layer(x), formula(layer, x, layer.scores()))
    assert layer.fold()[1] is layer.bias


def test_weight_and_bias_are_kept_by_reference():
    weight, bias = nn.Parameter(normal(6, 9)), nn.Parameter(normal(6))
    layer = SpectralLinear(weight, bias, whitened_svd(weight, None))
    assert layer.weight is weight
    assert layer.bias is bias
    assert {name for name, _ in layer.named_parameters()} == {"weight", "bias", "logit"}


def test_rows_of_down_have_unit_norm_and_gain_the_rest(device):
    weight = normal(6, 9, device=device)
    inputs = normal(20, 9, seed=8, device=device, dtype=torch.float64)
    layer = SpectralLinear(weight, None, whitened_svd(weight, inputs.T @ inputs))
    torch.testing.assert_close(layer.down.norm(dim=1), torch.ones(6, device=device))
    torch.testing.assert_close(layer.up * layer.gain @ layer.down, weight)
    assert layer.gain.dtype == torch.float32


@pytest.mark.parametrize("bias", [True, False])
def test_transposed_view(bias, device):
    """What a ``Conv1D`` of GPT-2 holds."""
    conv = Conv1D(6, 9).to(device)
    weight = weight_of(conv)
    assert not weight.is_contiguous()
    layer = SpectralLinear(weight, conv.bias if bias else None, whitened_svd(weight.detach(), None))
    x = normal(2, 4, 9, device=device)
    wanted = conv(x)
    torch.testing.assert_close(layer(x), wanted)
    folded, offset = layer.fold()
    assert isinstance(folded, torch.Tensor)
    torch.testing.assert_close(F.linear(x, folded, offset), wanted)
    layer.dense = True
    torch.testing.assert_close(layer(x), wanted)


# ---- backward ------------------------------------------------------------------------------------


@pytest.mark.parametrize("deviation", [False, True])
@pytest.mark.parametrize("alive", [6, 2])
@pytest.mark.parametrize("lead", [(4,), (2, 4)], ids=str)
@pytest.mark.parametrize("recording", [False, True])
def test_gradients_are_those_of_the_formula(recording, lead, alive, deviation, device):
    layer = trained(make(deviation=deviation, device=device), alive)
    layer.recording = recording
    x = normal(*lead, 9, seed=7, device=device).requires_grad_()
    by = normal(*lead, 6, seed=8, device=device)
    wanted_of = [x, layer.logit]
    if deviation and alive < 6:
        wanted_of.append(layer.deviation)
    got = torch.autograd.grad((layer(x) * by).sum(), wanted_of)
    y = formula(layer, x, layer.scores() * layer.mask)
    for gradient, wanted in zip(got, torch.autograd.grad((y * by).sum(), wanted_of), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-5)
    assert got[1][layer.mask].ne(0).all()
    assert got[1][~layer.mask].eq(0).all()
    assert len(got[1][~layer.mask]) == 6 - alive


@pytest.mark.parametrize("alive", [None, 4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_channels_have_scales_that_vanish_in_the_factors(dtype, bias, alive, device):
    layer = make(bias=bias, channels=True, device=device, dtype=dtype)
    x = normal(2, 5, 9, seed=7, device=device, dtype=dtype)
    tolerance: dict[str, Any] = {"rtol": 2 * TOLERANCE[dtype], "atol": 4 * TOLERANCE[dtype]}
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), **tolerance)
    trained(layer, alive)
    wide = x.float().requires_grad_()
    wanted = formula(layer, wide, layer.scores() * layer.mask)
    torch.testing.assert_close(layer(x).float(), wanted, **tolerance)
    folded, offset = layer.fold()
    weight = folded.product() if isinstance(folded, Factors) else folded
    torch.testing.assert_close(F.linear(x, weight, offset).float(), wanted, **tolerance)
    if dtype == torch.float32:
        by = normal(2, 5, 6, seed=8, device=device)
        learning = [layer.logit, layer.left, layer.right]
        got = torch.autograd.grad((layer(x) * by).sum(), learning)
        for one, other in zip(got, torch.autograd.grad((wanted * by).sum(), learning), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        assert all(bool(each.abs().max() > 0.1) for each in got)


def test_gradients_with_channels_to_the_last_digit():
    """Inputs, scores and scales, by finite differences in float64."""
    layer: Any = trained(make(dtype=torch.float64, channels=True), alive=4).double()
    x = normal(2, 3, 9, seed=7, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda *_: layer(x), (x, layer.logit, layer.left, layer.right))


def test_a_channel_scaled_to_zero_waits():
    """Its outputs are zero, of which the gradient by the scale cannot be told: it is not NaN."""
    layer: Any = trained(make(channels=True), alive=4)
    with torch.no_grad():
        layer.left[0], layer.right[0] = -1.0, -1.0
    layer(normal(4, 9)).square().sum().backward()
    for part in (layer.left, layer.right):
        assert part.grad[0] == 0
        assert bool(part.grad[1:].ne(0).all())


def test_only_scores_and_deviation_learn():
    layer = trained(make(deviation=True), alive=3)
    layer(normal(4, 9)).sum().backward()
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {
        "logit",
        "deviation",
    }
    assert not any(buffer.requires_grad for buffer in layer.buffers())


def sequence_gradients(layer, x, by):
    """(sequences, rank): for each sequence alone, autograd's gradient by ``score * mask``."""
    rows = []
    for sequence, weights in zip(x, by, strict=True):
        kept = (layer.scores() * layer.mask).detach().requires_grad_()
        y = formula(layer, sequence.float(), kept)
        rows.append(torch.autograd.grad((y * weights.float()).sum(), kept)[0])
    return torch.stack(rows)


def recorded(layer, x, by):
    layer.recording = True
    (layer(x) * by).sum().backward()
    layer.recording = False
    rows = layer.take_recorded()
    assert rows is not None
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("alive", [6, 2])
@pytest.mark.parametrize("lead", [(3, 5), (1, 5), (3, 2, 4)], ids=str)
def test_recorded_gradients_are_those_of_each_sequence(lead, alive, dtype, device):
    """Of masked components as well: the gradient at which they would come back from nothing."""
    layer = trained(make(deviation=True, device=device, dtype=dtype), alive)
    x = normal(*lead, 9, seed=7, device=device, dtype=dtype)
    by = normal(*lead, 6, seed=8, device=device, dtype=dtype)
    got = recorded(layer, x, by)
    assert got.dtype == torch.float32
    tolerance = 5 * TOLERANCE[dtype]
    wanted = sequence_gradients(layer, x, by)
    assert wanted.abs().mean() > 1
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
    assert layer.take_recorded() is None


def test_recorded_without_a_batch_dimension():
    layer = trained(make(), alive=4)
    x, by = normal(5, 9, seed=7), normal(5, 6, seed=8)
    wanted = sequence_gradients(layer, x[None], by[None])
    torch.testing.assert_close(recorded(layer, x, by), wanted)
    wanted = sequence_gradients(layer, x[None, :1], by[None, :1])
    torch.testing.assert_close(recorded(layer, x[0], by[0]), wanted)


def test_called_twice_in_a_forward():
    layer = trained(make((9, 9)), alive=4)
    x, by = normal(3, 5, 9, seed=7), normal(3, 5, 9, seed=8)
    layer.recording = True
    (layer(layer(x).tanh()) * by).sum().backward()
    rows = []
    for sequence, weights in zip(x, by, strict=True):
        kept = (layer.scores() * layer.mask).detach().requires_grad_()
        y = formula(layer, formula(layer, sequence, kept).tanh(), kept)
        rows.append(torch.autograd.grad((y * weights).sum(), kept)[0])
    torch.testing.assert_close(layer.take_recorded(), torch.stack(rows), rtol=1e-4, atol=1e-4)
    # Once with a batch and once without: all that can be said is the sum over everything.
    x2, by2 = x[0], by[0]
    ((layer(x) * by).sum() + (layer(x2) * by2).sum()).backward()
    both = torch.cat([sequence_gradients(layer, x, by), sequence_gradients(layer, x[:1], by[:1])])
    torch.testing.assert_close(
        layer.take_recorded(), both.sum(0, keepdim=True), rtol=1e-4, atol=1e-4
    )


def test_nothing_is_recorded_unasked():
    layer = make()
    x = normal(2, 3, 9)
    layer(x).sum().backward()
    assert layer.take_recorded() is None
    layer.recording = True
    y = layer(x)
    layer.recording = False
    y.sum().backward()
    assert layer.take_recorded() is None
    layer.recording = layer.dense = True
    assert not layer(x).requires_grad
    assert layer.take_recorded() is None


def test_checkpointing_records_the_same():
    def run(call):
        stack = [trained(make((9, 9)), alive=alive, seed=alive) for alive in (9, 5, 3)]
        for layer in stack:
            layer.recording = True
        x = normal(3, 5, 9, seed=7)
        for layer in stack:
            x = call(layer, x).tanh()
        (x * normal(3, 5, 9, seed=8)).sum().backward()
        return [tensor for layer in stack for tensor in (layer.logit.grad, layer.take_recorded())]

    plain = run(lambda layer, x: layer(x))
    again = run(lambda layer, x: checkpoint(layer, x, use_reentrant=False))
    for got, wanted in zip(again, plain, strict=True):
        assert isinstance(got, torch.Tensor)
        assert isinstance(wanted, torch.Tensor)
        assert torch.equal(got, wanted)
        assert wanted.abs().max() > 0.01


# ---- what it becomes -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("deviation", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("alive", [None, 3, 1])
def test_fold_has_the_same_outputs(alive, bias, deviation, dtype, device):
    layer = make((8, 10), bias=bias, deviation=deviation, device=device, dtype=dtype)
    trained(layer, alive)
    x = normal(2, 5, 10, seed=7, device=device, dtype=dtype)
    folded, offset = layer.fold()
    if alive is None:
        assert isinstance(folded, torch.Tensor)
        assert folded.shape == (8, 10)
        assert offset is layer.bias
        y = F.linear(x, folded, offset)
    else:
        assert isinstance(folded, Factors)
        assert (folded.up.shape, folded.down.shape) == ((8, alive), (alive, 10))
        assert (offset is None) == (not bias and not deviation)
        y = F.linear(F.linear(x, folded.down), folded.up, offset)
        torch.testing.assert_close(
            folded.up.norm(dim=0), folded.down.norm(dim=1), rtol=0.02, atol=0
        )
    parts = folded if isinstance(folded, Factors) else (folded,)
    for tensor in (*parts, offset):
        assert tensor is None or tensor.dtype == dtype
        assert tensor is None or not tensor.requires_grad
    torch.testing.assert_close(
        y, layer(x).detach(), rtol=TOLERANCE[dtype], atol=2 * TOLERANCE[dtype]
    )


def test_fold_of_what_was_not_trained_is_the_weight():
    layer = make((40, 30))
    weight, _ = layer.fold()
    torch.testing.assert_close(weight, layer.weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_inputs_that_fill_few_directions(dtype, device):
    """The Gram matrix has rank 2: rows of down reach 1e7 times the weight and more."""
    weight = normal(24, 32, device=device, dtype=dtype)
    inputs = normal(2, 32, seed=8, device=device, dtype=torch.float64)
    spectrum = whitened_svd(weight, inputs.T @ inputs)
    assert spectrum.down.abs().max() > torch.finfo(torch.float16).max
    layer = SpectralLinear(weight, None, spectrum)
    x = torch.cat([inputs.to(dtype), normal(3, 32, seed=9, device=device, dtype=dtype)])
    wanted = F.linear(x, weight)
    torch.testing.assert_close(layer(x), wanted, rtol=0.02, atol=0.05)
    with torch.no_grad():
        layer.mask[2:] = False  # the inputs it was made for need no more
    factors, _ = layer.fold()
    assert isinstance(factors, Factors)
    assert factors.up.isfinite().all()
    assert factors.down.isfinite().all()
    y = F.linear(F.linear(x[:2], factors.down), factors.up)
    torch.testing.assert_close(y, wanted[:2], rtol=0.02, atol=0.05)


@pytest.mark.parametrize("size", [1e-22, 1e-6, 1e6])
def test_inputs_of_any_size(size):
    weight = normal(6, 9)
    inputs = size * normal(3, 9, seed=8, dtype=torch.float64)
    layer = SpectralLinear(weight, None, whitened_svd(weight, inputs.T @ inputs))
    x = normal(4, 9, seed=7)
    torch.testing.assert_close(layer(x), F.linear(x, weight), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kept", [0, 1])
def test_a_weight_of_zeros(kept):
    weight = torch.zeros(6, 9)
    x = normal(2, 4, 9)
    weight[0, 0] = kept
    layer = SpectralLinear(weight, None, whitened_svd(weight, torch.eye(9)))
    torch.testing.assert_close(layer(x), F.linear(x, weight))
    torch.testing.assert_close(layer.up * layer.gain @ layer.down, weight)
    weight = torch.zeros(6, 9)
    layer = SpectralLinear(weight, None, whitened_svd(weight, torch.eye(9)))
    assert recorded(layer, x, normal(2, 4, 6, seed=1)).eq(0).all()
    with torch.no_grad():
        layer.mask[2:] = False
    factors, _ = layer.fold()
    assert isinstance(factors, Factors)
    assert factors.product().eq(0).all()


# ---- the rest ------------------------------------------------------------------------------------


@pytest.mark.parametrize("largest", [1.0, 0.5, -2.0, math.nan])
def test_bound_of_the_scores_is_checked(largest):
    with pytest.raises(ValueError, match=f"largest_score must be above 1, got {largest}"):
        make(largest_score=largest)


def test_spectrum_of_another_weight():
    weight = normal(6, 9)
    for other, message in (
        (whitened_svd(normal(9, 6), None), r"got \(9, 6\) and \(6, 6\)"),
        (whitened_svd(normal(7, 9), None, 6), r"got \(7, 6\) and \(6, 9\)"),
        (whitened_svd(normal(6, 8), None), r"got \(6, 6\) and \(6, 8\)"),
        (whitened_svd(weight, None, 4), r"got \(6, 4\) and \(4, 9\)"),
    ):
        with pytest.raises(ValueError, match=r"weight \(6, 9\) must have up \(6, 6\).*" + message):
            SpectralLinear(weight, None, other)


def test_repr_counts_the_living():
    layer = trained(make(), alive=4)
    assert repr(layer) == "SpectralLinear(in_features=9, out_features=6, alive=4 of 6)"


def test_state_dict_has_no_buffers():
    assert set(make(deviation=True).state_dict()) == {"logit", "deviation"}
