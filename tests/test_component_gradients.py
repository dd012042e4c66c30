"""Gradients by the scales of components: against autograd on one layer, and how samples add up."""

import pytest
import torch
from torch import nn

from soco.component_gradients import Recorder, Sums
from soco.linalg import Factors


def layer(rows=5, columns=4, rank=2):
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(columns, rows).requires_grad_(False)
    factors = Factors(
        torch.randn(rows, rank, generator=generator),
        torch.randn(rank, columns, generator=generator),
    )
    return linear, factors, generator


@pytest.mark.parametrize("removed", [True, False])
def test_equals_the_gradient_by_scales(removed):
    """Autograd on the scales themselves, sequence by sequence; r along what was removed."""
    linear, factors, generator = layer()
    x = torch.randn(3, 6, 4, generator=generator)  # sequences, tokens, features
    pull = torch.randn(3, 6, 5, generator=generator)  # the gradients of the outputs
    recorder = Recorder()
    recorder.shape = (3, 6)
    probe = torch.zeros((), requires_grad=True)
    weight = linear.weight if removed else None
    hook = linear.register_forward_hook(recorder.hook("a", factors, weight, probe))
    torch.autograd.grad((linear(x) * pull).sum(), [probe], allow_unused=True)
    hook.remove()
    ((name, (g, r)),) = recorder.take().items()
    assert name == "a"
    assert not recorder.take()  # forgotten
    up, down = factors
    rest = linear.weight - up @ down
    for k in range(3):
        scales, share = torch.ones(2, requires_grad=True), torch.zeros((), requires_grad=True)
        y = x[k] @ ((up * scales) @ down + share * rest).T
        by_scale, by_share = torch.autograd.grad((y * pull[k]).sum(), [scales, share])
        torch.testing.assert_close(g[k], by_scale, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            r[k], by_share if removed else torch.zeros(()), rtol=1e-4, atol=1e-4
        )


def test_calls_add_up_sequence_by_sequence_or_all_in_one():
    linear, factors, generator = layer()
    probe = torch.zeros((), requires_grad=True)
    x = torch.randn(3, 4, 4, generator=generator)
    taken = []
    for calls in ([x, x], [x, x[0, :2]]):  # the second call may have lost its sequences
        recorder = Recorder()
        recorder.shape = (3, 4)
        hook = linear.register_forward_hook(recorder.hook("a", factors, linear.weight, probe))
        total = sum((linear(each).square().sum() for each in calls), torch.zeros(()))
        torch.autograd.grad(total, [probe], allow_unused=True)
        hook.remove()
        taken.append(recorder.take()["a"][0])
    twice, mixed = taken
    assert (twice.shape, mixed.shape) == ((3, 2), (1, 2))
    recorder = Recorder()
    recorder.shape = (3, 4)
    hook = linear.register_forward_hook(recorder.hook("a", factors, linear.weight, probe))
    torch.autograd.grad(linear(x).square().sum(), [probe], allow_unused=True)
    hook.remove()
    torch.testing.assert_close(twice, 2 * recorder.take()["a"][0])


@pytest.mark.parametrize("folds", [1, 2, 3])
def test_samples_go_to_folds_by_their_number(folds):
    g = torch.arange(10.0).view(5, 2)
    r = torch.arange(5.0)
    at_once, by_parts = Sums(), Sums()
    at_once.add(g, r, 0, folds)
    by_parts.add(g[:2], r[:2], 0, folds)
    by_parts.add(g[2:], r[2:], 2, folds)
    assert at_once.samples == by_parts.samples == [len(range(k, 5, folds)) for k in range(folds)]
    for fold in range(folds):
        mine, own = g[fold::folds], r[fold::folds]
        for sums in (at_once, by_parts):
            assert torch.equal(sums.curvature[fold], mine.T @ mine)
            assert torch.equal(sums.pull[fold], mine.T @ own)
