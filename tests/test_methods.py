"""Every method's theorem, and what the table of methods promises."""

import pytest
import torch

from soco.methods import METHODS, SVD, SVDLLM, Method, SoCo, TrainedMethod
from soco.training import SOFT_STAGES, TrainingSettings

WEIGHT = torch.randn(9, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
INPUTS = torch.randn(6, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
INPUTS = torch.tensor([[9.0], [1], [0.1], [3], [1], [0.5]]) * INPUTS  # channels differ
GRAM = INPUTS @ INPUTS.T


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_svd_error_is_the_tail(rank):
    spectrum = SVD().spectrum(WEIGHT, {}, name="w")
    error = WEIGHT - spectrum.truncate(rank).product()
    torch.testing.assert_close(error.norm(), spectrum.sigma[rank:].norm(), atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(spectrum.sigma, torch.linalg.svdvals(WEIGHT))


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_svd_llm_output_error_is_the_tail(rank):
    spectrum = SVDLLM().spectrum(WEIGHT, {"gram": GRAM}, name="w")
    error = (WEIGHT - spectrum.truncate(rank).product()) @ INPUTS
    torch.testing.assert_close(error.norm(), spectrum.sigma[rank:].norm(), atol=1e-9, rtol=1e-8)


def test_svd_llm_is_the_published_form():
    """``trunc(W S) S^-1`` with the Cholesky factor S of the Gram matrix."""
    S = torch.linalg.cholesky(GRAM)
    U, sigma, Vh = torch.linalg.svd(WEIGHT @ S, full_matrices=False)
    published = (U[:, :3] * sigma[:3]) @ Vh[:3] @ torch.linalg.inv(S)
    found = SVDLLM().spectrum(WEIGHT, {"gram": GRAM}, name="w").truncate(3).product()
    torch.testing.assert_close(found, published, atol=1e-8, rtol=1e-8)


def test_whitening_pays_on_its_inputs_and_costs_on_the_weight():
    plain = SVD().spectrum(WEIGHT, {}, name="w").truncate(2).product()
    whitened = SVDLLM().spectrum(WEIGHT, {"gram": GRAM}, name="w").truncate(2).product()
    assert ((WEIGHT - whitened) @ INPUTS).norm() < ((WEIGHT - plain) @ INPUTS).norm()
    assert (WEIGHT - whitened).norm() > (WEIGHT - plain).norm()


@pytest.mark.parametrize("method", [SoCo(), SoCo(basis="plain")])
def test_soco_starts_at_the_weight_itself(method):
    stats = {"gram": GRAM} if method.needs else {}
    up, sigma, down = method.spectrum(WEIGHT, stats, name="w")
    torch.testing.assert_close((up * sigma) @ down, WEIGHT)


def test_soco_needs_a_gram_matrix_only_to_whiten():
    assert SoCo().needs == {"gram"}
    assert SoCo(basis="plain").needs == frozenset()


def test_settings_are_soco_s_own_fields():
    settings = SoCo(steps=7, learning_rate=0.5, seed=3).settings()
    assert type(settings) is TrainingSettings
    assert (settings.steps, settings.learning_rate, settings.seed) == (7, 0.5, 3)


def test_paper_preset():
    paper = SoCo.paper(steps=9)
    assert (paper.basis, paper.criterion, paper.deviation) == ("plain", "score", True)
    assert paper.stages == SOFT_STAGES
    assert not any(stage.hard for stage in paper.stages)
    assert paper.steps == 9


@pytest.mark.parametrize("name", METHODS)
def test_table(name):
    method = METHODS[name]()
    assert method.name == name
    assert isinstance(method, Method)
    assert isinstance(method, TrainedMethod) == (name == "soco")
    with pytest.raises(AttributeError):
        setattr(method, "name", "other")  # noqa: B010 - frozen


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"basis": "best"}, 'basis must be "whitened" or "plain", got \'best\''),
        ({"largest_score": 1.0}, "largest_score must be above 1, got 1.0"),
        ({"steps": -1}, "steps must be a positive whole number, got -1"),
    ],
)
def test_soco_refuses(options, text):
    with pytest.raises(ValueError, match=text):
        SoCo(**options)


def test_broken_gram_is_named():
    with pytest.raises(ValueError, match=r"Gram matrix of layer\.weight"):
        SVDLLM().spectrum(WEIGHT, {"gram": GRAM * torch.nan}, name="layer.weight")
