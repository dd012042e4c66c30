"""soco.masters: the best values, steps by size, and the rate that is measured, by hand."""

import math

import pytest
import torch
from torch import nn

from soco.masters import Best, Masters, probed_rate


def parameter(*values, dtype=torch.float32):
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def masters(parameters, sizes, **changes):
    settings = {"learning_rate": 0.1, "betas": (0.0, 0.0), "weight_decay": 0.0, "clip": None}
    return Masters(parameters, sizes, **{**settings, **changes})


def test_the_best_values_are_put_back():
    p = parameter(1.0, 2.0)
    best = Best([p])
    for value, loss in ((3.0, 0.5), (4.0, 0.2), (5.0, 0.3), (6.0, math.nan)):
        with torch.no_grad():
            p.fill_(value)
        best.offer(loss)
    assert (best.loss, best.since) == (0.2, 2)
    p.grad = torch.ones(2)
    best.restore()
    assert p.tolist() == [4.0, 4.0]
    assert p.grad is None


def test_a_step_moves_by_rate_and_size():
    """Without moments Adam's step is the sign of the gradient."""
    one, other = parameter(1.0, 1.0), parameter(1.0, 1.0)
    each = masters([one, other], [1.0, 3.0], weight_decay=0.5)
    for p in (one, other):
        p.grad = torch.tensor([1e-7, -5.0])
    each.step(0.5)  # rate 0.05; decay 0.5 * 0.05 of the value
    assert one.tolist() == pytest.approx([0.975 - 0.05, 0.975 + 0.05], rel=1e-4)
    assert other.tolist() == pytest.approx([0.975 - 0.15, 0.975 + 0.15], rel=1e-4)


def test_a_norm_is_one_of_relative_changes():
    """Gradients 3 and 4 of parameters of sizes 2 and 0.5: sqrt(6^2 + 2^2)."""
    one, other, idle = parameter(0.0), parameter(0.0), parameter(0.0)
    each = masters([one, other, idle], [2.0, 0.5, 1.0], clip=1.0)
    one.grad, other.grad = torch.tensor([3.0]), torch.tensor([4.0])
    norm = math.sqrt(40)
    assert float(each.norm()) == pytest.approx(norm)
    assert (float(one.grad), float(other.grad)) == pytest.approx((3 / norm, 4 / norm))
    assert idle.grad is None
    assert float(masters([idle], [1.0]).norm()) == 0


def test_steps_too_small_for_bfloat16_add_up_in_the_master():
    p = parameter(1.0, dtype=torch.bfloat16)
    each = masters([p], [1.0], learning_rate=1e-3)
    for _ in range(4):
        p.grad = torch.tensor([-1.0], dtype=torch.bfloat16)
        each.collect()
        each.step(1.0)
        each.forget()
    assert float(p.detach()) == 1.0078125  # 1.004, rounded; one step alone rounds to 1
    each.restart(0.5)
    assert float(each.masters[0]) == 1.0078125
    assert each.backed_off == 0.5


# ---- the rate that is measured -------------------------------------------------------------------


def quadratic(start, curvature, size=4):
    """A parameter of ``size`` entries, and ``start`` plus half the curvature times its square."""
    parameter = nn.Parameter(torch.zeros(size), requires_grad=False)
    return parameter, lambda: start + float(curvature / 2 * parameter.square().sum())


@pytest.mark.parametrize(("start", "curvature"), [(0.5, 100.0), (0.01, 100.0), (1e-4, 3.0)])
def test_rate_by_hand(start, curvature):
    """A step of r in each of four entries, of size 2, costs curvature / 2 * 4 * (2 r)^2."""
    parameter, loss = quadratic(start, curvature)
    rate = probed_rate([parameter], [2.0], loss, start, seed=0, cost=0.005)
    assert curvature / 2 * 4 * (2 * rate) ** 2 == pytest.approx(0.005 * start, rel=1e-3)
    assert torch.equal(parameter, torch.zeros(4))


def test_rate_takes_no_slope_for_a_curvature():
    parameter, loss = quadratic(0.5, 100.0)
    tilted = probed_rate(
        [parameter], [2.0], lambda: loss() + float(parameter.sum()), 0.5, seed=0, cost=0.005
    )
    assert tilted == pytest.approx(
        probed_rate([parameter], [2.0], loss, 0.5, seed=0, cost=0.005), rel=1e-3
    )


def test_rate_of_what_is_hardly_felt_is_the_largest():
    parameter, loss = quadratic(1.0, 1e-6)
    assert probed_rate([parameter], [1.0], loss, 1.0, seed=0, cost=0.005) == 0.02
    flat = probed_rate([parameter], [1.0], lambda: 1.0, 1.0, seed=0, cost=0.005)
    assert flat == 0.02


def test_a_loss_that_fails_leaves_the_parameters():
    parameter, _ = quadratic(1.0, 1.0)

    def failing():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        probed_rate([parameter], [1.0], failing, 1.0, seed=0, cost=0.005)
    assert torch.equal(parameter, torch.zeros(4))


def test_rate_where_the_probe_goes_too_far():
    """Not finite at 0.01, nor at 0.001: it is measured nearer."""
    parameter, loss = quadratic(1e-4, 1e3)

    def broken():
        return math.inf if float(parameter.abs().max()) > 5e-4 else loss()

    rate = probed_rate([parameter], [1.0], broken, 1e-4, seed=0, cost=0.005)
    assert 1e3 / 2 * 4 * rate**2 == pytest.approx(0.005 * 1e-4, rel=1e-3)
    nowhere = probed_rate([parameter], [1.0], lambda: math.nan, 1e-4, seed=0, cost=0.005)
    assert 0 < nowhere <= 1e-5
