"""soco.quadratics and its op: the quadratic against the tokens it stands for."""

import pytest
import torch
from torch.library import opcheck

from soco import ops
from soco.linalg import whitened_svd
from soco.ops import spectral
from soco.quadratics import SpectralQuadratic

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def normal(*shape, seed=0, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def made(tokens, rank, out, dtype=torch.float64, device="cpu"):
    sizes = ((tokens, rank), (out, rank), (tokens, out))
    z, up, target = (normal(*s, seed=i, dtype=dtype, device=device) for i, s in enumerate(sizes))
    return z, up, target


def error(z, up, target, scale):
    z, up, target = (part.double() for part in (z, up, target))
    return (target - (z * scale) @ up.mT).square().sum()


def test_by_hand(device):
    z, up = torch.tensor([[1.0, 2.0]], device=device), torch.tensor([[1.0, 3.0]], device=device)
    H, b, c = ops.spectral_quadratic(z, up, torch.tensor([[5.0]], device=device))
    assert H.tolist() == [[1.0, 6.0], [6.0, 36.0]]
    assert (b.tolist(), float(c)) == ([5.0, 30.0], 25.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(0, 3, 4), (1, 1, 1), (70, 5, 7), (70, 33, 2), (9, 4, 0)])
def test_is_the_error_at_any_scale(sizes, dtype, device, monkeypatch):
    monkeypatch.setattr(spectral, "TOKENS_AT_ONCE", 32)  # several pieces, the last one smaller
    z, up, target = made(*sizes, dtype=dtype, device=device)
    quadratic = SpectralQuadratic.of_tokens(z, up, target)
    assert {p.dtype for p in (quadratic.curvature, quadratic.pull)} == {torch.float64}
    for seed in range(3):
        scale = normal(sizes[1], seed=seed + 5, device=device)
        expected = error(z, up, target, scale)
        rtol = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(quadratic.loss(scale), expected, rtol=rtol, atol=1e-9)


def test_batches_add_up_and_have_any_shape(device):
    z, up, target = made(60, 5, 7, device=device)
    whole = SpectralQuadratic.of_tokens(z.view(3, 20, 5), up, target.view(3, 20, 7))
    parts = [
        SpectralQuadratic.of_tokens(a, up, b)
        for a, b in zip(z.split(25), target.split(25), strict=True)
    ]
    total = parts[0] + parts[1] + parts[2]
    for name in ("curvature", "pull", "energy"):
        torch.testing.assert_close(getattr(total, name), getattr(whole, name))


def test_of_gram_is_of_tokens(device):
    """Two ways to the same: through the tokens, and through their Gram matrix alone."""
    x, weight = normal(50, 6, device=device), normal(7, 6, seed=1, device=device)
    up, down = normal(7, 4, seed=2, device=device), normal(4, 6, seed=3, device=device)
    by_tokens = SpectralQuadratic.of_tokens(x @ down.mT, up, x @ weight.mT)
    by_gram = SpectralQuadratic.of_gram(up, down, weight, x.mT @ x)
    for name in ("curvature", "pull", "energy"):
        torch.testing.assert_close(getattr(by_gram, name), getattr(by_tokens, name))


def test_the_fit_is_the_least_squares_solution(device):
    z, up, target = made(40, 6, 7, device=device)
    quadratic = SpectralQuadratic.of_tokens(z, up, target)
    kept = torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.bool, device=device)
    scale = quadratic.fit(kept, damping=1e-14)
    assert (scale[~kept] == 0).all()
    columns = (z[:, None, :] * up).reshape(-1, 6)[:, kept]  # a row for every entry of the outputs
    expected = torch.linalg.lstsq(columns.cpu(), target.reshape(-1, 1).cpu()).solution[:, 0]
    torch.testing.assert_close(scale[kept].cpu(), expected)
    for other in range(3):
        moved = scale + 0.01 * normal(6, seed=other, device=device) * kept
        assert quadratic.loss(moved) > quadratic.loss(scale)
    assert quadratic.fit(torch.zeros(6, dtype=torch.bool, device=device)).abs().sum() == 0


def test_components_that_do_nothing_stay_at_one(device):
    z, up, target = made(40, 3, 4, device=device)
    z[:, 1] = 0
    scale = SpectralQuadratic.of_tokens(z, up, target).fit()
    assert float(scale[1]) == pytest.approx(1)
    nothing = SpectralQuadratic.of_tokens(torch.zeros_like(z), up, target).fit()
    torch.testing.assert_close(nothing, torch.ones_like(nothing))


def test_after_pruning_scales_make_up(device):
    """Components touch where neither side is orthonormal: some make up for the others."""
    x = normal(200, 12, device=device) @ normal(12, 12, seed=9, device=device)
    weight, gram = normal(10, 12, seed=1, device=device), x.mT @ x
    kept = torch.arange(10, device=device) < 5
    ones = kept.double()
    for sizes, gains in ((torch.ones(10), False), (torch.logspace(-1, 1, 10), True)):
        sizes = sizes.to(device).double()[:, None]
        spectrum = whitened_svd(sizes * weight, None)
        up = spectrum.up / sizes * spectrum.sigma
        quadratic = SpectralQuadratic.of_gram(up, spectrum.down, weight, gram)
        before, after = quadratic.loss(ones), quadratic.loss(quadratic.fit(kept))
        if gains:
            assert after < 0.99 * before
        else:  # columns of up are orthonormal
            torch.testing.assert_close(after, before, rtol=1e-9, atol=0)


def test_gradient_descent_on_it_reaches_the_fit(device):
    z, up, target = made(40, 4, 7, device=device)
    quadratic = SpectralQuadratic.of_tokens(z, up, target)
    scale = torch.ones(4, dtype=torch.float64, device=device, requires_grad=True)
    rate = 0.5 / float(torch.linalg.eigvalsh(quadratic.curvature)[-1])
    for _ in range(2000):
        (grad,) = torch.autograd.grad(quadratic.loss(scale), scale)
        scale = (scale - rate * grad).detach().requires_grad_()
    torch.testing.assert_close(scale.detach(), quadratic.fit(damping=1e-14), rtol=1e-6, atol=1e-6)


def test_registration(device):
    for sizes in ((5, 3, 4), (0, 3, 4)):
        opcheck(
            torch.ops.soco.spectral_quadratic.default,
            made(*sizes, dtype=torch.float32, device=device),
        )
    z = made(5, 3, 4, device=device)
    z[0].requires_grad_()
    assert not ops.spectral_quadratic(*z)[0].requires_grad


def test_wrong_arguments_are_named():
    z, up, target = made(5, 3, 4)
    with pytest.raises(
        ValueError, match=r"target must be \(\.\.\., out\) = \(5, 4\), got \(5, 3\)"
    ):
        ops.spectral_quadratic(z, up, z)
    with pytest.raises(ValueError, match=r"up must be \(out, rank\) = \(5, 3\), got \(5, 4\)"):
        ops.spectral_quadratic(z, target, target)
    with pytest.raises(TypeError, match=r"up must be torch\.float64, got torch\.float32"):
        ops.spectral_quadratic(z, up.float(), target)
    quadratic = SpectralQuadratic.of_tokens(z, up, target)
    with pytest.raises(ValueError, match=r"kept must be bool \(3,\), got torch\.int64 \(3,\)"):
        quadratic.fit(torch.ones(3).long())
    with pytest.raises(ValueError, match="damping must be above 0, got 0"):
        quadratic.fit(damping=0)
